//! Settings of method `bidf-mkd`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::free::DistillationConfig;
use crate::error::{Error, Result};

/// BiDf-MKD (ICML 2023): images bought by queries while the meta-model learns from them. Rounds, images a class, classes
/// and the weight of the boundary are those of `five`; directions and budgets those of `recover.black_box`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BidfConfig {
    /// The generator of the images.
    pub generator: BidfGeneratorName,
    /// Whom to visit.
    pub choice: ChoiceName,
    /// Visits that choice `knowledge` pays a model before it begins another one.
    pub depth: u64,
    /// What distils the models' answers.
    pub levels: LevelsName,
    /// How, on both levels.
    pub distillation: DistillationConfig,
    /// What the boundary holds apart.
    pub boundary_distance: DistanceName,
    /// Updates of the meta-model before the boundary counts.
    pub boundary_after: u64,
    /// Learning from the memory between rounds; null goes from round to round.
    pub replay: Option<ReplayConfig>,
    /// Image sets of a model that are remembered; a visit makes two.
    pub sets_kept: usize,
    /// Memory for images, MiB; what does not fit is on disk alone.
    pub memory_mib: usize,
}

/// The generator of the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BidfGeneratorName {
    /// One for all models, adapted in `five.steps` steps: some twenty times fewer queries an image.
    Shared,
    /// One drawn anew for each set, trained for `recover.black_box.steps` steps, as in the paper.
    Fresh,
}

/// Whom to visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ChoiceName {
    /// The models of which the meta-model knows least, for each query (docs/bidf-mkd.md holds both against each other).
    Knowledge,
    /// Models at random, as in the paper.
    Uniform,
}

/// What distils the models' answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LevelsName {
    /// Inner loop and outer loss (the paper).
    Both,
    /// The outer loss; the inner loop learns the wanted classes.
    Outer,
    /// Neither: no step on visits, their images go to the memory alone.
    Off,
}

/// What the boundary holds apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DistanceName {
    /// The divergence of the answers.
    Kl,
    /// The L1 distance of the logits, as the published program does.
    LogitL1,
}

/// Learning from tasks that recombine the classes of all models in the memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayConfig {
    /// Updates without a better accuracy, after which the next round of visits follows.
    pub patience: u64,
    /// Leaves out images that their own model puts into another class.
    pub only_agreed: bool,
    /// The remembered answers in tasks of one model; null for the wanted classes alone.
    pub distillation: Option<DistillationConfig>,
    /// Interpolation of two tasks; null for none.
    pub mix: Option<MixConfig>,
}

/// Interpolation of two tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MixConfig {
    /// Where.
    pub space: MixSpaceName,
    /// Of the share's distribution, Beta(alpha, alpha); at most 4.
    pub alpha: f64,
}

/// Where tasks are mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MixSpaceName {
    /// The images.
    Pixels,
    /// Their embeddings.
    Features,
}

impl BidfConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.sets_kept < 2 {
            return Err(Error::input(format!(
                "a visit makes two sets, `bidf.sets_kept` must be 2 or more: `{}`",
                self.sets_kept
            )));
        }
        if self.depth == 0 {
            return Err(Error::input("`bidf.depth` must be 1 or more: `0`"));
        }
        self.distillation.check("bidf.distillation")?;
        let Some(replay) = &self.replay else {
            if self.levels == LevelsName::Off {
                return Err(Error::input(
                    "nothing is learned: `bidf.replay` is null and `bidf.levels` is off",
                )
                .hint("set `bidf.levels` to `both` or `outer`, or `bidf.replay` to {}"));
            }
            return Ok(());
        };
        if let Some(own) = &replay.distillation {
            own.check("bidf.replay.distillation")?;
        }
        match &replay.mix {
            Some(mix) if !(mix.alpha > 0.0 && mix.alpha <= 4.0) => Err(Error::input(format!(
                "`bidf.replay.mix.alpha` must be above 0 and at most 4: `{}`",
                mix.alpha
            ))),
            _ => Ok(()),
        }
    }
}

impl Default for BidfConfig {
    fn default() -> Self {
        Self {
            generator: BidfGeneratorName::Shared,
            choice: ChoiceName::Uniform,
            depth: 8,
            levels: LevelsName::Both,
            distillation: DistillationConfig { weight: 1.0, ..DistillationConfig::default() },
            boundary_distance: DistanceName::Kl,
            boundary_after: 0,
            replay: Some(ReplayConfig::default()),
            sets_kept: 8,
            memory_mib: 1024,
        }
    }
}

impl Default for ReplayConfig {
    fn default() -> Self {
        Self { patience: 40, only_agreed: true, distillation: None, mix: None }
    }
}

impl Default for MixConfig {
    fn default() -> Self {
        Self { space: MixSpaceName::Features, alpha: 0.5 }
    }
}
