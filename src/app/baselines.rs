//! What a run's meta-model is measured against beside pixels (methods.md 1.7): the untrained network, the
//! mean of the zoo's models, the best of them, and the same learner trained on real images.
//!
//! Each is the run's own learner around another network, so only what was learned differs. Nothing is chosen
//! on the images evaluated: the best model is chosen on recovered images. A baseline that does not apply is
//! left out with its reason; only `--real-data`, which is asked for by name, fails.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use super::context::Context;
use super::embedder::{Embedder, ModelEmbedder};
use super::eval::Baselines;
use super::run_folder::{RunFolder, UsedModel};
use super::{RunConfig, mean, settings};
use crate::data::{ImageFolder, ImageSet, nearest_prototype};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::meta::{
    Backbone, BnMode, ClassSource, InnerLoop, InnerOrder, Learner, Limits, MetaModel, StopReason,
    TrainConfig, Trainer,
};
use crate::methods::parts::{ImageBank, ModelImages};
use crate::tensor::{Images, RngStream, TensorStore};
use crate::zoo::candidates::{Candidate, pair};
use crate::zoo::read::{Reach, read_candidate};
use crate::zoo::walk::walk;
use crate::zoo::{Access, ModelSpec};

/// Models tried for the best one, drawn where there are more.
const MOST_TRIED: usize = 64;
/// Classes of recovered images on which they are compared.
const MOST_CLASSES: usize = 30;
/// Pseudo episodes of the comparison.
const EPISODES: u64 = 200;

/// Other networks for the same episodes.
#[derive(Debug, Default)]
pub struct Rivals {
    /// Networks under the run's learner, by name.
    pub models: Vec<(&'static str, ModelEmbedder)>,
    /// What is to be known of one, by name.
    pub notes: BTreeMap<String, String>,
    /// Names of those that do not apply, and why.
    pub left_out: BTreeMap<String, String>,
}

impl Rivals {
    /// None.
    pub fn none() -> Self {
        Self::default()
    }

    /// Those of `asked`.
    ///
    /// # Errors
    /// When the run is damaged or the user interrupts.
    pub fn asked_for(run: &RunFolder, asked: Baselines, context: &Context) -> Result<Self> {
        match asked {
            Baselines::Skip => Ok(Self::none()),
            Baselines::Simple => Self::untrained(run),
            Baselines::All => Self::all(run, context),
        }
    }

    /// The untrained network of `run`.
    ///
    /// # Errors
    /// When the run's settings are damaged.
    pub fn untrained(run: &RunFolder) -> Result<Self> {
        let mut own = Self::default();
        own.models.push(("untrained", ModelEmbedder::untrained(run)?));
        Ok(own)
    }

    /// All that `run` allows.
    ///
    /// # Errors
    /// When the run is damaged or the user interrupts.
    pub fn all(run: &RunFolder, context: &Context) -> Result<Self> {
        let mut own = Self::untrained(run)?;
        let config = run.config()?;
        let average = average(run, &config, context);
        own.take("average", &config, average)?;
        let best = best_model(run, &config, context);
        own.take("best-model", &config, best)?;
        Ok(own)
    }

    /// Adds the run's learner, trained as the run was but on the images of `folder`.
    ///
    /// # Errors
    /// When `folder` is the one evaluated, has too few images, or training diverges; when the user interrupts.
    pub fn add_real_data(
        &mut self,
        run: &RunFolder,
        folder: &Path,
        evaluated: &ImageFolder,
        context: &Context,
    ) -> Result<()> {
        let (model, note) = real_data(run, folder, evaluated, context)
            .context(|| format!("cannot train on the real images `{}`", folder.display()))?;
        self.models.push(("real-data", model));
        self.notes.insert("real-data".into(), note);
        Ok(())
    }

    /// Takes the one called `name` out again, if it is there.
    pub fn remove(&mut self, name: &str) {
        self.models.retain(|(own, _)| *own != name);
        self.notes.remove(name);
    }

    /// The networks as evaluation takes them.
    pub fn embedders(&self) -> Vec<(&'static str, &dyn Embedder)> {
        self.models.iter().map(|(name, model)| (*name, model as &dyn Embedder)).collect()
    }

    fn take(
        &mut self,
        name: &'static str,
        config: &RunConfig,
        found: Result<(Backbone, String)>,
    ) -> Result<()> {
        let made = found.and_then(|(backbone, note)| {
            let learner = first_order(settings::learner(config));
            let model = MetaModel::new(backbone, learner, config.image_size, config.seed)?;
            Ok((ModelEmbedder::new(model, config.image_size)?, note))
        });
        match made {
            Ok((model, note)) => {
                self.models.push((name, model));
                self.notes.insert(name.into(), note);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                self.left_out.insert(name.into(), error.to_string());
            }
        }
        Ok(())
    }
}

/// The rule at test time, when no outer gradient is taken.
fn first_order(learner: Learner) -> Learner {
    let first = |inner| InnerLoop { order: InnerOrder::First, ..inner };
    match learner {
        Learner::ProtoNet => Learner::ProtoNet,
        Learner::Anil(inner) => Learner::Anil(first(inner)),
        Learner::Maml(inner) => Learner::Maml(first(inner)),
    }
}

/// The zoo as it is now, for the models that the run used.
struct Zoo {
    candidates: BTreeMap<String, Candidate>,
    root: std::path::PathBuf,
}

impl Zoo {
    fn open(config: &RunConfig) -> Result<Self> {
        let found = walk(&config.zoo).context(|| "the run's models are not here".into())?;
        let root = found.root.clone();
        let candidates = pair(found).candidates.into_iter();
        Ok(Self { candidates: candidates.map(|c| (c.id.clone(), c)).collect(), root })
    }

    /// The network of a model up to its last linear layer.
    fn network(&self, used: &UsedModel, image_size: [usize; 2]) -> Result<Backbone> {
        let open = || {
            let candidate = self.candidates.get(&used.id);
            let candidate = candidate.ok_or_else(|| Error::input("the file is gone"))?;
            let read = read_candidate(candidate, &self.root, Reach::AsFound);
            let spec: ModelSpec = read.map_err(|rejection| Error::input(rejection.reason))?.spec;
            if spec.sha != used.sha {
                return Err(Error::input("the file has changed since the run"));
            }
            mean::network(&spec, &self.root, image_size)
        };
        open().context(|| format!("model `{}`", used.id))
    }
}

/// The mean of the weights of all models, where they share one architecture.
fn average(run: &RunFolder, config: &RunConfig, context: &Context) -> Result<(Backbone, String)> {
    let models = run.record()?.models;
    if let Some(closed) = models.iter().find(|model| model.access != Access::WhiteBox) {
        return Err(Error::unsupported(format!(
            "the mean of weights needs those of every model, `{}` is a black box",
            closed.id
        )));
    }
    let zoo = Zoo::open(config)?;
    let networks =
        models.iter().map(|model| Ok((model.id.clone(), zoo.network(model, config.image_size)?)));
    let backbone = mean::average(context, models.len(), networks, config.image_size)?;
    Ok((backbone, format!("{} models", models.len())))
}

/// The model whose features tell recovered classes apart best.
fn best_model(
    run: &RunFolder,
    config: &RunConfig,
    context: &Context,
) -> Result<(Backbone, String)> {
    let models = run.record()?.models;
    let white: Vec<&UsedModel> =
        models.iter().filter(|model| model.access == Access::WhiteBox).collect();
    let mut rng = RngStream::new(config.seed, "best-model", "", 0);
    let mut tried = rng.sample(white.len(), white.len().min(MOST_TRIED));
    tried.sort_unstable();
    let pseudo = Pseudo::read(run, config, &mut rng)?;
    let zoo = Zoo::open(config)?;
    let stage = context.progress.stage("best model", Some(tried.len() as u64));
    let (mut best, mut failed) = (None::<(f64, Backbone, String)>, None);
    for &at in &tried {
        context.check_interrupt()?;
        stage.advance(1);
        let network = zoo.network(white[at], config.image_size);
        let network = match network {
            Ok(network) => network,
            Err(error) => {
                failed.get_or_insert(error);
                continue;
            }
        };
        let accuracy = pseudo.accuracy(&network, config)?;
        if best.as_ref().is_none_or(|(most, ..)| accuracy > *most) {
            best = Some((accuracy, network, white[at].id.clone()));
        }
    }
    let Some((accuracy, network, id)) = best else {
        return Err(failed.unwrap_or_else(|| Error::unsupported("no model is a white box")));
    };
    let note = format!(
        "`{id}`, best of {} of {} models on recovered images ({:.1} %)",
        tried.len(),
        models.len(),
        100.0 * accuracy
    );
    Ok((network, note))
}

/// Recovered images of some classes, to compare networks on.
struct Pseudo {
    images: Images,
    /// Images a class.
    each: usize,
    classes: usize,
}

impl Pseudo {
    fn read(run: &RunFolder, config: &RunConfig, rng: &mut RngStream) -> Result<Self> {
        let folder = run.bank();
        let entries = std::fs::read_dir(&folder).map_err(|error| Error::io(&folder, &error))?;
        let mut files: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        let mut bank = ImageBank::default();
        for file in files {
            let images = ModelImages::from_store(&TensorStore::load(&file)?)
                .context(|| format!("`{}`", file.display()))?;
            bank.push(images)?;
        }
        let each = config.meta.shot + config.meta.query;
        let full: Vec<usize> =
            (0..bank.n_classes()).filter(|&class| bank.images_in(class) >= each).collect();
        if full.len() < config.meta.way {
            return Err(Error::input(format!(
                "choosing needs {} recovered classes of {each} images, the run has `{}`",
                config.meta.way,
                full.len()
            )));
        }
        let chosen = rng.sample(full.len(), full.len().min(MOST_CLASSES));
        let [height, width] = bank.image_size();
        let mut images = Images::zeros([chosen.len() * each, 3, height, width]);
        let stride = images.stride();
        let mut slots = images.data_mut().chunks_exact_mut(stride);
        for &at in &chosen {
            for index in rng.sample(bank.images_in(full[at]), each) {
                if let Some(slot) = slots.next() {
                    bank.read(full[at], index, slot)?;
                }
            }
        }
        Ok(Self { images, each, classes: chosen.len() })
    }

    /// Share of queries answered rightly by the nearest class mean, over episodes of the run's size.
    fn accuracy(&self, network: &Backbone, config: &RunConfig) -> Result<f64> {
        let vectors = network.embed(&self.images, BnMode::Running)?;
        let dim = vectors.len() / self.images.len().max(1);
        let (way, shot) = (config.meta.way, config.meta.shot);
        let (mut right, mut all) = (0, 0);
        for episode in 0..EPISODES {
            let mut rng = RngStream::new(config.seed, "best-model", "episode", episode);
            let (mut support, mut query) = (Vec::new(), Vec::new());
            for class in rng.sample(self.classes, way) {
                for (place, index) in rng.sample(self.each, self.each).into_iter().enumerate() {
                    let vector = &vectors[(class * self.each + index) * dim..][..dim];
                    let part = if place < shot { &mut support } else { &mut query };
                    part.extend_from_slice(vector);
                }
            }
            let answers = nearest_prototype(&support, &query, dim, way);
            let queries = self.each - shot;
            right += answers.iter().enumerate().filter(|(at, a)| at / queries == **a).count();
            all += answers.len();
        }
        Ok(right as f64 / all as f64)
    }
}

/// Real images as classes to draw episodes from.
struct RealImages(ImageSet);

impl ClassSource for RealImages {
    fn n_classes(&self) -> usize {
        self.0.classes().len()
    }

    fn images_in(&self, class: usize) -> usize {
        self.0.classes()[class].range.len()
    }

    fn source_model(&self, _class: usize) -> usize {
        0
    }

    fn image_size(&self) -> [usize; 2] {
        self.0.size()
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        let image = self.0.classes()[class].range.start + index;
        pixels.copy_from_slice(self.0.select(&[image]).data());
        Ok(())
    }
}

/// The run's learner after the run's number of steps on real images: what data-free training can hope for.
fn real_data(
    run: &RunFolder,
    folder: &Path,
    evaluated: &ImageFolder,
    context: &Context,
) -> Result<(ModelEmbedder, String)> {
    // The training split where there is one.
    let found =
        ImageFolder::open(folder, Some("train")).or_else(|_| ImageFolder::open(folder, None))?;
    let real = |path: &Path| path.canonicalize().map_err(|error| Error::io(path, &error));
    if real(&found.root)? == real(&evaluated.root)? {
        return Err(Error::input("these are the images evaluated on")
            .hint("give `--real-data` a folder of other classes, such as FOLDER/meta_train"));
    }
    let known = |name: &String| evaluated.classes.iter().any(|class| class.name == *name);
    let same = found.classes.iter().filter(|class| known(&class.name)).count();
    if same > 0 {
        context.progress.note(&format!(
            "{same} classes of `{}` bear the name of an evaluated class: the bound may be too high",
            found.root.display()
        ));
    }
    let config = run.config()?;
    let (set, rejected) = found.load(config.image_size)?;
    for rejection in &rejected {
        context
            .progress
            .note(&format!("image `{}` left out: {}", rejection.path, rejection.reason));
    }
    let note = format!(
        "{} classes, {} images, {} steps",
        set.classes().len(),
        set.len(),
        config.meta.steps
    );
    let start = settings::starting_model(run, &config)?;
    let train = TrainConfig { early_stop: None, ..settings::train_config(&config) };
    let mut trainer = Trainer::new(train, start);
    let stage = context.progress.stage("real data", Some(config.meta.steps));
    let stop = trainer.run(&RealImages(set), Limits::default(), &mut |_, _| {
        stage.advance(1);
        if context.is_interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    match stop {
        StopReason::Interrupted => Err(Error::interrupted()),
        StopReason::Diverged => Err(Error::internal("training diverges on them")
            .hint("lower `meta.learning_rate` in a run of its own")),
        _ => Ok((ModelEmbedder::new(trainer.model().clone(), config.image_size)?, note)),
    }
}
