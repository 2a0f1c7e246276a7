//! A teacher that can only be asked: a model run by ONNX Runtime or behind an address, its gradient
//! estimated from queries.
//!
//! Invariants: no weight and no graph gradient ever leaves this file, and every image sent is taken from the
//! [`QueryBudget`] before it is sent. Batches are cut the same way whatever the number of threads, so results
//! do not depend on it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use super::Adapter;
use super::budget::{QueryBudget, Reservation};
use super::local::LocalModel;
use super::pool::SessionPool;
use super::remote::{Authorization, RemoteModel};
use super::runtime::Runtime;
use super::session::{Tensor, Values};
use super::teacher::{Guide, ImageGradient, Objective, Teacher};
use super::zero_order::{Estimator, ZeroOrder, estimate_gradient};
use crate::error::{Error, Result, ResultExt};
use crate::tensor::{Device, Images, RngStream};
use crate::zoo::{BatchDimension, ElementType, ModelSpec, OutputKind};

/// Probability below which a logarithm is cut off: the smallest normal `f32` (`ln` = -87.3).
const PROBABILITY_FLOOR: f32 = f32::MIN_POSITIVE;

/// Probability that a teacher which returns labels only is taken to leave for all other classes together.
const LABEL_DOUBT: f32 = 1e-3;

/// Root mean square of a step on one pixel below which the answers of a quantised model are noise: three
/// of 255 levels. Measured on `zoo_edge`'s int8 Conv4 (400 directions): a descent step of length 2 lowers
/// the loss by 2.6 with this step, by 1.2 with a tenth of it, by 1.5 with seven times it.
const QUANTISED_STEP: f64 = 0.011;

/// Root mean square of a step on one pixel that moves a label often enough to learn from: of 0.03, 0.05 and 0.1
/// the last gives the most (docs/black-box.md, "Labels only").
const LABEL_STEP: f64 = 0.1;

/// How a black-box teacher is asked. Good values for a float Conv4: 100 directions, radius 0.005 to 0.05,
/// forward differences (at equal queries antithetic ones are worse unless the radius exceeds 1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlackOptions {
    /// The gradient estimate.
    pub zero_order: ZeroOrder,
    /// Images per run of a model whose batch is free; the sidecar's `max_batch_size` may lower it.
    pub batch: usize,
}

/// What answers: one request of one batch at a time, from any thread.
pub(super) trait Backend: Send + Sync + fmt::Debug {
    /// Axes of the image input: 4, or 2 for models that take flattened images.
    fn rank(&self) -> usize;

    /// Queries that a batch of `asked` images, filled up to `filled`, counts as.
    fn cost(&self, asked: usize, filled: usize) -> u64;

    /// Answers one batch; `cost` queries are taken from `paid` each time the batch is sent.
    ///
    /// # Errors
    /// When no answer comes, or `paid` does not cover it.
    fn run(&self, input: Tensor, cost: u64, paid: &Reservation<'_>) -> Result<Tensor>;
}

/// A model that can only be asked.
#[derive(Debug)]
pub struct BlackTeacher {
    spec: ModelSpec,
    adapter: Adapter,
    backend: Box<dyn Backend>,
    budget: QueryBudget,
    options: BlackOptions,
}

impl BlackTeacher {
    /// Opens the model of `spec` in ONNX Runtime on the processor, with sessions of its own. The file must
    /// have passed a [`probe`](super::probe).
    ///
    /// # Errors
    /// When the file cannot be opened or does not have the input and output that `spec` names.
    pub fn open(spec: ModelSpec, runtime: &'static Runtime, options: BlackOptions) -> Result<Self> {
        let pool = Arc::new(SessionPool::new(usize::MAX));
        Self::open_in(spec, runtime, Device::Cpu, &pool, options)
    }

    /// As [`BlackTeacher::open`], on `device` and with sessions out of `pool`.
    ///
    /// # Errors
    /// As [`BlackTeacher::open`]; when the device is not there.
    pub fn open_in(
        spec: ModelSpec,
        runtime: &'static Runtime,
        device: Device,
        pool: &Arc<SessionPool>,
        options: BlackOptions,
    ) -> Result<Self> {
        let at = || format!("model `{}`", spec.path.display());
        let backend = LocalModel::open(&spec, runtime, device, pool).context(at)?;
        Self::new(spec, Box::new(backend), options)
    }

    /// Reaches the served model of `spec`, which has an endpoint. Asks the server what it is, spends no query.
    ///
    /// # Errors
    /// When the server cannot be reached or does not serve such a model.
    pub fn connect(
        spec: ModelSpec,
        authorization: Option<Authorization>,
        options: BlackOptions,
    ) -> Result<Self> {
        let at = || format!("model `{}`", spec.path.display());
        let backend = RemoteModel::open(&spec, authorization).context(at)?;
        Self::new(spec, Box::new(backend), options)
    }

    fn new(spec: ModelSpec, backend: Box<dyn Backend>, options: BlackOptions) -> Result<Self> {
        if options.batch == 0 {
            return Err(Error::usage("a batch needs at least `1` image"));
        }
        let adapter = Adapter::new(&spec.preprocess)
            .context(|| format!("model `{}`", spec.path.display()))?;
        let budget = QueryBudget::new(spec.query_budget);
        Ok(Self { spec, adapter, backend, budget, options })
    }

    /// Counts in `budget` instead of a counter of its own.
    #[must_use]
    pub fn with_budget(self, budget: QueryBudget) -> Self {
        Self { budget, ..self }
    }

    /// The query counter.
    pub fn budget(&self) -> &QueryBudget {
        &self.budget
    }

    /// The estimator in use: steps are made long enough to change the pixels of a `uint8` input by a level,
    /// and those of a quantised model by three (rounding hides shorter ones). Where only labels come back,
    /// differences of single images are blind and the hard-label estimate takes their place.
    pub fn zero_order(&self, images: &Images) -> ZeroOrder {
        self.zero_order_for(images.stride())
    }

    /// The estimator for images of `stride` values.
    fn zero_order_for(&self, stride: usize) -> ZeroOrder {
        let config = self.options.zero_order;
        let labels = self.spec.output_kind == OutputKind::Labels;
        let rounding = if self.spec.quantised { QUANTISED_STEP } else { 0.0 };
        let least =
            if labels || config.estimator == Estimator::HardLabel { LABEL_STEP } else { 0.0 };
        let step = rounding.max(least).max(f64::from(self.adapter.quantum()));
        ZeroOrder {
            radius: config.radius.max(step * (stride as f64).sqrt()),
            estimator: if labels { Estimator::HardLabel } else { config.estimator },
            ..config
        }
    }

    /// Images per run, and whether an image fills the run alone.
    fn batching(&self) -> (usize, Company) {
        let company = if self.spec.batch_dependent { Company::Alone } else { Company::Others };
        let size = match (self.spec.batch, company) {
            (BatchDimension::Fixed(size), _) => size.max(1),
            (BatchDimension::Free, Company::Alone) => 1,
            (BatchDimension::Free, Company::Others) => {
                self.options.batch.min(self.spec.max_batch_size.unwrap_or(usize::MAX)).max(1)
            }
        };
        (size, company)
    }

    /// Images of each run that answers `n` images, and how many a run is filled up to.
    fn runs(&self, n: usize) -> (impl Iterator<Item = Range<usize>> + use<>, usize) {
        let (size, company) = self.batching();
        let step = if company == Company::Alone { 1 } else { size };
        let runs = (0..n.div_ceil(step)).map(move |run| run * step..((run + 1) * step).min(n));
        (runs, size)
    }

    fn filled(&self, asked: usize, size: usize) -> usize {
        if matches!(self.spec.batch, BatchDimension::Fixed(_)) { size } else { asked }
    }

    /// Queries that `n` images asked together cost.
    fn cost(&self, n: usize) -> u64 {
        let (runs, size) = self.runs(n);
        runs.map(|run| self.backend.cost(run.len(), self.filled(run.len(), size))).sum()
    }

    /// Log-scores of `images`, each run paid from `paid`.
    fn ask(&self, images: &Images, paid: &Reservation<'_>) -> Result<Vec<f32>> {
        let (runs, size) = self.runs(images.len());
        let answers: Vec<Vec<f32>> = runs
            .collect::<Vec<_>>()
            .into_par_iter()
            .with_max_len(1)
            .map(|run| self.run(images, run, size, paid))
            .collect::<Result<_>>()
            .context(|| format!("model `{}`", self.spec.path.display()))?;
        Ok(answers.concat())
    }

    /// One run of the model on the images at `part`, at most `size`.
    fn run(
        &self,
        images: &Images,
        part: Range<usize>,
        size: usize,
        paid: &Reservation<'_>,
    ) -> Result<Vec<f32>> {
        let n = part.len();
        let filled = self.filled(n, size);
        let mut shape = self.adapter.input_shape(filled).to_vec();
        let mut values = vec![0.0; shape.iter().product()];
        // A fixed batch needs exactly `size` images: the last one fills it up. The answers for the filling are
        // thrown away.
        self.adapter.forward_into(images, part, &mut values)?;
        if self.backend.rank() == 2 {
            shape = vec![filled, values.len() / filled];
        }
        let input = Tensor { shape, values: pack(values, self.spec.preprocess.dtype) };
        let answer = self.backend.run(input, self.backend.cost(n, filled), paid)?;
        self.read(&answer, filled, n)
    }

    /// Log-scores of the first `n` of `filled` images from what the model gave.
    fn read(&self, answer: &Tensor, filled: usize, n: usize) -> Result<Vec<f32>> {
        let classes = self.spec.classes;
        let raw = answer.values.to_f32();
        let per_image = if self.spec.output_kind == OutputKind::Labels { 1 } else { classes };
        if raw.len() != filled * per_image {
            return Err(Error::input(format!(
                "output `{}` of shape {:?} does not give {per_image} values for each of {filled} images",
                self.spec.logits_output, answer.shape
            ))
            .hint("check `logits_output`, `output_kind` and `id2label` in the model's sidecar"));
        }
        let raw = &raw[..n * per_image];
        if raw.iter().any(|value| value.is_nan()) {
            return Err(Error::input(format!(
                "output `{}` is not a number",
                self.spec.logits_output
            )));
        }
        match self.spec.output_kind {
            OutputKind::Logits if raw.iter().any(|value| value.is_infinite()) => {
                Err(Error::input(format!("output `{}` is infinite", self.spec.logits_output)))
            }
            OutputKind::Logits => Ok(raw.to_vec()),
            OutputKind::LogProbabilities => {
                Ok(raw.iter().map(|value| value.max(PROBABILITY_FLOOR.ln())).collect())
            }
            OutputKind::Probabilities => {
                Ok(raw.iter().map(|value| value.max(PROBABILITY_FLOOR).ln()).collect())
            }
            OutputKind::Labels => labels_to_log_scores(raw, classes),
        }
    }
}

/// Whether images of one run may be different ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Company {
    Alone,
    Others,
}

impl Teacher for BlackTeacher {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Log-scores: logits as they are, log-probabilities cut off at -87.3, logarithms of probabilities
    /// likewise, for labels-only models `ln(0.999)` for the label and `ln(0.001 / (classes - 1))` else.
    fn logits(&self, images: &Images) -> Result<Vec<f32>> {
        let paid = self.budget.reserve(self.cost(images.len()))?;
        self.ask(images, &paid)
    }

    fn image_gradient(
        &self,
        images: &Images,
        objective: &Objective<'_>,
        rng: &mut RngStream,
    ) -> Result<ImageGradient> {
        self.guided_gradient(images, objective, &Guide::default(), rng)
    }

    /// Costs `n` queries for the images and [`ZeroOrder::queries`] for the directions, set aside at once.
    fn guided_gradient(
        &self,
        images: &Images,
        objective: &Objective<'_>,
        guide: &Guide<'_>,
        rng: &mut RngStream,
    ) -> Result<ImageGradient> {
        let n = images.len();
        let config = self.zero_order(images);
        let paid = self.budget.reserve(self.gradient_cost(images.shape()))?;
        let logits = self.ask(images, &paid)?;
        let values = self.losses(&logits, objective, &(0..n).collect::<Vec<_>>());
        let loss = |moved: &Images, owners: &[usize]| {
            Ok(self.losses(&self.ask(moved, &paid)?, objective, owners))
        };
        let mut gradient = estimate_gradient(images, &values, &config, guide, rng, &loss)
            .context(|| format!("model `{}`", self.spec.path.display()))?;
        // The objective is the mean over the batch.
        let share = 1.0 / n.max(1) as f32;
        gradient.data_mut().iter_mut().for_each(|value| *value *= share);
        let logits_loss = values.iter().sum::<f64>() / n.max(1) as f64;
        Ok(ImageGradient { gradient, logits_loss, statistics_loss: 0.0, logits })
    }

    fn queries(&self) -> u64 {
        self.budget.spent()
    }

    fn queries_left(&self) -> Option<u64> {
        self.budget.remaining()
    }

    fn logits_cost(&self, n: usize) -> u64 {
        self.cost(n)
    }

    fn gradient_cost(&self, shape: [usize; 4]) -> u64 {
        let config = self.zero_order_for(shape[1..].iter().product());
        let directions: u64 = config.requests(shape).map(|size| self.cost(size)).sum();
        self.cost(shape[0]) + directions
    }
}

impl BlackTeacher {
    fn losses(&self, logits: &[f32], objective: &Objective<'_>, owners: &[usize]) -> Vec<f64> {
        let rows = logits.chunks_exact(self.spec.classes.max(1));
        owners.iter().zip(rows).map(|(&owner, row)| objective.logits.value(owner, row)).collect()
    }
}

/// Input values in the element type the model declares.
fn pack(values: Vec<f32>, dtype: ElementType) -> Values {
    match dtype {
        ElementType::Float32 => Values::F32(values),
        ElementType::Float16 => Values::F16(values.into_iter().map(f16::from_f32).collect()),
        ElementType::Float64 => Values::F64(values.into_iter().map(f64::from).collect()),
        ElementType::Uint8 => Values::U8(values.into_iter().map(|value| value as u8).collect()),
    }
}

/// One row of log-scores a label: nearly sure of it, the doubt shared by the others.
fn labels_to_log_scores(labels: &[f32], classes: usize) -> Result<Vec<f32>> {
    let others = (LABEL_DOUBT / classes.saturating_sub(1).max(1) as f32).ln();
    let mut scores = vec![others; labels.len() * classes];
    for (row, &label) in scores.chunks_exact_mut(classes.max(1)).zip(labels) {
        let known = label >= 0.0 && label.fract() == 0.0;
        match row.get_mut(label as usize).filter(|_| known) {
            Some(score) => *score = (1.0 - LABEL_DOUBT).ln(),
            None => return Err(Error::input(format!("a label outside 0..{classes} `{label}`"))),
        }
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_become_log_scores_that_sum_to_one() {
        let scores = labels_to_log_scores(&[2.0, 0.0], 4).unwrap();
        for (row, label) in scores.chunks(4).zip([2, 0]) {
            let total: f32 = row.iter().map(|score| score.exp()).sum();
            assert!((total - 1.0).abs() < 1e-6);
            assert!((row[label].exp() - 0.999).abs() < 1e-6);
        }
        for bad in [-1.0, 4.0, 1.5, f32::NAN] {
            assert!(labels_to_log_scores(&[bad], 4).is_err(), "{bad}");
        }
    }
}
