//! The settings of a run: one YAML, completed by defaults, overridden by environment and flags.
//!
//! Precedence: YAML < environment (`METAZOA_META__STEPS=100`) < flags. Unknown keys are refused with
//! the nearest name. The resolved settings are saved in the run folder and accepted back as they
//! are. Defaults are those of the quickstart, and live only in [`types`].

use std::path::Path;

use serde_yaml::Value;

mod augmentation;
mod backbone;
pub mod bidf;
pub mod black_box;
mod faithful;
pub mod five;
pub mod free;
pub mod icfil;
pub mod layer;
pub mod pretrain;
pub mod training;
pub mod types;

pub use augmentation::{AffineConfig, AugmentationConfig, ColorConfig, Edge};
pub use backbone::BackboneName;
pub use bidf::{
    BidfConfig, BidfGeneratorName, ChoiceName, DistanceName, LevelsName, MixConfig, MixSpaceName,
    ReplayConfig,
};
pub use black_box::{BestName, BlackBoxConfig, EstimatorName};
pub use five::{FiveConfig, MetaGradientName, MetaOptimizerName};
pub use free::{
    AlignConfig, AlignName, DistillationConfig, FreeConfig, InnerOptimizerName, KdLossName,
    KeepName,
};
pub use icfil::IcfilConfig;
pub use layer::Layer;
pub use pretrain::PretrainConfig;
pub use training::{EarlyStopConfig, MergeClasses, MetaStart};
pub use types::{
    AccessName, EvalConfig, ExportForm, InnerConfig, InnerOrder, LearnerName, MetaConfig, Method,
    RecoverBy, RecoverConfig, RunConfig, Schedule, SurrogateName, WhiteBoxConfig,
};

use crate::error::{Error, Result, ResultExt};
use crate::zoo::yaml;

/// One setting from the environment or a flag: a dotted key, its value as YAML, and where it was
/// set, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// `meta.steps`.
    pub key: String,
    /// `100`.
    pub value: String,
    /// "environment variable `METAZOA_META__STEPS`".
    pub origin: String,
}

impl RunConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// Names file, line and nearest key; refuses another `schema_version`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::io(path, &error).context("cannot read the settings"))?;
        Self::parse(&text, path)
    }

    /// Reads the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// As [`RunConfig::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let config: Self = yaml::parse(text, path)?;
        config.check().context(|| format!("`{}`", path.display()))?;
        Ok(config)
    }

    /// The settings with `overrides` applied in order.
    ///
    /// # Errors
    /// When a key is unknown (with the nearest one), or a value does not fit.
    pub fn with_overrides(&self, overrides: &[Override]) -> Result<Self> {
        let mut config = self.clone();
        for Override { key, value, origin } in overrides {
            config = config.with_override(key, value).context(|| origin.clone())?;
        }
        config.check()?;
        Ok(config)
    }

    fn with_override(&self, key: &str, value: &str) -> Result<Self> {
        let internal = |error: serde_yaml::Error| Error::internal(error.to_string());
        let mut base = self.clone();
        if key.starts_with("eval.") {
            base.eval.get_or_insert_default();
        }
        if key.starts_with("meta.early_stop.") {
            base.meta.early_stop.get_or_insert_default();
        }
        let mut tree = serde_yaml::to_value(base).map_err(internal)?;
        let mut place = &mut tree;
        for part in key.split('.') {
            let known = keys(place);
            place = place.get_mut(part).ok_or_else(|| {
                let error = Error::usage(format!("unknown setting `{key}`"));
                match yaml::nearest(part, known.iter().map(String::as_str)) {
                    Some(near) => error.hint(format!("did you mean `{near}`?")),
                    None => error.hint(format!("known here: {}", known.join(", "))),
                }
            })?;
        }
        let refused = |error: &dyn std::fmt::Display| {
            Error::usage(format!("setting `{key}` cannot be `{value}`")).hint(error.to_string())
        };
        *place = serde_yaml::from_str(value).map_err(|error| refused(&error))?;
        serde_yaml::from_value(tree).map_err(|error| refused(&error))
    }

    /// The whole of it as YAML.
    ///
    /// # Errors
    /// Never for settings that were read or built.
    pub fn to_yaml(&self) -> Result<String> {
        serde_yaml::to_string(self)
            .map_err(|error| Error::internal(format!("cannot write the settings: `{error}`")))
    }

    fn check(&self) -> Result<()> {
        if self.schema_version != 1 {
            return Err(Error::input(format!(
                "this program reads settings of `schema_version: 1`, got `{}`",
                self.schema_version
            )));
        }
        let positive = [
            ("image_size", self.image_size[0].min(self.image_size[1])),
            ("max_models", self.max_models.unwrap_or(1)),
            ("recover.images_per_class", self.recover.images_per_class),
            ("recover.black_box.directions", self.recover.black_box.directions),
            ("recover.black_box.frequencies", self.recover.black_box.frequencies.unwrap_or(1)),
            ("recover.black_box.max_open", self.recover.black_box.max_open.unwrap_or(1)),
            ("meta.width", self.meta.width),
            ("meta.shot", self.meta.shot),
            ("meta.query", self.meta.query),
            ("meta.checkpoint_every", self.meta.checkpoint_every as usize),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::input(format!("setting must not be 0: `{name}`")));
        }
        let white = &self.recover.white_box;
        let weights = [
            ("recover.white_box.statistics_weight", white.statistics_weight),
            ("recover.white_box.lent_factor", white.lent_factor),
            ("recover.white_box.total_variation_weight", white.total_variation_weight),
            ("recover.white_box.l2_weight", white.l2_weight),
            ("curriculum.weight", self.curriculum.weight),
        ];
        if let Some((name, value)) = weights.iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return Err(Error::input(format!(
                "`{name}` must be 0 or a positive number: `{value}`"
            )));
        }
        let (by_turns, name) =
            (matches!(self.method, Method::Free | Method::BidfMkd), self.method.name());
        if by_turns && self.meta.early_stop.is_some() {
            return Err(Error::input(format!(
                "method `{name}` has no pseudo-validation: `meta.early_stop`"
            ))
            .hint("set `meta.early_stop: null`, or use method `inversion` or `purer`"));
        }
        if by_turns && self.meta.merge_classes != MergeClasses::Never {
            return Err(Error::input(format!(
                "method `{name}` keeps classes apart: `meta.merge_classes`"
            ))
            .hint("set `meta.merge_classes: never`, or use method `inversion` or `purer`"));
        }
        self.meta.augmentation.check()?;
        self.pretrain.check()?;
        self.five.check()?;
        self.free.check()?;
        self.bidf.check()?;
        if self.eval.as_ref().is_some_and(|eval| eval.data.as_os_str().is_empty()) {
            return Err(Error::input("evaluation needs images: `eval.data` is not set")
                .hint("set `eval.data` to an ImageFolder, or leave `eval` out"));
        }
        if !(0.0..=1.0).contains(&self.meta.cross_model_share) {
            return Err(Error::input(format!(
                "`meta.cross_model_share` must be between 0 and 1: `{}`",
                self.meta.cross_model_share
            )));
        }
        if let Some(early) = &self.meta.early_stop {
            early.check()?;
        }
        if self.meta.way < 2 {
            return Err(Error::input(format!("`meta.way` must be 2 or more: `{}`", self.meta.way)));
        }
        Ok(())
    }
}

fn keys(value: &Value) -> Vec<String> {
    let Value::Mapping(mapping) = value else { return Vec::new() };
    mapping.iter().filter_map(|(key, _)| key.as_str().map(str::to_owned)).collect()
}
