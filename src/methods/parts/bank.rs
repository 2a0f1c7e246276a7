//! The image bank: what was recovered, by model and class, as 8-bit images.
//!
//! Each (model, class) is a class of its own: which models share classes is unknown. A model's images
//! are one safetensors file, content-addressed and written by rename, so a lost worker costs only its
//! unfinished models.

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
    /// Class of each image.
    pub classes: Vec<usize>,
    /// `[height, width]`.
    pub size: [usize; 2],
    /// Pixels `[n, 3, height, width]`, canonical [0, 1] as 0..=255.
    pub pixels: Vec<u8>,
}

impl ModelImages {
    /// Rounds canonical images to 8 bits.
    pub fn new(id: &str, labels: Vec<String>, classes: Vec<usize>, images: &Images) -> Self {
        let [_, _, h, w] = images.shape();
        let pixels = images.data().iter().map(|&v| (v * 255.0).round().clamp(0.0, 255.0) as u8);
        Self { id: id.into(), labels, classes, size: [h, w], pixels: pixels.collect() }
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
        self.models.push(model);
        Ok(())
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
