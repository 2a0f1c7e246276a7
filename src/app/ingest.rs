//! The use-case `ingest`: a folder of files in, specs of usable models and reasons for the rest out.
//!
//! Models are read in parallel and independently; the outcome, and every byte of `catalog.json`,
//! depends on the files alone, not on the number of workers. One bad file never stops the rest.

use std::path::PathBuf;
use std::time::Instant;

use rayon::prelude::*;

use super::{Context, ingest_probe, ingest_remote};
use crate::access::probe::Prober;
use crate::error::{Error, Result};
use crate::zoo::candidates::Paired;
use crate::zoo::catalog::{Catalog, CatalogModel};
use crate::zoo::read::Reach;
use crate::zoo::{ModelSpec, Rejection, candidates, read, walk};

/// What to ingest.
#[derive(Debug, Clone)]
pub struct IngestOptions {
    /// The folder.
    pub zoo: PathBuf,
    /// Whether `catalog.json` is written.
    pub catalog: CatalogWriting,
    /// How models may be reached.
    pub reach: Reach,
    /// How black-box models are tried out; `None` leaves them untried, with a note.
    pub probe: Option<ProbeOptions>,
}

/// What a first contact in a child process needs.
#[derive(Debug, Clone)]
pub struct ProbeOptions {
    /// This program, which answers the hidden verb `probe-model`.
    pub executable: PathBuf,
    /// The ONNX Runtime library.
    pub library: PathBuf,
}

impl ProbeOptions {
    /// What tries the files.
    pub fn prober(&self) -> Prober {
        Prober::new(&self.executable, &self.library)
    }
}

/// Whether `catalog.json` is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CatalogWriting {
    /// Write it into the zoo, unless no model can be used.
    Write,
    /// Leave the zoo's folder alone.
    Skip,
}

/// Whether a rejected model fails the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// One usable model is enough.
    Lenient,
    /// Every file must be usable.
    Strict,
}

/// What ingest found.
#[derive(Debug, Clone, PartialEq)]
pub struct Ingest {
    /// Real path of the zoo.
    pub zoo: PathBuf,
    /// Usable models by id.
    pub models: Vec<CatalogModel>,
    /// The rest by path.
    pub rejected: Vec<Rejection>,
    /// Wall time; in no result that must be reproducible.
    pub seconds: f64,
}

/// Reads every model below the zoo, on rayon's current pool.
///
/// A zoo in which no model can be used is returned as it is and [`Ingest::verdict`] refuses it, so
/// that the caller can show the reasons; the catalog is then left as it was.
///
/// # Errors
/// When the zoo is no readable folder, holds no model at all, or its catalog cannot be written;
/// when the user interrupts.
pub fn ingest(context: &Context, options: &IngestOptions) -> Result<Ingest> {
    let start = Instant::now();
    let found = walk::walk(&options.zoo)?;
    let zoo = found.root.clone();
    let Paired { candidates, remotes, mut rejected } = candidates::pair(found);
    if candidates.is_empty() && remotes.is_empty() && rejected.is_empty() {
        return Err(Error::input(format!("no model in the zoo `{}`", options.zoo.display()))
            .hint("put `.onnx` files of image classifiers there, in folders if you like"));
    }
    let count = candidates.len() + remotes.len();
    let prober = options.probe.as_ref().map(ProbeOptions::prober);
    let stage = context.progress.stage("ingest", Some(count as u64));
    let read: Vec<Option<Result<CatalogModel, Rejection>>> = candidates
        .into_par_iter()
        .map(|candidate| {
            if context.is_interrupted() {
                return None;
            }
            let outcome = read::read_candidate(&candidate, &zoo, options.reach).and_then(|model| {
                ingest_probe::try_out(model, prober.as_ref())
                    .map_err(|error| read::rejection(&candidate.file.relative, &error))
            });
            stage.advance(1);
            Some(outcome)
        })
        .collect();
    let served: Vec<Option<Result<CatalogModel, Rejection>>> = remotes
        .par_iter()
        .map(|remote| {
            let outcome = (!context.is_interrupted())
                .then(|| ingest_remote::read_remote(remote, &context.secrets));
            stage.advance(1);
            outcome
        })
        .collect();
    context.check_interrupt()?;
    drop(stage);
    let mut models = Vec::new();
    for outcome in read.into_iter().chain(served).flatten() {
        match outcome {
            Ok(model) => models.push(model),
            Err(rejection) => rejected.push(rejection),
        }
    }
    models.sort_by(|a: &CatalogModel, b| a.spec.id.cmp(&b.spec.id));
    rejected.sort_by(|a, b| a.path.cmp(&b.path));
    if options.catalog == CatalogWriting::Write && !models.is_empty() {
        Catalog::new(&zoo, &models, &rejected).write(&zoo)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Ingest { zoo, models, rejected, seconds })
}

impl Ingest {
    /// The specs of the usable models, by id.
    pub fn specs(&self) -> Vec<ModelSpec> {
        self.models.iter().map(|model| model.spec.clone()).collect()
    }

    /// Refuses a zoo without any usable model, and a rejection where `strictness` asks for it.
    ///
    /// # Errors
    /// One error (exit code 1) that names the first reason.
    pub fn verdict(&self, strictness: Strictness) -> Result<()> {
        let Some(first) = self.rejected.first() else { return Ok(()) };
        let count = self.rejected.len();
        let message = if self.models.is_empty() {
            let files = if count == 1 {
                "the only file is".into()
            } else {
                format!("all {count} files are")
            };
            format!("no usable model in the zoo, {files} rejected `{}`", self.zoo.display())
        } else if strictness == Strictness::Strict {
            format!("{count} of {} files are rejected", count + self.models.len())
        } else {
            return Ok(());
        };
        let advice = first.hint.as_deref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        let start = if count == 1 { "" } else { "first: " };
        Err(Error::input(message)
            .hint(format!("{start}`{}`: {}{advice}", first.path, first.reason)))
    }
}
