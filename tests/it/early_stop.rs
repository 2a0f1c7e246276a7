//! Early stop on pseudo-validation: which classes it sees, which weights it keeps, that it can be resumed.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Mutex;

use metazoa::Result;
use metazoa::meta::{
    Backbone, ClassSource, EarlyStop, Limits, MetaModel, Sources, StopReason, TrainConfig, Trainer,
};
use metazoa::tensor::TensorStore;

use crate::meta::{Bars, bars, bytes, config, keep_going};

/// Three of the twelve classes are held out; every second step is checked.
fn stopping() -> TrainConfig {
    let early = EarlyStop { share: 0.25, every: 2, patience: 2 };
    TrainConfig { steps: 60, learning_rate: 0.02, early_stop: Some(early), ..config() }
}

fn trainer(config: TrainConfig) -> Trainer {
    Trainer::new(config, Backbone::conv4(4, 1).unwrap())
}

fn weights(model: &MetaModel) -> Vec<u8> {
    let mut store = TensorStore::default();
    model.write_to(&mut store).unwrap();
    store.to_bytes().unwrap()
}

/// Remembers the classes that were read; `pairs` of neighbouring classes mean the same.
struct Watched {
    bars: Bars,
    read: Mutex<BTreeSet<usize>>,
    pairs: bool,
}

impl ClassSource for Watched {
    fn n_classes(&self) -> usize {
        self.bars.n_classes()
    }

    fn images_in(&self, class: usize) -> usize {
        self.bars.images_in(class)
    }

    fn source_model(&self, class: usize) -> usize {
        self.bars.source_model(class)
    }

    fn meaning(&self, class: usize) -> usize {
        if self.pairs { class / 2 * 2 } else { class }
    }

    fn image_size(&self) -> [usize; 2] {
        self.bars.image_size()
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        self.read.lock().unwrap().insert(class);
        self.bars.read(class, index, pixels)
    }
}

#[test]
fn classes_of_checks_are_never_trained_on_and_those_that_mean_the_same_stay_together() {
    for (pairs, share, held) in [(false, 0.25, 3), (true, 0.5, 6)] {
        let watched = || Watched { bars: bars(), read: Mutex::default(), pairs };
        let (train, validation) = (watched(), watched());
        let early = EarlyStop { share, every: 5, patience: 100 };
        let mut trainer = trainer(TrainConfig { steps: 30, early_stop: Some(early), ..config() });
        let samplers = trainer.samplers(&train).unwrap();
        let sources = Sources { train: &train, validation: &validation, samplers: &samplers };
        let mut checked = Vec::new();
        let reason = trainer.run_on(sources, Limits::default(), &mut |_, iteration| {
            checked.extend(iteration.validation.map(|accuracy| (iteration.step, accuracy)));
            ControlFlow::Continue(())
        });
        assert_eq!(reason.unwrap(), StopReason::Done);
        assert_eq!(checked.iter().map(|c| c.0).collect::<Vec<_>>(), [5, 10, 15, 20, 25, 30]);
        assert!(checked.iter().all(|(_, accuracy)| (0.0..=1.0).contains(accuracy)), "{checked:?}");
        let (seen, held_out) =
            (train.read.into_inner().unwrap(), validation.read.into_inner().unwrap());
        assert_eq!((seen.len(), held_out.len()), (12 - held, held), "{seen:?} {held_out:?}");
        assert!(seen.is_disjoint(&held_out));
        if pairs {
            assert!(held_out.iter().all(|class| held_out.contains(&(class ^ 1))), "{held_out:?}");
        }
    }
}

#[test]
fn training_stops_after_its_patience_and_keeps_the_weights_of_the_best_check() {
    let mut trainer = trainer(stopping());
    let mut models = Vec::new();
    let mut checks = Vec::new();
    let reason = trainer.run(&bars(), Limits::default(), &mut |trainer, iteration| {
        models.push(weights(trainer.model()));
        checks.extend(iteration.validation.map(|accuracy| (accuracy, iteration.step)));
        ControlFlow::Continue(())
    });
    assert_eq!(reason.unwrap(), StopReason::EarlyStop, "{checks:?}");
    let (best, step) = trainer.best_check().unwrap();
    assert_eq!(trainer.step(), step + 2 * 2, "two checks after the best one: {checks:?}");
    assert!(checks.iter().all(|(accuracy, _)| *accuracy <= best));
    assert_eq!(checks.iter().find(|(accuracy, _)| *accuracy == best), Some(&(best, step)));
    assert!(weights(trainer.model()) == models[step as usize - 1], "not the best weights");
    assert!(weights(trainer.model()) != *models.last().unwrap());
    // Going on changes nothing any more.
    let before = bytes(&trainer);
    let again = trainer.run(&bars(), Limits::default(), &mut keep_going).unwrap();
    assert!(again == StopReason::EarlyStop && bytes(&trainer) == before);
}

#[test]
fn a_resumed_training_stops_where_an_uninterrupted_one_does_with_the_same_bytes() {
    let mut whole = trainer(stopping());
    let reason = whole.run(&bars(), Limits::default(), &mut keep_going).unwrap();
    for steps in [1, 3] {
        let mut part = trainer(stopping());
        let limits = Limits { steps: Some(steps), time: None };
        let mut calls = 0;
        let ended = loop {
            match part.run(&bars(), limits, &mut keep_going).unwrap() {
                StopReason::StepLimit => {
                    let store = TensorStore::from_bytes(&bytes(&part)).unwrap();
                    part = Trainer::from_store(stopping(), &store).unwrap();
                    calls += 1;
                }
                reason => break reason,
            }
        };
        assert_eq!(ended, reason);
        assert!(calls > 0 && bytes(&part) == bytes(&whole), "{calls} parts of {steps} steps");
    }
}

#[test]
fn a_share_that_leaves_too_few_classes_is_refused_with_figures() {
    for share in [0.1, 0.9] {
        let early = EarlyStop { share, every: 1, patience: 1 };
        let mut trainer = trainer(TrainConfig { early_stop: Some(early), ..config() });
        let error = trainer.run(&bars(), Limits::default(), &mut keep_going).unwrap_err();
        assert!(error.message().contains("of 12 classes"), "{error}");
        assert!(error.hint_text().unwrap().contains("meta.early_stop.share"));
    }
}
