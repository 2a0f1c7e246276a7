//! The grid: every cell of a suite with its settings and the evaluations it owes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

use super::suite::{Suite, check_name};
use crate::app::config::{Layer, Override, RunConfig};
use crate::app::{BatchNorm, run_folder};
use crate::error::{Error, Result, ResultExt};

/// Most cells of a suite; more is a slip of the hand.
const MOST_CELLS: usize = 10_000;

/// What a variant of a suite is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A method as the suite names it.
    Method,
    /// A method with some settings changed.
    Ablation,
    /// A method at one value of a swept setting.
    Sweep,
}

/// A point of a sweep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Point {
    /// The sweep's name.
    pub(super) sweep: String,
    /// The swept setting.
    pub(super) setting: String,
    /// Its value, as text.
    pub(super) value: String,
}

/// A method, an ablation or a point of a sweep.
#[derive(Debug, Clone)]
pub(super) struct Variant {
    /// Its name, a folder's.
    pub(super) name: String,
    /// What it is.
    pub(super) kind: Kind,
    /// The method it is or belongs to.
    pub(super) method: String,
    /// Of a sweep.
    pub(super) point: Option<Point>,
    layer: Layer,
    scenarios: Option<Vec<String>>,
    seeds: Option<Vec<u64>>,
}

/// Which images an evaluation is made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// For reporting.
    MetaTest,
    /// For choosing.
    MetaVal,
}

impl Part {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::MetaTest => "meta-test",
            Self::MetaVal => "meta-val",
        }
    }
}

/// One evaluation of a cell: whatever decides its numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(super) struct Wanted {
    /// The domain.
    pub(super) domain: String,
    /// For reporting or for choosing.
    pub(super) part: Part,
    /// The images.
    pub(super) data: PathBuf,
    /// Their split.
    pub(super) split: Option<String>,
    /// Classes in an episode.
    pub(super) way: usize,
    /// Support images a class.
    pub(super) shot: usize,
    /// Query images a class.
    pub(super) query: usize,
    /// Number of episodes.
    pub(super) episodes: u64,
    /// Seed of the episodes.
    pub(super) episode_seed: u64,
    /// Normalisation at test time.
    pub(super) bn: BatchNorm,
    /// Whether baselines answer too.
    pub(super) baselines: bool,
    /// Whether the calibrated model answers too.
    pub(super) icfil: bool,
    /// Real images that the upper bound is trained on.
    pub(super) real_data: Option<PathBuf>,
}

/// One run of the grid.
#[derive(Debug, Clone)]
pub(super) struct Cell {
    /// `SCENARIO/VARIANT/seed-N`, its folder below `cells`.
    pub(super) id: String,
    /// The scenario's name.
    pub(super) scenario: String,
    /// What is run.
    pub(super) variant: Variant,
    /// The run's seed.
    pub(super) seed: u64,
    /// All its settings.
    pub(super) config: RunConfig,
    /// SHA-256 of the settings without the seed, 16 digits.
    pub(super) settings_hash: String,
    /// Its evaluations.
    pub(super) wanted: Vec<Wanted>,
}

impl Cell {
    /// Its run folder.
    pub(super) fn run(&self, out: &Path) -> PathBuf {
        out.join("cells").join(&self.id)
    }

    /// The file of what is known of it.
    pub(super) fn record(&self, out: &Path) -> PathBuf {
        out.join("cells").join(format!("{}.json", self.id))
    }
}

/// The variants of `suite`: methods, ablations, points of sweeps.
///
/// # Errors
/// When two get the same name, or a value cannot be part of one.
pub(super) fn variants(suite: &Suite) -> Result<Vec<Variant>> {
    let method = |(name, layer): (&str, &Layer)| Variant {
        name: name.into(),
        kind: Kind::Method,
        method: name.into(),
        point: None,
        layer: layer.clone(),
        scenarios: None,
        seeds: None,
    };
    let mut all: Vec<Variant> = suite.methods.iter().map(method).collect();
    for (name, ablation) in suite.ablations.iter() {
        all.push(Variant {
            name: name.into(),
            kind: Kind::Ablation,
            method: ablation.of.clone(),
            point: None,
            layer: ablation.settings.clone(),
            scenarios: ablation.scenarios.clone(),
            seeds: ablation.seeds.clone(),
        });
    }
    for (sweep, own) in suite.sweeps.iter() {
        let every = || suite.methods.names().map(str::to_owned).collect();
        for method in own.methods.clone().unwrap_or_else(every) {
            for value in &own.values {
                let text = serde_yaml::to_string(value).unwrap_or_default().trim_end().to_owned();
                let name = format!("{method}+{sweep}={text}");
                check_name("values", &name).context(|| format!("sweeps: `{sweep}`"))?;
                let point =
                    Point { sweep: sweep.into(), setting: own.setting.clone(), value: text };
                all.push(Variant {
                    name,
                    kind: Kind::Sweep,
                    method: method.clone(),
                    point: Some(point),
                    layer: Layer::one(&own.setting, value.clone()),
                    scenarios: own.scenarios.clone(),
                    seeds: own.seeds.clone(),
                });
            }
        }
    }
    for (at, variant) in all.iter().enumerate() {
        if all[..at].iter().any(|other| other.name == variant.name) {
            return Err(Error::input(format!(
                "two of methods, ablations and sweeps have one name: `{}`",
                variant.name
            )));
        }
    }
    for name in &suite.icfil {
        if all.iter().all(|variant| variant.name != *name) {
            let names: Vec<&str> = all.iter().map(|variant| variant.name.as_str()).collect();
            return Err(Error::input(format!("`icfil` names nothing of the suite: `{name}`"))
                .hint(format!("there are {}", names.join(", "))));
        }
    }
    Ok(all)
}

/// Every cell of `suite`, seed by seed, so that a grid cut short has whole rows of its first seeds. `overrides`, of the
/// command line, lie over all settings.
///
/// # Errors
/// When settings are unknown or do not fit, naming the method and the like where they stand.
pub(super) fn cells(suite: &Suite, overrides: &[Override]) -> Result<Vec<Cell>> {
    let variants = variants(suite)?;
    let most = variants.len().saturating_mul(suite.scenarios.names().count());
    if most.saturating_mul(suite.seeds.len()) > MOST_CELLS {
        return Err(Error::input(format!(
            "a suite has {MOST_CELLS} cells at most (scenarios x variants x seeds), this has `{}`",
            most.saturating_mul(suite.seeds.len())
        ))
        .hint("split it into several suites"));
    }
    let mut cells: Vec<Cell> = Vec::new();
    for &seed in &suite.seeds {
        for (scenario, _) in suite.scenarios.iter() {
            for variant in &variants {
                let left_out = |list: &Option<Vec<String>>| {
                    list.as_ref().is_some_and(|names| names.iter().all(|name| name != scenario))
                };
                let other = variant.seeds.as_ref().is_some_and(|seeds| !seeds.contains(&seed));
                if left_out(&variant.scenarios) || other {
                    continue;
                }
                let config = settings(suite, scenario, variant, seed, overrides)?;
                let bound = cells.iter().any(|cell| {
                    cell.scenario == scenario
                        && cell.variant.kind == Kind::Method
                        && cell.seed == seed
                        && cell.config.meta == config.meta
                        && cell.config.image_size == config.image_size
                });
                let bound = if bound { Bound::Known } else { Bound::Wanted };
                cells.push(Cell {
                    id: format!("{scenario}/{}/seed-{seed}", variant.name),
                    scenario: scenario.into(),
                    seed,
                    settings_hash: settings_hash(&config)?,
                    config,
                    wanted: wanted(suite, scenario, variant, bound),
                    variant: variant.clone(),
                });
            }
        }
    }
    Ok(cells)
}

/// Whether an earlier cell has the same learner trained on real images.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bound {
    Known,
    Wanted,
}

fn settings(
    suite: &Suite,
    scenario: &str,
    variant: &Variant,
    seed: u64,
    overrides: &[Override],
) -> Result<RunConfig> {
    let mut config = RunConfig { seed, export: Vec::new(), ..RunConfig::default() }
        .with_layer(&suite.settings, "settings")?;
    if let Some(own) = suite.scenarios.get(scenario) {
        config.zoo.clone_from(&own.zoo);
        config = config.with_layer(&own.settings, &format!("scenarios: `{scenario}`"))?;
    }
    if let Some(method) = suite.methods.get(&variant.method) {
        config = config.with_layer(method, &format!("methods: `{}`", variant.method))?;
    }
    let place = match variant.kind {
        Kind::Method => return config.with_overrides(overrides),
        Kind::Ablation => format!("ablations: `{}`", variant.name),
        Kind::Sweep => format!("sweeps: `{}`", variant.name),
    };
    config.with_layer(&variant.layer, &place)?.with_overrides(overrides)
}

fn wanted(suite: &Suite, scenario: &str, variant: &Variant, bound: Bound) -> Vec<Wanted> {
    let Some(own) = suite.scenarios.get(scenario) else { return Vec::new() };
    let is_method = variant.kind == Kind::Method;
    let mut domains: Vec<&str> = own.meta_test.names().collect();
    domains.extend(own.meta_val.names().filter(|name| own.meta_test.get(name).is_none()));
    let mut all = Vec::new();
    // Domain by domain: both parts share the network trained on the domain's real images.
    for domain in domains {
        let real = own.real_data.get(domain).filter(|_| is_method && bound == Bound::Wanted);
        for (part, pictures) in [(Part::MetaTest, &own.meta_test), (Part::MetaVal, &own.meta_val)] {
            let Some(pictures) = pictures.get(domain) else { continue };
            for &shot in &suite.shots {
                all.push(Wanted {
                    domain: domain.into(),
                    part,
                    data: pictures.data.clone(),
                    split: pictures.split.clone(),
                    way: suite.way,
                    shot,
                    query: suite.query,
                    episodes: suite.episodes,
                    episode_seed: suite.episode_seed,
                    bn: suite.bn,
                    baselines: is_method && suite.baselines,
                    icfil: suite.icfil.contains(&variant.name),
                    real_data: real.cloned(),
                });
            }
        }
    }
    all
}

fn settings_hash(config: &RunConfig) -> Result<String> {
    let text = RunConfig { seed: 0, ..config.clone() }.to_yaml()?;
    let digest = Sha256::digest(text.as_bytes());
    Ok(digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// The cells whose id one of `patterns` fits: `*` stands for anything; without one, a part of the id does.
///
/// # Errors
/// When a pattern fits none.
pub(super) fn chosen<'a>(cells: &'a [Cell], patterns: &[String]) -> Result<Vec<&'a Cell>> {
    for pattern in patterns {
        if !cells.iter().any(|cell| fits(&cell.id, pattern)) {
            let some: Vec<&str> = cells.iter().take(4).map(|cell| cell.id.as_str()).collect();
            return Err(Error::usage(format!("`--only` fits no cell of the suite: `{pattern}`"))
                .hint(format!(
                    "cells are called {}, ...: `--dry-run` lists all",
                    some.join(", ")
                )));
        }
    }
    let wanted = |cell: &&Cell| patterns.is_empty() || patterns.iter().any(|p| fits(&cell.id, p));
    Ok(cells.iter().filter(wanted).collect())
}

fn fits(id: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let rest: Vec<&str> = parts.collect();
    let Some((last, middle)) = rest.split_last() else { return id.contains(pattern) };
    let Some(mut left) = id.strip_prefix(first) else { return false };
    for part in middle {
        match left.find(part) {
            Some(at) => left = &left[at + part.len()..],
            None => return false,
        }
    }
    left.ends_with(last)
}

/// The program's version, for results.
pub(super) fn version() -> String {
    run_folder::versions().remove("metazoa").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn patterns_fit_ids() {
        for (pattern, expected) in [
            ("SS", true),
            ("free", true),
            ("SS/*", true),
            ("*/seed-1", true),
            ("*/seed-2", false),
            ("*free*seed*1", true),
            ("free*", false),
            ("*", true),
            ("SH/*", false),
            ("SS/*1*1", false),
        ] {
            assert_eq!(fits("SS/free/seed-1", pattern), expected, "{pattern}");
        }
    }
}
