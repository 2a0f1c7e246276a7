//! Permuting axes. Neighbouring axes that stay neighbours are one axis; what is left is nearly always two
//! groups that change places (NCHW and NHWC, the heads of attention, a matrix): a blocked transposition. Any
//! other order is a rearrangement element by element.

use std::sync::Arc;

use rayon::prelude::*;

use super::arrange::{at, dot};
use super::rearrange::{indices, rearrange_stretches};
use super::{Rule, axis_index, strides};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantData, ConstantTensor, Node};
use crate::graph::plan::{Lower, Mode, Needs, Step, StepState, Target, Value};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::turn::turn;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "Transpose" => Some(transpose),
        _ => None,
    }
}

/// [outer, rows, columns, piece] to [outer, columns, rows, piece].
#[derive(Debug, Clone, Copy)]
struct Swap {
    rows: usize,
    columns: usize,
    piece: usize,
}

/// Output columns of pieces that a task moves together.
const LINE: usize = 16;

impl Swap {
    fn reversed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, ..self }
    }

    /// Moves all of `x` to its place in `y`, or adds it there.
    fn run<T: Element>(self, x: &[T], y: &mut [T], mode: Mode) {
        let Self { rows, columns, piece } = self;
        if piece == 1 {
            return turn(x, [rows, columns], y, mode == Mode::Add);
        }
        let block = rows * piece;
        y.par_chunks_mut(LINE * block).enumerate().for_each(|(task, y)| {
            let first = task * LINE;
            for row in 0..rows {
                for (i, y) in y.chunks_exact_mut(block).enumerate() {
                    let (outer, column) = ((first + i) / columns, (first + i) % columns);
                    let from = ((outer * rows + row) * columns + column) * piece;
                    let y = &mut y[row * piece..(row + 1) * piece];
                    Target { data: y, mode }.put_map(&x[from..from + piece], |x| x);
                }
            }
        });
    }

    /// Weights, which exporters leave transposed, are turned as fast as what is computed; integers go the general way.
    fn of_constant(&self, data: &ConstantData) -> Option<ConstantData> {
        fn turned<T: Element>(swap: &Swap, x: &[T]) -> Vec<T> {
            let mut y = vec![T::ZERO; x.len()];
            swap.run(x, &mut y, Mode::Write);
            y
        }
        match data {
            ConstantData::F32(x) => Some(ConstantData::F32(turned(self, x))),
            ConstantData::F64(x) => Some(ConstantData::F64(turned(self, x))),
            ConstantData::I64(_) => None,
        }
    }
}

impl<T: Element> Step<T> for Swap {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        self.run(inputs[0], output, Mode::Write);
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let _ = site;
        let Self { rows, columns, piece } = *self;
        Ok(Some(Box::new(cuda::Swap { rows, columns, piece })))
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
        target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        self.reversed().run(d_output, target.data, target.mode);
    }
}

/// Sizes of groups of neighbouring axes and their order in the output; axes of size 1 vanish.
fn merged(shape: &[usize], permutation: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let wide: Vec<usize> = permutation.iter().copied().filter(|&axis| shape[axis] != 1).collect();
    // Runs of the output's axes that are neighbours in the input too, each by its first axis.
    let mut groups: Vec<(usize, usize)> = Vec::new();
    let mut last = None;
    for &axis in &wide {
        let follows = last.is_some_and(|last: usize| {
            axis > last && shape[last + 1..axis].iter().all(|&size| size == 1)
        });
        match groups.last_mut() {
            Some((_, size)) if follows => *size *= shape[axis],
            _ => groups.push((axis, shape[axis])),
        }
        last = Some(axis);
    }
    let mut sorted: Vec<usize> = groups.iter().map(|&(axis, _)| axis).collect();
    sorted.sort_unstable();
    let order = groups
        .iter()
        .map(|(axis, _)| sorted.iter().position(|other| other == axis).unwrap_or(0))
        .collect();
    let mut sizes = vec![1; groups.len()];
    for &(axis, size) in &groups {
        if let Some(place) = sorted.iter().position(|&other| other == axis) {
            sizes[place] = size;
        }
    }
    (sizes, order)
}

/// Emits a transposition of `x` by `permutation` (output axis -> input axis).
pub(super) fn permute<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    permutation: &[usize],
) -> Result<Value> {
    let shape: Vec<usize> = permutation.iter().map(|&axis| x.shape()[axis]).collect();
    let (sizes, order) = merged(x.shape(), permutation);
    if order.len() < 2 || x.is_empty() {
        return lower.reshape(x, shape);
    }
    let swap = match (&order[..], &sizes[..]) {
        ([1, 0], &[rows, columns]) => Some(Swap { rows, columns, piece: 1 }),
        ([0, 2, 1], &[_, rows, columns]) => Some(Swap { rows, columns, piece: 1 }),
        ([1, 0, 2], &[rows, columns, piece]) => Some(Swap { rows, columns, piece }),
        ([0, 2, 1, 3], &[_, rows, columns, piece]) => Some(Swap { rows, columns, piece }),
        _ => None,
    };
    if let Some(swap) = swap {
        let Some(constant) = x.constant() else {
            return Ok(lower.emit(Box::new(swap), std::slice::from_ref(x), shape));
        };
        if let Some(data) = swap.of_constant(&constant.data) {
            let dtype = constant.dtype;
            return Ok(Value::Constant(Arc::new(ConstantTensor { shape, dtype, data })));
        }
    }
    let input_strides = strides(x.shape());
    let moved: Vec<usize> = permutation.iter().map(|&axis| input_strides[axis]).collect();
    // Trailing axes that stay are copied in one piece.
    let stay = (0..shape.len()).rev().take_while(|&axis| permutation[axis] == axis).count();
    let outer = shape.len() - stay;
    let piece: usize = shape[outer..].iter().product();
    let stretches = indices(&shape[..outer]).map(|index| (at(dot(&index, &moved)), piece));
    rearrange_stretches(lower, std::slice::from_ref(x), shape.clone(), 0.0, stretches)
}

fn transpose<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let rank = x.rank();
    let permutation: Vec<usize> = match node.ints("perm")? {
        Some(perm) => perm.iter().map(|&a| axis_index(a, rank)).collect::<Result<_>>()?,
        None => (0..rank).rev().collect(),
    };
    let mut sorted = permutation.clone();
    sorted.sort_unstable();
    if sorted != (0..rank).collect::<Vec<_>>() {
        return Err(Error::input(format!("`perm` is no permutation of {rank} axes")));
    }
    let y = permute(lower, &x, &permutation)?;
    lower.set_output(node, 0, y);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_axis_and_axes_of_one_vanish() {
        assert_eq!(merged(&[2, 3, 4, 5], &[0, 2, 3, 1]), (vec![2, 3, 20], vec![0, 2, 1]));
        assert_eq!(merged(&[1, 3, 4, 5], &[0, 2, 3, 1]), (vec![3, 20], vec![1, 0]));
        assert_eq!(merged(&[2, 3, 1, 5], &[0, 1, 3, 2]), (vec![30], vec![0]));
        assert_eq!(merged(&[2, 3, 4, 5], &[0, 2, 1, 3]), (vec![2, 3, 4, 5], vec![0, 2, 1, 3]));
        assert_eq!(merged(&[2, 3, 4], &[2, 1, 0]), (vec![2, 3, 4], vec![2, 1, 0]));
    }

    #[test]
    fn a_swap_moves_pieces_and_its_reverse_brings_them_back() {
        for (outer, rows, columns, piece) in [(2, 3, 5, 2), (1, 40, 33, 1), (3, 1, 7, 4)] {
            let swap = Swap { rows, columns, piece };
            let x: Vec<f64> = (0..outer * rows * columns * piece).map(|v| v as f64).collect();
            let (mut y, mut back) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            swap.run(&x, &mut y, Mode::Write);
            for (i, &value) in x.iter().enumerate() {
                let (p, c) = (i % piece, i / piece % columns);
                let (r, o) = (i / piece / columns % rows, i / piece / columns / rows);
                assert_eq!(y[((o * columns + c) * rows + r) * piece + p], value);
            }
            swap.reversed().run(&y, &mut back, Mode::Write);
            assert_eq!(back, x);
        }
    }
}
