//! What a suite's YAML may hold: the axes of a grid of runs, and how each run is evaluated.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::named::Named;
use crate::app::BatchNorm;
use crate::app::config::Layer;
use crate::data::EpisodeShape;
use crate::error::{Error, Result, ResultExt};
use crate::zoo::yaml;

/// Longest name of a scenario, method, ablation or domain: they become folders.
const LONGEST_NAME: usize = 60;

/// A grid of runs: scenarios x (methods, their ablations, their sweeps) x seeds, each evaluated for every domain and shot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// Version of this format: 1.
    pub schema_version: u32,
    /// What it is about, for the head of the results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Seeds of the runs: one run each.
    pub seeds: Vec<u64>,
    /// Support images a class: one evaluation each.
    pub shots: Vec<usize>,
    /// Classes in an episode.
    #[serde(default = "defaults::way")]
    pub way: usize,
    /// Query images a class.
    #[serde(default = "defaults::query")]
    pub query: usize,
    /// Episodes of an evaluation.
    #[serde(default = "defaults::episodes")]
    pub episodes: u64,
    /// Seed of the episodes, the same for every run, so that differences are paired.
    #[serde(default)]
    pub episode_seed: u64,
    /// Normalisation at test time.
    #[serde(default = "defaults::batch_norm")]
    pub bn: BatchNorm,
    /// Whether the runs of methods are also held against the baselines of `eval --baselines`.
    #[serde(default)]
    pub baselines: bool,
    /// Methods, ablations or points of sweeps whose model also answers with calibration at test time (ICFIL).
    #[serde(default)]
    pub icfil: Vec<String>,
    /// Settings of every run; those of its scenario lie over them, over these its method's, then its ablation's or sweep's.
    #[serde(default)]
    pub settings: Layer,
    /// Zoos and the images that runs on them are evaluated on.
    pub scenarios: Named<Scenario>,
    /// What is compared: settings in the shape of a configuration, `method` among them.
    pub methods: Named<Layer>,
    /// A method with some settings changed, held against it on the same episodes.
    #[serde(default)]
    pub ablations: Named<Ablation>,
    /// A method at several values of one setting: the axes of figures.
    #[serde(default)]
    pub sweeps: Named<Sweep>,
}

/// A zoo and its images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The folder of models.
    pub zoo: PathBuf,
    /// Images that results are reported on, by domain.
    #[serde(default)]
    pub meta_test: Named<Pictures>,
    /// Images that anything may be chosen on, by domain.
    #[serde(default)]
    pub meta_val: Named<Pictures>,
    /// Real training images by domain: the methods' learners trained on them are the upper bound.
    #[serde(default)]
    pub real_data: Named<PathBuf>,
    /// Settings of the runs on it.
    #[serde(default)]
    pub settings: Layer,
}

/// Evaluation images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pictures {
    /// A data set in any layout that is read (docs/benchmarks.md), or a list.
    pub data: PathBuf,
    /// Its split; null when it has none.
    #[serde(default)]
    pub split: Option<String>,
}

/// A method with some settings changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ablation {
    /// The method.
    pub of: String,
    /// What is changed.
    pub settings: Layer,
    /// Only in these scenarios; null is all.
    #[serde(default)]
    pub scenarios: Option<Vec<String>>,
    /// Only with these seeds; null is all.
    #[serde(default)]
    pub seeds: Option<Vec<u64>>,
}

/// Methods at several values of one setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// The setting, as `meta.steps`, `max_models` or `recover.black_box.run_budget`.
    pub setting: String,
    /// Its values: numbers, or words where the setting takes them.
    #[schemars(with = "Vec<serde_json::Value>")]
    pub values: Vec<serde_yaml::Value>,
    /// The methods; null is all.
    #[serde(default)]
    pub methods: Option<Vec<String>>,
    /// Only in these scenarios; null is all.
    #[serde(default)]
    pub scenarios: Option<Vec<String>>,
    /// Only with these seeds; null is all.
    #[serde(default)]
    pub seeds: Option<Vec<u64>>,
}

mod defaults {
    //! The field's protocol.

    use crate::app::BatchNorm;

    pub(super) fn way() -> usize {
        5
    }

    pub(super) fn query() -> usize {
        15
    }

    pub(super) fn episodes() -> u64 {
        600
    }

    pub(super) fn batch_norm() -> BatchNorm {
        BatchNorm::Inductive
    }
}

impl Suite {
    /// Reads a file.
    ///
    /// # Errors
    /// Names file, line and nearest key; refuses what makes no grid.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::io(path, &error).context("cannot read the suite"))?;
        Self::parse(&text, path)
    }

    /// Reads the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// As [`Suite::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let suite: Self = yaml::parse(text, path).hint(|| {
            "a suite holds `schema_version: 1`, `seeds`, `shots`, `scenarios` and `methods`: \
             see examples/bench_small.yaml"
                .into()
        })?;
        suite.check().context(|| format!("`{}`", path.display()))?;
        Ok(suite)
    }

    /// The size of its episodes with `shot` support images.
    pub fn shape(&self, shot: usize) -> EpisodeShape {
        EpisodeShape { way: self.way, shot, query: self.query }
    }

    /// Refuses what makes no grid.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<()> {
        if self.schema_version != 1 {
            return Err(Error::input(format!(
                "this program reads suites of `schema_version: 1`, got `{}`",
                self.schema_version
            )));
        }
        listed_once("seeds", &self.seeds)?;
        listed_once("shots", &self.shots)?;
        let numbers = [
            ("shots", self.shots.iter().copied().min().unwrap_or(0)),
            ("query", self.query),
            ("episodes", self.episodes as usize),
        ];
        if let Some((name, _)) = numbers.iter().find(|(_, value)| *value == 0) {
            return Err(Error::input(format!("must not be 0: `{name}`")));
        }
        if self.way < 2 {
            return Err(Error::input(format!("`way` must be 2 or more: `{}`", self.way)));
        }
        for (key, empty) in
            [("scenarios", self.scenarios.is_empty()), ("methods", self.methods.is_empty())]
        {
            if empty {
                return Err(Error::input(format!("at least one is needed: `{key}`")));
            }
        }
        self.check_scenarios()?;
        for (name, layer) in self.methods.iter() {
            check_name("methods", name)?;
            refuse_decided(layer, || format!("methods: `{name}`"))?;
        }
        refuse_decided(&self.settings, || "settings".into())?;
        self.check_variants()
    }

    fn check_scenarios(&self) -> Result<()> {
        for (name, scenario) in self.scenarios.iter() {
            check_name("scenarios", name)?;
            refuse_decided(&scenario.settings, || format!("scenarios: `{name}`"))?;
            let domains = || scenario.meta_test.names().chain(scenario.meta_val.names());
            if domains().next().is_none() {
                return Err(Error::input("no images to evaluate on: `meta_test`")
                    .context(format!("scenarios: `{name}`"))
                    .hint("for instance `meta_test: {glyphs: {data: images, split: meta_test}}`"));
            }
            for domain in domains() {
                check_name("domains", domain)?;
            }
            for domain in scenario.real_data.names() {
                known("real_data", "domain", domain, domains())
                    .context(|| format!("scenarios: `{name}`"))?;
            }
        }
        Ok(())
    }

    fn check_variants(&self) -> Result<()> {
        let place = |kind: &str, name: &str| format!("{kind}: `{name}`");
        for (name, ablation) in self.ablations.iter() {
            check_name("ablations", name)?;
            let at = || place("ablations", name);
            known("of", "method", &ablation.of, self.methods.names()).context(at)?;
            refuse_decided(&ablation.settings, at)?;
            self.check_limits(&ablation.scenarios, &ablation.seeds).context(at)?;
        }
        for (name, sweep) in self.sweeps.iter() {
            check_name("sweeps", name)?;
            let at = || place("sweeps", name);
            for method in sweep.methods.iter().flatten() {
                known("methods", "method", method, self.methods.names()).context(at)?;
            }
            self.check_limits(&sweep.scenarios, &sweep.seeds).context(at)?;
            refuse_decided(&Layer::one(&sweep.setting, serde_yaml::Value::Null), at)?;
            if sweep.values.is_empty() {
                return Err(Error::input("at least one is needed: `values`").context(at()));
            }
        }
        Ok(())
    }

    fn check_limits(
        &self,
        scenarios: &Option<Vec<String>>,
        seeds: &Option<Vec<u64>>,
    ) -> Result<()> {
        for scenario in scenarios.iter().flatten() {
            known("scenarios", "scenario", scenario, self.scenarios.names())?;
        }
        let all: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        for seed in seeds.iter().flatten() {
            known("seeds", "seed", &seed.to_string(), all.iter().map(String::as_str))?;
        }
        Ok(())
    }
}

/// Refuses an empty list and one that holds a value twice.
fn listed_once<T: PartialEq + std::fmt::Display>(key: &str, values: &[T]) -> Result<()> {
    if values.is_empty() {
        return Err(Error::input(format!("at least one is needed: `{key}`")));
    }
    let twice = (1..values.len()).find(|&at| values[..at].contains(&values[at]));
    match twice.and_then(|at| values.get(at)) {
        Some(value) => Err(Error::input(format!("`{key}` holds a value twice: `{value}`"))),
        None => Ok(()),
    }
}

/// Names become folders: nothing that leads out of one.
pub(super) fn check_name(kind: &str, name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+=".contains(c);
    let fits = !name.is_empty() && name.len() <= LONGEST_NAME && !name.starts_with(['.', '-']);
    if fits && name.chars().all(plain) {
        return Ok(());
    }
    Err(Error::input(format!("`{kind}` holds a name that cannot name a folder: `{name}`")).hint(
        format!(
            "use letters, digits and `-_.+=`, {LONGEST_NAME} at most, none of `.-` at the start"
        ),
    ))
}

/// Refuses a name that is none of `all`, with the nearest one.
fn known<'a>(key: &str, what: &str, name: &str, all: impl Iterator<Item = &'a str>) -> Result<()> {
    let all: Vec<&str> = all.collect();
    if all.contains(&name) {
        return Ok(());
    }
    let error = Error::input(format!("`{key}` names no {what} of the suite: `{name}`"));
    Err(match yaml::nearest(name, all.iter().copied()) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint(format!("there are {}", all.join(", "))),
    })
}

/// Settings that the suite itself decides, and the key that does.
const DECIDED: [(&str, &str); 4] = [
    ("zoo", "`scenarios.NAME.zoo`"),
    ("seed", "`seeds`"),
    ("eval", "`shots`, `way`, `query`, `episodes` and the images of each scenario"),
    ("export", "nothing: export a run of the grid with `metazoa export`"),
];

fn refuse_decided(layer: &Layer, place: impl Fn() -> String) -> Result<()> {
    match DECIDED.iter().find(|(key, _)| layer.sets(key)) {
        Some((key, by)) => Err(Error::input(format!("a suite does not set `{key}` there"))
            .context(place())
            .hint(format!("in a suite {by} decides"))),
        None => Ok(()),
    }
}
