//! `metazoa adapt RUN IMAGES --out CLASSIFIER.onnx`: a user's own classes as a ready classifier.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;

use crate::app::RunFolder;
use crate::app::adapt::{AdaptOptions, AdaptResult, adapt};
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, startup};
use crate::error::{Error, Result};

/// Arguments of `adapt`.
#[derive(Debug, Args)]
pub(crate) struct AdaptArgs {
    /// The run folder
    run: PathBuf,
    /// Your images, one folder a class (IMAGES/CLASS/*.png)
    #[arg(required_unless_present = "support", conflicts_with = "support")]
    images: Option<PathBuf>,
    /// Another way to name IMAGES
    #[arg(long, value_name = "IMAGES")]
    support: Option<PathBuf>,
    /// The split, where IMAGES has several
    #[arg(long, value_name = "S")]
    split: Option<String>,
    /// Learn from K images a class, drawn by --seed, and report the accuracy on the others [default: all]
    #[arg(long, value_name = "K")]
    shot: Option<std::num::NonZeroUsize>,
    /// The file to write; its labels also go into a sidecar beside it
    #[arg(long, value_name = "CLASSIFIER.onnx")]
    out: PathBuf,
}

/// Writes the classifier, checked against ONNX Runtime, and prints what it learned from.
pub(crate) fn run(args: &AdaptArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let context = startup::context(settings, printer)?;
    let images = args.images.as_ref().or(args.support.as_ref());
    let images = images.ok_or_else(|| Error::usage("no images: give IMAGES"))?;
    let options = AdaptOptions {
        images: images.clone(),
        split: args.split.clone(),
        shot: args.shot.map(usize::from),
        out: args.out.clone(),
    };
    let result = adapt(&RunFolder::open(&args.run)?, &options, &context)?;
    printer.result(&result, table)?;
    Ok(Outcome::Done)
}

fn table(result: &AdaptResult) -> String {
    let mut text = format!(
        "{} ({} bytes, opset {}, within {:.1e} of ONNX Runtime on {} images)\n",
        result.path.display(),
        result.bytes,
        result.opset,
        result.max_abs_diff_ort,
        result.images
    );
    let labels = result.sidecar.display();
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        text,
        "{} classes by {} ({}), labels in {labels}",
        result.way,
        result.learner,
        result.bn.name()
    );
    let width = result.classes.iter().map(|class| class.name.chars().count()).max().unwrap_or(0);
    for class in &result.classes {
        let _ = write!(text, "{:width$} {:6} images", class.name, class.support);
        if class.held_out > 0 {
            let _ = write!(text, ", {} held out", class.held_out);
        }
        text.push('\n');
    }
    let percent = 100.0 * result.support_accuracy;
    let _ = writeln!(text, "{percent:.1} % of the images it learned from are recognised");
    if let Some(accuracy) = result.held_out_accuracy {
        let _ = writeln!(text, "{:.1} % of the others are", 100.0 * accuracy);
    }
    text
}
