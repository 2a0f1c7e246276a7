//! The meta-model with calibration at test time, as evaluation sees it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::embedder::{BatchNorm, Embedder, Labelled, Rule, all_finite};
use super::run_folder::RunFolder;
use super::settings;
use crate::error::{Error, Result, ResultExt};
use crate::meta::{Contrast, IcfilConfig, MetaModel};
use crate::tensor::{Images, RngStream};

/// A run's model, calibrated to each episode (ICFIL, PURER sec. 3.3).
#[derive(Debug)]
pub struct Calibrated {
    model: MetaModel,
    image_size: [usize; 2],
    config: IcfilConfig,
    loss: Contrast,
    seed: u64,
    nanoseconds: AtomicU64,
}

impl Calibrated {
    /// The newest checkpoint of `run`, calibrated as its settings say, for an evaluation that normalises so.
    ///
    /// # Errors
    /// When the run has no usable checkpoint; and for anything but the statistics of training.
    pub fn of(run: &RunFolder, batch_norm: BatchNorm) -> Result<Self> {
        if batch_norm != BatchNorm::Inductive {
            return Err(Error::usage("calibration needs the normalisation statistics of training")
                .hint("leave out `--bn transductive` or `--icfil`"));
        }
        let config = run.config()?;
        Ok(Self {
            model: MetaModel::load(&run.latest_checkpoint()?)?,
            image_size: config.image_size,
            config: settings::icfil_config(&config),
            loss: Contrast { temperature: config.icfil.temperature },
            seed: config.seed,
            nanoseconds: AtomicU64::new(0),
        })
    }

    /// Time spent on all episodes, threads side by side counting each.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }
}

impl Embedder for Calibrated {
    fn image_size(&self) -> [usize; 2] {
        self.image_size
    }

    fn dim(&self) -> usize {
        0
    }

    fn embed(&self, _images: &Images, _batch_norm: BatchNorm) -> Result<Vec<f32>> {
        Err(Error::internal("a calibrated model has vectors in an episode only"))
    }

    fn rule(&self) -> Rule {
        Rule::Adapting
    }

    fn learn(&self, episode: &Labelled<'_>, _batch_norm: BatchNorm) -> Result<Vec<usize>> {
        let begin = Instant::now();
        let Labelled { support, labels, query, way } = *episode;
        // The same noise in every episode: an episode's answer does not depend on its number.
        let mut rng = RngStream::new(self.seed, "icfil", "", 0);
        let how = (&self.config, &self.loss as &dyn crate::meta::CalibrationLoss);
        let classifier = (self.model.calibrate(support, labels, way, how, &mut rng))
            .context(|| "cannot calibrate".into())?;
        let logits = classifier.logits(query)?;
        let spent = begin.elapsed().as_nanos().min(u128::from(u64::MAX)) as u64;
        self.nanoseconds.fetch_add(spent, Ordering::Relaxed);
        all_finite(&logits)
            .context(|| "calibration has diverged".into())
            .map_err(|error| error.hint("lower `icfil.learning_rate` in the run's config.yaml"))?;
        Ok(classifier.predictions(&logits))
    }
}
