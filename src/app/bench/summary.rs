//! Accuracies of a variant over its seeds, and differences between variants on the same episodes.

use super::cells::{Cell, Part};
use super::record::CellRecord;
use crate::report::{mean_with_ci, student_ci95};

/// A mean over seeds with both of its intervals.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Summary {
    /// Mean over seeds and episodes.
    pub(super) mean: f64,
    /// Number of seeds.
    pub(super) seeds: usize,
    /// Half width of the 95 % interval over seeds (Student's t); `None` for one seed.
    pub(super) over_seeds: Option<f64>,
    /// Half width of the 95 % interval over episodes, each averaged over the seeds first: all seeds answer the same.
    pub(super) over_episodes: f64,
}

/// Where accuracies are compared: one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place<'a> {
    pub(super) scenario: &'a str,
    pub(super) domain: &'a str,
    pub(super) part: Part,
}

/// The accuracies of each episode, seed by seed.
pub(super) type BySeed = Vec<(u64, Vec<f64>)>;

/// The places of all that is known, in the order of the suite.
pub(super) fn places<'a>(known: &[(&'a Cell, &CellRecord)]) -> Vec<Place<'a>> {
    let mut places: Vec<Place<'a>> = Vec::new();
    for (cell, _) in known {
        for wanted in &cell.wanted {
            let place =
                Place { scenario: &cell.scenario, domain: &wanted.domain, part: wanted.part };
            if !places.contains(&place) {
                places.push(place);
            }
        }
    }
    places
}

/// The accuracies of `variant`, or of the one called `name` who answered beside it.
pub(super) fn accuracies(
    known: &[(&Cell, &CellRecord)],
    place: Place<'_>,
    variant: &str,
    name: Option<&str>,
    shot: usize,
) -> BySeed {
    let of = |(cell, record): &(&Cell, &CellRecord)| {
        if cell.scenario != place.scenario || cell.variant.name != variant {
            return None;
        }
        let wanted = cell.wanted.iter().find(|wanted| {
            wanted.domain == place.domain && wanted.part == place.part && wanted.shot == shot
        })?;
        Some((cell.seed, record.evaluation(wanted)?.accuracies(name)?))
    };
    known.iter().filter_map(of).collect()
}

/// Episode by episode `own - other`, for the seeds that both have.
pub(super) fn differences(own: &BySeed, other: &BySeed) -> BySeed {
    let of = |(seed, accuracies): &(u64, Vec<f64>)| {
        let (_, others) = other.iter().find(|(same, _)| same == seed)?;
        (others.len() == accuracies.len())
            .then(|| (*seed, accuracies.iter().zip(others).map(|(a, b)| a - b).collect()))
    };
    own.iter().filter_map(of).collect()
}

/// Mean and intervals; `None` without any seed.
pub(super) fn summarize(by_seed: &BySeed) -> Option<Summary> {
    let (_, first) = by_seed.first()?;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let means: Vec<f64> = by_seed.iter().map(|(_, values)| mean(values)).collect();
    let episode = |at: usize| {
        let values: Vec<f64> =
            by_seed.iter().filter_map(|(_, values)| values.get(at).copied()).collect();
        mean(&values)
    };
    let episodes: Vec<f64> = (0..first.len()).map(episode).collect();
    Some(Summary {
        mean: mean(&means),
        seeds: by_seed.len(),
        over_seeds: student_ci95(&means),
        over_episodes: mean_with_ci(&episodes).ci95,
    })
}

/// The mean of what `of` tells of a variant's cells in a scenario; `None` where a cell does not tell.
pub(super) fn mean_of(
    known: &[(&Cell, &CellRecord)],
    scenario: &str,
    variant: &str,
    of: impl Fn(&CellRecord) -> Option<f64>,
) -> Option<f64> {
    let cells = known.iter().filter(|(cell, record)| {
        cell.scenario == scenario && cell.variant.name == variant && record.trained.is_some()
    });
    let values = cells.map(|(_, record)| of(record)).collect::<Option<Vec<f64>>>()?;
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_taken_episode_by_episode_for_shared_seeds() {
        let own = vec![(0, vec![0.5, 0.9]), (1, vec![0.6, 0.8]), (2, vec![1.0, 1.0])];
        let other = vec![(1, vec![0.5, 0.7]), (0, vec![0.4, 0.8])];
        let found = differences(&own, &other);
        assert_eq!(found.iter().map(|(seed, _)| *seed).collect::<Vec<_>>(), [0, 1]);
        let summary = summarize(&found).unwrap();
        assert!((summary.mean - 0.1).abs() < 1e-12 && summary.over_episodes < 1e-9);
        assert!(summary.seeds == 2 && summary.over_seeds.unwrap() < 1e-9);
        assert!(summarize(&own).unwrap().over_episodes > 0.05);
        assert_eq!(summarize(&Vec::new()), None);
        assert_eq!(summarize(&vec![(0, vec![1.0])]).unwrap().over_seeds, None);
    }
}
