//! A black-box model in ONNX Runtime, its sessions out of the run's pool.

use std::sync::Arc;

use super::black::Backend;
use super::budget::Reservation;
use super::pool::SessionPool;
use super::runtime::Runtime;
use super::session::{Session, Tensor};
use crate::error::{Error, Result};
use crate::tensor::Device;
use crate::zoo::ModelSpec;
use crate::zoo::hash::unchanged;

/// A model file that ONNX Runtime runs.
#[derive(Debug)]
pub(super) struct LocalModel {
    spec: ModelSpec,
    runtime: &'static Runtime,
    device: Device,
    pool: Arc<SessionPool>,
    owner: u64,
    rank: usize,
}

impl LocalModel {
    /// Opens the first session and checks it against `spec`.
    ///
    /// # Errors
    /// When the file cannot be opened or does not have the input and output that `spec` names.
    pub(super) fn open(
        spec: &ModelSpec,
        runtime: &'static Runtime,
        device: Device,
        pool: &Arc<SessionPool>,
    ) -> Result<Self> {
        let owner = pool.owner();
        let mut lease = pool.lease(owner, || runtime.open_on(&spec.path, device))?;
        let rank = check_ports(lease.session(), spec);
        drop(lease);
        let model = Self {
            spec: spec.clone(),
            runtime,
            device,
            pool: Arc::clone(pool),
            owner,
            rank: *rank.as_ref().unwrap_or(&0),
        };
        rank.map(|_| model)
    }
}

impl Backend for LocalModel {
    fn rank(&self) -> usize {
        self.rank
    }

    /// What fills up a fixed batch is nobody's question.
    fn cost(&self, asked: usize, _filled: usize) -> u64 {
        asked as u64
    }

    fn run(&self, input: Tensor, cost: u64, paid: &Reservation<'_>) -> Result<Tensor> {
        let mut lease = self.pool.lease(self.owner, || {
            // The pool may have closed the first session long ago, and the file be another one by now.
            unchanged(&self.spec)?;
            self.runtime.open_on(&self.spec.path, self.device)
        })?;
        paid.take(cost)?;
        let inputs = vec![(self.spec.input_name.as_str(), input)];
        let mut answer = lease.session().run(inputs, &[self.spec.logits_output.as_str()])?;
        answer.pop().ok_or_else(|| Error::internal("the run gave `0` outputs"))
    }
}

impl Drop for LocalModel {
    fn drop(&mut self) {
        self.pool.close(self.owner);
    }
}

/// Checks the names in `spec` against the model; the rank of the image input.
fn check_ports(session: &Session, spec: &ModelSpec) -> Result<usize> {
    let names = |ports: &[super::session::Port]| {
        ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>().join("`, `")
    };
    let Some(input) = session.inputs().iter().find(|port| port.name == spec.input_name) else {
        return Err(Error::input(format!(
            "the model has no input `{}`; it has `{}`",
            spec.input_name,
            names(session.inputs())
        )));
    };
    if session.inputs().len() > 1 {
        return Err(Error::unsupported(format!(
            "the model needs more inputs than one image: `{}`",
            names(session.inputs())
        )));
    }
    if !session.outputs().iter().any(|port| port.name == spec.logits_output) {
        return Err(Error::input(format!(
            "the model has no output `{}`; it has `{}`",
            spec.logits_output,
            names(session.outputs())
        ))
        .hint("set `logits_output` in the model's sidecar"));
    }
    match input.dims.len() {
        rank @ (2 | 4) => Ok(rank),
        0 => Ok(4),
        rank => Err(Error::unsupported(format!("an image input of `{rank}` axes"))),
    }
}
