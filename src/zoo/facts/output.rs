//! The class output: which one holds the class scores, how many classes, logits or probabilities.
//!
//! Followed backwards from each graph output: reshapes and casts are passed, a softmax or argmax
//! says what the numbers are, the last dense layer or convolution says how many classes there are
//! when the declared shape does not. Of several outputs, those the others are computed from
//! (embeddings) and those that only rescale another one are dropped.

use super::index::GraphIndex;
use crate::error::{Error, Result};
use crate::graph::{Dimension, Node, Port};
use crate::zoo::spec::OutputKind;
use crate::zoo::yaml::nearest;

/// Longest way followed back from an output.
const MAX_CHAIN: usize = 64;

/// What the graph says of its class output.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputFacts {
    /// Value name.
    pub name: String,
    /// Number of classes.
    pub classes: usize,
    /// What it holds.
    pub kind: OutputKind,
    /// How sure [`OutputFacts::kind`] is.
    pub certainty: Certainty,
    /// Other outputs that would do as well; empty when the choice is plain.
    pub alternatives: Vec<String>,
    /// For an output of labels: the scores behind its argmax, and what they are.
    pub scores_behind: Option<(String, OutputKind)>,
}

/// How sure the kind of an output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certainty {
    /// The operators that make it leave no doubt.
    Proven,
    /// The operators are not known; logits are assumed.
    Assumed,
}

/// Reads the output facts. `named` is the sidecar's `logits_output`, `labels` the number of labels
/// it gives.
///
/// # Errors
/// When the named output is not there, none of the outputs can hold class scores, or several can
/// and nothing tells which.
pub fn output_facts(
    index: &GraphIndex<'_>,
    named: Option<&str>,
    labels: Option<usize>,
) -> Result<OutputFacts> {
    let outputs = &index.graph.outputs;
    if let Some(name) = named {
        let Some(port) = outputs.iter().find(|port| port.name == name) else {
            let known: Vec<_> = outputs.iter().map(|port| port.name.as_str()).collect();
            let error = Error::input(format!(
                "`logits_output` names no output of the file, expected one of `{}`, found `{name}`",
                known.join(", ")
            ));
            return Err(match nearest(name, known.iter().copied()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint("correct `logits_output`, or remove it: it is inferred"),
            });
        };
        return look(index, port).map_err(|why| {
            Error::input(format!("output cannot hold class scores: {why}"))
                .context(format!("output `{name}`"))
                .hint("name the output with one score a class in `logits_output`")
        });
    }
    let mut fit = Vec::new();
    let mut unfit = Vec::new();
    for port in outputs {
        match look(index, port) {
            Ok(facts) => fit.push(facts),
            Err(why) => unfit.push(format!("`{}` {why}", port.name)),
        }
    }
    if fit.is_empty() {
        let found = if unfit.is_empty() { "none".into() } else { unfit.join("; ") };
        return Err(Error::input(format!("no output holds class scores: {found}"))
            .hint("an image classifier has an output of shape [batch, classes]"));
    }
    choose(index, fit, labels)
}

/// Facts of one output, or why it cannot hold class scores.
fn look(index: &GraphIndex<'_>, port: &Port) -> std::result::Result<OutputFacts, String> {
    let tail = trace(index, &port.name);
    let declared = declared_classes(port);
    if let Declared::Not(why) = declared {
        return Err(why);
    }
    let is_label = tail.kind == Some(OutputKind::Labels) || declared == Declared::Labels;
    if is_label && port.dtype.is_float() {
        return Err("holds one number an image".into());
    }
    if !is_label && !port.dtype.is_float() {
        return Err(format!("holds `{:?}`", port.dtype));
    }
    let classes = match declared {
        Declared::Classes(classes) if !is_label => Some(classes),
        _ => tail.classes,
    };
    let Some(classes) = classes else {
        return Err("has no class count that can be read from the file".into());
    };
    if classes < 2 {
        return Err(format!("has `{classes}` class"));
    }
    Ok(OutputFacts {
        name: port.name.clone(),
        classes,
        kind: if is_label { OutputKind::Labels } else { tail.kind.unwrap_or(OutputKind::Logits) },
        certainty: if tail.kind.is_some() || tail.ends_in_layer || is_label {
            Certainty::Proven
        } else {
            Certainty::Assumed
        },
        alternatives: Vec::new(),
        scores_behind: tail.scores.map(|scores| {
            let kind = trace(index, &scores).kind.unwrap_or(OutputKind::Logits);
            (scores, kind)
        }),
    })
}

/// What the declared shape of an output says.
#[derive(Debug, PartialEq)]
enum Declared {
    Classes(usize),
    Labels,
    Open,
    Not(String),
}

fn declared_classes(port: &Port) -> Declared {
    let Some(shape) = &port.shape else { return Declared::Open };
    let fixed = |position: usize| match shape.get(position) {
        Some(Dimension::Fixed(n)) => Some(*n),
        _ => None,
    };
    let shown = || {
        let sizes: Vec<String> = shape
            .iter()
            .map(|dimension| match dimension {
                Dimension::Fixed(n) => n.to_string(),
                Dimension::Symbol(name) if name.is_empty() => "?".into(),
                Dimension::Symbol(name) => name.clone(),
            })
            .collect();
        format!("has shape [{}]", sizes.join(", "))
    };
    match shape.len() {
        1 if !port.dtype.is_float() => Declared::Labels,
        2 if !port.dtype.is_float() && fixed(1) == Some(1) => Declared::Labels,
        2 => fixed(1).map_or(Declared::Open, Declared::Classes),
        4 => match (fixed(1), fixed(2), fixed(3)) {
            (Some(classes), Some(1), Some(1)) | (Some(1), Some(1), Some(classes)) => {
                Declared::Classes(classes)
            }
            (_, Some(1), Some(1)) => Declared::Open,
            _ => Declared::Not(shown()),
        },
        _ => Declared::Not(shown()),
    }
}

/// What lies before an output.
#[derive(Debug, Default)]
struct Tail<'a> {
    kind: Option<OutputKind>,
    /// Classes of the last layer.
    classes: Option<usize>,
    /// The last layer (dense or convolution) was met.
    ends_in_layer: bool,
    /// Values passed on the way.
    passed: Vec<&'a str>,
    /// Input of the argmax met.
    scores: Option<String>,
}

/// Follows `value` back to the layer that makes the scores.
fn trace<'a>(index: &GraphIndex<'a>, value: &str) -> Tail<'a> {
    let mut tail = Tail::default();
    let mut next = index.producer(value);
    for _ in 0..MAX_CHAIN {
        let Some(node) = next else { break };
        let source = node.inputs.first().map(String::as_str);
        match node.op_type.as_str() {
            "Identity" | "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze" | "Cast" | "Dropout"
            | "QuantizeLinear" | "DequantizeLinear" | "GlobalAveragePool" | "AveragePool"
            | "ReduceMean" | "Relu" => {}
            "Softmax" => {
                tail.kind.get_or_insert(OutputKind::Probabilities);
            }
            "LogSoftmax" => {
                tail.kind.get_or_insert(OutputKind::LogProbabilities);
            }
            "Sigmoid" => {
                tail.kind.get_or_insert(OutputKind::Probabilities);
            }
            "Log" => {
                let below = source.map(|name| trace(index, name).kind);
                if below == Some(Some(OutputKind::Probabilities)) {
                    tail.kind.get_or_insert(OutputKind::LogProbabilities);
                }
            }
            "ArgMax" => {
                if tail.kind.is_none() {
                    tail.scores = source.map(str::to_owned);
                }
                tail.kind.get_or_insert(OutputKind::Labels);
            }
            "Div" if is_softmax(index, node) => {
                tail.kind.get_or_insert(OutputKind::Probabilities);
                break;
            }
            _ => {
                tail.classes = layer_width(index, node);
                tail.ends_in_layer = tail.classes.is_some();
                break;
            }
        }
        let Some(name) = source else { break };
        if let Some(port) = index.graph.inputs.iter().find(|port| port.name == name) {
            tail.passed.push(&port.name);
            break;
        }
        next = index.producer(name);
        if let Some(made) = next.and_then(|node| node.outputs.iter().find(|o| *o == name)) {
            tail.passed.push(made);
        }
    }
    tail
}

/// `exp(x) / reduce_sum(exp(x))`, as old exporters write a softmax.
fn is_softmax(index: &GraphIndex<'_>, node: &Node) -> bool {
    let [exponentials, total] = node.inputs.as_slice() else { return false };
    let made_by = |value: &str, op: &str| index.producer(value).is_some_and(|n| n.op_type == op);
    made_by(exponentials, "Exp")
        && index.producer(total).is_some_and(|sum| {
            sum.op_type == "ReduceSum" && sum.inputs.first() == Some(exponentials)
        })
}

/// Number of output features of a dense layer or convolution (the bias alone when it is added
/// after).
fn layer_width(index: &GraphIndex<'_>, node: &Node) -> Option<usize> {
    let shape = |position: usize| {
        let name = node.inputs.get(position)?;
        let constant = index.constant(name).or_else(|| {
            let behind = index.producer(name)?;
            (behind.op_type == "DequantizeLinear").then(|| index.constant_input(behind, 0))?
        })?;
        Some(constant.shape.clone())
    };
    let transposed = |shape: Vec<usize>| {
        let by_rows = node.int("transB", 0).ok()? != 0;
        if by_rows { shape.first().copied() } else { shape.last().copied() }
    };
    match node.op_type.as_str() {
        "Gemm" => transposed(shape(1)?),
        "QGemm" => transposed(shape(3)?),
        "MatMul" | "MatMulInteger" => shape(1)?.last().copied(),
        "QLinearMatMul" => shape(3)?.last().copied(),
        "Conv" | "ConvInteger" => shape(1)?.first().copied(),
        "QLinearConv" => shape(3)?.first().copied(),
        "Add" | "Sub" | "Mul" | "Div" => {
            let [left, right] = node.inputs.as_slice() else { return None };
            let other = match (index.constant(left), index.constant(right)) {
                (None, Some(_)) => left,
                (Some(_), None) => right,
                _ => return None,
            };
            layer_width(index, index.producer(other)?)
        }
        _ => None,
    }
}

/// Picks one of several fit outputs.
fn choose(
    index: &GraphIndex<'_>,
    mut fit: Vec<OutputFacts>,
    labels: Option<usize>,
) -> Result<OutputFacts> {
    if fit.iter().any(|facts| facts.kind != OutputKind::Labels) {
        fit.retain(|facts| facts.kind != OutputKind::Labels);
    }
    if let Some(labels) = labels
        && fit.iter().any(|facts| facts.classes == labels)
    {
        fit.retain(|facts| facts.classes == labels);
    }
    let names: Vec<String> = fit.iter().map(|facts| facts.name.clone()).collect();
    let mut dropped = vec![false; fit.len()];
    for later in 0..fit.len() {
        let ancestors = index.ancestors(&names[later]);
        let passed = trace(index, &names[later]).passed;
        for earlier in 0..fit.len() {
            if earlier == later || !ancestors.contains(names[earlier].as_str()) {
                continue;
            }
            // softmax(logits) beside logits: the logits say more. Else: an embedding.
            if passed.contains(&names[earlier].as_str()) {
                dropped[later] = true;
            } else {
                dropped[earlier] = true;
            }
        }
    }
    let mut keep = dropped.iter().map(|dropped| !dropped);
    fit.retain(|_| keep.next().unwrap_or(true));
    let telling = |facts: &OutputFacts| facts.name.to_lowercase().contains("logit");
    if fit.iter().filter(|facts| telling(facts)).count() == 1 {
        fit.retain(telling);
    }
    let mut all = fit.into_iter();
    let Some(mut first) = all.next() else {
        return Err(Error::internal("no output left to choose from"));
    };
    let rest: Vec<OutputFacts> = all.collect();
    if rest.iter().any(|other| other.classes != first.classes) {
        let mut list = vec![format!("{} ({})", first.name, first.classes)];
        list.extend(rest.iter().map(|other| format!("{} ({})", other.name, other.classes)));
        return Err(Error::input(format!(
            "several outputs could hold the class scores `{}`",
            list.join(", ")
        ))
        .hint("name the right one in the sidecar: `logits_output: NAME`"));
    }
    first.alternatives = rest.into_iter().map(|other| other.name).collect();
    Ok(first)
}
