//! ProtoNet (Snell et al. 2017): classify by squared Euclidean distance to the class means.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::tensor::tape::{KeepDims, Var};

/// Factor that training multiplies the logits by: 16 over the length of an embedding, as in the
/// reference pipeline of ../shared/data/README.md 3. Raw squared distances grow with that length; the
/// factor keeps them of one order for every image size. Measured on glyphs, 200 steps of 5-way 5-shot
/// 7-query on real images, 600 meta-val episodes, 1- and 5-shot: 49.3 and 73.0 % with it, 34.4 and
/// 55.0 % without (56.2 and 77.0 % with 4 in place of 16). Predictions do not depend on it.
pub fn logit_factor(embedding_dim: usize) -> f64 {
    16.0 / embedding_dim.max(1) as f64
}

/// Prototypes `[way, d]`: the mean embedding of each class. `labels[i]` is the class of row `i`.
///
/// # Errors
/// When a class has no row or a label is out of range.
pub fn prototypes(support: &Var, labels: &[usize], way: usize) -> Result<Var> {
    let rows = support.dims().first().copied().unwrap_or(0);
    class_counts(labels, way)?;
    if labels.len() != rows {
        return Err(Error::internal(format!("{rows} support rows with labels `{}`", labels.len())));
    }
    let mut shares = vec![0.0f64; rows * way];
    for (row, &label) in shares.chunks_exact_mut(way).zip(labels) {
        row[label] = 1.0;
    }
    weighted_prototypes(support, &shares, way)
}

/// Prototypes `[way, d]` where row `i` of `support` `[n, d]` belongs to each class by a share, `shares` `[n, way]`: the
/// means weighted by them.
///
/// # Errors
/// When nothing belongs to a class, or lengths do not fit.
pub fn weighted_prototypes(support: &Var, shares: &[f64], way: usize) -> Result<Var> {
    let rows = support.dims().first().copied().unwrap_or(0);
    if shares.len() != rows * way {
        return Err(Error::internal(format!("{rows} support rows with `{}` shares", shares.len())));
    }
    let mut weights = vec![0.0f64; way * rows];
    for class in 0..way {
        let total: f64 = shares.iter().skip(class).step_by(way).sum();
        if total <= 0.0 {
            return Err(Error::internal(format!("no support image of class `{class}`")));
        }
        for row in 0..rows {
            weights[class * rows + row] = shares[row * way + class] / total;
        }
    }
    let weights = Tensor::from_vec(weights, (way, rows), &Device::Cpu)?
        .to_dtype(support.dtype())?
        .to_device(support.device())?;
    support.tape().constant(weights).matmul(support)
}

/// Negative squared distances `[n, way]` of `query` `[n, d]` to `prototypes` `[way, d]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn prototype_logits(query: &Var, prototypes: &Var) -> Result<Var> {
    let cross = query.matmul(&prototypes.transpose(0, 1)?)?.scale(2.0)?;
    let own = query.square()?.sum(&[1], KeepDims::Keep)?;
    let theirs = prototypes.square()?.sum(&[1], KeepDims::Drop)?;
    cross.sub(&own)?.sub(&theirs)
}

/// What a few-shot learner says of the queries.
#[derive(Debug, Clone, PartialEq)]
pub struct Classification {
    /// Negative squared distances `[n, way]`, row-major.
    pub logits: Vec<f32>,
    /// The class of each query: the largest logit, the first of equals.
    pub predictions: Vec<usize>,
}

/// Classifies `query` embeddings `[n, dim]` from `support` embeddings `[m, dim]` with their labels
/// in `0..way`, all row-major.
///
/// # Errors
/// When the lengths do not fit, or a class has no support.
pub fn classify(
    support: &[f32],
    labels: &[usize],
    query: &[f32],
    dim: usize,
    way: usize,
) -> Result<Classification> {
    let means = class_means(support, labels, dim, way)?;
    if !query.len().is_multiple_of(dim) {
        return Err(Error::internal(format!("{} query values of dimension `{dim}`", query.len())));
    }
    let mut result = Classification { logits: Vec::new(), predictions: Vec::new() };
    for row in query.chunks_exact(dim) {
        let start = result.logits.len();
        result.logits.extend(means.chunks_exact(dim).map(|mean| {
            let gap: f64 = row.iter().zip(mean).map(|(&q, &m)| (f64::from(q) - m).powi(2)).sum();
            -gap as f32
        }));
        result.predictions.push(first_largest(&result.logits[start..]));
    }
    Ok(result)
}

/// Class means `[way, dim]` of `support` embeddings `[m, dim]` with their labels, row-major.
fn class_means(support: &[f32], labels: &[usize], dim: usize, way: usize) -> Result<Vec<f64>> {
    let counts = class_counts(labels, way)?;
    if dim == 0 || support.len() != labels.len() * dim {
        return Err(Error::internal(format!(
            "{} support values for {} labels and dimension `{dim}`",
            support.len(),
            labels.len()
        )));
    }
    let mut means = vec![0.0f64; way * dim];
    for (row, &label) in support.chunks_exact(dim).zip(labels) {
        for (mean, &value) in means[label * dim..][..dim].iter_mut().zip(row) {
            *mean += f64::from(value) / counts[label] as f64;
        }
    }
    Ok(means)
}

/// The rule as a linear head, weights `[way, dim]` and biases `[way]` (Snell et al. 2017, sec. 2.4):
/// `-f |x - p|^2 = 2 f p x - f |p|^2 - f |x|^2`, whose last term is the same for every class. `f` is
/// [`logit_factor`], so that a softmax gives the probabilities of training.
///
/// # Errors
/// As [`classify`].
pub(super) fn linear_head(
    support: &[f32],
    labels: &[usize],
    dim: usize,
    way: usize,
) -> Result<[Vec<f32>; 2]> {
    let means = class_means(support, labels, dim, way)?;
    let factor = logit_factor(dim);
    let weight = means.iter().map(|mean| (2.0 * factor * mean) as f32).collect();
    let length = |mean: &[f64]| mean.iter().map(|m| m * m).sum::<f64>();
    let bias = means.chunks_exact(dim).map(|mean| (-factor * length(mean)) as f32).collect();
    Ok([weight, bias])
}

/// Index of the largest value, the first of equals; 0 for an empty slice.
pub fn first_largest(values: &[f32]) -> usize {
    let mut best = 0;
    for (at, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = at;
        }
    }
    best
}

fn class_counts(labels: &[usize], way: usize) -> Result<Vec<usize>> {
    let mut counts = vec![0usize; way];
    for &label in labels {
        *counts.get_mut(label).ok_or_else(|| {
            Error::internal(format!("label beyond the {way} classes of the episode: `{label}`"))
        })? += 1;
    }
    if let Some(class) = counts.iter().position(|&n| n == 0) {
        return Err(Error::internal(format!("no support image of class `{class}`")));
    }
    Ok(counts)
}
