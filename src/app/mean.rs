//! The mean of a zoo's models: a baseline of `eval`, and a start of meta-training (PURER's "FedAvg"; methods.md 1.7, 2.3).

use std::path::Path;

use super::config::RunConfig;
use super::context::Context;
use super::settings;
use crate::error::{Error, Result, ResultExt};
use crate::meta::{Backbone, MetaModel};
use crate::onnx;
use crate::zoo::hash::unchanged;
use crate::zoo::{Access, ModelSpec};

/// The network of the model of `spec` up to its last linear layer, for images of `[height, width]`; `zoo` is the folder
/// its external data may lie in.
///
/// # Errors
/// When the file has changed since `spec` was read, or its weights cannot be trained.
pub fn network(spec: &ModelSpec, zoo: &Path, image_size: [usize; 2]) -> Result<Backbone> {
    unchanged(spec)?;
    let graph = onnx::load(&spec.path, zoo)?.graph;
    Backbone::of_classifier(&graph, spec, image_size)
}

/// The mean of `count` networks of one architecture, each with its model's id.
///
/// # Errors
/// When a network cannot be opened, two are of different architectures (both are named), or the user interrupts.
pub fn average(
    context: &Context,
    count: usize,
    networks: impl Iterator<Item = Result<(String, Backbone)>>,
    image_size: [usize; 2],
) -> Result<Backbone> {
    let stage = context.progress.stage("average", Some(count as u64));
    let told = networks.map(|network| {
        context.check_interrupt()?;
        stage.advance(1);
        network
    });
    Backbone::average(told, image_size)
}

/// The meta-model of the settings, its network with the mean of the weights and running statistics of the white-box
/// models of `specs`. Its head, where it has one, is drawn as always.
///
/// # Errors
/// When there is no white-box model, two are of different architectures (both are named), the network of the settings is
/// another one than theirs, or the user interrupts.
pub fn mean_of_teachers(
    context: &Context,
    config: &RunConfig,
    specs: &[ModelSpec],
    zoo: &Path,
) -> Result<MetaModel> {
    let size = config.image_size;
    let make = || {
        let white: Vec<&ModelSpec> =
            specs.iter().filter(|spec| spec.access == Access::WhiteBox).collect();
        let Some(first) = white.first() else {
            return Err(Error::unsupported("no model is a white box"));
        };
        let networks = white.iter().map(|spec| {
            let open = network(spec, zoo, size).context(|| format!("model `{}`", spec.id));
            Ok((spec.id.clone(), open?))
        });
        let mean = average(context, white.len(), networks, size)?;
        let mut model = settings::untrained_model(config)?;
        let backbone = String::from(config.meta.backbone.clone());
        let what = || format!("`meta.backbone: {backbone}` and model `{}`", first.id);
        model.backbone_mut().start_from(&mean, size).context(what)?;
        Ok(model)
    };
    make()
        .context(|| "cannot start from the mean of teachers".into())
        .map_err(|error| error.hint("set `meta.start: random`"))
}
