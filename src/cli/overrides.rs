//! Settings from the environment (`METAZOA_META__STEPS=100`) and from `--set meta.steps=100`.

use super::settings::Settings;
use crate::app::RunConfig;
use crate::app::config::Override;
use crate::error::{Error, Result};

/// Variables that are global flags or places, not settings of a run.
const OTHERS: [&str; 4] = ["METAZOA_SEED", "METAZOA_JOBS", "METAZOA_DEVICE", "METAZOA_ORT_DIR"];

/// `config` under the environment, then `--set` flags, then `--seed`.
///
/// # Errors
/// When a setting is unknown or does not fit, naming where it was set.
pub(crate) fn resolved(
    config: &RunConfig,
    set: &[String],
    settings: &Settings,
) -> Result<RunConfig> {
    let seed = settings.seed.map(|seed| Override {
        key: "seed".into(),
        value: seed.to_string(),
        origin: "flag `--seed`".into(),
    });
    config.with_overrides(&all(set)?)?.with_overrides(seed.as_slice())
}

/// The environment's settings, then those of `--set` flags.
///
/// # Errors
/// When a flag has no `=`.
pub(crate) fn all(set: &[String]) -> Result<Vec<Override>> {
    let mut overrides = from_environment();
    overrides.extend(from_flags(set)?);
    Ok(overrides)
}

/// The flags `--budget` and `--max-open`.
pub(crate) fn queries(
    config: &mut RunConfig,
    budget: Option<u64>,
    max_open: Option<std::num::NonZeroUsize>,
) {
    let black = &mut config.recover.black_box;
    black.run_budget = budget.or(black.run_budget);
    black.max_open = max_open.map(usize::from).or(black.max_open);
}

/// The `METAZOA_*` variables that name settings, sorted by name.
fn from_environment() -> Vec<Override> {
    let mut found: Vec<Override> = std::env::vars()
        .filter(|(name, _)| name.starts_with("METAZOA_") && !OTHERS.contains(&name.as_str()))
        .map(|(name, value)| Override {
            key: name.trim_start_matches("METAZOA_").to_lowercase().replace("__", "."),
            value,
            origin: format!("environment variable `{name}`"),
        })
        .collect();
    found.sort_by(|a, b| a.key.cmp(&b.key));
    found
}

/// The `--set KEY=VALUE` flags, in order.
///
/// # Errors
/// When one has no `=`.
fn from_flags(set: &[String]) -> Result<Vec<Override>> {
    set.iter()
        .map(|text| {
            let (key, value) = text.split_once('=').ok_or_else(|| {
                Error::usage(format!("a setting is `KEY=VALUE`, got `{text}`"))
                    .hint("for instance `--set meta.steps=100`")
            })?;
            let origin = format!("flag `--set {text}`");
            Ok(Override { key: key.into(), value: value.into(), origin })
        })
        .collect()
}
