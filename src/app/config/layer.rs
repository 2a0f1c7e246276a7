//! Some settings, in the shape of a whole configuration, to be laid over others: the grid of `bench` is made of them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

use super::{Override, RunConfig};
use crate::error::{Error, Result};

/// Some of the settings of a run; what is not named stays. Lists and what is `null` below are replaced whole.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Layer(#[schemars(with = "RunConfig")] Mapping);

impl Layer {
    /// One setting: `key` may be dotted.
    pub fn one(key: &str, value: Value) -> Self {
        Self(Mapping::from_iter([(Value::String(key.into()), value)]))
    }

    /// Whether it sets `key` (a name without dots) or anything below it.
    pub fn sets(&self, key: &str) -> bool {
        let names = |name: &str| name.split('.').next() == Some(key);
        self.0.keys().any(|name| name.as_str().is_some_and(names))
    }
}

impl RunConfig {
    /// These settings with those of `layer` over them; `origin` says where the layer stands, for messages.
    ///
    /// # Errors
    /// When a setting is unknown (with the nearest one), or a value does not fit.
    pub fn with_layer(&self, layer: &Layer, origin: &str) -> Result<Self> {
        let mut overrides = Vec::new();
        collect(&self.tree()?, &layer.0, "", origin, &mut overrides)?;
        self.with_overrides(&overrides).map_err(|error| {
            // A setting that is wrong by itself knows where it was set, the whole of them does not.
            if error.contexts().iter().any(|context| context == origin) {
                error
            } else {
                error.context(origin)
            }
        })
    }

    /// The settings that differ in `other`, as `key: own -> other's`.
    ///
    /// # Errors
    /// Never for settings that were read or built.
    pub fn differences(&self, other: &Self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        compare(&self.tree()?, &other.tree()?, "", &mut found);
        Ok(found)
    }

    fn tree(&self) -> Result<Value> {
        serde_yaml::to_value(self)
            .map_err(|error| Error::internal(format!("cannot write the settings: `{error}`")))
    }
}

fn below(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.into() } else { format!("{prefix}.{key}") }
}

/// `layer` as overrides of single settings of `base`.
fn collect(
    base: &Value,
    layer: &Mapping,
    prefix: &str,
    origin: &str,
    overrides: &mut Vec<Override>,
) -> Result<()> {
    for (key, value) in layer {
        let Some(key) = key.as_str() else {
            let shown = shown(key);
            return Err(Error::input(format!("the name of a setting must be a text: `{shown}`"))
                .context(origin));
        };
        let name = below(prefix, key);
        match (value, base.get(key)) {
            (Value::Mapping(inner), Some(there @ Value::Mapping(_))) => {
                collect(there, inner, &name, origin, overrides)?;
            }
            _ => overrides.push(Override {
                key: name,
                value: shown(value),
                origin: origin.to_owned(),
            }),
        }
    }
    Ok(())
}

fn compare(own: &Value, other: &Value, name: &str, found: &mut Vec<String>) {
    if let (Value::Mapping(left), Value::Mapping(right)) = (own, other) {
        for (key, value) in left {
            let name = below(name, key.as_str().unwrap_or_default());
            compare(value, right.get(key).unwrap_or(&Value::Null), &name, found);
        }
        for (key, value) in right.iter().filter(|(key, _)| !left.contains_key(*key)) {
            compare(&Value::Null, value, &below(name, key.as_str().unwrap_or_default()), found);
        }
    } else if own != other {
        found.push(format!("{name}: {} -> {}", shown(own), shown(other)));
    }
}

/// A value as YAML on one line, where it is a plain one.
fn shown(value: &Value) -> String {
    serde_yaml::to_string(value).map_or_else(|_| "?".into(), |text| text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(text: &str) -> Layer {
        serde_yaml::from_str(text).unwrap()
    }

    fn laid(text: &str) -> Result<RunConfig> {
        RunConfig::default().with_layer(&layer(text), "method `m`")
    }

    #[test]
    fn what_a_layer_does_not_name_stays() {
        let text = "method: purer\nmeta: {steps: 3, early_stop: {share: 0.5}}\nmeta.way: 4\n\
                    recover: {white_box: {steps: 1}, black_box: {run_budget: 9}}";
        let config = laid(text).unwrap();
        let plain = RunConfig::default();
        assert_eq!((config.meta.steps, config.meta.way), (3, 4));
        assert_eq!(config.meta.early_stop.as_ref().unwrap().share, 0.5);
        assert_eq!(config.meta.early_stop.as_ref().unwrap().every, 100);
        assert_eq!(config.meta.shot, plain.meta.shot);
        assert_eq!(config.recover.white_box.learning_rate, plain.recover.white_box.learning_rate);
        assert_eq!(config.recover.black_box.run_budget, Some(9));
        let mut told = plain.differences(&config).unwrap();
        told.retain(|line| !line.contains("early_stop"));
        let expected = [
            "method: inversion -> purer",
            "recover.white_box.steps: 150 -> 1",
            "recover.black_box.run_budget: null -> 9",
            "meta.steps: 600 -> 3",
            "meta.way: 5 -> 4",
        ];
        assert_eq!(told, expected);
        assert!(layer("meta.steps: 3").sets("meta") && !layer("metas: 3").sets("meta"));
    }

    #[test]
    fn a_wrong_layer_says_where_it_stands() {
        for (text, said) in [
            ("meta: {stepz: 3}", "method `m`: unknown setting `meta.stepz`"),
            ("meta: {steps: many}", "method `m`: setting `meta.steps` cannot be `many`"),
            ("meta: {steps: {a: 1}}", "method `m`: setting `meta.steps` cannot be `a: 1`"),
            ("meta: {way: 1}", "method `m`: `meta.way` must be 2 or more: `1`"),
            ("1: 2", "method `m`: the name of a setting must be a text: `1`"),
        ] {
            assert_eq!(laid(text).unwrap_err().to_string(), said);
        }
        assert_eq!(
            laid("meta: {stepz: 3}").unwrap_err().hint_text(),
            Some("did you mean `steps`?")
        );
    }
}
