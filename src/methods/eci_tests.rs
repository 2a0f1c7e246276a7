use super::*;
use crate::meta::{
    Augmentation, Backbone, ClassSource, ColourMap, Episode, InnerLoop, InnerOrder, Learner,
    MetaModel, Schedule, ShiftEdge, TrainConfig,
};
use crate::methods::parts::{ImageBank, ModelImages};
use crate::tensor::Images;

/// Images of noise from three models of three classes, six a class.
fn bank() -> ImageBank {
    let mut bank = ImageBank::default();
    for model in 0..3_u64 {
        let mut rng = RngStream::new(model, "eci-tests", "", 0);
        let values = (0..18 * 3 * 64).map(|_| rng.uniform()).collect();
        let images = Images::new(values, [18, 3, 8, 8]).unwrap();
        let labels = ["a", "b", "c"].map(str::to_owned).to_vec();
        let classes = (0..18).map(|i| i / 6).collect();
        bank.push(ModelImages::new(&format!("m{model}"), labels, classes, &images)).unwrap();
    }
    bank
}

/// Moves the pixels of a model, without a teacher.
fn nudge(set: &DynamicSet<'_>, model: usize, times: usize) {
    for _ in 0..times {
        let pixels = set.pixels(model).unwrap();
        let (mut store, step) = (pixels.to_store(), pixels.steps() + 1);
        let mut rng = RngStream::new(model as u64, "nudge", "", step);
        for value in &mut store.tensors.get_mut("z").unwrap().data {
            *value += 0.1 * rng.normal();
        }
        store.words.insert("steps".into(), step.to_string());
        set.replace(model, FreePixels::from_store(&store, pixels.shape()).unwrap()).unwrap();
    }
}

fn all_images(set: &DynamicSet<'_>) -> Vec<f32> {
    let mut all = Vec::new();
    for class in 0..set.n_classes() {
        for index in 0..set.images_in(class) {
            let mut own = vec![0.0; 3 * 64];
            set.read(class, index, &mut own).unwrap();
            all.extend(own);
        }
    }
    all
}

#[test]
fn memory_decides_where_images_are_and_not_what_they_are() {
    let (bank, folder) = (bank(), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name);
    let [rich, poor] = [("rich", usize::MAX), ("poor", 0)]
        .map(|(name, memory)| DynamicSet::new(&bank, &path(name), memory));
    let start = all_images(&rich);
    for set in [&rich, &poor] {
        for (model, times) in [(0, 2), (2, 1), (0, 1)] {
            nudge(set, model, times);
        }
    }
    let moved = all_images(&rich);
    assert_eq!(moved, all_images(&poor));
    assert_ne!(moved, start);
    assert!(!path("rich").exists(), "nothing had to leave memory");
    // The middle model has not moved: its images are those of the bank.
    assert_eq!(moved[18 * 192..36 * 192], start[18 * 192..36 * 192]);
    let files = |name: &str| {
        let entries = std::fs::read_dir(path(name)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };

    let mut store = TensorStore::default();
    poor.write_to(&mut store).unwrap();
    poor.commit();
    assert_eq!(files("poor"), ["000000-3.safetensors", "000002-1.safetensors"]);
    nudge(&poor, 0, 2);
    nudge(&poor, 1, 1);
    assert_ne!(all_images(&poor), moved);
    // Versions that a checkpoint names stay until the next; those in between do not pile up.
    assert_eq!(
        files("poor"),
        [
            "000000-3.safetensors",
            "000000-5.safetensors",
            "000001-1.safetensors",
            "000002-1.safetensors"
        ]
    );
    let again = DynamicSet::new(&bank, &path("poor"), 0);
    again.restore(&store).unwrap();
    assert_eq!(all_images(&again), moved);
    assert!(DynamicSet::new(&ImageBank::default(), &path("poor"), 0).restore(&store).is_err());
}

#[test]
fn images_get_harder_when_no_accuracy_is_better_for_a_while() {
    let config = EciConfig {
        seed: 0,
        candidates: 1,
        rate: 0.1,
        weight: 10.0,
        warm_up: 4,
        patience: 3,
        invert: InvertConfig {
            steps: 1,
            learning_rate: 0.1,
            final_rate: 1.0,
            statistics: 0.0,
            total_variation: 0.0,
            size: 0.0,
            jitter: 0,
        },
    };
    let mut feedback = Feedback { best: None, since: 0 };
    let accuracies = [0.1, 0.2, 0.9, 0.9, 0.5, 0.6, 0.6, 0.2, 0.55, 0.1, 0.3, 0.2, 0.1, 0.3];
    let told: Vec<usize> = (1..)
        .zip(accuracies)
        .filter_map(|(step, accuracy)| {
            feedback.tell(&config, step, accuracy).then_some(step as usize)
        })
        .collect();
    // After the warm-up; then 0.6 stays the best for three updates; then 0.3 does.
    assert_eq!(told, [4, 9, 14]);
}

/// Nine classes of six images, 16 pixels wide, that can be moved along a direction.
struct Plain {
    images: Vec<f32>,
    moved: Vec<((usize, usize), Vec<f32>)>,
    by: f32,
}

impl ClassSource for Plain {
    fn n_classes(&self) -> usize {
        9
    }

    fn images_in(&self, _class: usize) -> usize {
        6
    }

    fn source_model(&self, class: usize) -> usize {
        class / 3
    }

    fn image_size(&self) -> [usize; 2] {
        [16, 16]
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        pixels.copy_from_slice(&self.images[(class * 6 + index) * 768..][..768]);
        for (_, direction) in self.moved.iter().filter(|(image, _)| *image == (class, index)) {
            pixels.iter_mut().zip(direction).for_each(|(p, d)| *p += self.by * d);
        }
        Ok(())
    }
}

#[test]
fn the_gradient_of_an_episode_tells_how_its_loss_moves_with_the_pixels() {
    let order = InnerOrder::Second;
    let inner = InnerLoop { train_steps: 2, test_steps: 2, learning_rate: 0.05, order };
    let colour = Some(ColourMap { identity: 1.0, matrix: 0.4, offset: 0.1 });
    for learner in [Learner::ProtoNet, Learner::Anil(inner), Learner::Maml(inner)] {
        let config = TrainConfig {
            seed: 1,
            way: 3,
            shot: 2,
            query: 2,
            steps: 1,
            episodes_per_step: 1,
            learning_rate: 1e-3,
            schedule: Schedule::Constant,
            cross_model_share: 1.0,
            augmentation: Augmentation { shift: 2, edge: ShiftEdge::Nearest, affine: None, colour },
            early_stop: None,
        };
        let model = MetaModel::new(Backbone::conv4(4, 2).unwrap(), learner, [16, 16], 1).unwrap();
        let trainer = Trainer::new(config, model);
        let images = RngStream::new(3, "plain", "", 0).normals(9 * 6 * 768);
        let images = images.iter().map(|v| 0.5 + 0.2 * v).collect();
        let mut source = Plain { images, moved: Vec::new(), by: 0.0 };
        let mut rng = RngStream::new(0, "test", "", 0);
        let samplers = trainer.samplers(&source).unwrap();
        let found = trainer.pixel_gradient(&source, samplers.train(), &mut rng).unwrap();
        assert!((found.loss - trainer.outer_loss(&source, &found).unwrap()).abs() < 1e-6);
        let parts = found.gradient.chunks_exact(768).map(<[f32]>::to_vec);
        source.moved = found.episode.images.iter().copied().zip(parts).collect();
        let square: f64 = found.gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        let mut at = |by: f64| {
            source.by = by as f32;
            trainer.outer_loss(&source, &found).unwrap()
        };
        let h = 2e-3 / square;
        let slope = (at(h) - at(-h)) / (2.0 * h);
        let error = (slope - square).abs() / square;
        assert!(error < 0.02, "{}: {slope:e} along the gradient, not {square:e}", learner.name());
    }
}

#[test]
fn a_gradient_to_an_episode_goes_to_the_images_it_is_of() {
    let (bank, folder) = (bank(), tempfile::tempdir().unwrap());
    let set = DynamicSet::new(&bank, folder.path(), usize::MAX);
    let episode = Episode {
        images: vec![(7, 2), (0, 5), (7, 0)],
        support_labels: vec![0],
        query_labels: vec![1, 0],
    };
    let gradient: Vec<f32> = (0..3 * 192).map(|i| (i / 192 + 1) as f32).collect();
    let pulls = set.by_model(&episode, &gradient, -10.0);
    assert_eq!(pulls.iter().map(|(model, _)| *model).collect::<Vec<_>>(), [0, 2]);
    let filled = |pull: &[f32]| -> Vec<(usize, f32)> {
        let images =
            pull.chunks_exact(192).enumerate().filter(|(_, g)| g.iter().any(|v| *v != 0.0));
        images.map(|(at, g)| (at, g.iter().sum::<f32>() / 192.0)).collect()
    };
    assert_eq!(filled(&pulls[0].1), [(5, -20.0)]);
    assert_eq!(filled(&pulls[1].1), [(6, -30.0), (8, -10.0)]);
}
