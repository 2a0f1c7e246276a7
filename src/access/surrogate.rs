//! Statistics for networks that hold none: what their layers should see where BatchNormalization is
//! folded into the weights, or was never there.
//!
//! Folding `y = gamma (z - mu) / sigma + beta` into a convolution loses less than it seems. Over the training
//! data `y` has mean beta and deviation gamma, which start at 0 and 1 and stay near (1.00 +- 0.05, 0.00 +- 0.05 in
//! the layers of ../shared/data's zoos). And sigma is what the length of a channel's weights was divided by, a length
//! that training hardly changes: 1 / length correlates with the true sigma at 0.89 to 0.99 over the channels of each
//! of their layers. So each layer's output is held to mean 0 and variance 1, deviations counted in units of the
//! estimated sigma: nearly the term that the lost statistics would give. Networks that never had the layer get what
//! they make of procedural images, if that is asked for (it helps less than nothing on our zoos: docs/surrogate.md).

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
    /// `Unit` where BatchNormalization looks folded, else none.
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
    /// The taps that plans of `graph` get for this, as far as the graph alone tells.
    pub(super) fn taps(self, graph: &Graph) -> Taps {
        let norms = Normalization::of(graph);
        let wanted = match self {
            Self::Off => false,
            Self::Auto => norms.looks_folded(),
            Self::Unit | Self::Procedural => norms.batch == 0,
        };
        if wanted { Taps::Activations } else { Taps::Norms }
    }
}

/// Whether layers that see this on procedural images had a normalisation folded into them.
pub(super) fn look_normalised(seen: &[Reference]) -> bool {
    seen.iter().all(near_unit)
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
