//! Normalisation layers with running statistics, and traces of those an exporter folded away.
//!
//! Inversion matches the statistics of synthesised images to the running statistics of the layers
//! (PURER sec. 2.2); both default PyTorch exporters fold them into the convolutions, from where
//! they cannot be separated again. A user should learn that at ingest, with the call that keeps them.

use super::index::GraphIndex;
use crate::graph::Node;

/// What the graph keeps of its normalisation layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NormFacts {
    /// BatchNormalization nodes whose running mean and variance are in the file.
    pub taps: usize,
    /// Those of them exported in training mode; used as in evaluation.
    pub in_training_mode: usize,
    /// BatchNormalization nodes whose statistics are computed, not stored.
    pub without_statistics: usize,
    /// Convolutions.
    pub convolutions: usize,
    /// Spatial convolutions with a bias and no normalisation after: where folding leaves its traces.
    pub maybe_folded: usize,
}

impl NormFacts {
    /// One sentence for the user when statistics are missing or odd.
    pub fn note(&self) -> Option<String> {
        if self.taps == 0 && self.maybe_folded > 0 {
            return Some(format!(
                "no BatchNormalization left; {} of {} Conv nodes carry a bias, so it was folded if the network had it: {REEXPORT}",
                self.maybe_folded, self.convolutions
            ));
        }
        if self.taps > 0 && self.maybe_folded > 0 {
            return Some(format!(
                "{} BatchNormalization nodes kept, {} of {} Conv nodes look folded: {REEXPORT}",
                self.taps, self.maybe_folded, self.convolutions
            ));
        }
        if self.in_training_mode > 0 {
            return Some(format!(
                "{} BatchNormalization nodes were exported in training mode; running statistics are used: export after `model.eval()`",
                self.in_training_mode
            ));
        }
        None
    }
}

/// The export calls that keep the statistics (measured with torch 2.15).
const REEXPORT: &str = "re-export with `torch.onnx.export(..., optimize=False)` (dynamo) or `training=TrainingMode.PRESERVE, do_constant_folding=False` (dynamo=False) to keep its statistics";

/// Reads the normalisation facts.
pub fn norm_facts(index: &GraphIndex<'_>) -> NormFacts {
    let mut facts = NormFacts::default();
    let mut layer_norm = false;
    for node in &index.graph.nodes {
        match node.op_type.as_str() {
            "BatchNormalization" => {
                let stored = |position| index.constant_input(node, position).is_some();
                if stored(3) && stored(4) {
                    facts.taps += 1;
                    facts.in_training_mode +=
                        usize::from(node.int("training_mode", 0).unwrap_or(0) != 0);
                } else {
                    facts.without_statistics += 1;
                }
            }
            "LayerNormalization" | "GroupNormalization" | "InstanceNormalization" => {
                layer_norm = true;
            }
            "Conv" => {
                facts.convolutions += 1;
                facts.maybe_folded += usize::from(looks_folded(index, node));
            }
            _ => {}
        }
    }
    // Networks built on layer or group normalisation keep their biases for other reasons.
    if layer_norm || decomposed_layer_norm(index) {
        facts.maybe_folded = 0;
    }
    facts
}

/// Spatial (a 1x1 convolution with a bias is also how squeeze-excitation is written), with a bias,
/// and not followed by a normalisation; the last layer of an all-convolutional head does not count.
fn looks_folded(index: &GraphIndex<'_>, node: &Node) -> bool {
    let Some(weight) = index.constant_input(node, 1) else { return false };
    let spatial = weight.shape.iter().skip(2).any(|&side| side > 1);
    let biased = index
        .constant_input(node, 2)
        .is_some_and(|bias| bias.to_f32().iter().any(|&value| value != 0.0));
    let Some(output) = node.outputs.first() else { return false };
    let readers = index.consumers(output);
    let normalised = readers.iter().any(|reader| reader.op_type == "BatchNormalization");
    spatial && biased && !normalised && !readers.is_empty()
}

/// Mean, square root and division, as exporters below opset 17 write LayerNormalization.
fn decomposed_layer_norm(index: &GraphIndex<'_>) -> bool {
    index.graph.nodes.iter().any(|node| {
        let made_by = |value: Option<&String>, op: &str| {
            value.and_then(|name| index.producer(name)).is_some_and(|n| n.op_type == op)
        };
        node.op_type == "Div" && made_by(node.inputs.get(1), "Sqrt")
    })
}
