//! Milliseconds of inversion steps (forward, statistics, gradient to the pixels) of one model.
//!
//! `cargo run --example step_speed -- zoo/ss_001_glyphs_conv4_32.onnx 64 20`: batch 64, 20 steps, each
//! step's time on a line. benches/reference/step_speed.py holds it against PyTorch.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use metazoa::access::{Objective, Surrogate, Teacher, WhiteTeacher};
use metazoa::methods::parts::CrossEntropy;
use metazoa::tensor::{Images, RngStream};
use metazoa::{Error, Result, onnx, zoo};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |at: usize, default| arguments.get(at).and_then(|v| v.parse().ok()).unwrap_or(default);
    let path = arguments.first().map_or("zoo/ss_001_glyphs_conv4_32.onnx", String::as_str);
    let (batch, steps): (usize, usize) = (number(1, 64), number(2, 20));
    let path = Path::new(path);
    let folder = path.parent().ok_or_else(|| Error::usage("name a file"))?;
    let spec = zoo::read::read_file(path)?.spec;
    let [_, height, width] = spec.preprocess.input_size;
    let classes = spec.classes;
    let teacher = WhiteTeacher::new(spec, onnx::load(path, folder)?.graph, Surrogate::Off)?;
    let mut rng = RngStream::new(0, "step-speed", "", 0);
    let pixels = (0..batch * 3 * height * width).map(|_| rng.uniform()).collect();
    let images = Images::new(pixels, [batch, 3, height, width])?;
    let loss = CrossEntropy::new((0..batch).map(|i| i % classes).collect());
    let objective = Objective { logits: &loss, statistics_weight: 1.0 };
    // The first step compiles and takes memory.
    teacher.image_gradient(&images, &objective, &mut rng)?;
    for _ in 0..steps {
        let begin = Instant::now();
        teacher.image_gradient(&images, &objective, &mut rng)?;
        println!("{:.3}", begin.elapsed().as_secs_f64() * 1e3);
    }
    Ok(())
}
