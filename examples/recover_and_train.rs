//! The core of the library without the command: images out of three models, a learner out of the
//! images. Far fewer steps than `metazoa run` takes, so that it ends in seconds.
//!
//! `cargo run --example recover_and_train`
#![allow(clippy::print_stdout)]

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use metazoa::access::WhiteTeacher;
use metazoa::app::ingest::{CatalogWriting, IngestOptions, ingest};
use metazoa::app::{Context, RunConfig, settings};
use metazoa::meta::{Backbone, Limits, Trainer};
use metazoa::methods::parts::ImageBank;
use metazoa::methods::{Via, Watch, recover_one};
use metazoa::zoo::read::Reach;
use metazoa::{Result, onnx};

fn main() -> Result<()> {
    let options = IngestOptions {
        zoo: "zoo".into(),
        catalog: CatalogWriting::Skip,
        probe: None,
        reach: Reach::AsFound,
    };
    let found = ingest(&Context::silent(0), &options)?;
    let mut config = RunConfig::read("examples/quickstart.yaml".as_ref())?;
    config.recover.white_box.steps = 40;
    config.meta.steps = 60;
    let watch = Watch { observe: &|_| (), interrupt: &AtomicBool::new(false) };
    let mut bank = ImageBank::default();
    for spec in found.specs().into_iter().filter(|spec| spec.id.starts_with("ss_")) {
        let model = onnx::load(&spec.path, &found.zoo)?;
        let teacher = WhiteTeacher::new(spec, model.graph, settings::surrogate(&config))?;
        let recovered =
            recover_one(&teacher, &settings::recover_config(&config), Via::Pixels, &watch)?;
        let share = 100.0 * recovered.agreement;
        println!("{}: the model agrees with {share:.0} % of its images", recovered.images.id);
        bank.push(recovered.images)?;
    }
    let mut trainer = Trainer::new(settings::train_config(&config), Backbone::conv4(32, 0)?);
    let reason = trainer.run(&bank, Limits::default(), &mut |_, step| {
        if step.step % 20 == 0 {
            println!("step {}: loss {:.3}, accuracy {:.2}", step.step, step.loss, step.accuracy);
        }
        ControlFlow::Continue(())
    })?;
    println!("{reason:?} after {} steps on {} images", trainer.step(), bank.len());
    trainer.backbone().save(&std::env::temp_dir().join("metazoa_example.safetensors"))
}
