//! A white-box teacher's plan on a device: what goes up are images (or, for resident pixels, only their start), what comes
//! back is what was asked for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::adapter::Adapter;
use super::surrogate::Reference;
use super::teacher::{Objective, PixelLosses, PixelTask, ResidentPixels};
use crate::error::Result;
use crate::graph::Plan;
use crate::graph::plan::device::DevicePlan;
use crate::tensor::AdamOptions;
use crate::tensor::cuda::{Device, Pixels, Standard};

/// A plan on a device, one user at a time.
#[derive(Debug)]
pub(super) struct OnDevice {
    plan: Mutex<DevicePlan>,
}

/// What one pass with gradient gives.
pub(super) struct Pass {
    pub(super) logits: Vec<f32>,
    pub(super) d_input: Vec<f32>,
    /// Mean loss of the images that count, times their share of all.
    pub(super) logits_loss: f64,
    /// Unweighted.
    pub(super) statistics_loss: f64,
}

/// The images of a pass: from `start` on `used` of all `n`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) start: usize,
    pub(super) used: usize,
    pub(super) n: usize,
}

impl OnDevice {
    pub(super) fn new(
        plan: &Plan<f32>,
        device: &Arc<dyn Device>,
        references: Option<&[Reference]>,
    ) -> Result<Self> {
        Ok(Self { plan: Mutex::new(DevicePlan::new(plan, device, references)?) })
    }

    fn plan(&self) -> MutexGuard<'_, DevicePlan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The logits of `input`.
    pub(super) fn logits(&self, input: &[f32]) -> Result<Vec<f32>> {
        let plan = self.plan();
        plan.input().write(plan.device(), input)?;
        plan.forward()?;
        plan.output().read(plan.device())
    }

    /// The gradient of `objective` to `input`, its statistics weighted by `weight`.
    pub(super) fn gradient(
        &self,
        input: &[f32],
        objective: &Objective<'_>,
        weight: f32,
        Part { start, used, n }: Part,
    ) -> Result<Pass> {
        let plan = self.plan();
        plan.input().write(plan.device(), input)?;
        plan.forward()?;
        let share = 1.0 / n as f32;
        let (logits, logits_loss, statistics_loss) = match objective.logits.labels() {
            Some(labels) => {
                plan.set_labels(&labels[start..start + used])?;
                plan.objective(used, share, weight)?;
                let losses = plan.losses()?;
                let logits = plan.output().read(plan.device())?;
                (logits, losses.cross_entropy / n as f64, losses.statistics)
            }
            None => {
                let logits = plan.output().read(plan.device())?;
                let classes = logits.len() / plan.images();
                let mut d_logits = vec![0.0; logits.len()];
                let mut total = 0.0;
                let rows = logits.chunks_exact(classes).zip(d_logits.chunks_exact_mut(classes));
                for (i, (row, d_row)) in rows.take(used).enumerate() {
                    total += objective.logits.value(start + i, row) / n as f64;
                    objective.logits.gradient(start + i, row, d_row);
                    d_row.iter_mut().for_each(|d| *d *= share);
                }
                plan.output_gradient().write(plan.device(), &d_logits)?;
                plan.statistics(weight)?;
                (logits, total, plan.statistics_loss()?)
            }
        };
        plan.backward(weight != 0.0)?;
        let d_input = plan.input_gradient().read(plan.device())?;
        Ok(Pass { logits, d_input, logits_loss, statistics_loss })
    }
}

/// Pixels beside a plan of their own.
pub(super) struct Resident {
    plan: DevicePlan,
    pixels: Pixels,
    images: usize,
    statistics: f32,
    total_variation: f32,
    norm: f32,
    adam: AdamOptions,
    steps: u64,
}

impl Resident {
    /// `None` where the adapter has a step that is not on the device.
    pub(super) fn new(
        plan: &Plan<f32>,
        device: &Arc<dyn Device>,
        references: Option<&[Reference]>,
        adapter: &Adapter,
        task: &PixelTask<'_>,
    ) -> Result<Option<Self>> {
        let Some(map) = adapter.input_map(task.size) else { return Ok(None) };
        let [middle, unit, range] = task.standard;
        let pixels = Pixels::new(device, &map, Standard { middle, unit, range }, task.start)?;
        let plan = DevicePlan::new(plan, device, references)?;
        plan.set_labels(task.labels)?;
        Ok(Some(Self {
            plan,
            pixels,
            images: task.labels.len(),
            statistics: task.statistics,
            total_variation: task.total_variation,
            norm: task.norm,
            adam: task.adam,
            steps: 0,
        }))
    }
}

impl ResidentPixels for Resident {
    fn step(&mut self, shift: [i64; 2], rate: f64) -> Result<PixelLosses> {
        let shift = shift.map(|pixels| pixels as i32);
        let n = self.images;
        self.pixels.forward(self.plan.input(), shift)?;
        self.plan.forward()?;
        self.plan.objective(n, 1.0 / n as f32, self.statistics)?;
        self.plan.backward(self.statistics != 0.0)?;
        let gradient = self.plan.input_gradient();
        self.pixels.backward(gradient, shift, self.total_variation, self.norm)?;
        self.steps += 1;
        self.pixels.step(self.adam, self.steps, rate)?;
        let losses = self.plan.losses()?;
        let [total_variation, norm] = self.pixels.priors()?;
        let logits = losses.cross_entropy / n as f64;
        Ok(PixelLosses { logits, statistics: losses.statistics, total_variation, norm })
    }

    fn read(&self) -> Result<Vec<f32>> {
        self.pixels.read()
    }
}
