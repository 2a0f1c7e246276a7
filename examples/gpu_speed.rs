//! An inversion step on a GPU: our side of `benches/reference/gpu.py`, which holds it against PyTorch on the same card.
//!
//! ```text
//! gpu_speed [--steps N] [--device cuda[:I][+tf32]] step FILE BATCH       whole steps that stay on the card
//! gpu_speed [--device cuda[:I][+tf32]] values FILE BATCH OUT.safetensors gradient, logits and losses of one
//! ```
//!
//! Each of the N steps (50) prints its milliseconds on a line, after five that are not counted; a step ends with its
//! scalars on the host. Needs the feature `cuda`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use metazoa::access::{Objective, PixelTask, Surrogate, Teacher, WhiteTeacher};
use metazoa::methods::parts::CrossEntropy;
use metazoa::tensor::cuda::Device as Machine;
use metazoa::tensor::cuda::driver::Card;
use metazoa::tensor::{AdamOptions, Device, Images, RngStream, TensorStore};
use metazoa::{Error, Result, onnx, zoo};

/// Steps before the first that counts.
const WARM: usize = 5;

fn number(text: &str) -> Result<usize> {
    text.parse().map_err(|_| Error::usage(format!("not a whole number: `{text}`")))
}

/// The value after `name`, taken out of the arguments.
fn option(arguments: &mut Vec<String>, name: &str) -> Option<String> {
    let at =
        arguments.iter().position(|word| word == name).filter(|at| at + 1 < arguments.len())?;
    arguments.remove(at);
    Some(arguments.remove(at))
}

/// The model on the card, and the labels of `batch` images.
fn open(file: &str, batch: &str, device: Device) -> Result<(WhiteTeacher, Vec<usize>)> {
    let Device::Cuda(index, products) = device else {
        return Err(Error::usage("`--device` must be a GPU"));
    };
    let path = Path::new(file);
    let folder = path.parent().ok_or_else(|| Error::usage("name a file"))?;
    let spec = zoo::read::read_file(path)?.spec;
    let labels = (0..number(batch)?).map(|i| i % spec.classes).collect();
    let card: Arc<dyn Machine> = Card::open(index, products)?;
    eprintln!("on {}", card.describe());
    let teacher = WhiteTeacher::new(spec, onnx::load(path, folder)?.graph, Surrogate::Off)?;
    Ok((teacher.on_device(&card)?, labels))
}

fn values(teacher: &WhiteTeacher, labels: Vec<usize>, out: &str) -> Result<()> {
    let [_, height, width] = teacher.spec().preprocess.input_size;
    let shape = [labels.len(), 3, height, width];
    let mut rng = RngStream::new(0, "gpu-speed", "images", 0);
    let pixels = (0..shape.iter().product()).map(|_| rng.uniform()).collect();
    let images = Images::new(pixels, shape)?;
    let loss = CrossEntropy::new(labels);
    let objective = Objective { logits: &loss, statistics_weight: 1.0 };
    let found = teacher.image_gradient(&images, &objective, &mut rng)?;
    let mut store = TensorStore::default();
    store.insert("images", &shape, images.data().to_vec());
    store.insert("gradient", &shape, found.gradient.data().to_vec());
    store.insert("logits", &[shape[0], teacher.spec().classes], found.logits);
    store.insert("losses", &[2], vec![found.logits_loss as f32, found.statistics_loss as f32]);
    store.save(Path::new(out))
}

fn steps(teacher: &WhiteTeacher, labels: &[usize], count: usize) -> Result<()> {
    let [_, height, width] = teacher.spec().preprocess.input_size;
    let mut rng = RngStream::new(0, "gpu-speed", "pixels", 0);
    let start = rng.normals(labels.len() * 3 * height * width);
    let task = PixelTask {
        start: &start,
        size: [height, width],
        labels,
        standard: [0.5, 0.25, 2.0],
        statistics: 1.0 / teacher.statistics_layers().max(1) as f32,
        total_variation: 0.0,
        norm: 0.0,
        adam: AdamOptions::STANDARD,
    };
    let pixels = teacher.resident(&task)?;
    let mut pixels =
        pixels.ok_or_else(|| Error::unsupported("this model's input is not made on the card"))?;
    for step in 0..WARM + count {
        let begin = Instant::now();
        pixels.step([1, -1], 0.01)?;
        if step >= WARM {
            println!("{:.4}", begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let count = option(&mut arguments, "--steps").map_or(Ok(50), |text| number(&text))?;
    let device = option(&mut arguments, "--device").map_or(Ok("cuda".into()), Ok::<_, Error>)?;
    let device: Device = device.parse()?;
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["step", file, batch] => {
            let (teacher, labels) = open(file, batch, device)?;
            steps(&teacher, &labels, count)
        }
        ["values", file, batch, out] => {
            let (teacher, labels) = open(file, batch, device)?;
            values(&teacher, labels, out)
        }
        _ => Err(Error::usage("the head of examples/gpu_speed.rs lists the cases")),
    }
}
