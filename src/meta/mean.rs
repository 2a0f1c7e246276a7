//! The mean of networks of one architecture (methods.md 1.7, "Average"), and starting from it (PURER's "FedAvg").

use super::backbone::{Backbone, BnMode};
use crate::error::{Error, Result};
use crate::tensor::{Images, RngStream};

/// Largest difference between embeddings of one network computed twice, as a share of their length.
const SAME: f64 = 1e-3;

impl Backbone {
    /// The mean of networks of one architecture, by name: weights and running statistics, not the heads,
    /// which are for other classes each (methods.md 1.7, "Average").
    ///
    /// # Errors
    /// When there is none, one cannot be opened, or two compute something else for images of `image_size` (how
    /// they were exported does not matter).
    pub fn average(
        mut networks: impl Iterator<Item = Result<(String, Self)>>,
        image_size: [usize; 2],
    ) -> Result<Self> {
        let (first, mut own) = networks
            .next()
            .unwrap_or_else(|| Err(Error::input("there is no network to average")))?;
        let structure = own.structure(image_size)?;
        let mut sums: Vec<Vec<f64>> = own.numbers()?;
        let mut count = 1.0;
        for network in networks {
            let (name, other) = network?;
            if other.structure(image_size)? != structure {
                return Err(Error::unsupported(format!(
                    "the models are of several architectures: `{first}` and `{name}`"
                )));
            }
            for (sum, values) in sums.iter_mut().zip(other.numbers()?) {
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
            count += 1.0;
        }
        let mean = |sum: Vec<f64>| sum.into_iter().map(|sum| (sum / count) as f32).collect();
        own.set_numbers(sums.into_iter().map(mean).collect())?;
        Ok(own)
    }

    /// Takes the weights and running statistics of `other`, a network that computes the same but for them, whatever its
    /// values are called.
    ///
    /// # Errors
    /// When the shapes differ (naming the first), or `other` makes something else of images of `image_size` all the same.
    pub fn start_from(&mut self, other: &Self, [height, width]: [usize; 2]) -> Result<()> {
        let shapes = |network: &Self| -> Vec<Vec<usize>> {
            let running = network.running().iter().map(|r| vec![r.mean.len()]);
            network.parameters().iter().map(|p| p.value.dims().to_vec()).chain(running).collect()
        };
        let (own, theirs) = (shapes(self), shapes(other));
        if own != theirs {
            let at = own.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
            let shape = |shapes: &[Vec<usize>]| match shapes.get(at) {
                Some(shape) => format!("{shape:?}"),
                None => "none".into(),
            };
            return Err(Error::unsupported(format!(
                "the networks differ: of {} and {} weights and statistics number {} is {} in one, `{}` in the other",
                own.len(),
                theirs.len(),
                at + 1,
                shape(&own),
                shape(&theirs)
            )));
        }
        let numbers = other.numbers()?.into_iter();
        let mut made = self.clone();
        made.set_numbers(numbers.map(|n| n.iter().map(|&v| v as f32).collect()).collect())?;
        let noise = RngStream::new(0, "start", "", 0).normals(2 * 3 * height * width);
        let noise = noise.iter().map(|v| 0.5 + 0.2 * v).collect();
        let images = Images::new(noise, [2, 3, height, width])?;
        let seen = made.embed(&images, BnMode::Running)?;
        let wanted = other.embed(&images, BnMode::Running)?;
        let norm = |values: &mut dyn Iterator<Item = f32>| {
            values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
        };
        let gap = norm(&mut seen.iter().zip(&wanted).map(|(a, b)| a - b));
        if seen.len() != wanted.len() || gap > SAME * norm(&mut wanted.iter().copied()) {
            return Err(Error::unsupported(
                "the networks differ: with the same weights they compute something else (other operators, or images prepared in another way)",
            ));
        }
        *self = made;
        Ok(())
    }
}
