//! The meta-model: backbone, few-shot rule, meta-training.
//!
//! A [`Backbone`] embeds images, [`protonet`] classifies queries by the distance to the class means,
//! [`Trainer`] meta-trains on episodes drawn from any [`ClassSource`] (in a run: the bank of recovered
//! images). A backbone is one of ours or comes from a classifier's ONNX file; [`MetaModel::adapt`] makes an
//! ordinary [`Classifier`] of a learner. Nothing here knows where images come from or how teachers are reached.

pub mod adapt;
mod architectures;
pub mod augment;
pub mod backbone;
pub mod distill;
pub mod drawn;
pub mod early_stop;
pub mod episodes;
pub mod export;
pub mod feedback;
pub mod icfil;
pub mod learner;
mod mean;
mod onnx_file;
pub mod pretrain;
pub mod protonet;
pub mod task;
pub mod train;

pub use adapt::{Classifier, SupportImages};
pub use architectures::Architecture;
pub use augment::{AffineMap, Augmentation, ColourMap, ShiftEdge};
pub use backbone::{Backbone, BnMode};
pub use distill::{Distillation, KdLoss, SoftLabels, SoftSupport};
pub use drawn::DrawnClasses;
pub use early_stop::{EarlyStop, Samplers};
pub use episodes::{ClassSource, Episode, EpisodeSampler};
pub use feedback::PixelGradient;
pub use icfil::{CalibrationLoss, Contrast, IcfilConfig};
pub use learner::{InnerLoop, InnerOrder, Learner, MetaModel};
pub use pretrain::{Answers, PretrainConfig, Pretrainer};
pub use protonet::{Classification, classify};
pub use task::{Partner, Task};
pub use train::{
    Iteration, Lesson, Limits, Mix, MixSpace, Schedule, Sources, StepSeconds, StopReason,
    TaskGradient, TrainConfig, Trainer, mean_gradient,
};
