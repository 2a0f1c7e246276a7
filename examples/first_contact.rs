//! What first contact with a model costs (docs/black-box.md, "First contact"), in milliseconds:
//!
//! `cargo build && cargo run --example first_contact -- ZOO|MODEL.onnx...`
//!
//! `all` is what a file costs in the process that tries them (its start, some 50 ms, is paid once a worker); `open` ONNX Runtime's opening of the file and `runs`
//! the test runs, each in a new process where the library is loaded already and no other model was opened: what the first opening costs anyone.
//! `beyond` is what the border of the process costs: all - open - runs. `warm` is open and runs where the same file was
//! opened before and the memory that it takes lies ready. Medians of five, one model at a time.
#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use metazoa::access::library::RuntimeOptions;
use metazoa::access::probe::{ProbeLimits, ProbeRequest, Prober, child};
use metazoa::access::runtime::Runtime;
use metazoa::{Error, Result};

const ROUNDS: usize = 5;
/// First word of a call of this program by itself.
const COLD: &str = "--cold";

fn main() -> Result<()> {
    let here = std::env::current_exe().map_err(|error| Error::io(Path::new("."), &error))?;
    // target/debug/examples/first_contact: the command lies one folder up.
    let executable = here.ancestors().nth(2).unwrap_or(Path::new(".")).join("metazoa");
    let cache = std::env::var("HOME").unwrap_or_default() + "/.cache/metazoa";
    let runtime = Runtime::load(&RuntimeOptions::new(cache))?;
    let library = runtime.library().path.clone();
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [first, what, model] = words.as_slice()
        && first == COLD
    {
        let model = Path::new(model);
        let took = match what.as_str() {
            "open" => timed(|| runtime.open(model))?,
            _ => timed(|| child::answer(&request(model, &library)?))?,
        };
        println!("{took}");
        return Ok(());
    }
    let prober = Prober::new(&executable, &library);
    println!("| model | MB | all | open | runs | beyond | warm |\n|---|---|---|---|---|---|---|");
    let mut worst: f64 = 0.0;
    for path in words.iter().flat_map(|word| models(Path::new(word))) {
        let text = request(&path, &library)?;
        let bytes = std::fs::metadata(&path).map_err(|error| Error::io(&path, &error))?.len();
        let mut times: [Vec<f64>; 4] = Default::default();
        for _ in 0..ROUNDS {
            times[0].push(timed(|| prober.probe(&path, None, &ProbeLimits::for_size(bytes)))?);
            times[1].push(cold(&here, "open", &path)?);
            times[2].push(cold(&here, "answer", &path)?);
            times[3].push(timed(|| child::answer(&text))?);
        }
        let [all, open, answer, warm] = times.map(median);
        worst = worst.max(all - answer);
        println!(
            "| {} | {:.1} | {all:.0} | {open:.0} | {:.0} | {:.0} | {warm:.0} |",
            path.file_stem().unwrap_or_default().to_string_lossy(),
            bytes as f64 / 1e6,
            answer - open,
            all - answer
        );
    }
    println!("\nmost beyond opening and runs: {worst:.0} ms");
    Ok(())
}

fn request(model: &Path, library: &Path) -> Result<String> {
    let (model, library) = (model.to_path_buf(), library.to_path_buf());
    serde_json::to_string(&ProbeRequest { model, library, input: None })
        .map_err(|error| Error::internal(format!("no request: `{error}`")))
}

/// What `what` takes in a new process.
fn cold(here: &Path, what: &str, model: &Path) -> Result<f64> {
    let mut command = std::process::Command::new(here);
    let said = command.args([COLD, what]).arg(model).output();
    let said = said.map_err(|error| Error::io(here, &error))?;
    let text = String::from_utf8_lossy(&said.stdout);
    text.trim().parse().map_err(|_| Error::internal(format!("no time but `{text}`")))
}

/// A file, or the models of a folder by name.
fn models(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return vec![path.to_path_buf()] };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "onnx"));
    files.sort();
    files
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(1e3 * begin.elapsed().as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
