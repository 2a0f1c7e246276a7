//! Inversion with all of a step on the (emulated) device against inversion driven by the processor.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use super::*;
use crate::access::{Surrogate, WhiteTeacher};
use crate::onnx;
use crate::tensor::cuda::{Device, emulation};
use crate::zoo::read;

fn teacher(path: &Path) -> WhiteTeacher {
    let spec = read::read_file(path).unwrap().spec;
    let graph = onnx::load(path, path.parent().unwrap()).unwrap().graph;
    WhiteTeacher::new(spec, graph, Surrogate::Off).unwrap()
}

/// Images, and what was seen at each step.
fn inverted(teacher: &WhiteTeacher, size: [usize; 2], steps: usize) -> (Images, Vec<[f64; 3]>) {
    let config = InvertConfig {
        steps,
        learning_rate: 0.05,
        final_rate: 0.1,
        statistics: 0.2,
        total_variation: 0.3,
        size: 0.1,
        jitter: 3,
    };
    let seen: Mutex<Vec<[f64; 3]>> = Mutex::default();
    let interrupt = AtomicBool::new(false);
    let observe = |i: &RecoverIteration| seen.lock().unwrap().push([i.loss, i.statistics, i.prior]);
    let watch = Watch { observe: &observe, interrupt: &interrupt };
    let images = invert(teacher, &[0, 2, 1], size, &config, 5, 0, &watch).unwrap();
    (images, seen.into_inner().unwrap())
}

#[test]
fn inversion_on_a_device_is_inversion_on_the_processor() {
    let Some(emulated) = emulation::open() else { return };
    let device: Arc<dyn Device> = emulated.clone();
    let zoo = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("zoo");
    for (name, size) in [
        ("sh_000_glyphs_conv4_64", [32, 32]),
        ("sh_000_glyphs_conv4_64", [37, 29]),
        ("mh_006_glyphs_senet_sigmoid", [20, 24]),
        ("edge_nhwc_uint8", [40, 33]),
    ] {
        let path = zoo.join(format!("{name}.onnx"));
        let (host, on) = (teacher(&path), teacher(&path).on_device(&device).unwrap());
        let labels = vec![0, 2, 1];
        let loss = CrossEntropy::new(labels);
        let objective = Objective { logits: &loss, statistics_weight: 0.3 };
        let mut rng = RngStream::new(2, "device", name, 0);
        let [h, w] = size;
        let images = Images::new(
            rng.normals(9 * h * w).iter().map(|v| (0.5 + 0.2 * v).clamp(0.0, 1.0)).collect(),
            [3, 3, h, w],
        );
        let images = images.unwrap();
        let ours = host.image_gradient(&images, &objective, &mut rng).unwrap();
        let theirs = on.image_gradient(&images, &objective, &mut rng).unwrap();
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-4 * (1e-2 + b.abs());
        assert!(near(theirs.logits_loss, ours.logits_loss), "{name}");
        assert!(near(theirs.statistics_loss, ours.statistics_loss), "{name}");
        let gap = distance(theirs.gradient.data(), ours.gradient.data());
        assert!(gap < 1e-3, "{name}: gradient {gap:.1e}");
        assert!(distance(&theirs.logits, &ours.logits) < 1e-4, "{name}");

        let before = emulated.launches();
        let (ours, ours_seen) = inverted(&host, size, 6);
        let (theirs, theirs_seen) = inverted(&on, size, 6);
        let steps = |kernel| emulated.launches()[kernel] - before.get(kernel).unwrap_or(&0);
        assert_eq!((steps("adam_step"), steps("pixels_backward")), (6, 6), "{name}");
        assert_eq!(ours_seen.len(), theirs_seen.len());
        for (a, b) in theirs_seen.iter().zip(&ours_seen) {
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() <= 2e-3 * (1e-2 + b.abs()), "{name}: {a} for {b}");
            }
        }
        // Adam's first steps have nearly the sign of the gradient: where that is rounding alone, pixels part.
        let apart = theirs.data().iter().zip(ours.data()).filter(|(a, b)| (*a - *b).abs() > 1e-3);
        let share = apart.count() as f64 / ours.data().len() as f64;
        println!("{name} {size:?}: {share:.1e} of the pixels differ by more than 1e-3");
        assert!(share < 2e-2, "{name}: {share:.1e} of the pixels differ");
        emulated.check_guards();
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let gap = length(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    gap / length(&mut b.iter().map(|&v| f64::from(v))).max(1e-30)
}
