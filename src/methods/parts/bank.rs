//! The image bank: what was recovered, by model and class, as 8-bit images.
//!
//! Each (model, class) is a class of its own: which models share classes is unknown, unless their sidecars name them and
//! [`ImageBank::merge_by_name`] believes it. A model's images
//! are one safetensors file, content-addressed and written by rename, so a lost worker costs only its
//! unfinished models.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::meta::ClassSource;
use crate::tensor::{Images, TensorStore};

/// The images recovered from one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelImages {
    /// Model id.
    pub id: String,
    /// Names of the classes, or their numbers.
    pub labels: Vec<String>,
    /// Which of the two.
    pub naming: Naming,
    /// Class of each image.
    pub classes: Vec<usize>,
    /// `[height, width]`.
    pub size: [usize; 2],
    /// Pixels `[n, 3, height, width]`, canonical [0, 1] as 0..=255.
    pub pixels: Vec<u8>,
}

/// Where the labels of a model's classes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// Its sidecar names them.
    Named,
    /// Nothing does: they are numbers.
    Numbered,
}

impl ModelImages {
    /// Rounds canonical images to 8 bits; the labels count as numbers.
    pub fn new(id: &str, labels: Vec<String>, classes: Vec<usize>, images: &Images) -> Self {
        let [_, _, h, w] = images.shape();
        let pixels = images.data().iter().map(|&v| (v * 255.0).round().clamp(0.0, 255.0) as u8);
        let naming = Naming::Numbered;
        Self { id: id.into(), labels, naming, classes, size: [h, w], pixels: pixels.collect() }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// No image.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    fn stride(&self) -> usize {
        3 * self.size[0] * self.size[1]
    }

    /// All images, canonical.
    pub fn images(&self) -> Images {
        let mut images = Images::zeros([self.len(), 3, self.size[0], self.size[1]]);
        for (value, &byte) in images.data_mut().iter_mut().zip(&self.pixels) {
            *value = f32::from(byte) / 255.0;
        }
        images
    }

    /// The images as the content of a file.
    pub fn to_store(&self) -> TensorStore {
        let mut store = TensorStore::default();
        let [h, w] = self.size;
        store.bytes.insert("images".into(), (vec![self.len(), 3, h, w], self.pixels.clone()));
        let classes = self.classes.iter().map(|&c| c as f32).collect();
        store.insert("classes", &[self.len()], classes);
        store.words.insert("model".into(), self.id.clone());
        store.words.insert("labels".into(), self.labels.join("\n"));
        let naming = if self.naming == Naming::Named { "named" } else { "numbered" };
        store.words.insert("naming".into(), naming.into());
        store
    }

    /// Reads what [`ModelImages::to_store`] made.
    ///
    /// # Errors
    /// When the store is another one.
    pub fn from_store(store: &TensorStore) -> Result<Self> {
        let missing = || Error::input("holds no recovered images");
        let (shape, pixels) = store.bytes.get("images").ok_or_else(missing)?;
        let [n, 3, h, w] = shape[..] else { return Err(missing()) };
        let classes = store.tensor("classes", &[n])?;
        Ok(Self {
            id: store.word("model")?.to_string(),
            labels: store.word("labels")?.split('\n').map(str::to_string).collect(),
            // Files of earlier versions do not say.
            naming: match store.words.get("naming").map(String::as_str) {
                Some("named") => Naming::Named,
                _ => Naming::Numbered,
            },
            classes: classes.iter().map(|&c| c as usize).collect(),
            size: [h, w],
            pixels: pixels.clone(),
        })
    }
}

/// The images of all models, as classes to draw episodes from.
#[derive(Debug, Clone, Default)]
pub struct ImageBank {
    models: Vec<ModelImages>,
    /// Model and images of each class that has any.
    classes: Vec<(usize, Vec<usize>)>,
    /// The class that each counts as.
    meanings: Vec<usize>,
}

impl ImageBank {
    /// Adds a model's images.
    ///
    /// # Errors
    /// When their size differs from those before.
    pub fn push(&mut self, model: ModelImages) -> Result<()> {
        if let Some(first) = self.models.first()
            && first.size != model.size
        {
            return Err(Error::internal(format!(
                "images of {:?} in a bank of `{:?}`",
                model.size, first.size
            )));
        }
        let number = self.models.len();
        let count = model.classes.iter().max().map_or(0, |&c| c + 1);
        let mut images = vec![Vec::new(); count];
        for (index, &class) in model.classes.iter().enumerate() {
            images[class].push(index);
        }
        let filled = images.into_iter().filter(|images| !images.is_empty());
        self.classes.extend(filled.map(|images| (number, images)));
        self.meanings.extend(self.meanings.len()..self.classes.len());
        self.models.push(model);
        Ok(())
    }

    /// From now on classes of one name, leading and trailing spaces aside, count as one class, whatever model they are of.
    /// Classes without a name stay what they are. Returns how many classes now count as another.
    pub fn merge_by_name(&mut self) -> usize {
        let mut first: BTreeMap<&str, usize> = BTreeMap::new();
        let mut merged = 0;
        for (class, (model, images)) in self.classes.iter().enumerate() {
            let model = &self.models[*model];
            let name = model.labels.get(model.classes[images[0]]).map_or("", |name| name.trim());
            if model.naming == Naming::Named && !name.is_empty() {
                self.meanings[class] = *first.entry(name).or_insert(class);
                merged += usize::from(self.meanings[class] != class);
            }
        }
        merged
    }

    /// The models in the bank.
    pub fn models(&self) -> &[ModelImages] {
        &self.models
    }

    /// Number of images of all models.
    pub fn len(&self) -> usize {
        self.models.iter().map(ModelImages::len).sum()
    }

    /// No image at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Model of a class, and the position of its image `index` among the model's.
    pub fn position(&self, class: usize, index: usize) -> (usize, usize) {
        let (model, images) = &self.classes[class];
        (*model, images[index])
    }
}

impl ClassSource for ImageBank {
    fn n_classes(&self) -> usize {
        self.classes.len()
    }

    fn images_in(&self, class: usize) -> usize {
        self.classes[class].1.len()
    }

    fn source_model(&self, class: usize) -> usize {
        self.classes[class].0
    }

    fn meaning(&self, class: usize) -> usize {
        self.meanings[class]
    }

    fn image_size(&self) -> [usize; 2] {
        self.models.first().map_or([0, 0], |model| model.size)
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        let (model, image) = self.position(class, index);
        let model = &self.models[model];
        let start = image * model.stride();
        let bytes = &model.pixels[start..start + model.stride()];
        pixels.iter_mut().zip(bytes).for_each(|(p, &b)| *p = f32::from(b) / 255.0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::EpisodeSampler;
    use crate::tensor::RngStream;

    /// A model of three classes, four images each, called so.
    fn model(id: &str, labels: [&str; 3], naming: Naming) -> ModelImages {
        let labels = labels.map(str::to_owned).to_vec();
        let classes = (0..12).map(|i| i / 4).collect();
        let mut images = ModelImages::new(id, labels, classes, &Images::zeros([12, 3, 2, 2]));
        images.naming = naming;
        images
    }

    fn bank() -> ImageBank {
        let mut bank = ImageBank::default();
        bank.push(model("a", ["ant", "bee", ""], Naming::Named)).unwrap();
        bank.push(model("b", [" bee ", "", "Ant"], Naming::Named)).unwrap();
        bank.push(model("c", ["ant", "bee", "2"], Naming::Numbered)).unwrap();
        bank.push(model("d", ["cat", "ant", "2"], Naming::Named)).unwrap();
        bank
    }

    #[test]
    fn classes_of_one_name_become_one_and_those_without_a_name_never_do() {
        let mut bank = bank();
        let meanings =
            |bank: &ImageBank| (0..12).map(|class| bank.meaning(class)).collect::<Vec<_>>();
        assert_eq!(meanings(&bank), (0..12).collect::<Vec<_>>());
        assert_eq!(bank.merge_by_name(), 2);
        assert_eq!(meanings(&bank), [0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 0, 11]);
    }

    #[test]
    fn merged_classes_are_one_in_an_episode_with_the_images_of_both() {
        let mut bank = bank();
        // Ten classes once merged; two of them have eight images.
        assert!(EpisodeSampler::new(&bank, 11, 1, 1, 1.0).is_ok());
        bank.merge_by_name();
        assert!(EpisodeSampler::new(&bank, 11, 1, 1, 1.0).is_err());
        assert!(EpisodeSampler::new(&bank, 3, 2, 3, 1.0).is_err(), "two have five images");
        let sampler = EpisodeSampler::new(&bank, 2, 2, 3, 1.0).unwrap();
        let mut mixed = 0;
        for index in 0..50 {
            let episode = sampler.draw(&mut RngStream::new(0, "bank", "", index));
            let mut unique = episode.images.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), 10);
            let labels = episode.support_labels.iter().chain(&episode.query_labels);
            let mut meanings = [None; 2];
            for (&(class, index), &label) in episode.images.iter().zip(labels) {
                assert!(index < bank.images_in(class));
                assert_eq!(
                    *meanings[label].get_or_insert(bank.meaning(class)),
                    bank.meaning(class)
                );
            }
            assert_ne!(meanings[0], meanings[1]);
            mixed += usize::from(episode.images.iter().any(|(class, _)| *class == 10));
        }
        assert!(mixed > 40, "images of the second model are drawn: {mixed}");
        // Episodes of one model take that model's images only.
        let own = EpisodeSampler::new(&bank, 3, 1, 1, 0.0).unwrap();
        for index in 0..50 {
            let episode = own.draw(&mut RngStream::new(0, "bank", "", index));
            let models: Vec<usize> =
                episode.images.iter().map(|(class, _)| bank.source_model(*class)).collect();
            assert!(models.iter().all(|model| *model == models[0]), "{models:?}");
        }
    }

    #[test]
    fn a_file_keeps_whether_classes_have_names() {
        for naming in [Naming::Named, Naming::Numbered] {
            let model = model("a", ["ant", "bee", ""], naming);
            assert_eq!(ModelImages::from_store(&model.to_store()).unwrap(), model);
        }
    }
}
