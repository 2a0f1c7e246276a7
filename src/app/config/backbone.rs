//! The name of a backbone in settings: one of ours, or the path of an ONNX file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The embedding network (methods.md 1.3): a name, or the path of an ONNX file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum BackboneName {
    /// Four convolutions of `width` channels.
    Conv4,
    /// ResNet-10 for small images.
    ResNet10,
    /// ResNet-12 of the few-shot literature.
    ResNet12,
    /// ResNet-18 for small images.
    ResNet18,
    /// A classifier's file, ending in .onnx, with its weights: its last linear layer gives way to the
    /// learner's head.
    File(PathBuf),
}

/// The built-in backbones by name.
const BACKBONES: [(&str, BackboneName); 4] = [
    ("conv4", BackboneName::Conv4),
    ("resnet10", BackboneName::ResNet10),
    ("resnet12", BackboneName::ResNet12),
    ("resnet18", BackboneName::ResNet18),
];

impl TryFrom<String> for BackboneName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match BACKBONES.into_iter().find(|(name, _)| *name == text) {
            Some((_, backbone)) => Ok(backbone),
            None if text.ends_with(".onnx") => Ok(Self::File(text.into())),
            None => {
                let known = BACKBONES.map(|(name, _)| name).join(", ");
                Err(format!(
                    "unknown backbone `{text}`: known are {known}, and paths of .onnx files"
                ))
            }
        }
    }
}

impl From<BackboneName> for String {
    fn from(backbone: BackboneName) -> Self {
        match backbone {
            BackboneName::File(path) => path.display().to_string(),
            named => BACKBONES
                .into_iter()
                .find(|(_, backbone)| *backbone == named)
                .map_or_else(Self::new, |(name, _)| name.into()),
        }
    }
}

impl JsonSchema for BackboneName {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "BackboneName".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "The embedding network (methods.md 1.3), or a classifier's file: its last linear layer gives way to the learner's head.",
            "type": "string",
            "anyOf": [
                { "enum": BACKBONES.map(|(name, _)| name) },
                { "pattern": "\\.onnx$" }
            ]
        })
    }
}
