//! Operators that compare along one axis or accumulate along it: TopK, ArgMax, ArgMin, Hardmax,
//! CumSum, CumProd.

use rayon::prelude::*;

use super::transpose::permute;
use super::{Rule, axis_index};
use crate::error::{Error, Result};
use crate::graph::ir::{DataType, Node};
use crate::graph::plan::{Choice, Chosen, Lower, Needs, Reads, Step, StepState, Target, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "TopK" => top_k,
        "ArgMax" | "ArgMin" => arg_extreme,
        "Hardmax" => hardmax,
        "CumSum" | "CumProd" => cumulative,
        _ => return None,
    })
}

/// Positions of the `k` largest (or smallest) of each row of `row` values, best first; of equals the
/// first.
#[derive(Debug, Clone, Copy)]
struct Ranking {
    row: usize,
    k: usize,
    largest: bool,
}

impl Ranking {
    fn positions<T: Element>(&self, x: &[T]) -> Vec<u32> {
        let mut order: Vec<u32> = (0..x.len() as u32).collect();
        let compare = |&a: &u32, &b: &u32| {
            let (a, b) = (x[a as usize], x[b as usize]);
            let order = a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal);
            if self.largest { order.reverse() } else { order }
        };
        order.sort_by(compare);
        order.truncate(self.k);
        order
    }
}

/// The values at the ranking's positions.
#[derive(Debug)]
struct Best(Ranking);

impl<T: Element> Step<T> for Best {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        let Ranking { row, k, .. } = self.0;
        state.indices.resize(output.len(), 0);
        let rows = output.chunks_exact_mut(k).zip(state.indices.chunks_exact_mut(k));
        for ((y, at), x) in rows.zip(inputs[0].chunks_exact(row)) {
            at.copy_from_slice(&self.0.positions(x));
            for (y, &at) in y.iter_mut().zip(at.iter()) {
                *y = x[at as usize];
            }
        }
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn backward(
        &self,
        _which: usize,
        _inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        let Ranking { row, k, .. } = self.0;
        let rows = target.data.chunks_exact_mut(row).zip(d_output.chunks_exact(k));
        for ((d, dy), at) in rows.zip(state.indices.chunks_exact(k)) {
            for (&g, &at) in dy.iter().zip(at) {
                d[at as usize] += g;
            }
        }
    }
}

/// The ranking's positions themselves.
#[derive(Debug)]
struct Positions(Ranking);

impl<T: Element> Choice<T> for Positions {
    fn choose(&self, inputs: &[&[T]], output: &mut [T]) {
        let Ranking { row, k, .. } = self.0;
        for (y, x) in output.chunks_exact_mut(k).zip(inputs[0].chunks_exact(row)) {
            for (y, at) in y.iter_mut().zip(self.0.positions(x)) {
                *y = T::of(f64::from(at));
            }
        }
    }
}

/// `x` with `axis` and the last axis exchanged (its own inverse).
pub(super) fn axis_last<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    axis: usize,
) -> Result<Value> {
    let mut swap: Vec<usize> = (0..x.rank()).collect();
    if axis + 1 >= x.rank() {
        return Ok(x.clone());
    }
    swap.swap(axis, x.rank() - 1);
    permute(lower, x, &swap)
}

fn top_k<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = axis_index(node.int("axis", -1)?, x.rank())?;
    let k = match lower.integers(node, 1)? {
        Some(k) => k.first().copied().unwrap_or(-1),
        None => node.int("k", -1)?,
    };
    let row = x.shape().get(axis).copied().unwrap_or(0);
    let k = usize::try_from(k)
        .ok()
        .filter(|&k| k > 0 && k <= row)
        .ok_or_else(|| Error::input(format!("k `{k}` does not fit an axis of {row}")))?;
    let ranking = Ranking { row, k, largest: node.int("largest", 1)? != 0 };
    let rows = axis_last(lower, &x, axis)?;
    let mut shape = rows.shape().to_vec();
    shape.pop();
    shape.push(k);
    let values = lower.emit(Box::new(Best(ranking)), std::slice::from_ref(&rows), shape.clone());
    let values = axis_last(lower, &values, axis)?;
    lower.set_output(node, 0, values);
    if node.outputs.get(1).is_some_and(|name| !name.is_empty()) {
        let at =
            lower.emit_as(DataType::Int64, Box::new(Chosen(Positions(ranking))), &[rows], shape);
        let at = axis_last(lower, &at, axis)?;
        lower.set_output(node, 1, at);
    }
    Ok(())
}

/// The position of each row's first (or last) largest or smallest value.
#[derive(Debug)]
struct Extreme {
    row: usize,
    largest: bool,
    last: bool,
}

impl Extreme {
    fn position<T: Element>(&self, x: &[T]) -> usize {
        let mut best = 0;
        for (i, &value) in x.iter().enumerate().skip(1) {
            let better = if self.largest { value > x[best] } else { value < x[best] };
            if better || (self.last && value == x[best]) {
                best = i;
            }
        }
        best
    }
}

impl<T: Element> Choice<T> for Extreme {
    fn choose(&self, inputs: &[&[T]], output: &mut [T]) {
        for (y, x) in output.iter_mut().zip(inputs[0].chunks_exact(self.row)) {
            *y = T::of(self.position(x) as f64);
        }
    }
}

fn arg_extreme<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = axis_index(node.int("axis", 0)?, x.rank())?;
    let row = x.shape().get(axis).copied().unwrap_or(0);
    if row == 0 {
        return Err(Error::input("an axis without elements has no extreme"));
    }
    // Rows must keep the order of the other axes, so the axis is moved, not exchanged.
    let mut order: Vec<usize> = (0..x.rank()).filter(|&a| a != axis).collect();
    order.push(axis);
    let rows = permute(lower, &x, &order)?;
    let mut shape = x.shape().to_vec();
    shape[axis] = 1;
    let step = Extreme {
        row,
        largest: node.op_type == "ArgMax",
        last: node.int("select_last_index", 0)? != 0,
    };
    let mut y = lower.emit_as(DataType::Int64, Box::new(Chosen(step)), &[rows], shape.clone());
    if node.int("keepdims", 1)? == 0 {
        shape.remove(axis);
        y = lower.reshape(&y, shape)?;
    }
    lower.set_output(node, 0, y);
    Ok(())
}

/// 1 at the first largest value of each row, 0 elsewhere.
#[derive(Debug)]
struct Hardmax {
    row: usize,
}

impl<T: Element> Choice<T> for Hardmax {
    fn choose(&self, inputs: &[&[T]], output: &mut [T]) {
        let first = Extreme { row: self.row, largest: true, last: false };
        output.fill(T::ZERO);
        for (y, x) in output.chunks_exact_mut(self.row).zip(inputs[0].chunks_exact(self.row)) {
            y[first.position(x)] = T::ONE;
        }
    }
}

fn hardmax<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let old = lower.opset < 13;
    let axis = axis_index(node.int("axis", if old { 1 } else { -1 })?, x.rank())?;
    let shape = x.shape().to_vec();
    let y = if old {
        let row = shape[axis..].iter().product::<usize>().max(1);
        lower.emit(Box::new(Chosen(Hardmax { row })), &[x], shape)
    } else {
        let rows = axis_last(lower, &x, axis)?;
        let (row, shape) = (shape[axis].max(1), rows.shape().to_vec());
        let y = lower.emit(Box::new(Chosen(Hardmax { row })), &[rows], shape);
        axis_last(lower, &y, axis)?
    };
    lower.set_output(node, 0, y);
    Ok(())
}

/// Running sums or products along the middle of [outer, size, inner].
#[derive(Debug)]
struct Cumulative {
    size: usize,
    inner: usize,
    product: bool,
    exclusive: bool,
    reverse: bool,
}

impl Cumulative {
    /// Positions along the axis in the order they are accumulated.
    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (size, reverse) = (self.size, self.reverse);
        (0..size).map(move |i| if reverse { size - 1 - i } else { i })
    }

    fn combine<T: Element>(&self, a: T, b: T) -> T {
        if self.product { a * b } else { a + b }
    }
}

impl<T: Element> Step<T> for Cumulative {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let block = self.size * self.inner;
        output.par_chunks_mut(block).zip(inputs[0].par_chunks(block)).for_each(|(y, x)| {
            for i in 0..self.inner {
                let mut total = if self.product { T::ONE } else { T::ZERO };
                for at in self.order().map(|p| p * self.inner + i) {
                    let next = self.combine(total, x[at]);
                    y[at] = if self.exclusive { total } else { next };
                    total = next;
                }
            }
        });
    }

    fn needs(&self) -> Needs {
        if self.product { Needs { inputs: Reads::Yes, ..Needs::NOTHING } } else { Needs::NOTHING }
    }

    fn backward(
        &self,
        _which: usize,
        inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        let block = self.size * self.inner;
        let order: Vec<usize> = self.order().collect();
        for (row, (d, dy)) in
            target.data.chunks_exact_mut(block).zip(d_output.chunks_exact(block)).enumerate()
        {
            for i in 0..self.inner {
                // Backwards: `behind` is the gradient to the running value after this element.
                let mut behind = T::ZERO;
                let at = |p: usize| p * self.inner + i;
                let before: Vec<T> = match self.product {
                    false => Vec::new(),
                    true => {
                        let x = &inputs[0][row * block..(row + 1) * block];
                        let mut total = T::ONE;
                        let step = |&p: &usize| {
                            let so_far = total;
                            total *= x[at(p)];
                            so_far
                        };
                        order.iter().map(step).collect()
                    }
                };
                for (k, &p) in order.iter().enumerate().rev() {
                    let g = dy[at(p)];
                    let after = if self.exclusive { behind } else { behind + g };
                    if self.product {
                        let x = inputs[0][row * block + at(p)];
                        d[at(p)] += after * before[k];
                        behind = after * x;
                    } else {
                        d[at(p)] += after;
                        behind = after;
                    }
                    if self.exclusive {
                        behind += g;
                    }
                }
            }
        }
    }
}

fn cumulative<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = lower.integers(node, 1)?.and_then(|axis| axis.first().copied()).unwrap_or(0);
    let axis = axis_index(axis, x.rank())?;
    if x.is_empty() || x.rank() == 0 {
        lower.set_output(node, 0, x);
        return Ok(());
    }
    let step = Cumulative {
        size: x.shape()[axis],
        inner: x.shape()[axis + 1..].iter().product(),
        product: node.op_type == "CumProd",
        exclusive: node.int("exclusive", 0)? != 0,
        reverse: node.int("reverse", 0)? != 0,
    };
    let shape = x.shape().to_vec();
    let y = lower.emit(Box::new(step), &[x], shape);
    lower.set_output(node, 0, y);
    Ok(())
}
