//! The step behind every operator that only moves values: each output element is one element of one
//! input, or a fill value. Transpose, Slice, Concat, Pad, Expand, Gather with constant indices, nearest
//! Resize and many more are this step with another map; their gradient is the reversed copy.

use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::graph::ir::{ConstantData, ConstantTensor};
use crate::graph::plan::{Lower, Mode, Needs, Step, StepState, Target, Value};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;

/// Where an output element comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// Element `at` of input `input`.
    Element {
        /// Which input.
        input: usize,
        /// Flat position in it.
        at: usize,
    },
    /// The fill value.
    Fill,
}

/// A run of consecutive output elements that are consecutive in one input (or all fill).
#[derive(Debug, Clone, Copy)]
struct Run {
    input: u32,
    from: u32,
    to: u32,
    length: u32,
}

const FILL: u32 = u32::MAX;

#[derive(Debug)]
struct Rearrange<T> {
    runs: Vec<Run>,
    /// For each input its runs in its own order, where they are long and none of its elements is taken twice.
    taken: Vec<Option<Vec<Run>>>,
    fill: T,
}

/// Elements that one task moves, at least.
const PIECE: usize = 1 << 14;

/// A run shorter than this, on average, is not worth an order of its own.
const LONG: usize = 8;

/// The runs of input `which` in its own order, none longer than a task.
fn taken_once(runs: &[Run], which: usize) -> Option<Vec<Run>> {
    let of_it = runs.iter().filter(|run| run.input as usize == which);
    let (count, length) =
        of_it.clone().fold((0, 0), |(count, sum), run| (count + 1, sum + run.length as usize));
    if count == 0 || length < count * LONG {
        return None;
    }
    let piece = PIECE as u32;
    let mut own: Vec<Run> = of_it
        .flat_map(|run| {
            (0..run.length).step_by(PIECE).map(move |at| Run {
                from: run.from + at,
                to: run.to + at,
                length: piece.min(run.length - at),
                ..*run
            })
        })
        .collect();
    own.sort_unstable_by_key(|run| run.from);
    own.windows(2).all(|two| two[0].from + two[0].length <= two[1].from).then_some(own)
}

/// The gradient to an input by its own runs, in tasks.
fn give_back<T: Element>(runs: &[Run], d_output: &[T], target: Target<'_, T>) {
    let (mut tasks, mut rest, mut start, mut first) = (Vec::new(), target.data, 0, 0);
    for i in 0..runs.len() {
        let end = runs.get(i + 1).map_or(start + rest.len(), |next| next.from as usize);
        if end - start >= PIECE || i + 1 == runs.len() {
            let (data, after) = rest.split_at_mut(end - start);
            tasks.push((&runs[first..=i], start, data));
            (rest, start, first) = (after, end, i + 1);
        }
    }
    let fresh = target.mode == Mode::Write;
    tasks.into_par_iter().for_each(|(runs, start, data)| {
        let mut done = 0;
        for run in runs {
            let (from, to, length) =
                (run.from as usize - start, run.to as usize, run.length as usize);
            let d_output = &d_output[to..to + length];
            if fresh {
                data[done..from].fill(T::ZERO);
                data[from..from + length].copy_from_slice(d_output);
            } else {
                data[from..from + length].iter_mut().zip(d_output).for_each(|(d, &g)| *d += g);
            }
            done = from + length;
        }
        if fresh {
            data[done..].fill(T::ZERO);
        }
    });
}

impl<T> Rearrange<T> {
    /// Whole runs, and the stretch of the output that they make.
    fn pieces<'a>(&'a self, mut output: &'a mut [T]) -> Vec<(&'a [Run], &'a mut [T])> {
        let (mut pieces, mut first, mut length) = (Vec::new(), 0, 0);
        for (i, run) in self.runs.iter().enumerate() {
            length += run.length as usize;
            if length >= PIECE || i + 1 == self.runs.len() {
                let (piece, rest) = output.split_at_mut(length);
                pieces.push((&self.runs[first..=i], piece));
                (output, first, length) = (rest, i + 1, 0);
            }
        }
        pieces
    }
}

/// Stretches of consecutive output elements, joined where one goes on from the last.
fn runs(stretches: impl Iterator<Item = (Source, usize)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut to = 0;
    for (source, length) in stretches {
        let length = length as u32;
        let (input, from) = match source {
            Source::Element { input, at } => (input as u32, at as u32),
            Source::Fill => (FILL, 0),
        };
        match runs.last_mut() {
            Some(last)
                if last.input == input && (input == FILL || last.from + last.length == from) =>
            {
                last.length += length;
            }
            _ if length == 0 => {}
            _ => runs.push(Run { input, from, to, length }),
        }
        to += length;
    }
    runs
}

impl<T: Element> Step<T> for Rearrange<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        self.pieces(output).into_par_iter().for_each(|(runs, output)| {
            let Some(start) = runs.first().map(|run| run.to as usize) else { return };
            for run in runs {
                let (from, to) = (run.from as usize, run.to as usize - start);
                let length = run.length as usize;
                if run.input == FILL {
                    output[to..to + length].fill(self.fill);
                } else if length == 1 {
                    output[to] = inputs[run.input as usize][from];
                } else {
                    let input = &inputs[run.input as usize][from..from + length];
                    output[to..to + length].copy_from_slice(input);
                }
            }
        });
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let mut pairs = vec![Vec::new(); site.inputs.len()];
        for run in self.runs.iter().filter(|run| run.input != FILL) {
            let pairs = &mut pairs[run.input as usize];
            pairs.extend((0..run.length).map(|i| (run.from + i, run.to + i)));
        }
        let step = cuda::Movement::new(site, &pairs, self.fill.f64() as f32)?;
        Ok(Some(Box::new(step)))
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn backward(
        &self,
        which: usize,
        _inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        if let Some(runs) = &self.taken[which] {
            return give_back(runs, d_output, target);
        }
        target.clear_if_fresh();
        debug_assert_eq!(target.mode, Mode::Add);
        for run in self.runs.iter().filter(|run| run.input as usize == which) {
            let (from, to, length) = (run.from as usize, run.to as usize, run.length as usize);
            let d_input = &mut target.data[from..from + length];
            for (d, &g) in d_input.iter_mut().zip(&d_output[to..to + length]) {
                *d += g;
            }
        }
    }
}

/// Emits the rearrangement of `sources` given by `map` (one entry an output element, row-major).
///
/// # Errors
/// When a tensor is too large for 32-bit positions.
pub(super) fn rearrange<T: Element>(
    lower: &mut Lower<'_, T>,
    sources: &[Value],
    shape: Vec<usize>,
    fill: f64,
    map: impl Iterator<Item = Source>,
) -> Result<Value> {
    rearrange_stretches(lower, sources, shape, fill, map.map(|source| (source, 1)))
}

/// As [`rearrange`], with the map given in stretches: a source and how many elements follow from
/// there.
///
/// # Errors
/// As [`rearrange`].
pub(super) fn rearrange_stretches<T: Element>(
    lower: &mut Lower<'_, T>,
    sources: &[Value],
    shape: Vec<usize>,
    fill: f64,
    stretches: impl Iterator<Item = (Source, usize)>,
) -> Result<Value> {
    let length: usize = shape.iter().product();
    let largest = sources.iter().map(Value::len).chain([length]).max().unwrap_or(0);
    if largest >= u32::MAX as usize || length > super::shape::CONSTANT_LIMIT {
        return Err(Error::unsupported(format!("makes a tensor of shape `{shape:?}`")));
    }
    let runs = runs(stretches);
    let constants: Option<Vec<_>> = sources.iter().map(|s| s.constant().cloned()).collect();
    match constants {
        Some(constants) if !constants.is_empty() => {
            let data = rearrange_constants(&constants, &runs, length, fill);
            let dtype = constants[0].dtype;
            Ok(Value::Constant(Arc::new(ConstantTensor { shape, dtype, data })))
        }
        _ => {
            let taken = (0..sources.len()).map(|which| taken_once(&runs, which)).collect();
            let step = Rearrange { runs, taken, fill: T::of(fill) };
            Ok(lower.emit(Box::new(step), sources, shape))
        }
    }
}

/// The same on constants, exact for integers.
fn rearrange_constants(
    sources: &[Arc<ConstantTensor>],
    runs: &[Run],
    length: usize,
    fill: f64,
) -> ConstantData {
    fn copy<E: Copy>(sources: &[Vec<E>], runs: &[Run], length: usize, fill: E) -> Vec<E> {
        let mut output = vec![fill; length];
        for run in runs.iter().filter(|run| run.input != FILL) {
            let (from, to, n) = (run.from as usize, run.to as usize, run.length as usize);
            output[to..to + n].copy_from_slice(&sources[run.input as usize][from..from + n]);
        }
        output
    }
    let integers: Option<Vec<Vec<i64>>> =
        sources.iter().map(|s| s.as_i64().map(<[i64]>::to_vec)).collect();
    if let Some(integers) = integers {
        return ConstantData::I64(copy(&integers, runs, length, fill as i64));
    }
    if sources.iter().any(|s| matches!(s.data, ConstantData::F64(_))) {
        let values: Vec<Vec<f64>> = sources.iter().map(|s| s.to_f64()).collect();
        return ConstantData::F64(copy(&values, runs, length, fill));
    }
    let values: Vec<Vec<f32>> = sources.iter().map(|s| s.to_f32()).collect();
    ConstantData::F32(copy(&values, runs, length, fill as f32))
}

/// Calls `visit` with each multi-index of `shape` in row-major order, through an iterator of
/// mapped values; the odometer behind all maps.
pub(super) fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let shape = shape.to_vec();
    let length: usize = shape.iter().product();
    let mut index = vec![0; shape.len()];
    (0..length).map(move |i| {
        if i > 0 {
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        index.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives back a stretch of `length` of every `period`, the later half first.
    fn check(period: usize, length: usize, mode: Mode) {
        let (count, size) = (40_000 / period, 40_100);
        let order = (count / 2..count).chain(0..count / 2);
        let stretches = order.map(|i| (Source::Element { input: 0, at: i * period + 3 }, length));
        let runs = runs(stretches);
        let taken = vec![taken_once(&runs, 0)];
        assert_eq!(taken[0].is_some(), length >= LONG);
        let step = Rearrange { runs, taken, fill: 0.0 };
        let d_output: Vec<f64> = (0..count * length).map(|i| 1.0 + i as f64).collect();
        let mut wanted = vec![if mode == Mode::Add { 0.5 } else { 0.0 }; size];
        for (i, stretch) in d_output.chunks(length).enumerate() {
            let i = (i + count / 2) % count;
            wanted[i * period + 3..][..length].iter_mut().zip(stretch).for_each(|(d, g)| *d += g);
        }
        let mut data = vec![if mode == Mode::Add { 0.5 } else { f64::NAN }; size];
        let target = Target { data: &mut data, mode };
        step.backward(0, &[], &[], &d_output, target, &StepState::default());
        assert_eq!(data, wanted, "{period} {length} {mode:?}");
    }

    #[test]
    fn a_gradient_goes_back_in_tasks_as_it_does_one_by_one() {
        for mode in [Mode::Write, Mode::Add] {
            for (period, length) in [(100, 40), (100, 100), (20_000, 19_000), (50, 3), (8, 8)] {
                check(period, length, mode);
            }
        }
    }

    #[test]
    fn each_of_two_inputs_gets_its_own_and_none_what_was_filled() {
        let part = |input, at| (Source::Element { input, at }, 30);
        let runs = runs([part(1, 10), (Source::Fill, 5), part(0, 40), part(1, 60)].into_iter());
        let taken = (0..3).map(|which| taken_once(&runs, which)).collect();
        let step = Rearrange { runs, taken, fill: 7.0 };
        let d_output: Vec<f64> = (0..95).map(f64::from).collect();
        for (which, parts) in [(0, vec![(40, 35)]), (1, vec![(10, 0), (60, 65)]), (2, vec![])] {
            let mut wanted = vec![0.0; 100];
            for (from, to) in parts {
                wanted[from..from + 30].copy_from_slice(&d_output[to..to + 30]);
            }
            let mut data = vec![f64::NAN; 100];
            let target = Target { data: &mut data, mode: Mode::Write };
            step.backward(which, &[], &[], &d_output, target, &StepState::default());
            assert_eq!(data, wanted, "input {which}");
        }
    }

    #[test]
    fn elements_that_are_taken_twice_have_no_order_of_their_own() {
        let element = |at| (Source::Element { input: 0, at }, 20);
        assert!(taken_once(&runs([element(0), element(10)].into_iter()), 0).is_none());
        assert!(taken_once(&runs([element(30), element(10)].into_iter()), 0).is_some());
    }
}
