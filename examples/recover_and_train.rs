//! The core of the library without the command: images out of three models, a learner out of the
//! images. Far fewer steps than `metazoa run` takes, so that it ends in seconds.
//!
//! `cargo run --example recover_and_train`
#![allow(clippy::print_stdout)]

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use metazoa::access::WhiteTeacher;
use metazoa::app::Context;
use metazoa::app::ingest::{CatalogWriting, IngestOptions, ingest};
use metazoa::meta::{Backbone, Limits, Trainer};
use metazoa::methods::parts::ImageBank;
use metazoa::methods::{Watch, recover_one};
use metazoa::{Result, onnx};

fn main() -> Result<()> {
    let options = IngestOptions { zoo: "zoo".into(), catalog: CatalogWriting::Skip, probe: None };
    let found = ingest(&Context::silent(0), &options)?;
    let watch = Watch { observe: &|_| (), interrupt: &AtomicBool::new(false) };
    let mut bank = ImageBank::default();
    for spec in found.specs().into_iter().filter(|spec| spec.id.starts_with("ss_")) {
        let model = onnx::load(&spec.path, &found.zoo)?;
        let teacher = WhiteTeacher::new(spec, model.graph)?;
        let recovered = recover_one(&teacher, &settings::recover(), &watch)?;
        let share = 100.0 * recovered.agreement;
        println!("{}: the model agrees with {share:.0} % of its images", recovered.images.id);
        bank.push(recovered.images)?;
    }
    let mut trainer = Trainer::new(settings::train(), Backbone::conv4(32, 0)?);
    let reason = trainer.run(&bank, Limits::default(), &mut |_, step| {
        if step.step % 20 == 0 {
            println!("step {}: loss {:.3}, accuracy {:.2}", step.step, step.loss, step.accuracy);
        }
        ControlFlow::Continue(())
    })?;
    println!("{reason:?} after {} steps on {} images", trainer.step(), bank.len());
    trainer.backbone().save(&std::env::temp_dir().join("metazoa_example.safetensors"))
}

/// What a run takes from its YAML file, here by hand.
mod settings {
    use metazoa::meta::{Augmentation, ColourMap, Schedule, ShiftEdge, TrainConfig};
    use metazoa::methods::{GenerateConfig, InvertConfig, RecoverConfig};

    pub fn recover() -> RecoverConfig {
        RecoverConfig {
            seed: 0,
            image_size: [32, 32],
            images_per_class: 12,
            batch: 60,
            white_box: InvertConfig {
                steps: 40,
                learning_rate: 0.1,
                final_rate: 0.05,
                statistics: 1.0,
                total_variation: 1e-3,
                size: 1e-5,
                jitter: 2,
            },
            black_box: GenerateConfig { steps: 1, learning_rate: 1e-3, latent: 64, features: 16 },
        }
    }

    pub fn train() -> TrainConfig {
        TrainConfig {
            seed: 0,
            way: 5,
            shot: 5,
            query: 7,
            steps: 60,
            learning_rate: 2e-3,
            schedule: Schedule::Cosine,
            cross_model_share: 1.0,
            augmentation: Augmentation {
                shift: 2,
                edge: ShiftEdge::Nearest,
                colour: Some(ColourMap { identity: 0.5, matrix: 0.5, offset: 0.2 }),
            },
        }
    }
}
