//! Where the time of meta-training goes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::meta::StepSeconds;
use crate::methods::EciStep;

/// Wall-clock seconds of the parts of meta-training, summed over its updates. What happens around them (checkpoints, the
/// log) is in none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct MetaSeconds {
    /// Meta-updates.
    pub updates: u64,
    /// Reading and augmenting episodes, the inner loop, the loss on the queries.
    pub inner: f64,
    /// The gradient of that loss to the parameters and the optimiser's step.
    pub outer: f64,
    /// Inversion steps of the teachers (method `purer`).
    pub inversion: f64,
    /// Making episodes harder: their outer loss and its gradient to the pixels (method `purer`).
    pub hardening: f64,
    /// Checks on pseudo-validation.
    pub validation: f64,
}

impl MetaSeconds {
    /// Adds an update.
    pub(super) fn add_update(&mut self, step: &StepSeconds) {
        self.updates += 1;
        self.inner += step.inner;
        self.outer += step.outer;
        self.validation += step.validation;
    }

    /// Adds what happened to the images after an update.
    pub(super) fn add_move(&mut self, step: &EciStep) {
        self.inversion += step.inversion_seconds;
        self.hardening += step.hardening_seconds;
    }

    /// The parts that took any time, as the run's record names them.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let all = [
            ("meta-inner", self.inner),
            ("meta-outer", self.outer),
            ("meta-inversion", self.inversion),
            ("meta-hardening", self.hardening),
            ("meta-validation", self.validation),
        ];
        all.into_iter().filter(|(_, seconds)| *seconds > 0.0)
    }
}
