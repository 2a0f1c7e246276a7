//! What a run may ask its black-box models and what it has asked: one count a model in `RUN/queries/`.
//!
//! A count is written before the queries leave (`access::budget`), so a run that is killed and resumed goes on
//! from what was really spent. The run's own budget is shared among the models before the first is asked and
//! the shares are kept in `run.json`: what one model may ask depends neither on the others' speed nor on when
//! the run was interrupted. A method that chooses whom to ask by cost (BiDf-MKD) has it whole, as a pool.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::access::budget::{QueryBudget, read_count};
use crate::error::Result;
use crate::zoo::{Access, ModelSpec};

/// How the recovery of one model ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelOutcome {
    /// Its path below the zoo, without extension.
    pub id: String,
    /// How it was reached.
    pub access: Access,
    /// `done`, `budget-spent`, `not-visited` or `failed`.
    pub stop_reason: String,
    /// Images it gave.
    pub images: usize,
    /// Queries spent on it, retries included, over all calls of this run.
    pub queries: u64,
    /// Queries it was allowed; null is no limit.
    pub query_budget: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The counts and limits of a run.
#[derive(Debug, Clone)]
pub struct Queries {
    folder: PathBuf,
    /// Limits by model id.
    limits: BTreeMap<String, u64>,
    /// What all models are asked together, where their budget is not divided among them.
    pool: Option<Arc<QueryBudget>>,
}

impl Queries {
    /// Counts in `folder`, with the limits of [`limits`].
    pub fn new(folder: PathBuf, limits: BTreeMap<String, u64>) -> Self {
        Self { folder, limits, pool: None }
    }

    /// The same, where all `specs` together may be asked `total` queries (`None` is no limit), those already spent
    /// included; and the counter of them all.
    ///
    /// # Errors
    /// When a count cannot be read.
    pub fn pooled(
        self,
        total: Option<u64>,
        specs: &[&ModelSpec],
    ) -> Result<(Self, Arc<QueryBudget>)> {
        let spent = specs.iter().map(|spec| self.spent(spec)).sum::<Result<u64>>()?;
        let pool = Arc::new(QueryBudget::resumed(total, spent));
        Ok((Self { pool: Some(Arc::clone(&pool)), ..self }, pool))
    }

    /// Queries that may be spent on the model in this run; `None` is no limit.
    pub fn limit(&self, spec: &ModelSpec) -> Option<u64> {
        self.limits.get(&spec.id).copied()
    }

    /// The model's counter, going on from what was spent before.
    ///
    /// # Errors
    /// When the count cannot be read or written.
    pub fn budget(&self, spec: &ModelSpec) -> Result<QueryBudget> {
        let own = QueryBudget::kept(self.limit(spec), &self.file(spec))?;
        Ok(match &self.pool {
            Some(pool) => own.within(Arc::clone(pool)),
            None => own,
        })
    }

    /// Queries spent on the model so far.
    ///
    /// # Errors
    /// When the count cannot be read.
    pub fn spent(&self, spec: &ModelSpec) -> Result<u64> {
        read_count(&self.file(spec))
    }

    fn file(&self, spec: &ModelSpec) -> PathBuf {
        self.folder.join(file_name(spec))
    }

    /// The folder of the counts.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Name of a model's files in a run: its identity, so that two copies of a model do not collide.
pub fn file_name(spec: &ModelSpec) -> String {
    let short: String = spec.sha.chars().take(16).collect();
    format!("{short}-{}", spec.id.replace('/', "_"))
}

/// Limits by model id: the sidecar's `query_budget`, else `usual`, and together no more than `run`. Models that
/// are not asked have none.
pub fn limits(specs: &[ModelSpec], usual: Option<u64>, run: Option<u64>) -> BTreeMap<String, u64> {
    let asked: Vec<&ModelSpec> =
        specs.iter().filter(|spec| spec.access != Access::WhiteBox).collect();
    let own: Vec<Option<u64>> = asked.iter().map(|spec| spec.query_budget.or(usual)).collect();
    let shares = match run {
        Some(run) => share(run, &own).into_iter().map(Some).collect(),
        None => own,
    };
    let ids = asked.iter().map(|spec| spec.id.clone());
    ids.zip(shares).filter_map(|(id, limit)| Some((id, limit?))).collect()
}

/// `total` shared equally among takers who can use at most `caps`; what one cannot use goes to the others, a rest
/// that cannot be divided to the last.
fn share(total: u64, caps: &[Option<u64>]) -> Vec<u64> {
    let mut order: Vec<usize> = (0..caps.len()).collect();
    order.sort_by_key(|&i| caps[i].unwrap_or(u64::MAX));
    let mut shares = vec![0; caps.len()];
    let mut left = total;
    for (done, &taker) in order.iter().enumerate() {
        let even = left / (caps.len() - done) as u64;
        shares[taker] = caps[taker].unwrap_or(u64::MAX).min(even);
        left -= shares[taker];
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_capped_and_spend_the_whole_budget() {
        assert_eq!(share(10, &[None, None, None]), [3, 3, 4]);
        assert_eq!(share(100, &[Some(10), None, Some(30)]), [10, 60, 30]);
        assert_eq!(share(100, &[Some(10), None, Some(80)]), [10, 45, 45]);
        assert_eq!(share(100, &[Some(1), Some(2)]), [1, 2]);
        assert_eq!(share(1, &[Some(0), None, None]), [0, 0, 1]);
        assert_eq!(share(5, &[]), [0; 0]);
    }
}
