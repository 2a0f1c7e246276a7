//! The backward pass: one walk over the tape from the output down, no recursion.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::memory::Value;
use super::{Made, Rule, Source, Step, Tape, Var};
use crate::error::{Error, Result};

/// Whether a gradient will itself be differentiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Gradients are constants; fused kernels are used and nothing is recorded.
    First,
    /// Gradients are recorded and can be differentiated again, any number of times.
    Higher,
}

/// Gradients of the one-element `loss` with respect to each of `wrt` (leaves or computed values), each
/// of the shape of its variable; zeros where the loss does not depend on it.
///
/// # Errors
/// When `loss` has more than one element, when a variable of `wrt` is a constant or of another tape.
pub fn grad(loss: &Var, wrt: &[&Var], order: Order) -> Result<Vec<Var>> {
    if loss.elements() != 1 {
        return Err(Error::internal(format!(
            "a loss must have one element, got shape `{:?}`",
            loss.dims()
        )));
    }
    let seed = loss.constant_like(loss.value.ones_like()?);
    vjp(loss, &seed, wrt, order)
}

/// Vector-Jacobian product: the gradients of `sum(output * cotangent)`, as [`grad`]. `cotangent` has
/// the shape of `output`.
///
/// # Errors
/// As [`grad`], and when the shapes differ.
pub fn vjp(output: &Var, cotangent: &Var, wrt: &[&Var], order: Order) -> Result<Vec<Var>> {
    let tape = output.tape();
    if output.dims() != cotangent.dims() {
        return Err(Error::internal(format!(
            "cotangent of shape {:?} for an output of shape `{:?}`",
            cotangent.dims(),
            output.dims()
        )));
    }
    let mut wanted = Vec::with_capacity(wrt.len());
    for var in wrt {
        match var.id {
            Some(id) if var.tape.is(tape) => wanted.push(id),
            _ => {
                return Err(Error::internal(format!(
                    "gradient asked with respect to a constant or a variable of another tape: `{var:?}`"
                )));
            }
        }
    }
    let mut found: Vec<Option<Var>> = vec![None; wrt.len()];
    if let Some(last) = output.id {
        let seed = if order == Order::First { cotangent.detach() } else { cotangent.clone() };
        walk(tape, last, seed, &wanted, &mut found, order)?;
    }
    wrt.iter()
        .zip(found)
        .map(|(var, gradient)| match gradient {
            Some(gradient) => Ok(gradient),
            None => Ok(tape.constant(var.value.zeros_like()?)),
        })
        .collect()
}

fn walk(
    tape: &Tape,
    last: usize,
    seed: Var,
    wanted: &[usize],
    found: &mut [Option<Var>],
    order: Order,
) -> Result<()> {
    let depends = dependents(tape, last, wanted);
    let mut cotangents: Vec<Option<Var>> = vec![None; last + 1];
    cotangents[last] = Some(seed);
    // Those of further outputs, by the node of the operation; they lie after it, so they come first.
    let mut waiting: BTreeMap<usize, Vec<Option<Var>>> = BTreeMap::new();
    for id in (0..=last).rev() {
        if !depends[id] {
            continue;
        }
        let further = waiting.remove(&id).unwrap_or_default();
        let cotangent = match cotangents[id].take() {
            Some(cotangent) => cotangent,
            None if further.is_empty() => continue,
            None => tape.constant(tape.nodes.borrow()[id].value.zeros_like()?),
        };
        for (slot, _) in wanted.iter().enumerate().filter(|&(_, &want)| want == id) {
            found[slot] = Some(cotangent.clone());
        }
        let (rule, output, inputs, ids) = {
            let nodes = tape.nodes.borrow();
            let node = &nodes[id];
            let rule = match (&node.made, node.inputs.as_slice()) {
                (Made::By(rule), _) => Rc::clone(rule),
                (Made::Further(index), [Source::Recorded(first)]) => {
                    let others = waiting.entry(*first).or_default();
                    others.resize(others.len().max(index + 1), None);
                    others[*index] = Some(cotangent);
                    continue;
                }
                _ => continue,
            };
            let output = view(tape, id, &node.value, order);
            let mut inputs = Vec::with_capacity(node.inputs.len());
            let mut ids = Vec::with_capacity(node.inputs.len());
            for source in &node.inputs {
                match source {
                    Source::Recorded(input) => {
                        inputs.push(view(tape, *input, &nodes[*input].value, order));
                        ids.push(depends[*input].then_some(*input));
                    }
                    Source::Constant(value) => {
                        inputs.push(tape.unrecorded(value.clone()));
                        ids.push(None);
                    }
                }
            }
            (rule, output, inputs, ids)
        };
        let needs: Vec<bool> = ids.iter().map(Option::is_some).collect();
        if !needs.contains(&true) {
            continue;
        }
        let step = Step {
            inputs: &inputs,
            output: &output,
            cotangent: &cotangent,
            further: &further,
            needs: &needs,
            order,
        };
        let gradients = rule.vjp(&step)?;
        for (input, gradient) in ids.into_iter().zip(gradients) {
            let (Some(input), Some(gradient)) = (input, gradient) else { continue };
            let sum = match cotangents[input].take() {
                Some(sum) => sum.add(&gradient)?,
                None => gradient,
            };
            cotangents[input] = Some(sum);
        }
    }
    Ok(())
}

/// Which nodes up to `last` are, or are computed from, a wanted one.
fn dependents(tape: &Tape, last: usize, wanted: &[usize]) -> Vec<bool> {
    let nodes = tape.nodes.borrow();
    let mut depends = vec![false; last + 1];
    for &id in wanted.iter().filter(|&&id| id <= last) {
        depends[id] = true;
    }
    for id in 0..=last {
        depends[id] = depends[id]
            || nodes[id]
                .inputs
                .iter()
                .any(|source| matches!(source, Source::Recorded(input) if depends[*input]));
    }
    depends
}

/// A recorded value as the rule may use it: recorded for higher orders, constant for the first.
fn view(tape: &Tape, id: usize, value: &Value, order: Order) -> Var {
    let id = (order == Order::Higher).then_some(id);
    Var { tape: tape.clone(), id, value: value.clone() }
}

/// The value itself, under a name of its own.
struct Same;

impl Rule for Same {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.clone())])
    }
}

/// The rule of a fused operation for higher orders: its outputs are computed again from recorded operations by
/// `compose`, and those are differentiated.
pub(super) fn by_composition(
    step: &Step<'_>,
    compose: impl FnOnce(&[Var]) -> Result<Vec<Var>>,
) -> Result<Vec<Option<Var>>> {
    // Under names of their own: one input may have been computed from another.
    let mut own = Vec::with_capacity(step.inputs.len());
    for input in step.inputs {
        own.push(input.tape.record(&[input], input.value.clone(), Same)?);
    }
    let outputs = compose(&own)?;
    let cotangents =
        std::iter::once(Some(step.cotangent)).chain(step.further.iter().map(Option::as_ref));
    let mut total: Option<Var> = None;
    for (output, cotangent) in outputs.iter().zip(cotangents) {
        let Some(cotangent) = cotangent else { continue };
        let product = output.mul(cotangent)?.sum_all()?;
        total = Some(match total {
            Some(total) => total.add(&product)?,
            None => product,
        });
    }
    let mut gradients = vec![None; own.len()];
    let Some(total) = total else { return Ok(gradients) };
    let asked: Vec<usize> = (0..own.len()).filter(|&at| step.needs[at]).collect();
    let wrt: Vec<&Var> = asked.iter().map(|&at| &own[at]).collect();
    for (at, gradient) in asked.into_iter().zip(grad(&total, &wrt, step.order)?) {
        gradients[at] = Some(gradient);
    }
    Ok(gradients)
}
