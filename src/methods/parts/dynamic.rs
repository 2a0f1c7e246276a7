//! The dynamic dataset (PURER sec. 3.1; methods.md 2.1): the bank's images with their pixels free, so that they keep
//! moving while the meta-model learns from them.
//!
//! Pixels and optimiser state are kept in memory up to a limit, the least recently used beyond it on disk; which of
//! them are where changes no result.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bank::ImageBank;
use crate::error::{Error, Result, ResultExt};
use crate::meta::{ClassSource, Episode};
use crate::methods::invert::FreePixels;
use crate::tensor::TensorStore;

/// Images of all models, with free pixels.
#[derive(Debug)]
pub struct DynamicSet<'a> {
    bank: &'a ImageBank,
    folder: PathBuf,
    /// Most bytes of pixels and moments in memory.
    memory: usize,
    cache: Mutex<Cache>,
}

/// The states in memory, least recently used first, and the newest version of each model's.
#[derive(Debug)]
struct Cache {
    held: Vec<Held>,
    /// Adam steps that each model's pixels have taken: 0 are the bank's images.
    versions: Vec<u64>,
    /// The version of each that is on disk.
    stored: Vec<u64>,
    /// The version that the newest checkpoint names.
    committed: Vec<u64>,
}

#[derive(Debug)]
struct Held {
    model: usize,
    pixels: Arc<FreePixels>,
    /// Whether the disk has this version.
    saved: bool,
}

impl Cache {
    /// Nothing in memory, these versions of each model's pixels on disk.
    fn at(versions: Vec<u64>) -> Self {
        Self { held: Vec::new(), stored: versions.clone(), committed: versions.clone(), versions }
    }
}

/// Bytes of a state: pixels and two moments.
fn bytes(pixels: &FreePixels) -> usize {
    3 * size_of::<f32>() * pixels.shape().iter().product::<usize>()
}

impl<'a> DynamicSet<'a> {
    /// The images of `bank`, none of them moved yet; states that do not fit into `memory` bytes go to `folder`.
    pub fn new(bank: &'a ImageBank, folder: &Path, memory: usize) -> Self {
        let cache = Mutex::new(Cache::at(vec![0; bank.models().len()]));
        Self { bank, folder: folder.into(), memory, cache }
    }

    /// The bank it began with.
    pub fn bank(&self) -> &'a ImageBank {
        self.bank
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, model: usize, version: u64) -> PathBuf {
        self.folder.join(format!("{model:06}-{version}.safetensors"))
    }

    /// The pixels of a model.
    ///
    /// # Errors
    /// When the disk cannot be read or written.
    pub fn pixels(&self, model: usize) -> Result<Arc<FreePixels>> {
        self.pixels_in(&mut self.cache(), model)
    }

    fn pixels_in(&self, cache: &mut Cache, model: usize) -> Result<Arc<FreePixels>> {
        if let Some(at) = cache.held.iter().position(|held| held.model == model) {
            let held = cache.held.remove(at);
            let pixels = Arc::clone(&held.pixels);
            cache.held.push(held);
            return Ok(pixels);
        }
        let pixels = Arc::new(self.load(model, cache.versions[model])?);
        self.hold(cache, Held { model, pixels: Arc::clone(&pixels), saved: true })?;
        Ok(pixels)
    }

    fn load(&self, model: usize, version: u64) -> Result<FreePixels> {
        let start = &self.bank.models()[model];
        if version == 0 {
            return Ok(FreePixels::of(&start.images()));
        }
        let path = self.file(model, version);
        let [h, w] = start.size;
        let store = TensorStore::load(&path)?;
        FreePixels::from_store(&store, [start.len(), 3, h, w])
            .context(|| format!("pixels `{}`", path.display()))
    }

    /// Replaces a model's pixels.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn replace(&self, model: usize, pixels: FreePixels) -> Result<()> {
        let mut cache = self.cache();
        cache.held.retain(|held| held.model != model);
        cache.versions[model] = pixels.steps();
        self.hold(&mut cache, Held { model, pixels: Arc::new(pixels), saved: false })
    }

    /// Takes a state into memory, and the least recently used out of it; the one taken always stays.
    fn hold(&self, cache: &mut Cache, held: Held) -> Result<()> {
        cache.held.push(held);
        let mut total: usize = cache.held.iter().map(|held| bytes(&held.pixels)).sum();
        while total > self.memory && cache.held.len() > 1 {
            self.save(cache, 0)?;
            total -= bytes(&cache.held.remove(0).pixels);
        }
        Ok(())
    }

    /// Puts what is held at `at` on disk, and drops the version there if no checkpoint names it.
    fn save(&self, cache: &mut Cache, at: usize) -> Result<()> {
        let held = &mut cache.held[at];
        if held.saved {
            return Ok(());
        }
        std::fs::create_dir_all(&self.folder).map_err(|error| Error::io(&self.folder, &error))?;
        let (model, version) = (held.model, held.pixels.steps());
        held.pixels.to_store().save(&self.file(model, version))?;
        held.saved = true;
        let before = std::mem::replace(&mut cache.stored[model], version);
        if before != version && before != cache.committed[model] {
            // A leftover only costs space.
            let _ = std::fs::remove_file(self.file(model, before));
        }
        Ok(())
    }

    /// Puts all that is not on disk there and writes into `store` what [`DynamicSet::restore`] needs.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        let mut cache = self.cache();
        (0..cache.held.len()).try_for_each(|at| self.save(&mut cache, at))?;
        let versions: Vec<String> = cache.versions.iter().map(u64::to_string).collect();
        store.words.insert("pixels.versions".into(), versions.join(" "));
        Ok(())
    }

    /// Goes back to the state that [`DynamicSet::write_to`] wrote.
    ///
    /// # Errors
    /// When the store is of another bank.
    pub fn restore(&self, store: &TensorStore) -> Result<()> {
        let word = store.word("pixels.versions")?;
        let versions: Vec<u64> = word.split_whitespace().filter_map(|v| v.parse().ok()).collect();
        if versions.len() != self.bank.models().len() {
            return Err(Error::input(format!(
                "the checkpoint has pixels of `{}` models, the bank images of {}",
                versions.len(),
                self.bank.models().len()
            ))
            .hint("the run folder was changed by hand: train again"));
        }
        *self.cache() = Cache::at(versions);
        Ok(())
    }

    /// The checkpoint of what [`DynamicSet::write_to`] wrote is in place: removes all other versions.
    pub fn commit(&self) {
        let mut cache = self.cache();
        cache.committed = cache.versions.clone();
        let kept: Vec<PathBuf> =
            cache.versions.iter().enumerate().map(|(model, &v)| self.file(model, v)).collect();
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| !kept.contains(path))
        {
            // A leftover only costs space.
            let _ = std::fs::remove_file(path);
        }
    }

    /// The gradient to an episode's images, by model: model and gradient to all its images, zeros where the episode
    /// has none of them, times `factor`.
    pub fn by_model(
        &self,
        episode: &Episode,
        gradient: &[f32],
        factor: f32,
    ) -> Vec<(usize, Vec<f32>)> {
        let [h, w] = self.image_size();
        let stride = 3 * h * w;
        let mut models: Vec<(usize, Vec<f32>)> = Vec::new();
        for (&(class, index), part) in episode.images.iter().zip(gradient.chunks_exact(stride)) {
            let (model, image) = self.bank.position(class, index);
            let at = models.iter().position(|(own, _)| *own == model).unwrap_or_else(|| {
                let length = self.bank.models()[model].len() * stride;
                models.push((model, vec![0.0; length]));
                models.len() - 1
            });
            let to = &mut models[at].1[image * stride..][..stride];
            to.iter_mut().zip(part).for_each(|(to, g)| *to += factor * g);
        }
        models.sort_by_key(|(model, _)| *model);
        models
    }
}

impl ClassSource for DynamicSet<'_> {
    fn n_classes(&self) -> usize {
        self.bank.n_classes()
    }

    fn images_in(&self, class: usize) -> usize {
        self.bank.images_in(class)
    }

    fn source_model(&self, class: usize) -> usize {
        self.bank.source_model(class)
    }

    fn meaning(&self, class: usize) -> usize {
        self.bank.meaning(class)
    }

    fn image_size(&self) -> [usize; 2] {
        self.bank.image_size()
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        let (model, image) = self.bank.position(class, index);
        let mut cache = self.cache();
        if cache.versions[model] == 0 {
            drop(cache);
            return self.bank.read(class, index, pixels);
        }
        let own = self.pixels_in(&mut cache, model)?;
        drop(cache);
        own.read(image, pixels);
        Ok(())
    }
}
