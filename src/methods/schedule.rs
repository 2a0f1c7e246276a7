//! Whom to visit next when each visit costs queries.

/// How models are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Where a query is expected to teach most: how far the meta-model's answers are from the model's, divided by what a
    /// visit costs and by the visits already paid, so that a model that cannot be learned does not eat the budget.
    /// Models never visited count as the farthest.
    Knowledge {
        /// Visits that a model is paid before another one is begun: under a budget that covers few, many images of a
        /// few classes teach more than a few of many (docs/bidf-mkd.md).
        depth: u64,
    },
    /// At random (the published program).
    Uniform,
}

impl Choice {
    /// Whether a model that was paid `visits` comes before those that are not begun or have all that they are first paid.
    pub fn goes_on(self, visits: u64) -> bool {
        matches!(self, Self::Knowledge { depth } if (1..depth).contains(&visits))
    }
}

/// What is known of a model before a visit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Known {
    /// Its number.
    pub model: usize,
    /// Visits already paid to it.
    pub visits: u64,
    /// Queries of the next one.
    pub cost: u64,
    /// Queries left of its own budget.
    pub left: Option<u64>,
    /// Distance between the meta-model's answers and its own; `None` before the first visit.
    pub gap: Option<f64>,
}

/// A round.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Whom to visit.
    pub chosen: Vec<usize>,
    /// Who can be visited no more: its own budget, or the run's, covers no visit.
    pub exhausted: Vec<usize>,
}

/// At most `most` of `models`, in drawn order, whose visits together cost no more than `left`.
pub fn plan(mut models: Vec<Known>, choice: Choice, most: usize, left: Option<u64>) -> Plan {
    let mut plan = Plan::default();
    let affordable = |known: &Known| {
        known.cost <= known.left.unwrap_or(u64::MAX) && known.cost <= left.unwrap_or(u64::MAX)
    };
    plan.exhausted = models.iter().filter(|known| !affordable(known)).map(|k| k.model).collect();
    models.retain(affordable);
    if matches!(choice, Choice::Knowledge { .. }) {
        let farthest = models.iter().filter_map(|known| known.gap).fold(1.0, f64::max);
        let worth = |known: &Known| {
            let gap = known.gap.filter(|gap| gap.is_finite()).unwrap_or(farthest);
            gap / ((known.cost.max(1)) as f64 * (1 + known.visits) as f64)
        };
        let goes_on = |known: &Known| choice.goes_on(known.visits);
        // Of equals the first drawn.
        models.sort_by(|a, b| {
            goes_on(b).cmp(&goes_on(a)).then_with(|| worth(b).total_cmp(&worth(a)))
        });
    }
    let mut left = left.unwrap_or(u64::MAX);
    for known in models {
        if plan.chosen.len() == most.max(1) {
            break;
        }
        if known.cost <= left {
            left -= known.cost;
            plan.chosen.push(known.model);
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(model: usize, visits: u64, cost: u64, gap: Option<f64>) -> Known {
        Known { model, visits, cost, left: None, gap }
    }

    #[test]
    fn queries_go_where_they_teach_most() {
        let models = vec![
            known(0, 1, 100, Some(0.5)),
            known(1, 1, 100, Some(2.0)),
            known(2, 1, 10, Some(0.5)),
            known(3, 9, 100, Some(2.0)),
            known(4, 0, 100, None),
        ];
        let by = Choice::Knowledge { depth: 1 };
        let chosen = |most, left| plan(models.clone(), by, most, left).chosen;
        assert_eq!(chosen(5, None), [2, 4, 1, 0, 3]);
        assert_eq!(chosen(2, None), [2, 4]);
        // 110 are enough for two, and for nobody after them.
        assert_eq!(chosen(5, Some(115)), [2, 4]);
        assert_eq!(plan(models.clone(), Choice::Uniform, 3, None).chosen, [0, 1, 2]);
    }

    #[test]
    fn what_is_begun_is_finished_before_another_model_is_begun() {
        let models = vec![
            known(0, 0, 100, None),
            known(1, 4, 100, Some(9.0)),
            known(2, 3, 100, Some(0.1)),
            known(3, 1, 100, Some(0.2)),
            known(4, 1, 100, Some(0.3)),
        ];
        let chosen = |depth| plan(models.clone(), Choice::Knowledge { depth }, 5, None).chosen;
        // A model never visited counts as far as the farthest.
        assert_eq!(chosen(1), [0, 1, 4, 3, 2]);
        assert_eq!(chosen(2), [4, 3, 0, 1, 2]);
        assert_eq!(chosen(3), [4, 3, 0, 1, 2]);
        assert_eq!(chosen(4), [4, 3, 2, 0, 1]);
    }

    #[test]
    fn who_cannot_pay_is_told() {
        let mut models = vec![known(0, 0, 100, None), known(1, 0, 50, None), known(2, 0, 0, None)];
        models[1].left = Some(49);
        let found = plan(models.clone(), Choice::Uniform, 3, Some(99));
        assert_eq!(found, Plan { chosen: vec![2], exhausted: vec![0, 1] });
        let all = plan(models, Choice::Uniform, 3, None);
        assert_eq!(all, Plan { chosen: vec![0, 2], exhausted: vec![1] });
    }
}
