//! How a zoo becomes a bank of labelled images: recovery of what each teacher knows.
//!
//! Methods see a model only as `&dyn Teacher`; whether its gradients are exact or estimated changes
//! what they cost, not what is called. [`recover()`] runs the recovery of all teachers side by side;
//! [`invert`] frees pixels under exact gradients (PURER sec. 2.2, DeepInversion), [`generate`] trains a
//! generator on estimated ones (BiDf-MKD sec. 3.3).

pub mod bidf;
pub mod eci;
pub mod five;
pub mod free;
pub mod generate;
pub mod invert;
pub mod parts;
mod recover;
pub mod rounds;
pub mod schedule;

pub use bidf::{
    Bidf, BidfConfig, BidfEvent, BidfRound, BoundaryConfig, Levels, Recovery, ReplayConfig,
};
pub use eci::{Eci, EciConfig, EciStep, Hardening};
pub use five::{FiveConfig, MetaGenerator, MetaGradient, Visit};
pub use free::{Align, Free, FreeConfig, FreeEvent, Inner, Keep};
pub use generate::GenerateConfig;
pub use invert::InvertConfig;
pub use recover::{
    Opener, RecoverConfig, RecoverItem, RecoverIteration, RecoverStop, Recovered, Via, Watch,
    recover, recover_one,
};
pub use rounds::{Round, RoundConfig, Visited, draw};
pub use schedule::Choice;
