//! Facts read off a graph without running it: where the logits are, what normalises, what is folded.

use std::collections::{BTreeMap, HashMap};

use super::ir::{Graph, Node};

/// What the last operators make of the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreKind {
    /// Nothing: these are the logits.
    Logits,
    /// Softmax.
    Probabilities,
    /// Log-softmax, or the logarithm of a softmax.
    LogProbabilities,
}

/// Operators that only change the shape or the type of their first input.
fn is_transparent(node: &Node) -> bool {
    matches!(
        node.op_type.as_str(),
        "Identity" | "Dropout" | "Cast" | "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze"
    )
}

/// The value under the softmax (if any) of `output`, and what `output` itself holds.
pub fn logits_under<'g>(graph: &'g Graph, output: &'g str) -> (&'g str, ScoreKind) {
    let producers = producers(graph);
    let mut value = output;
    let mut log = false;
    while let Some(node) = producers.get(value) {
        let Some(input) = node.inputs.first() else { break };
        match node.op_type.as_str() {
            "Softmax" if log => return (input, ScoreKind::LogProbabilities),
            "Softmax" => return (input, ScoreKind::Probabilities),
            "LogSoftmax" => return (input, ScoreKind::LogProbabilities),
            "Log" if !log => log = true,
            _ if is_transparent(node) => {}
            _ => break,
        }
        value = input;
    }
    (output, ScoreKind::Logits)
}

fn producers(graph: &Graph) -> HashMap<&str, &Node> {
    graph
        .nodes
        .iter()
        .flat_map(|node| node.outputs.iter().map(move |name| (name.as_str(), node)))
        .filter(|(name, _)| !name.is_empty())
        .collect()
}

/// What is left of a network's normalisation layers in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Normalization {
    /// BatchNormalization nodes: their running statistics can be matched.
    pub batch: usize,
    /// Layer, RMS, group and instance normalisation nodes: no running statistics.
    pub other: usize,
    /// Convolutions.
    pub convolutions: usize,
    /// Convolutions with a bias: where no BatchNormalization is left, it was probably folded into them.
    pub biased_convolutions: usize,
}

impl Normalization {
    /// Counts the layers of `graph`.
    pub fn of(graph: &Graph) -> Self {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        let mut biased = 0;
        for node in &graph.nodes {
            *counts.entry(node.op_type.as_str()).or_default() += 1;
            let has_bias = node.inputs.get(2).is_some_and(|name| !name.is_empty());
            biased += usize::from(node.op_type == "Conv" && has_bias);
        }
        let count = |op: &str| counts.get(op).copied().unwrap_or(0);
        Self {
            batch: count("BatchNormalization"),
            other: ["LayerNormalization", "RMSNormalization", "GroupNormalization"]
                .into_iter()
                .chain(["InstanceNormalization"])
                .map(count)
                .sum(),
            convolutions: count("Conv"),
            biased_convolutions: biased,
        }
    }

    /// Whether BatchNormalization was probably folded into the convolutions on export.
    pub fn looks_folded(&self) -> bool {
        self.batch == 0
            && self.other == 0
            && self.biased_convolutions > 0
            && self.biased_convolutions == self.convolutions
    }
}
