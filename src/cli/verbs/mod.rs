//! One file a verb: its arguments and the call of its use-case.

pub(crate) mod adapt;
pub(crate) mod bench;
pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod ingest;
pub(crate) mod inspect;
pub(crate) mod invert;
pub(crate) mod probe_model;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod schema;
pub(crate) mod setup;
pub(crate) mod train;
