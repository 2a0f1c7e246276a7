//! Einsum: sums over labels are matrix products of operands brought to [batch, kept, summed] form, two
//! at a time from the left.

use super::Rule;
use super::binary::{Binary, emit};
use super::matmul::product;
use super::rearrange::{Source, indices, rearrange};
use super::reduce::{Reduction, reduce_axes};
use super::strides;
use super::transpose::permute;
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "Einsum" => Some(einsum),
        _ => None,
    }
}

/// Labels of a term; the axes under `...` are numbered from the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Ellipsis(usize),
    Letter(char),
}

/// A value with a label for each axis, each label once.
#[derive(Debug, Clone)]
struct Term {
    value: Value,
    labels: Vec<Label>,
}

/// The labels of one comma-separated term for an operand of `rank` (`None`: for the output, with
/// `ellipsis` axes under the dots).
fn labels(text: &str, ellipsis: usize) -> Result<Vec<Label>> {
    let mut labels = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("...") {
            labels.extend((0..ellipsis).rev().map(Label::Ellipsis));
            rest = after;
            continue;
        }
        if !c.is_alphabetic() {
            return Err(Error::input(format!("equation has `{c}` in a term")));
        }
        labels.push(Label::Letter(c));
        rest = &rest[c.len_utf8()..];
    }
    Ok(labels)
}

/// Takes the diagonal where a label is repeated in one term.
fn diagonal<T: Element>(lower: &mut Lower<'_, T>, term: Term) -> Result<Term> {
    let mut kept: Vec<Label> = Vec::new();
    for &label in &term.labels {
        if !kept.contains(&label) {
            kept.push(label);
        }
    }
    if kept.len() == term.labels.len() {
        return Ok(term);
    }
    let own = strides(term.value.shape());
    let mut shape = Vec::new();
    let mut steps = Vec::new();
    for &label in &kept {
        let axes = (0..term.labels.len()).filter(|&axis| term.labels[axis] == label);
        let sizes: Vec<usize> = axes.clone().map(|axis| term.value.shape()[axis]).collect();
        if sizes.iter().any(|&size| size != sizes[0]) {
            return Err(Error::input(format!("a repeated label stands for sizes `{sizes:?}`")));
        }
        shape.push(sizes[0]);
        steps.push(axes.map(|axis| own[axis]).sum::<usize>());
    }
    let map = indices(&shape).map(move |index| Source::Element {
        input: 0,
        at: index.iter().zip(&steps).map(|(i, s)| i * s).sum(),
    });
    let value = rearrange(lower, &[term.value], shape.clone(), 0.0, map)?;
    Ok(Term { value, labels: kept })
}

/// Sums over the labels that neither the output nor another term has.
fn sum_out<T: Element>(
    lower: &mut Lower<'_, T>,
    term: Term,
    wanted: &dyn Fn(Label) -> bool,
) -> Result<Term> {
    let axes: Vec<usize> =
        (0..term.labels.len()).filter(|&axis| !wanted(term.labels[axis])).collect();
    if axes.is_empty() {
        return Ok(term);
    }
    let summed = reduce_axes(lower, Reduction::Sum, &term.value, &axes)?;
    let kept: Vec<usize> = (0..term.labels.len()).filter(|axis| !axes.contains(axis)).collect();
    let shape = kept.iter().map(|&axis| summed.shape()[axis]).collect();
    let value = lower.reshape(&summed, shape)?;
    Ok(Term { value, labels: kept.iter().map(|&axis| term.labels[axis]).collect() })
}

/// `term` with its axes in the order of `order`; a label it lacks becomes an axis of size 1.
fn ordered<T: Element>(lower: &mut Lower<'_, T>, term: &Term, order: &[Label]) -> Result<Value> {
    let place = |label: &Label| term.labels.iter().position(|own| own == label);
    let axes: Vec<usize> = order.iter().filter_map(place).collect();
    let value = permute(lower, &term.value, &axes)?;
    let shape =
        order.iter().map(|label| place(label).map_or(1, |axis| term.value.shape()[axis])).collect();
    lower.reshape(&value, shape)
}

/// The product of two terms, summed over the labels that `wanted` does not keep.
fn contract<T: Element>(
    lower: &mut Lower<'_, T>,
    a: Term,
    b: Term,
    wanted: &dyn Fn(Label) -> bool,
) -> Result<Term> {
    let a = sum_out(lower, a, &|label| wanted(label) || b.labels.contains(&label))?;
    let b = sum_out(lower, b, &|label| wanted(label) || a.labels.contains(&label))?;
    let shared = |label: &Label| b.labels.contains(label);
    let batch: Vec<Label> = a.labels.iter().copied().filter(|l| shared(l) && wanted(*l)).collect();
    let summed: Vec<Label> =
        a.labels.iter().copied().filter(|l| shared(l) && !wanted(*l)).collect();
    let rows: Vec<Label> = a.labels.iter().copied().filter(|l| !shared(l)).collect();
    let columns: Vec<Label> = b.labels.iter().copied().filter(|l| !a.labels.contains(l)).collect();
    let left = ordered(lower, &a, &[&batch[..], &rows, &summed].concat())?;
    let right = ordered(lower, &b, &[&batch[..], &summed, &columns].concat())?;
    let size = |value: &Value, from: usize, count: usize| -> usize {
        value.shape()[from..from + count].iter().product()
    };
    let (nb, nr, ns, nc) = (batch.len(), rows.len(), summed.len(), columns.len());
    let labels = [&batch[..], &rows, &columns].concat();
    let mut shape: Vec<usize> =
        (0..nb).map(|axis| left.shape()[axis].max(right.shape()[axis])).collect();
    shape.extend_from_slice(&left.shape()[nb..nb + nr]);
    shape.extend_from_slice(&right.shape()[nb + ns..]);
    if ns == 0 {
        // Nothing to sum: an element-wise product with broadcasting.
        let mut wide = left.shape().to_vec();
        wide.resize(nb + nr + nc, 1);
        let left = lower.reshape(&left, wide)?;
        let mut wide = right.shape()[..nb].to_vec();
        wide.resize(nb + nr, 1);
        wide.extend_from_slice(&right.shape()[nb..]);
        let right = lower.reshape(&right, wide)?;
        let value = emit(lower, Binary::Mul, &left, &right)?;
        return Ok(Term { value, labels });
    }
    let mut matrix = left.shape()[..nb].to_vec();
    matrix.extend([size(&left, nb, nr), size(&left, nb + nr, ns)]);
    let left = lower.reshape(&left, matrix)?;
    let mut matrix = right.shape()[..nb].to_vec();
    matrix.extend([size(&right, nb, ns), size(&right, nb + ns, nc)]);
    let right = lower.reshape(&right, matrix)?;
    let value = product(lower, &left, &right)?;
    let value = lower.reshape(&value, shape)?;
    Ok(Term { value, labels })
}

fn einsum<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let equation: String =
        node.text("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match equation.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (equation.as_str(), None),
    };
    let texts: Vec<&str> = left.split(',').collect();
    if texts.len() != node.inputs.len() {
        let (terms, inputs) = (texts.len(), node.inputs.len());
        return Err(Error::input(format!("equation has {terms} terms for `{inputs}` inputs")));
    }
    let mut terms = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let value = lower.input(node, index)?;
        let letters = text.replace("...", "").chars().count();
        let under = value.rank().checked_sub(letters);
        let under = under.filter(|&under| under == 0 || text.contains("...")).ok_or_else(|| {
            let shape = value.shape();
            Error::input(format!("term `{text}` does not fit an input of shape {shape:?}"))
        })?;
        terms.push(diagonal(lower, Term { labels: labels(text, under)?, value })?);
    }
    let mut all: Vec<Label> = terms.iter().flat_map(|term| term.labels.clone()).collect();
    all.sort_unstable();
    let ellipsis = all.iter().filter_map(|l| match l {
        Label::Ellipsis(i) => Some(i + 1),
        Label::Letter(_) => None,
    });
    let ellipsis = ellipsis.max().unwrap_or(0);
    let output = match right {
        Some(text) => labels(text, ellipsis)?,
        // Without an output: the dots, then the letters that occur once, in alphabetical order.
        None => {
            let mut output: Vec<Label> = (0..ellipsis).rev().map(Label::Ellipsis).collect();
            let once = |l: &&Label| {
                matches!(l, Label::Letter(_)) && left.matches(&letter(**l)).count() == 1
            };
            let mut letters: Vec<Label> = all.iter().filter(once).copied().collect();
            letters.dedup();
            output.extend(letters);
            output
        }
    };
    if output.iter().any(|label| !all.contains(label)) {
        return Err(Error::input(format!("equation `{equation}` makes a label from nothing")));
    }
    let mut terms = terms.into_iter();
    let mut total = terms.next().ok_or_else(|| Error::input("needs an input"))?;
    while let Some(next) = terms.next() {
        let later: Vec<Label> = terms.as_slice().iter().flat_map(|t| t.labels.clone()).collect();
        let wanted = |label: Label| output.contains(&label) || later.contains(&label);
        total = contract(lower, total, next, &wanted)?;
    }
    let total = sum_out(lower, total, &|label| output.contains(&label))?;
    let y = ordered(lower, &total, &output)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn letter(label: Label) -> String {
    match label {
        Label::Letter(c) => c.to_string(),
        Label::Ellipsis(_) => String::new(),
    }
}
