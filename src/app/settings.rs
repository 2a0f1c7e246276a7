//! From the settings a user writes to the configurations the layers below take.

use super::config::{
    AlignName, BackboneName, BestName, BidfGeneratorName, ChoiceName, DistanceName,
    DistillationConfig, Edge, EstimatorName, InnerOptimizerName, InnerOrder, KdLossName, KeepName,
    LearnerName, LevelsName, MetaGradientName, MetaOptimizerName, MixSpaceName, RunConfig,
    Schedule, SurrogateName,
};
use super::run_folder::RunFolder;
use crate::access::zero_order::{Estimator, ZeroOrder};
use crate::access::{BlackOptions, Surrogate};
use crate::error::{Result, ResultExt};
use crate::meta::{
    self, AffineMap, Architecture, Augmentation, Backbone, ColourMap, Distillation, InnerLoop,
    KdLoss, Learner, MetaModel, MixSpace, PretrainConfig, ShiftEdge, TrainConfig,
};
use crate::methods::generate::Best;
use crate::methods::invert::UNIT;
use crate::methods::parts::Distance;
use crate::methods::{
    Align, BidfConfig, BoundaryConfig, Choice, EciConfig, FiveConfig, FreeConfig, GenerateConfig,
    Inner, InvertConfig, Keep, Levels, MetaGenerator, MetaGradient, RecoverConfig, Recovery,
    ReplayConfig, RoundConfig, Via,
};
use crate::zoo::ModelSpec;

/// Images asked of a black-box model at once.
const QUERY_BATCH: usize = 128;
/// Directions packed into one request.
const PACK: usize = 1024;

/// How images are recovered.
pub fn recover_config(config: &RunConfig) -> RecoverConfig {
    let (white, black) = (&config.recover.white_box, &config.recover.black_box);
    RecoverConfig {
        seed: config.seed,
        image_size: config.image_size,
        images_per_class: config.recover.images_per_class,
        batch: config.recover.batch,
        white_box: InvertConfig {
            steps: white.steps,
            learning_rate: white.learning_rate / f64::from(UNIT),
            final_rate: white.final_rate,
            statistics: white.statistics_weight,
            total_variation: white.total_variation_weight,
            size: white.l2_weight,
            jitter: white.jitter,
        },
        black_box: GenerateConfig {
            steps: black.steps,
            learning_rate: black.learning_rate,
            latent: black.latent,
            features: black.features,
            statistics: white.statistics_weight,
            best: match black.best {
                BestName::Loss => Best::Loss,
                BestName::Surrogate => Best::Surrogate,
            },
            tangents: match black.estimator {
                EstimatorName::Guided => black.directions,
                _ => 0,
            },
        },
    }
}

/// How the meta-generator is made and trained.
pub fn five_config(config: &RunConfig) -> FiveConfig {
    let own = &config.five;
    FiveConfig {
        seed: config.seed,
        image_size: config.image_size,
        latent: own.latent,
        features: own.features,
        steps: own.steps,
        rate: own.learning_rate,
        latent_rate: own.latent_learning_rate,
        class_spread: own.class_spread,
        statistics: own.statistics_weight,
        boundary: own.boundary_weight,
        jitter: own.jitter,
        meta: match own.meta_gradient {
            MetaGradientName::LastStep => MetaGradient::LastStep,
            MetaGradientName::AllSteps => MetaGradient::AllSteps,
            MetaGradientName::Reptile => MetaGradient::Reptile,
        },
        meta_rate: own.meta_learning_rate,
        forgetful: own.meta_optimizer == MetaOptimizerName::Fresh,
        redraw: own.redraw,
    }
}

/// What a round of visits is.
pub fn round_config(config: &RunConfig) -> RoundConfig {
    let own = &config.five;
    RoundConfig {
        seed: config.seed,
        models: own.models,
        images_per_class: own.images_per_class,
        classes: own.classes,
    }
}

/// How FREE trains.
pub fn free_config(config: &RunConfig) -> FreeConfig {
    let own = &config.free;
    FreeConfig {
        seed: config.seed,
        round: round_config(config),
        warm_up: own.warm_up,
        patience: own.patience,
        only_agreed: own.only_agreed,
        align: match own.align.by {
            AlignName::Sequential => Align::Sequential(Inner {
                rate: own.align.learning_rate,
                adam: own.align.optimizer == InnerOptimizerName::Adam,
                scale: own.align.scale,
            }),
            AlignName::Joint => Align::Joint,
            AlignName::Off => Align::Off,
        },
        distillation: distillation(&own.distillation),
        cross: own.cross_task.as_ref().map(distillation),
        keep: match own.keep {
            KeepName::All => Keep::All,
            KeepName::Last => Keep::Last,
        },
    }
}

/// How BiDf-MKD trains.
pub fn bidf_config(config: &RunConfig) -> BidfConfig {
    let own = &config.bidf;
    BidfConfig {
        seed: config.seed,
        image_size: config.image_size,
        round: round_config(config),
        choice: match own.choice {
            ChoiceName::Knowledge => Choice::Knowledge { depth: own.depth },
            ChoiceName::Uniform => Choice::Uniform,
        },
        levels: match own.levels {
            LevelsName::Both => Levels::Both,
            LevelsName::Outer => Levels::Outer,
            LevelsName::Off => Levels::Off,
        },
        distillation: distillation(&own.distillation),
        boundary: BoundaryConfig {
            weight: config.five.boundary_weight,
            distance: match own.boundary_distance {
                DistanceName::Kl => Distance::Kl,
                DistanceName::LogitL1 => Distance::LogitL1,
            },
            after: own.boundary_after,
        },
        replay: own.replay.as_ref().map(|replay| ReplayConfig {
            patience: replay.patience,
            only_agreed: replay.only_agreed,
            soft: replay.distillation.as_ref().map(distillation),
            mix: replay.mix.as_ref().map(|mix| match mix.space {
                MixSpaceName::Pixels => (MixSpace::Pixels, mix.alpha),
                MixSpaceName::Features => (MixSpace::Features, mix.alpha),
            }),
        }),
    }
}

/// What BiDf-MKD's images are made by.
///
/// # Errors
/// When the image size is no multiple of 4.
pub fn bidf_recovery(config: &RunConfig) -> Result<Recovery> {
    Ok(match config.bidf.generator {
        BidfGeneratorName::Shared => {
            Recovery::Shared(Box::new(MetaGenerator::new(five_config(config))?))
        }
        BidfGeneratorName::Fresh => Recovery::Fresh(recover_config(config).black_box),
    })
}

fn distillation(own: &DistillationConfig) -> Distillation {
    Distillation {
        loss: match own.kd_loss {
            KdLossName::Kl => KdLoss::Kl,
            KdLossName::Linear => KdLoss::Linear,
        },
        temperature: own.temperature,
        weight: own.weight,
    }
}

/// How the images move in meta-training.
pub fn eci_config(config: &RunConfig) -> EciConfig {
    let own = &config.curriculum;
    EciConfig {
        seed: config.seed,
        candidates: own.candidates,
        rate: own.learning_rate / f64::from(UNIT),
        weight: own.weight,
        warm_up: own.warm_up,
        patience: own.patience,
        invert: recover_config(config).white_box,
    }
}

/// How a model is calibrated at test time.
pub fn icfil_config(config: &RunConfig) -> meta::IcfilConfig {
    let own = &config.icfil;
    meta::IcfilConfig {
        images_per_class: own.images_per_class,
        inversion_steps: own.inversion_steps,
        inversion_rate: own.inversion_learning_rate / f64::from(UNIT),
        total_variation: own.total_variation_weight,
        size: own.l2_weight,
        steps: own.steps,
        rate: own.learning_rate,
        head_steps: own.head_steps,
        head_rate: own.head_learning_rate,
    }
}

/// Which statistics stand in for those a model does not hold.
pub fn surrogate(config: &RunConfig) -> Surrogate {
    match config.recover.white_box.surrogate {
        SurrogateName::Auto => Surrogate::Auto,
        SurrogateName::Unit => Surrogate::Unit,
        SurrogateName::Procedural => Surrogate::Procedural,
        SurrogateName::Off => Surrogate::Off,
    }
}

impl RecoverConfig {
    /// Steps that the recovery of a model takes, for progress.
    pub fn steps(&self, spec: &ModelSpec, via: Via<'_>) -> usize {
        let per_block = (self.batch / self.images_per_class.max(1)).max(1);
        via.steps(spec.access, self) * spec.classes.div_ceil(per_block)
    }
}

/// How black-box models are asked.
pub fn black_options(config: &RunConfig) -> BlackOptions {
    let black = &config.recover.black_box;
    let side = config.image_size[0].min(config.image_size[1]);
    BlackOptions {
        zero_order: ZeroOrder {
            estimator: estimator(black.estimator),
            directions: black.directions,
            radius: black.smoothing,
            frequencies: black.frequencies.unwrap_or(side.div_ceil(4)),
            pack: PACK,
        },
        batch: QUERY_BATCH,
    }
}

fn estimator(name: EstimatorName) -> Estimator {
    match name {
        EstimatorName::Forward => Estimator::Forward,
        EstimatorName::Antithetic => Estimator::Antithetic,
        EstimatorName::Orthogonal => Estimator::Orthogonal,
        EstimatorName::LowFrequency => Estimator::LowFrequency,
        EstimatorName::Guided => Estimator::Guided,
        EstimatorName::Prior => Estimator::Prior,
        EstimatorName::PriorLowFrequency => Estimator::PriorLowFrequency,
        EstimatorName::HardLabel => Estimator::HardLabel,
    }
}

/// The meta-model before training.
///
/// # Errors
/// When the images are too small for its backbone, or its file cannot be trained.
pub fn untrained_model(config: &RunConfig) -> Result<MetaModel> {
    let meta = &config.meta;
    let architecture = match &meta.backbone {
        BackboneName::Conv4 => Architecture::Conv4 { width: meta.width },
        BackboneName::ResNet10 => Architecture::ResNet10,
        BackboneName::ResNet12 => Architecture::ResNet12,
        BackboneName::ResNet18 => Architecture::ResNet18,
        BackboneName::File(path) => {
            let backbone = Backbone::from_onnx(path, config.image_size)?;
            return MetaModel::new(backbone, learner(config), config.image_size, config.seed)
                .context(|| format!("backbone `{}`", path.display()));
        }
    };
    let backbone = Backbone::new(architecture, config.seed)?;
    MetaModel::new(backbone, learner(config), config.image_size, config.seed)
}

/// The meta-model that the training of `run` started from: kept in its folder where it was not drawn by the seed.
///
/// # Errors
/// As [`untrained_model`], and when what was kept is damaged.
pub fn starting_model(run: &RunFolder, config: &RunConfig) -> Result<MetaModel> {
    let kept = run.start();
    if kept.is_file() { MetaModel::load(&kept) } else { untrained_model(config) }
}

/// What the start of `run` is distilled from: kept in its folder where it came from a file.
///
/// # Errors
/// As [`starting_model`].
pub fn undistilled_model(run: &RunFolder, config: &RunConfig) -> Result<MetaModel> {
    let kept = run.undistilled();
    if kept.is_file() { MetaModel::load(&kept) } else { untrained_model(config) }
}

/// The few-shot rule.
pub fn learner(config: &RunConfig) -> Learner {
    let meta = &config.meta;
    let inner = InnerLoop {
        train_steps: meta.inner.train_steps,
        test_steps: meta.inner.test_steps,
        learning_rate: meta.inner.learning_rate,
        order: match meta.inner.order {
            InnerOrder::Second => meta::InnerOrder::Second,
            InnerOrder::First => meta::InnerOrder::First,
        },
    };
    match meta.learner {
        LearnerName::ProtoNet => Learner::ProtoNet,
        LearnerName::Anil => Learner::Anil(inner),
        LearnerName::Maml => Learner::Maml(inner),
    }
}

/// How the meta-model is trained.
pub fn train_config(config: &RunConfig) -> TrainConfig {
    let own = &config.meta;
    TrainConfig {
        seed: config.seed,
        way: own.way,
        shot: own.shot,
        query: own.query,
        steps: own.steps,
        episodes_per_step: own.episodes_per_step,
        learning_rate: own.learning_rate,
        schedule: match own.schedule {
            Schedule::Constant => meta::Schedule::Constant,
            Schedule::Cosine => meta::Schedule::Cosine,
        },
        cross_model_share: own.cross_model_share,
        augmentation: augmentation(config),
        early_stop: own.early_stop.as_ref().map(|own| meta::EarlyStop {
            share: own.share,
            every: own.every,
            patience: own.patience,
        }),
    }
}

/// What is done to images that the meta-model learns from.
fn augmentation(config: &RunConfig) -> Augmentation {
    let own = &config.meta.augmentation;
    Augmentation {
        shift: own.shift,
        edge: match own.edge {
            Edge::Grey => ShiftEdge::Grey,
            Edge::Nearest => ShiftEdge::Nearest,
        },
        affine: own.affine.as_ref().map(|map| AffineMap {
            rotation: map.rotation,
            scale: map.scale,
            shear: map.shear,
        }),
        colour: own.color.as_ref().map(|color| ColourMap {
            identity: color.identity,
            matrix: color.matrix,
            offset: color.offset,
        }),
    }
}

/// How answers are distilled before meta-training.
pub fn pretrain_config(config: &RunConfig) -> PretrainConfig {
    let own = &config.pretrain;
    PretrainConfig {
        seed: config.seed,
        steps: own.steps,
        batch: own.batch,
        learning_rate: own.learning_rate,
        temperature: own.temperature,
        augmentation: augmentation(config),
    }
}
