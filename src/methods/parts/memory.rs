//! The memory of recovered images (FREE sec. 3.3, methods.md 4.3): of each model the newest visits, as floats.
//!
//! A visit's images never change. They are kept in memory up to a limit, the least recently used beyond it are on disk
//! alone; which are where changes no result.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result, ResultExt};
use crate::meta::ClassSource;
use crate::meta::protonet::first_largest;
use crate::tensor::{Images, TensorStore};

/// One visit's images.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// Number of the visit, in order of time.
    number: u64,
    model: usize,
    /// The wanted class of each image.
    labels: Vec<usize>,
    /// Whether the model, asked, puts it there; true where it was not asked.
    agreed: Vec<bool>,
    /// Classes of the model where its answers are kept, 0 where they are not.
    answered: usize,
}

/// What is kept of a visit beside its entry.
#[derive(Debug)]
struct Kept {
    images: Images,
    /// The model's logits `[n, answered]`.
    answers: Vec<f32>,
}

impl Kept {
    fn bytes(&self) -> usize {
        size_of_val(self.images.data()) + size_of_val(self.answers.as_slice())
    }
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
    held: Mutex<Vec<(u64, Arc<Kept>)>>,
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

    fn held(&self) -> MutexGuard<'_, Vec<(u64, Arc<Kept>)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:06}.safetensors"))
    }

    /// Keeps the images of a visit to `model`, and its `answers` (logits, one row an image) or none; its oldest visit
    /// beyond the limit is forgotten.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn push(
        &mut self,
        model: usize,
        labels: &[usize],
        images: Images,
        answers: Vec<f32>,
    ) -> Result<()> {
        let number = self.next;
        let agreed = match answers.is_empty() {
            true => vec![true; labels.len()],
            false => (answers.chunks_exact(answers.len() / labels.len()).zip(labels))
                .map(|(row, &label)| first_largest(row) == label)
                .collect(),
        };
        let answered = answers.len() / labels.len().max(1);
        std::fs::create_dir_all(&self.folder).map_err(|error| Error::io(&self.folder, &error))?;
        let mut store = TensorStore::default();
        store.insert("images", &images.shape(), images.data().to_vec());
        if answered > 0 {
            store.insert("answers", &[labels.len(), answered], answers.clone());
        }
        store.save(&self.file(number))?;
        self.next += 1;
        let own = || self.entries.iter().filter(|entry| entry.model == model);
        if own().count() >= self.visits {
            let oldest = own().map(|entry| entry.number).min();
            self.entries.retain(|entry| Some(entry.number) != oldest);
            self.held().retain(|(held, _)| Some(*held) != oldest);
        }
        self.entries.push(Entry { number, model, labels: labels.to_vec(), agreed, answered });
        self.hold(number, Arc::new(Kept { images, answers }));
        self.index();
        Ok(())
    }

    fn hold(&self, number: u64, kept: Arc<Kept>) {
        let mut held = self.held();
        held.push((number, kept));
        let mut total: usize = held.iter().map(|(_, kept)| kept.bytes()).sum();
        while total > self.limit && held.len() > 1 {
            total -= held.remove(0).1.bytes();
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

    fn load(&self, number: u64) -> Result<Arc<Kept>> {
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
        let entry = self.entries.iter().find(|entry| entry.number == number);
        let (n, answered) = entry.map_or((0, 0), |entry| (entry.labels.len(), entry.answered));
        let shape = [n, 3, h, w];
        let values = store.tensor("images", &shape).context(at)?.to_vec();
        let answers = match answered {
            0 => Vec::new(),
            classes => store.tensor("answers", &[n, classes]).context(at)?.to_vec(),
        };
        let kept = Arc::new(Kept { images: Images::new(values, shape)?, answers });
        self.hold(number, Arc::clone(&kept));
        Ok(kept)
    }

    /// Forgets the newest `count` visits but the very newest.
    pub fn forget_before_newest(&mut self, count: usize) {
        let Some(newest) = self.entries.iter().map(|entry| entry.number).max() else { return };
        let gone = newest.saturating_sub(count as u64)..newest;
        self.entries.retain(|entry| !gone.contains(&entry.number));
        self.held().retain(|(held, _)| !gone.contains(held));
        self.index();
    }

    /// Visits kept of a model.
    pub fn visits_kept(&self) -> u64 {
        self.visits as u64
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

    /// Labels of the newest visit to a model.
    pub fn newest_labels(&self, model: usize) -> Option<&[usize]> {
        let newest = self.entries.iter().rev().find(|entry| entry.model == model)?;
        Some(&newest.labels)
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
        Ok(self.load(self.entries[entry].number)?.images.image(position).to_vec())
    }

    /// What its model answers to image `index` of a class: its logits, empty where they were not kept.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn answer(&self, class: usize, index: usize) -> Result<Vec<f32>> {
        let (entry, position) = self.classes[class].places[index];
        let Entry { number, answered, .. } = self.entries[entry];
        Ok(self.load(number)?.answers[position * answered..(position + 1) * answered].to_vec())
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

    /// The images that their own model puts where they belong, or was not asked about: what labels can be trusted of.
    /// A class with fewer than `least` of them, but as many images, has all.
    pub fn agreed(&self, least: usize) -> Agreed<'_> {
        let trusted = |class: &Class, index: usize| {
            let (entry, position) = class.places[index];
            self.entries[entry].agreed[position]
        };
        let of = |class: &Class| -> Vec<usize> {
            let all = 0..class.places.len();
            let kept: Vec<usize> = all.clone().filter(|&index| trusted(class, index)).collect();
            if kept.len() < least && all.len() >= least { all.collect() } else { kept }
        };
        Agreed { memory: self, kept: self.classes.iter().map(of).collect() }
    }

    /// All images, likewise.
    pub fn all(&self) -> Agreed<'_> {
        let of = |class: &Class| (0..class.places.len()).collect();
        Agreed { memory: self, kept: self.classes.iter().map(of).collect() }
    }

    /// What episodes are drawn from: all images, or those of [`Memory::agreed`].
    pub fn episodes_from(&self, only_agreed: bool, least: usize) -> Agreed<'_> {
        if only_agreed { self.agreed(least) } else { self.all() }
    }

    /// Writes into a checkpoint which visits are kept; their images are on disk.
    pub fn write_to(&self, store: &mut TensorStore) {
        let line = |entry: &Entry| {
            let sign = |agreed: bool| if agreed { "" } else { "!" };
            let labels = entry.labels.iter().zip(&entry.agreed);
            let labels: Vec<String> =
                labels.map(|(label, &agreed)| format!("{}{label}", sign(agreed))).collect();
            format!("{} {} {} {}", entry.number, entry.model, entry.answered, labels.join(","))
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
            let list = line.rsplit(' ').next()?;
            Some(Entry {
                number: words.next()?.parse().ok()?,
                model: words.next()?.parse().ok()?,
                answered: words.next()?.parse().ok()?,
                labels: (words.next()?.split(','))
                    .map(|label| label.trim_start_matches('!').parse().ok())
                    .collect::<Option<_>>()?,
                agreed: list.split(',').map(|label| !label.starts_with('!')).collect(),
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

/// Some of the images of a memory, its classes numbered as there.
#[derive(Debug, Clone)]
pub struct Agreed<'a> {
    memory: &'a Memory,
    kept: Vec<Vec<usize>>,
}

impl<'a> Agreed<'a> {
    /// The memory.
    pub fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// Number in the memory of image `index` of a class here.
    pub fn index(&self, class: usize, index: usize) -> usize {
        self.kept[class][index]
    }
}

impl ClassSource for Agreed<'_> {
    fn n_classes(&self) -> usize {
        self.memory.n_classes()
    }

    fn images_in(&self, class: usize) -> usize {
        self.kept[class].len()
    }

    fn source_model(&self, class: usize) -> usize {
        self.memory.source_model(class)
    }

    fn image_size(&self) -> [usize; 2] {
        self.memory.image_size()
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        self.memory.read(class, self.index(class, index), pixels)
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
        pixels.copy_from_slice(self.load(self.entries[entry].number)?.images.image(position));
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
                let answers = (0..3 * 6).map(|i| (18 * visit + i) as f32).collect();
                let answers = if model == 3 { answers } else { Vec::new() };
                memory.push(model, &[1, 1, 4], images(visit as f32, 3), answers).unwrap();
            }
            memory
        };
        let (tight, wide) = (fill(1), fill(1 << 20));
        assert_eq!((tight.n_classes(), tight.images_in(0), tight.images_in(2)), (4, 4, 2));
        assert_eq!([tight.origin(0), tight.origin(3)], [(3, 1), (5, 4)]);
        for (class, index) in [(0, 0), (0, 1), (0, 3), (1, 0), (2, 1), (3, 0)] {
            assert_eq!(pixel(&tight, class, index), pixel(&wide, class, index));
            let answers = [&tight, &wide].map(|memory| memory.answer(class, index).unwrap());
            assert_eq!(answers[0], answers[1]);
            assert_eq!(answers[0].len(), if class < 2 { 6 } else { 0 });
        }
        // Class 1 of model 3 is believed of nobody (the largest answer is the last), where nobody was asked of everybody.
        let kept = |least: usize| [0, 2].map(|class| tight.agreed(least).images_in(class));
        assert_eq!((kept(0), kept(4), kept(5)), ([0, 2], [4, 2], [0, 2]));
        assert_eq!(tight.all().images_in(0), 4);
        // Visit 3, image 1.
        assert_eq!(tight.answer(0, 3).unwrap()[0], 60.0);
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
        assert_eq!(again.answer(0, 3).unwrap()[5], 65.0);
        assert_eq!(std::fs::read_dir(folder.path().join("1")).unwrap().count(), 3);
        store.words.insert("memory.entries".into(), "1 x".into());
        assert!(again.restore(&store).is_err());
    }
}
