//! `metazoa setup`: fetch ONNX Runtime.

use clap::{Args, ValueEnum};

use crate::app::setup::{self, Cuda, SetupOptions};
use crate::cli::Outcome;
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::error::Result;

/// Arguments of `setup`.
#[derive(Debug, Args)]
pub(crate) struct SetupArgs {
    /// Fetch the GPU build for this major version of CUDA instead (2.5 GB)
    #[arg(long, value_name = "MAJOR")]
    cuda: Option<CudaMajor>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CudaMajor {
    #[value(name = "13")]
    V13,
    #[value(name = "12")]
    V12,
}

/// Fetches ONNX Runtime into metazoa's cache unless it is there.
pub(crate) fn run(args: &SetupArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let cuda = match args.cuda {
        None => Cuda::None,
        Some(CudaMajor::V13) => Cuda::V13,
        Some(CudaMajor::V12) => Cuda::V12,
    };
    printer.note(&format!("looking for ONNX Runtime in `{}`", settings.cache_dir.display()));
    let result = setup::setup(&SetupOptions {
        cache_dir: settings.cache_dir.clone(),
        cuda,
        python: "python3".into(),
    })?;
    setup::verify(&result)?;
    printer.result(&result, |result| {
        let what = if result.already_there { "already there" } else { "fetched" };
        format!("ONNX Runtime {} {what}: {}", result.version, result.library.display())
    })?;
    Ok(Outcome::Done)
}
