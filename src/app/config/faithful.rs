//! Settings of the published programs, for comparisons (methods.md 1.5, 2.5, 3.7, 4.5): what changes numbers, defects included.

use super::{Method, Override};

/// What FREE's program does (methods.md 4).
const FREE: &[(&str, &str)] = &[
    ("five.models", "4"),
    ("five.images_per_class", "20"),
    ("five.classes", "5"),
    ("five.steps", "5"),
    ("five.learning_rate", "0.001"),
    ("five.latent_learning_rate", "0.001"),
    ("five.class_spread", "null"),
    // No statistics; the boundary term from the first kept round on.
    ("five.statistics_weight", "0"),
    ("five.boundary_weight", "1"),
    ("five.jitter", "4"),
    ("five.meta_gradient", "last-step"),
    // Adam's moments are lost from round to round.
    ("five.meta_optimizer", "fresh"),
    ("five.meta_learning_rate", "0.001"),
    ("five.latent", "256"),
    ("five.features", "64"),
    ("free.warm_up", "19"),
    ("free.patience", "10"),
    ("free.only_agreed", "false"),
    ("free.visits_kept", "20"),
    // Three quarters of what was recovered is thrown away.
    ("free.keep", "last"),
    ("free.align", "{by: sequential, optimizer: adam, learning_rate: 0.001, scale: 67}"),
    // Its divergence is none.
    ("free.distillation", "{kd_loss: linear, temperature: 1, weight: 1}"),
    ("free.cross_task", "null"),
    ("meta.learner", "maml"),
    ("meta.inner", "{train_steps: 5, test_steps: 10, learning_rate: 0.01, order: second}"),
    ("meta.episodes_per_step", "10"),
    ("meta.query", "15"),
];

/// What PURER's program does (methods.md 2).
const PURER: &[(&str, &str)] = &[
    // Images start as noise.
    ("recover.by", "pixels"),
    ("recover.white_box.steps", "0"),
    ("recover.white_box.statistics_weight", "0.01"),
    ("recover.white_box.total_variation_weight", "0.0001"),
    ("recover.white_box.l2_weight", "0.00001"),
    ("recover.white_box.jitter", "2"),
    ("recover.images_per_class", "20"),
    // All teachers step after each update, 0.25 in standardised pixels.
    ("curriculum.candidates", "1000000"),
    ("curriculum.learning_rate", "0.0625"),
    ("curriculum.weight", "10"),
    ("curriculum.warm_up", "4000"),
    ("curriculum.patience", "6"),
    ("meta.learner", "maml"),
    ("meta.inner", "{train_steps: 1, test_steps: 1, learning_rate: 0.01, order: second}"),
    ("meta.episodes_per_step", "4"),
    ("meta.query", "15"),
];

/// What BiDf-MKD's program does (methods.md 3).
const BIDF: &[(&str, &str)] = &[
    ("bidf.generator", "fresh"),
    ("bidf.choice", "uniform"),
    ("bidf.levels", "both"),
    // Its divergence is none.
    ("bidf.distillation", "{kd_loss: linear, temperature: 1, weight: 1}"),
    ("bidf.boundary_distance", "logit-l1"),
    ("bidf.boundary_after", "4000"),
    // Two hundred groups of four episodes.
    ("bidf.replay", "{patience: 200, only_agreed: false, distillation: null, mix: null}"),
    // Twenty sets of thirty images a class.
    ("bidf.sets_kept", "20"),
    ("five.models", "1"),
    ("five.images_per_class", "30"),
    ("five.classes", "5"),
    ("five.boundary_weight", "1"),
    ("recover.black_box.steps", "200"),
    ("recover.black_box.learning_rate", "0.001"),
    ("recover.black_box.latent", "256"),
    ("recover.black_box.features", "64"),
    ("recover.black_box.best", "surrogate"),
    ("recover.black_box.estimator", "forward"),
    ("recover.black_box.directions", "100"),
    ("recover.black_box.smoothing", "0.005"),
    ("meta.learner", "maml"),
    ("meta.inner", "{train_steps: 10, test_steps: 10, learning_rate: 0.01, order: second}"),
    ("meta.episodes_per_step", "4"),
    ("meta.query", "15"),
];

/// What all do.
const ALL: &[(&str, &str)] = &[
    ("meta.start", "random"),
    ("meta.backbone", "conv4"),
    ("meta.width", "32"),
    ("meta.learning_rate", "0.001"),
    ("meta.schedule", "constant"),
    ("meta.cross_model_share", "1"),
    ("meta.augmentation", "{shift: 0, color: null}"),
    ("meta.early_stop", "null"),
];

impl Method {
    /// The settings of the method's published program, `None` where there is none.
    pub fn faithful(self) -> Option<Vec<Override>> {
        let own = match self {
            Self::Inversion => return None,
            Self::Purer => PURER,
            Self::Free => FREE,
            Self::BidfMkd => BIDF,
        };
        let one = |(key, value): &(&str, &str)| Override {
            key: (*key).into(),
            value: (*value).into(),
            origin: "flag `--faithful`".into(),
        };
        Some(ALL.iter().chain(own).map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::config::RunConfig;

    /// Every key is one of the settings, and every value fits.
    #[test]
    fn presets_are_settings() {
        for method in [Method::Purer, Method::Free, Method::BidfMkd] {
            let base = RunConfig { method, ..RunConfig::default() };
            let config = base.with_overrides(&method.faithful().unwrap()).unwrap();
            assert_ne!(config, base);
            assert_eq!(config.meta.augmentation.color, None);
        }
        assert_eq!(Method::Inversion.faithful(), None);
    }
}
