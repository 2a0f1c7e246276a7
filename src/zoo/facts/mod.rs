//! What a model's graph says of itself: image input, class output, normalisation statistics.
//!
//! Everything here is read from the graph alone; [`super::resolve`] merges it with the sidecar. A
//! fact is `None` when the graph is silent. Nothing is executed, so a hostile graph costs at most
//! one pass over its nodes.

pub mod index;
pub mod input;
pub mod norm;
pub mod output;

use std::collections::BTreeMap;

pub use index::GraphIndex;
pub use input::InputFacts;
pub use norm::NormFacts;
pub use output::OutputFacts;

/// Whether a graph computes with quantised integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantisation {
    /// Floating point throughout.
    None,
    /// Scales fixed in the file: each image's result stands alone.
    Static,
    /// Scales computed from the batch: images of one batch influence each other.
    Dynamic,
}

/// Looks for integer arithmetic in operator counts (as [`crate::graph::Graph::op_counts`] gives them).
pub fn quantisation(ops: &BTreeMap<String, usize>) -> Quantisation {
    let mut found = Quantisation::None;
    for name in ops.keys() {
        let (domain, op) = name.rsplit_once('.').unwrap_or(("", name));
        if op.starts_with("DynamicQuantize") {
            return Quantisation::Dynamic;
        }
        let standard = matches!(
            op,
            "QuantizeLinear"
                | "DequantizeLinear"
                | "QLinearConv"
                | "QLinearMatMul"
                | "ConvInteger"
                | "MatMulInteger"
        );
        let contributed = domain == "com.microsoft"
            && (op.starts_with("QLinear")
                || matches!(op, "QGemm" | "QAttention" | "MatMulNBits" | "MatMulIntegerToFloat"));
        if standard || contributed {
            found = Quantisation::Static;
        }
    }
    found
}

/// Whether a graph of these operators rounds its activations, and not its weights alone: a dequantised weight or
/// `MatMulNBits` leaves the activations in floating point.
pub fn rounds_activations(ops: &BTreeMap<String, usize>) -> bool {
    ops.keys().any(|name| {
        let op = name.rsplit_once('.').map_or(name.as_str(), |(_, op)| op);
        op.starts_with("QLinear")
            || op.contains("Integer")
            || op.starts_with("DynamicQuantize")
            || op == "QuantizeLinear"
            || matches!(op, "QGemm" | "QAttention")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Quantisation {
        quantisation(&names.iter().map(|n| ((*n).to_owned(), 1)).collect())
    }

    #[test]
    fn weights_that_are_dequantised_leave_the_activations_alone() {
        let rounds = |names: &[&str]| {
            rounds_activations(&names.iter().map(|n| ((*n).to_owned(), 1)).collect())
        };
        for weights_only in ["Conv", "DequantizeLinear", "com.microsoft.MatMulNBits"] {
            assert!(!rounds(&[weights_only, "Relu"]), "{weights_only}");
        }
        for op in ["QuantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "QLinearMatMul"] {
            assert!(rounds(&["DequantizeLinear", op]), "{op}");
        }
        for op in ["QLinearAdd", "QGemm", "MatMulIntegerToFloat", "QuantizeLinear"] {
            assert!(rounds(&["Relu", &format!("com.microsoft.{op}")]), "{op}");
        }
    }

    #[test]
    fn tells_static_from_dynamic_quantisation() {
        assert_eq!(found(&["Conv", "Gemm"]), Quantisation::None);
        assert_eq!(found(&["Conv", "DequantizeLinear"]), Quantisation::Static);
        assert_eq!(found(&["com.microsoft.QGemm"]), Quantisation::Static);
        assert_eq!(found(&["MatMulInteger", "DynamicQuantizeLinear"]), Quantisation::Dynamic);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod graph_tests;
