//! The memory of recovered images (FREE sec. 3.3, methods.md 4.3): of each model the newest visits, as floats.
//!
//! A visit's images never change. They are kept in memory up to a limit, the least recently used beyond it are on disk
//! alone; which are where changes no result.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result, ResultExt};
use crate::meta::ClassSource;
use crate::tensor::{Images, TensorStore};

/// One visit's images.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// Number of the visit, in order of time.
    number: u64,
    model: usize,
    /// The wanted class of each image.
    labels: Vec<usize>,
}

/// A class of the memory.
#[derive(Debug)]
struct Class {
    /// Model, and class of that model.
    origin: (usize, usize),
    /// Entry and position of each image, oldest first.
    places: Vec<(usize, usize)>,
}

/// Images of the newest visits to each model.
#[derive(Debug)]
pub struct Memory {
    folder: PathBuf,
    size: [usize; 2],
    /// Visits kept of a model.
    visits: usize,
    /// Most bytes in memory.
    limit: usize,
    entries: Vec<Entry>,
    /// The classes that have images, in order.
    classes: Vec<Class>,
    next: u64,
    held: Mutex<Vec<(u64, Arc<Images>)>>,
}

impl Memory {
    /// An empty one for images of `[height, width]`: `visits` of each model, `limit` bytes in memory, all in `folder`.
    pub fn new(folder: &Path, size: [usize; 2], visits: usize, limit: usize) -> Self {
        Self {
            folder: folder.into(),
            size,
            visits: visits.max(1),
            limit,
            entries: Vec::new(),
            classes: Vec::new(),
            next: 0,
            held: Mutex::default(),
        }
    }

    fn held(&self) -> MutexGuard<'_, Vec<(u64, Arc<Images>)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:06}.safetensors"))
    }

    /// Keeps the images of a visit to `model`; its oldest visit beyond the limit is forgotten.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn push(&mut self, model: usize, labels: &[usize], images: Images) -> Result<()> {
        let number = self.next;
        std::fs::create_dir_all(&self.folder).map_err(|error| Error::io(&self.folder, &error))?;
        let mut store = TensorStore::default();
        store.insert("images", &images.shape(), images.data().to_vec());
        store.save(&self.file(number))?;
        self.next += 1;
        let own = || self.entries.iter().filter(|entry| entry.model == model);
        if own().count() >= self.visits {
            let oldest = own().map(|entry| entry.number).min();
            self.entries.retain(|entry| Some(entry.number) != oldest);
            self.held().retain(|(held, _)| Some(*held) != oldest);
        }
        self.entries.push(Entry { number, model, labels: labels.to_vec() });
        self.hold(number, Arc::new(images));
        self.index();
        Ok(())
    }

    fn hold(&self, number: u64, images: Arc<Images>) {
        let mut held = self.held();
        held.push((number, images));
        let bytes = |images: &Images| size_of_val(images.data());
        let mut total: usize = held.iter().map(|(_, images)| bytes(images)).sum();
        while total > self.limit && held.len() > 1 {
            total -= bytes(&held.remove(0).1);
        }
    }

    fn index(&mut self) {
        let mut classes: BTreeMap<(usize, usize), Vec<(usize, usize)>> = BTreeMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            for (position, &label) in entry.labels.iter().enumerate() {
                classes.entry((entry.model, label)).or_default().push((at, position));
            }
        }
        let class = |(origin, places)| Class { origin, places };
        self.classes = classes.into_iter().map(class).collect();
    }

    fn load(&self, number: u64) -> Result<Arc<Images>> {
        let mut held = self.held();
        if let Some(at) = held.iter().position(|(own, _)| *own == number) {
            let found = held.remove(at);
            held.push(found.clone());
            return Ok(found.1);
        }
        drop(held);
        let path = self.file(number);
        let at = || format!("images `{}`", path.display());
        let store = TensorStore::load(&path).context(at)?;
        let [h, w] = self.size;
        let n = self.entries.iter().find(|entry| entry.number == number);
        let shape = [n.map_or(0, |entry| entry.labels.len()), 3, h, w];
        let values = store.tensor("images", &shape).context(at)?.to_vec();
        let images = Arc::new(Images::new(values, shape)?);
        self.hold(number, Arc::clone(&images));
        Ok(images)
    }

    /// Forgets the newest `count` visits but the very newest.
    pub fn forget_before_newest(&mut self, count: usize) {
        let Some(newest) = self.entries.iter().map(|entry| entry.number).max() else { return };
        let gone = newest.saturating_sub(count as u64)..newest;
        self.entries.retain(|entry| !gone.contains(&entry.number));
        self.held().retain(|(held, _)| !gone.contains(held));
        self.index();
    }

    /// Nothing was kept yet.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The class of this source that is `class` of `model`, and how many images it has, oldest first.
    pub fn find(&self, model: usize, class: usize) -> Option<(usize, usize)> {
        let at = self.classes.binary_search_by_key(&(model, class), |own| own.origin).ok()?;
        Some((at, self.classes[at].places.len()))
    }

    /// Model and class of a class of this source.
    pub fn origin(&self, class: usize) -> (usize, usize) {
        self.classes[class].origin
    }

    /// Image `index` of a class, `[3, H, W]`.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn image(&self, class: usize, index: usize) -> Result<Vec<f32>> {
        let (entry, position) = self.classes[class].places[index];
        Ok(self.load(self.entries[entry].number)?.image(position).to_vec())
    }

    /// The newest `each` images of every class of `model`, class after class, and their classes.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn newest(&self, model: usize, each: usize) -> Result<(Images, Vec<usize>)> {
        let [h, w] = self.size;
        let (mut data, mut labels) = (Vec::new(), Vec::new());
        for (at, class) in self.classes.iter().enumerate() {
            if class.origin.0 == model {
                for index in (0..class.places.len()).rev().take(each) {
                    data.extend(self.image(at, index)?);
                    labels.push(class.origin.1);
                }
            }
        }
        Ok((Images::new(data, [labels.len(), 3, h, w])?, labels))
    }

    /// Writes into a checkpoint which visits are kept; their images are on disk.
    pub fn write_to(&self, store: &mut TensorStore) {
        let line = |entry: &Entry| {
            let labels: Vec<String> = entry.labels.iter().map(usize::to_string).collect();
            format!("{} {} {}", entry.number, entry.model, labels.join(","))
        };
        let lines: Vec<String> = self.entries.iter().map(line).collect();
        store.words.insert("memory.entries".into(), lines.join("\n"));
        store.words.insert("memory.next".into(), self.next.to_string());
    }

    /// Goes on where a checkpoint was made.
    ///
    /// # Errors
    /// When the checkpoint is of another run.
    pub fn restore(&mut self, store: &TensorStore) -> Result<()> {
        let broken = || Error::input("the checkpoint's list of recovered images is damaged");
        let entry = |line: &str| -> Option<Entry> {
            let mut words = line.split(' ');
            Some(Entry {
                number: words.next()?.parse().ok()?,
                model: words.next()?.parse().ok()?,
                labels: (words.next()?.split(','))
                    .map(|label| label.parse().ok())
                    .collect::<Option<_>>()?,
            })
        };
        let lines = store.word("memory.entries")?.lines();
        self.entries = lines.map(|line| entry(line).ok_or_else(broken)).collect::<Result<_>>()?;
        self.next = store.number("memory.next")?;
        self.held().clear();
        self.index();
        Ok(())
    }

    /// Removes from the disk what no checkpoint can ask for once the one just written is the newest.
    pub fn commit(&self) {
        let Ok(files) = std::fs::read_dir(&self.folder) else { return };
        for file in files.flatten() {
            let name = file.file_name();
            let number = name.to_str().and_then(|n| n.strip_suffix(".safetensors")?.parse().ok());
            let kept = |number: u64| self.entries.iter().any(|entry| entry.number == number);
            if number.is_some_and(|number: u64| !kept(number)) {
                // A leftover only costs space.
                let _ = std::fs::remove_file(file.path());
            }
        }
    }
}

impl ClassSource for Memory {
    fn n_classes(&self) -> usize {
        self.classes.len()
    }

    fn images_in(&self, class: usize) -> usize {
        self.classes[class].places.len()
    }

    fn source_model(&self, class: usize) -> usize {
        self.classes[class].origin.0
    }

    fn image_size(&self) -> [usize; 2] {
        self.size
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        let (entry, position) = self.classes[class].places[index];
        pixels.copy_from_slice(self.load(self.entries[entry].number)?.image(position));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(value: f32, n: usize) -> Images {
        let data = (0..n * 48).map(|i| value + (i / 48) as f32 / 100.0).collect();
        Images::new(data, [n, 3, 4, 4]).unwrap()
    }

    fn pixel(memory: &Memory, class: usize, index: usize) -> f32 {
        let mut pixels = vec![0.0; 48];
        memory.read(class, index, &mut pixels).unwrap();
        pixels[0]
    }

    /// Visits beyond the limit are forgotten, nothing depends on what is in memory, and a resumed one is the same.
    #[test]
    fn the_newest_visits_stay_wherever_they_lie() {
        let folder = tempfile::tempdir().unwrap();
        let fill = |limit: usize| {
            let path = folder.path().join(limit.to_string());
            let mut memory = Memory::new(&path, [4, 4], 2, limit);
            for (visit, model) in [3, 5, 3, 3].into_iter().enumerate() {
                memory.push(model, &[1, 1, 4], images(visit as f32, 3)).unwrap();
            }
            memory
        };
        let (tight, wide) = (fill(1), fill(1 << 20));
        assert_eq!((tight.n_classes(), tight.images_in(0), tight.images_in(2)), (4, 4, 2));
        assert_eq!([tight.origin(0), tight.origin(3)], [(3, 1), (5, 4)]);
        for (class, index) in [(0, 0), (0, 1), (0, 3), (1, 0), (2, 1), (3, 0)] {
            assert_eq!(pixel(&tight, class, index), pixel(&wide, class, index));
        }
        // Of model 3 the visits 2 and 3 are left.
        assert_eq!([pixel(&tight, 0, 0), pixel(&tight, 0, 3)], [2.0, 3.01]);
        let (newest, labels) = tight.newest(3, 1).unwrap();
        assert_eq!(labels, [1, 4]);
        assert_eq!([newest.image(0)[0], newest.image(1)[0]], [3.01, 3.02]);
        let mut store = TensorStore::default();
        tight.write_to(&mut store);
        tight.commit();
        let mut again = Memory::new(&folder.path().join("1"), [4, 4], 2, 1);
        again.restore(&store).unwrap();
        assert_eq!(again.entries, tight.entries);
        assert_eq!(pixel(&again, 0, 3), 3.01);
        assert_eq!(std::fs::read_dir(folder.path().join("1")).unwrap().count(), 3);
        store.words.insert("memory.entries".into(), "1 x".into());
        assert!(again.restore(&store).is_err());
    }
}
