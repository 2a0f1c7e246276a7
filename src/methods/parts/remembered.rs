//! What the models answered when their images were made, as soft labels of episodes from memory: nobody is asked again.

use super::Memory;
use super::memory::Agreed;
use crate::error::Result;
use crate::meta::{Episode, SoftLabels};

/// The answers in a memory. An episode that mixes models has none: a model was asked about its own images only.
#[derive(Debug, Clone, Copy)]
pub struct Remembered<'a>(pub &'a Memory);

impl Remembered<'_> {
    /// Logits `[images, way]` of images of an episode, or nothing where one is not known.
    fn rows(&self, episode: &Episode, images: &[(usize, usize)]) -> Result<Option<Vec<f32>>> {
        let slots: Vec<(usize, usize)> =
            episode.slots().into_iter().map(|class| self.0.origin(class)).collect();
        if slots.windows(2).any(|pair| pair[0].0 != pair[1].0) {
            return Ok(None);
        }
        let mut rows = Vec::with_capacity(images.len() * slots.len());
        for &(class, index) in images {
            let answer = self.0.answer(class, index)?;
            if answer.is_empty() {
                return Ok(None);
            }
            rows.extend(slots.iter().map(|&(_, class)| answer[class]));
        }
        Ok(Some(rows))
    }
}

impl SoftLabels for Remembered<'_> {
    fn logits(&self, episode: &Episode) -> Result<Option<Vec<f32>>> {
        self.rows(episode, &episode.images[episode.support_labels.len()..])
    }

    fn support(&self, episode: &Episode) -> Result<Option<Vec<f32>>> {
        self.rows(episode, &episode.images[..episode.support_labels.len()])
    }
}

/// The same for the queries of episodes drawn from a part of the memory.
#[derive(Debug, Clone, Copy)]
pub struct RememberedOf<'a>(pub &'a Agreed<'a>);

impl SoftLabels for RememberedOf<'_> {
    fn logits(&self, episode: &Episode) -> Result<Option<Vec<f32>>> {
        let queries: Vec<(usize, usize)> = (episode.images[episode.support_labels.len()..].iter())
            .map(|&(class, index)| (class, self.0.index(class, index)))
            .collect();
        Remembered(self.0.memory()).rows(episode, &queries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Images;

    /// Answers come in the order of the episode's labels, and only where one model gave them all.
    #[test]
    fn answers_are_those_of_the_episodes_classes() {
        let folder = tempfile::tempdir().unwrap();
        let mut memory = Memory::new(folder.path(), [4, 4], 2, 1 << 20);
        for model in [2, 7] {
            let answers = (0..8).map(|i| (100 * model + i) as f32).collect();
            memory.push(model, &[0, 3], Images::zeros([2, 3, 4, 4]), answers).unwrap();
        }
        memory.push(9, &[0, 1], Images::zeros([2, 3, 4, 4]), Vec::new()).unwrap();
        let episode = |classes: [usize; 2]| Episode {
            images: [classes, classes].concat().into_iter().map(|class| (class, 0)).collect(),
            support_labels: vec![0, 1],
            query_labels: vec![0, 1],
        };
        // Classes of the memory: (2, 0), (2, 3), (7, 0), (7, 3), (9, 0), (9, 1).
        let asked = Remembered(&memory);
        let own = episode([1, 0]);
        assert_eq!(asked.logits(&own).unwrap().unwrap(), [207.0, 204.0, 203.0, 200.0]);
        assert_eq!(asked.support(&own).unwrap(), asked.logits(&own).unwrap());
        assert_eq!(asked.logits(&episode([1, 2])).unwrap(), None);
        assert_eq!(asked.logits(&episode([4, 5])).unwrap(), None);
    }
}
