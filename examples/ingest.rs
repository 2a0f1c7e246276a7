//! Which models of a folder can be used, how, and what had to be inferred about them.
//!
//! `cargo run --example ingest [ZOO]`
#![allow(clippy::print_stdout)]

use metazoa::app::Context;
use metazoa::app::ingest::{CatalogWriting, IngestOptions, ingest};
use metazoa::zoo::catalog::Provenance;
use metazoa::zoo::read::Reach;

fn main() -> metazoa::Result<()> {
    let zoo = std::env::args().nth(1).unwrap_or_else(|| "zoo".into());
    let options = IngestOptions {
        zoo: zoo.into(),
        catalog: CatalogWriting::Skip,
        probe: None,
        reach: Reach::AsFound,
    };
    let found = ingest(&Context::silent(0), &options)?;
    for model in &found.models {
        let spec = &model.spec;
        let [channels, height, width] = spec.preprocess.input_size;
        println!(
            "{}: {:?}, {} classes of {channels}x{height}x{width}, {} normalisation layers",
            spec.id, spec.access, spec.classes, spec.norm_taps
        );
        let inferred = |source: &Provenance| *source == Provenance::Inferred;
        let keys = model.provenance.iter().filter(|(_, source)| inferred(source));
        println!("  inferred: {:?}", keys.map(|(key, _)| key.as_str()).collect::<Vec<_>>());
        for note in &model.notes {
            println!("  {note}");
        }
    }
    for rejection in &found.rejected {
        println!("{}: rejected, {}", rejection.path, rejection.reason);
    }
    println!("{} usable, {} rejected", found.models.len(), found.rejected.len());
    Ok(())
}
