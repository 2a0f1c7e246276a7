//! Statistics for networks that hold none: what their layers should see where BatchNormalization is
//! folded into the weights, or was never there.
//!
//! Folding `y = gamma (z - mu) / sigma + beta` into a convolution loses mu and sigma but not what they
//! did: over the training data `y` has mean beta and standard deviation gamma. Both start at 0 and 1 and
//! stay near (gamma 1.00 +- 0.05, beta 0.00 +- 0.05 in every layer of ../shared/data's zoos), so mean 0
//! and variance 1 at each convolution's output stand in for the statistics that are gone. Networks that never
//! had the layer get what they make of procedural images.

use crate::graph::facts::Normalization;
use crate::graph::{Graph, Plan, Taps};
use crate::tensor::{Images, RngStream, scenes::scenes};

/// Which statistics stand in where a model has none of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surrogate {
    /// None: images are held by the priors on pixels alone.
    Off,
    /// Mean 0 and variance 1: a folded BatchNormalization.
    Unit,
    /// Those of procedural images.
    Procedural,
    /// `Unit` where BatchNormalization looks folded, else `Procedural`.
    Auto,
}

/// Procedural images behind a reference.
const IMAGES: usize = 64;
/// Median standard deviation of a layer's channels on procedural images, least and most, where its
/// normalisation is taken for folded. Other images than the training data's and a moved gamma spread
/// it around 1; a network without normalisation drifts far from it with depth.
const FOLDED_SPREAD: [f32; 2] = [0.1, 6.0];

/// Mean and variance of a layer's channels.
pub(super) type Reference = [Vec<f32>; 2];

impl Surrogate {
    /// Where the plans of `graph` need taps for this.
    pub(super) fn taps(self, graph: &Graph) -> Taps {
        match self {
            Self::Off => Taps::Norms,
            _ if Normalization::of(graph).batch > 0 => Taps::Norms,
            _ => Taps::Activations,
        }
    }

    /// The references of the taps, given what procedural images make of each layer; `None` leaves
    /// mean 0 and variance 1.
    pub(super) fn references(self, graph: &Graph, seen: Vec<Reference>) -> Option<Vec<Reference>> {
        let unit = match self {
            Self::Off | Self::Unit => true,
            Self::Procedural => false,
            Self::Auto => Normalization::of(graph).looks_folded() && seen.iter().all(near_unit),
        };
        if unit { None } else { Some(seen) }
    }
}

fn near_unit(layer: &Reference) -> bool {
    let mut spread: Vec<f32> = layer[1].iter().map(|v| v.sqrt()).collect();
    spread.sort_by(f32::total_cmp);
    let median = spread.get(spread.len() / 2).copied().unwrap_or(1.0);
    (FOLDED_SPREAD[0]..=FOLDED_SPREAD[1]).contains(&median)
}

/// Procedural images for a model whose inputs are `[height, width]`; the same for every model.
pub(super) fn probes(size: [usize; 2]) -> Images {
    scenes(&mut RngStream::new(0, "surrogate", "", 0), IMAGES, size)
}

/// Mean and variance at each tap of `plan` after its forward on parts of equal size, merged.
pub(super) fn measure(plan: &Plan<f32>, parts: &[Vec<f32>]) -> Vec<Reference> {
    let mut workspace = plan.workspace();
    let mut total: Vec<[Vec<f64>; 2]> = Vec::new();
    for input in parts {
        plan.forward(&mut workspace, input);
        for (index, tap) in plan.taps(&workspace).enumerate() {
            if total.len() == index {
                total.push([vec![0.0; tap.mean.len()], vec![0.0; tap.mean.len()]]);
            }
            for (channel, (&mean, &var)) in tap.mean.iter().zip(tap.var).enumerate() {
                let mean = f64::from(mean);
                total[index][0][channel] += mean;
                total[index][1][channel] += f64::from(var) + mean * mean;
            }
        }
    }
    let count = parts.len().max(1) as f64;
    total
        .into_iter()
        .map(|[first, second]| {
            let mean: Vec<f64> = first.iter().map(|v| v / count).collect();
            let var = second.iter().zip(&mean).map(|(v, m)| (v / count - m * m) as f32).collect();
            [mean.iter().map(|&m| m as f32).collect(), var]
        })
        .collect()
}
