//! Few-shot accuracy of anything that turns an image into a vector: here of the zoo itself, whose
//! scores, one model after the other, are the vector. No training; a baseline for what training adds.
//!
//! `cargo run --example few_shot_eval`
#![allow(clippy::print_stdout)]

use metazoa::access::{Surrogate, Teacher, WhiteTeacher};
use metazoa::app::eval::{Baselines, Calibration, EvalOptions, evaluate};
use metazoa::app::ingest::{CatalogWriting, IngestOptions, ingest};
use metazoa::app::{BatchNorm, Context, Embedder};
use metazoa::data::EpisodeShape;
use metazoa::tensor::Images;
use metazoa::zoo::read::Reach;
use metazoa::{Result, onnx, zoo::Access};

/// The scores of all teachers side by side.
struct Committee(Vec<WhiteTeacher>);

impl Embedder for Committee {
    fn image_size(&self) -> [usize; 2] {
        [32, 32]
    }

    fn dim(&self) -> usize {
        self.0.iter().map(|teacher| teacher.spec().classes).sum()
    }

    fn embed(&self, images: &Images, _: BatchNorm) -> Result<Vec<f32>> {
        let mut rows = vec![Vec::new(); images.shape()[0]];
        for teacher in &self.0 {
            let logits = teacher.logits(images)?;
            let scores = logits.chunks_exact(teacher.spec().classes);
            rows.iter_mut().zip(scores).for_each(|(row, scores)| row.extend_from_slice(scores));
        }
        Ok(rows.concat())
    }
}

fn main() -> Result<()> {
    let context = Context::silent(0);
    let options = IngestOptions {
        zoo: "zoo".into(),
        catalog: CatalogWriting::Skip,
        probe: None,
        reach: Reach::AsFound,
    };
    let mut committee = Committee(Vec::new());
    for spec in ingest(&context, &options)?.specs() {
        if spec.access == Access::WhiteBox && spec.id.starts_with("ss_") {
            let model = onnx::load(&spec.path, "zoo".as_ref())?;
            committee.0.push(WhiteTeacher::new(spec, model.graph, Surrogate::Off)?);
        }
    }
    let options = EvalOptions {
        data: "zoo/images/glyphs".into(),
        split: Some("meta_test".into()),
        shape: EpisodeShape { way: 5, shot: 5, query: 15 },
        episodes: 200,
        batch_norm: BatchNorm::Inductive,
        baselines: Baselines::Simple,
        real_data: None,
        calibration: Calibration::Skip,
        against: None,
    };
    let (result, _) = evaluate(&committee, &[], &options, &context)?;
    println!("{} models: {:.3} +- {:.3}", committee.0.len(), result.accuracy, result.ci95);
    result
        .baselines
        .iter()
        .for_each(|(name, b)| println!("{name}: {:.3} +- {:.3}", b.accuracy, b.ci95));
    Ok(())
}
