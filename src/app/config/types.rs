//! The settings themselves, with their defaults: what a YAML file may hold.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BackboneName;
use super::augmentation::AugmentationConfig;
use super::bidf::BidfConfig;
use super::black_box::BlackBoxConfig;
use super::five::FiveConfig;
use super::free::FreeConfig;
use super::icfil::IcfilConfig;
use super::pretrain::PretrainConfig;
use super::training::{EarlyStopConfig, MergeClasses, MetaStart};

/// Everything that decides what a run does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Version of this format: 1.
    pub schema_version: u32,
    /// The folder of models.
    pub zoo: PathBuf,
    /// The method.
    pub method: Method,
    /// Seed of all randomness.
    pub seed: u64,
    /// `[height, width]` of recovered images and of the meta-model's input.
    pub image_size: [usize; 2],
    /// Use only the first so many accepted models, in order of their ids; null uses all.
    pub max_models: Option<usize>,
    /// Recovering images from the models.
    pub recover: RecoverConfig,
    /// How the models are reached.
    pub access: AccessName,
    /// The generator that all models share, of methods `free` and `bidf-mkd` and where `recover.by` is `five`.
    pub five: FiveConfig,
    /// Distillation before meta-training, where `meta.start` is `distilled`.
    pub pretrain: PretrainConfig,
    /// Meta-training on the recovered images.
    pub meta: MetaConfig,
    /// How images and meta-model take turns, of method `free`.
    pub free: FreeConfig,
    /// How queries are spent and learned from, of method `bidf-mkd`.
    pub bidf: BidfConfig,
    /// How the images move in meta-training, of method `purer`.
    pub curriculum: CurriculumConfig,
    /// Calibration at test time, of `eval --icfil`.
    pub icfil: IcfilConfig,
    /// Evaluation after training; null skips it.
    pub eval: Option<EvalConfig>,
    /// What `run` exports.
    pub export: Vec<ExportForm>,
}

/// The data-free meta-learning method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Plain inversion: pixels (white-box) or a generator (black-box), then a ProtoNet on what was
    /// recovered.
    Inversion,
    /// PURER's episode curriculum inversion: after that inversion the images go on moving while the meta-model learns
    /// from them, and get harder when it stops improving.
    Purer,
    /// FREE: images by one generator for all models, in a few steps each, while the meta-model learns from them.
    Free,
    /// BiDf-MKD: images bought by queries from models that can only be asked, while the meta-model learns what the models
    /// answer.
    BidfMkd,
}

/// How the models of a run are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AccessName {
    /// Each as its sidecar says, white-box where it can be.
    Auto,
    /// None is more than asked: no gradient is taken from any graph.
    BlackBox,
}

impl Method {
    /// The name in settings and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Inversion => "inversion",
            Self::Purer => "purer",
            Self::Free => "free",
            Self::BidfMkd => "bidf-mkd",
        }
    }
}

/// Recovering images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RecoverConfig {
    /// What images are recovered with.
    pub by: RecoverBy,
    /// Images a class of each model.
    pub images_per_class: usize,
    /// Most images recovered in one batch; a model of many classes is done in blocks of classes.
    pub batch: usize,
    /// By gradients, from white-box models.
    pub white_box: WhiteBoxConfig,
    /// By queries, from black-box models.
    pub black_box: BlackBoxConfig,
}

/// What images are recovered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RecoverBy {
    /// Free pixels for white-box models, a generator of its own for each that can only be asked.
    Pixels,
    /// A generator of its own for each model.
    Generator,
    /// One generator for all, adapted to each model in a few steps (FIVE).
    Five,
}

/// Pixel inversion (PURER sec. 2.2; DeepInversion).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WhiteBoxConfig {
    /// Optimiser steps.
    pub steps: usize,
    /// Adam's learning rate, in units of the canonical image's range.
    pub learning_rate: f64,
    /// Share of the learning rate left at the last step (half a cosine between).
    pub final_rate: f64,
    /// Weight of the normalisation statistics, shared among a model's layers.
    pub statistics_weight: f32,
    /// The statistics of models that hold none (normalisation folded, or another kind).
    pub surrogate: SurrogateName,
    /// Models of the zoo, at most, that lend their statistics to those that have none even so (layer
    /// normalisation, transformers); 0 for none.
    pub lenders: usize,
    /// Weight of lent statistics, times `statistics_weight`.
    pub lent_factor: f32,
    /// Weight of the total variation.
    pub total_variation_weight: f32,
    /// Weight of the L2 norm.
    pub l2_weight: f32,
    /// Largest random shift, pixels.
    pub jitter: usize,
}

/// Statistics that stand in where a model has no BatchNormalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SurrogateName {
    /// `unit` where BatchNormalization looks folded into the weights, else `off`.
    Auto,
    /// Mean 0 and variance 1 after each convolution, in units estimated from its weights: what a folded
    /// BatchNormalization makes.
    Unit,
    /// What the model makes of procedural images.
    Procedural,
    /// None.
    Off,
}

/// Meta-training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MetaConfig {
    /// The embedding network.
    pub backbone: BackboneName,
    /// Channels of Conv4.
    pub width: usize,
    /// The weights that training starts from.
    pub start: MetaStart,
    /// The few-shot rule.
    pub learner: LearnerName,
    /// Gradient steps on the support set, of `anil` and `maml`.
    pub inner: InnerConfig,
    /// Steps of the outer optimiser.
    pub steps: u64,
    /// Episodes a step (the meta-batch); their gradients are averaged.
    pub episodes_per_step: usize,
    /// Classes in an episode.
    pub way: usize,
    /// Support images a class.
    pub shot: usize,
    /// Query images a class.
    pub query: usize,
    /// Adam's learning rate.
    pub learning_rate: f64,
    /// How the learning rate moves.
    pub schedule: Schedule,
    /// Share of the episodes that mix classes of several models, 0 to 1.
    pub cross_model_share: f64,
    /// Whether classes of several models count as one where sidecars give them one name.
    pub merge_classes: MergeClasses,
    /// What is done to the images of an episode.
    pub augmentation: AugmentationConfig,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Early stop on recovered classes that are held out; null trains all steps on all classes.
    pub early_stop: Option<EarlyStopConfig>,
}

/// Episode curriculum inversion (PURER sec. 3.2).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CurriculumConfig {
    /// White-box models whose images take an inversion step after each step of meta-training.
    pub candidates: usize,
    /// Adam's learning rate in these steps, in units of the canonical image's range.
    pub learning_rate: f64,
    /// Weight of the outer loss when images are made harder; 0 for inversion alone.
    pub weight: f32,
    /// Steps of meta-training before images are first made harder.
    pub warm_up: u64,
    /// Steps without a better accuracy after which they are again.
    pub patience: u64,
    /// Memory for moving images and their optimisers, MiB; what does not fit is on disk.
    pub memory_mib: usize,
}

/// The few-shot rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LearnerName {
    /// Nearest class mean of embeddings.
    ProtoNet,
    /// A linear head takes gradient steps on the support set.
    Anil,
    /// All weights do.
    Maml,
}

/// Gradient steps on the support set (methods.md 1.5).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InnerConfig {
    /// Steps in meta-training.
    pub train_steps: usize,
    /// Steps on a new task.
    pub test_steps: usize,
    /// Their learning rate.
    pub learning_rate: f64,
    /// Which derivatives of the steps the outer gradient sees.
    pub order: InnerOrder,
}

/// Which derivatives of the inner steps the outer gradient sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InnerOrder {
    /// All: exact, through the steps.
    Second,
    /// The steps' gradients count as constants.
    First,
}

/// How the learning rate moves over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// It stays.
    Constant,
    /// Half a cosine down to 0.
    Cosine,
}

/// Evaluation on real images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// A data set in any layout that is read (docs/benchmarks.md), or a list.
    pub data: PathBuf,
    /// Its split; null when it has none.
    pub split: Option<String>,
    /// Classes in an episode.
    pub way: usize,
    /// Support images a class; one evaluation each.
    pub shots: Vec<usize>,
    /// Query images a class.
    pub query: usize,
    /// Episodes.
    pub episodes: u64,
}

/// The form of an exported meta-model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExportForm {
    /// Images in, embeddings out.
    Embedding,
    /// Support images, support labels and query images in, logits out.
    Episode,
}

impl ExportForm {
    /// The name in settings and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Episode => "episode",
        }
    }
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            schema_version: 1,
            zoo: "zoo".into(),
            method: Method::Inversion,
            seed: 0,
            image_size: [32, 32],
            max_models: None,
            access: AccessName::Auto,
            recover: RecoverConfig::default(),
            five: FiveConfig::default(),
            pretrain: PretrainConfig::default(),
            meta: MetaConfig::default(),
            free: FreeConfig::default(),
            bidf: BidfConfig::default(),
            curriculum: CurriculumConfig::default(),
            icfil: IcfilConfig::default(),
            eval: None,
            export: vec![ExportForm::Embedding, ExportForm::Episode],
        }
    }
}

impl Default for RecoverConfig {
    fn default() -> Self {
        Self {
            by: RecoverBy::Pixels,
            images_per_class: 12,
            batch: 120,
            white_box: WhiteBoxConfig::default(),
            black_box: BlackBoxConfig::default(),
        }
    }
}

impl Default for WhiteBoxConfig {
    fn default() -> Self {
        Self {
            steps: 150,
            learning_rate: 0.025,
            final_rate: 0.05,
            statistics_weight: 0.2,
            surrogate: SurrogateName::Auto,
            lenders: 8,
            lent_factor: 5.0,
            total_variation_weight: 1e-3,
            l2_weight: 1e-5,
            jitter: 2,
        }
    }
}

impl Default for MetaConfig {
    fn default() -> Self {
        Self {
            backbone: BackboneName::Conv4,
            width: crate::meta::backbone::STANDARD_WIDTH,
            start: MetaStart::Random,
            learner: LearnerName::ProtoNet,
            inner: InnerConfig::default(),
            steps: 600,
            episodes_per_step: 1,
            way: 5,
            shot: 5,
            query: 7,
            learning_rate: 2e-3,
            schedule: Schedule::Cosine,
            cross_model_share: 1.0,
            merge_classes: MergeClasses::Never,
            augmentation: AugmentationConfig::default(),
            checkpoint_every: 100,
            early_stop: None,
        }
    }
}

impl Default for CurriculumConfig {
    fn default() -> Self {
        Self {
            candidates: 1,
            learning_rate: 0.002,
            weight: 10.0,
            warm_up: 200,
            patience: 6,
            memory_mib: 1024,
        }
    }
}

impl Default for InnerConfig {
    fn default() -> Self {
        // Those of BiDf-MKD and FREE (methods.md 1.5).
        Self { train_steps: 5, test_steps: 10, learning_rate: 0.01, order: InnerOrder::Second }
    }
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            data: PathBuf::new(),
            split: None,
            way: 5,
            shots: vec![1, 5],
            query: 15,
            episodes: 600,
        }
    }
}
