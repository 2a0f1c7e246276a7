//! A teacher compiled by our own engine: exact logits, exact image gradients, running statistics.
//!
//! Invariant: the gradient is of the very function that `logits` computes (the same plan); images go
//! through the same adapter as a black-box teacher's.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Adapter;
use super::surrogate::{self, Reference, Surrogate};
use super::teacher::{ImageGradient, Objective, Teacher};
#[cfg(any(feature = "cuda", test))]
use super::{
    on_device::{OnDevice, Part, Resident},
    teacher::{PixelTask, ResidentPixels},
};
use crate::error::{Error, Result, ResultExt};
use crate::graph::facts::logits_under;
use crate::graph::{CompileOptions, Gradient, Graph, Plan, Taps, Workspace};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda::Device;
use crate::tensor::{Images, RngStream};
use crate::zoo::{BatchDimension, ModelSpec};

/// Images per pass when only logits are wanted.
const LOGITS_BATCH: usize = 64;
/// Compiled batch sizes kept; a method uses a few.
const PLANS_KEPT: usize = 6;

/// A white-box model.
#[derive(Debug)]
pub struct WhiteTeacher {
    spec: ModelSpec,
    graph: Graph,
    logits: String,
    adapter: Adapter,
    taps: Taps,
    /// What the taps should see, where that is not in the plan.
    references: Option<Vec<Reference>>,
    /// Tapped layers.
    layers: usize,
    plans: Mutex<BTreeMap<usize, Arc<Compiled>>>,
    #[cfg(any(feature = "cuda", test))]
    device: Option<Arc<dyn Device>>,
}

/// A plan and the workspaces that no thread is using.
#[derive(Debug)]
struct Compiled {
    plan: Plan<f32>,
    free: Mutex<Vec<Workspace<f32>>>,
    /// Images the plan takes at once; smaller than asked where the file fixes the batch.
    batch: usize,
    #[cfg(any(feature = "cuda", test))]
    on: Option<OnDevice>,
}

impl Compiled {
    fn with_workspace<R>(&self, work: impl FnOnce(&Plan<f32>, &mut Workspace<f32>) -> R) -> R {
        let taken = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut workspace = taken.unwrap_or_else(|| self.plan.workspace());
        let result = work(&self.plan, &mut workspace);
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(workspace);
        result
    }
}

impl WhiteTeacher {
    /// Opens the model of `spec`; `graph` is its imported file. `surrogate` says which statistics are
    /// matched where the file holds none.
    ///
    /// # Errors
    /// When the graph cannot be compiled or differentiated, or does not give `spec.classes` scores.
    pub fn new(spec: ModelSpec, graph: Graph, surrogate: Surrogate) -> Result<Self> {
        let adapter = Adapter::new(&spec.preprocess)?;
        let logits = logits_under(&graph, &spec.logits_output).0.to_string();
        let taps = surrogate.taps(&graph);
        let mut teacher = Self {
            spec,
            graph,
            logits,
            adapter,
            taps,
            references: None,
            layers: 0,
            plans: Mutex::default(),
            #[cfg(any(feature = "cuda", test))]
            device: None,
        };
        let probe = match teacher.spec.batch {
            BatchDimension::Fixed(n) => n,
            BatchDimension::Free => 1,
        };
        let compiled = teacher.compiled(probe).context(|| teacher.describe())?;
        teacher.layers = compiled.plan.tap_count();
        if taps == Taps::Activations && surrogate != Surrogate::Unit && teacher.layers > 0 {
            let seen = teacher.seen_on_probes(&compiled)?;
            match surrogate {
                Surrogate::Procedural => teacher.references = Some(seen),
                // Biased convolutions alone do not make a folded network.
                _ if !surrogate::look_normalised(&seen) => {
                    teacher.taps = Taps::Norms;
                    teacher.layers = 0;
                    teacher.plans = Mutex::default();
                }
                _ => {}
            }
        }
        Ok(teacher)
    }

    /// The same teacher, computed on `device`.
    ///
    /// # Errors
    /// When an operator is not there (naming the node), or memory runs out.
    #[cfg(any(feature = "cuda", test))]
    pub fn on_device(mut self, device: &Arc<dyn Device>) -> Result<Self> {
        let probe = match self.spec.batch {
            BatchDimension::Fixed(n) => n,
            BatchDimension::Free => 1,
        };
        self.device = Some(Arc::clone(device));
        self.plans = Mutex::default();
        self.compiled(probe).context(|| self.describe())?;
        Ok(self)
    }

    /// What the tapped layers see on procedural images.
    fn seen_on_probes(&self, compiled: &Compiled) -> Result<Vec<Reference>> {
        let [_, height, width] = self.spec.preprocess.input_size;
        let images = surrogate::probes([height, width]);
        let parts: Vec<Vec<f32>> = (0..images.len() / compiled.batch)
            .map(|part| {
                let start = part * compiled.batch;
                self.adapter.forward(&images.range(start, start + compiled.batch))
            })
            .collect::<Result<_>>()?;
        Ok(surrogate::measure(&compiled.plan, &parts))
    }

    fn describe(&self) -> String {
        format!("model `{}`", self.spec.path.display())
    }

    /// The compiled network of the model for `n` images, in the model's own input space.
    ///
    /// # Errors
    /// When the graph does not compile for that batch.
    pub fn compile(&self, n: usize) -> Result<Plan<f32>> {
        Plan::compile(&self.graph, &self.options(n))
    }

    /// How the plan for `n` images is compiled (for checks in another precision).
    pub fn options(&self, n: usize) -> CompileOptions {
        CompileOptions {
            input: self.spec.input_name.clone(),
            input_shape: self.adapter.input_shape(n).to_vec(),
            output: self.logits.clone(),
            gradient: Gradient::Wanted,
            taps: self.taps,
        }
    }

    /// The imported graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The map from canonical images to the model's input.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Sets the gradient of `weight * sum_l (||mean_l - ref|| + ||var_l - ref||)` (PURER sec. 2.2) on the
    /// plan's taps; returns the unweighted sum.
    fn match_statistics(
        &self,
        plan: &Plan<f32>,
        workspace: &mut Workspace<f32>,
        weight: f32,
    ) -> f64 {
        if weight == 0.0 {
            plan.clear_tap_gradients(workspace);
        }
        let mut total = 0.0;
        let mut gradients = Vec::with_capacity(plan.tap_count());
        for (index, tap) in plan.taps(workspace).enumerate() {
            let mut pair = [Vec::new(), Vec::new()];
            let [mean, var] = match &self.references {
                Some(references) => references[index].each_ref(),
                None => [&tap.reference.mean, &tap.reference.var],
            };
            // A variance counts in the square of a mean's unit.
            let sides = [(tap.mean, mean, 1), (tap.var, var, 2)];
            for ((seen, wanted, power), gradient) in sides.into_iter().zip(&mut pair) {
                let units = tap.reference.unit.iter().map(|unit| unit.powi(power));
                let difference = seen
                    .iter()
                    .zip(wanted.iter())
                    .zip(units.clone())
                    .map(|((s, w), u)| (s - w) * u);
                let norm =
                    difference.clone().map(|d| f64::from(d) * f64::from(d)).sum::<f64>().sqrt();
                total += norm;
                let scale = if norm > 0.0 { weight / norm as f32 } else { 0.0 };
                gradient.extend(difference.zip(units).map(|(d, u)| d * u * scale));
            }
            gradients.push(pair);
        }
        if weight != 0.0 {
            for (index, [mean, var]) in gradients.iter().enumerate() {
                plan.set_tap_gradient(workspace, index, mean, var);
            }
        }
        total
    }

    /// A plan for `n` images, or for the file's own batch where its graph works for no other.
    fn compiled(&self, n: usize) -> Result<Arc<Compiled>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = plans.get(&n) {
            return Ok(Arc::clone(found));
        }
        let right = |plan: &Plan<f32>, n: usize| {
            let shape = plan.output_shape();
            shape.first() == Some(&n) && shape.iter().product::<usize>() == n * self.spec.classes
        };
        let attempt = self.compile(n);
        let (plan, batch) = match (attempt, self.spec.batch) {
            (Ok(plan), _) if right(&plan, n) => (plan, n),
            (_, BatchDimension::Fixed(fixed)) if fixed != n => (self.compile(fixed)?, fixed),
            (Ok(plan), _) => (plan, n),
            (Err(error), _) => return Err(error),
        };
        if !right(&plan, batch) {
            return Err(Error::input(format!(
                "output `{}` has shape {:?} for {batch} images, expected {batch} rows of `{}` classes",
                self.spec.logits_output,
                plan.output_shape(),
                self.spec.classes
            ))
            .hint("name the right output as `logits_output` in the sidecar"));
        }
        while plans.len() >= PLANS_KEPT {
            plans.pop_first();
        }
        #[cfg(any(feature = "cuda", test))]
        let on = match &self.device {
            Some(device) => Some(OnDevice::new(&plan, device, self.references.as_deref())?),
            None => None,
        };
        let compiled = Arc::new(Compiled {
            plan,
            free: Mutex::default(),
            batch,
            #[cfg(any(feature = "cuda", test))]
            on,
        });
        plans.insert(n, Arc::clone(&compiled));
        Ok(compiled)
    }

    /// Input values of the images at `own`, filled up to `batch`.
    #[cfg(any(feature = "cuda", test))]
    fn input(
        &self,
        images: &Images,
        own: std::ops::Range<usize>,
        batch: usize,
    ) -> Result<Vec<f32>> {
        let mut input = vec![0.0; self.adapter.input_shape(batch).iter().product()];
        self.adapter.forward_into(images, own, &mut input)?;
        Ok(input)
    }
}

impl Teacher for WhiteTeacher {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn logits(&self, images: &Images) -> Result<Vec<f32>> {
        let classes = self.spec.classes;
        let mut logits = Vec::with_capacity(images.len() * classes);
        let mut start = 0;
        while start < images.len() {
            let n = (images.len() - start).min(LOGITS_BATCH);
            // A short last batch is filled up rather than compiled for.
            let size = if start > 0 || images.len() > LOGITS_BATCH { LOGITS_BATCH } else { n };
            let compiled = self.compiled(size).context(|| self.describe())?;
            let used = n.min(compiled.batch);
            let own = start..start + used;
            #[cfg(any(feature = "cuda", test))]
            if let Some(on) = &compiled.on {
                let input = self.input(images, own, compiled.batch)?;
                logits.extend_from_slice(&on.logits(&input)?[..used * classes]);
                start += used;
                continue;
            }
            compiled.with_workspace(|plan, workspace| -> Result<()> {
                self.adapter.forward_into(images, own, plan.input_mut(workspace))?;
                let output = plan.forward_written(workspace);
                logits.extend_from_slice(&output[..used * classes]);
                Ok(())
            })?;
            start += used;
        }
        Ok(logits)
    }

    fn image_gradient(
        &self,
        images: &Images,
        objective: &Objective<'_>,
        _rng: &mut RngStream,
    ) -> Result<ImageGradient> {
        let n = images.len();
        let classes = self.spec.classes;
        let mut result = ImageGradient {
            gradient: Images::zeros(images.shape()),
            logits_loss: 0.0,
            statistics_loss: 0.0,
            logits: Vec::with_capacity(n * classes),
        };
        let compiled = self.compiled(n).context(|| self.describe())?;
        let stride = images.stride();
        let mut start = 0;
        while start < n {
            let used = compiled.batch.min(n - start);
            let own = start..start + used;
            let [_, channels, height, width] = images.shape();
            let shape = [used, channels, height, width];
            let d_images = &mut result.gradient.data_mut()[own.start * stride..own.end * stride];
            let inputs: usize = self.adapter.input_shape(used).iter().product();
            let share = used as f32 / n as f32;
            let weight = objective.statistics_weight * share;
            #[cfg(any(feature = "cuda", test))]
            if let Some(on) = &compiled.on {
                let input = self.input(images, own, compiled.batch)?;
                let pass = on.gradient(&input, objective, weight, Part { start, used, n })?;
                result.logits_loss += pass.logits_loss;
                result.statistics_loss += f64::from(share) * pass.statistics_loss;
                result.logits.extend_from_slice(&pass.logits[..used * classes]);
                self.adapter.backward_into(&pass.d_input[..inputs], shape, d_images)?;
                start += used;
                continue;
            }
            compiled.with_workspace(|plan, workspace| -> Result<()> {
                self.adapter.forward_into(images, own, plan.input_mut(workspace))?;
                let logits = plan.forward_written(workspace);
                let mut d_logits = vec![0.0; logits.len()];
                let rows = logits.chunks_exact(classes).zip(d_logits.chunks_exact_mut(classes));
                for (i, (row, d_row)) in rows.take(used).enumerate() {
                    result.logits_loss += objective.logits.value(start + i, row) / n as f64;
                    objective.logits.gradient(start + i, row, d_row);
                    d_row.iter_mut().for_each(|d| *d /= n as f32);
                }
                result.logits.extend_from_slice(&logits[..used * classes]);
                result.statistics_loss +=
                    f64::from(share) * self.match_statistics(plan, workspace, weight);
                let d_input = plan.backward(workspace, &d_logits);
                self.adapter.backward_into(&d_input[..inputs], shape, d_images)
            })?;
            start += used;
        }
        Ok(result)
    }

    #[cfg(any(feature = "cuda", test))]
    fn resident(&self, task: &PixelTask<'_>) -> Result<Option<Box<dyn ResidentPixels>>> {
        let Some(device) = &self.device else { return Ok(None) };
        let n = task.labels.len();
        let compiled = self.compiled(n).context(|| self.describe())?;
        if compiled.batch != n {
            return Ok(None);
        }
        let references = self.references.as_deref();
        let pixels = Resident::new(&compiled.plan, device, references, &self.adapter, task)?;
        Ok(pixels.map(|pixels| Box::new(pixels) as Box<dyn ResidentPixels>))
    }

    fn statistics_layers(&self) -> usize {
        self.layers
    }

    fn queries(&self) -> u64 {
        0
    }
}
