//! What is done to the images of an episode.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Augmentation of episode images, one draw an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AugmentationConfig {
    /// Largest shift, pixels.
    pub shift: usize,
    /// What a shift brings in at the edge.
    pub edge: Edge,
    /// Random affine map about the centre; null neither turns nor stretches.
    pub affine: Option<AffineConfig>,
    /// Random colour map; null keeps colours, and then a learner tells models apart instead of
    /// classes.
    pub color: Option<ColorConfig>,
}

/// What a shift brings in at the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Edge {
    /// Mid grey.
    Grey,
    /// The nearest pixel of the image.
    Nearest,
}

/// A random affine map about an image's centre, each part drawn uniformly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AffineConfig {
    /// Largest turn, each way, degrees.
    pub rotation: f32,
    /// Largest factor of size, at least 1; the smallest is one over it.
    pub scale: f32,
    /// Largest shear, each way: columns a row is moved by, per row from the centre.
    pub shear: f32,
}

/// A random colour map on centred values: `(identity * I + matrix * N(0, 1)) x + offset * N(0, 1)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ColorConfig {
    /// Weight of the image's own colours.
    pub identity: f32,
    /// Standard deviation of the nine entries.
    pub matrix: f32,
    /// Standard deviation of the three offsets, in units of the pixel range.
    pub offset: f32,
}

impl Default for AugmentationConfig {
    fn default() -> Self {
        // Chosen on the glyphs meta-val split (CHANGELOG).
        Self { shift: 4, edge: Edge::Grey, affine: None, color: Some(ColorConfig::default()) }
    }
}

impl Default for AffineConfig {
    fn default() -> Self {
        Self { rotation: 15.0, scale: 1.2, shear: 0.2 }
    }
}

impl Default for ColorConfig {
    fn default() -> Self {
        Self { identity: 1.0, matrix: 0.4, offset: 0.1 }
    }
}

impl AugmentationConfig {
    /// # Errors
    /// When a number makes no sense.
    pub(super) fn check(&self) -> Result<()> {
        let Some(map) = &self.affine else { return Ok(()) };
        let asked = [
            ("rotation", map.rotation, 0.0, "0 or more"),
            ("scale", map.scale, 1.0, "1 or more"),
            ("shear", map.shear, 0.0, "0 or more"),
        ];
        for (name, value, least, what) in asked {
            if !(value.is_finite() && value >= least) {
                return Err(Error::input(format!(
                    "`meta.augmentation.affine.{name}` must be {what}: `{value}`"
                )));
            }
        }
        Ok(())
    }
}
