//! Peephole fusion on recorded steps: an addition, an activation or a pooling that alone reads what a step makes
//! joins it, if the step can take it in, so that all is one pass and the values between need no buffer. And the five
//! operators that exporters write GELU with become one step.

use super::binary::{Binary, BinaryStep};
use super::elementwise::{Elementwise, Function};
use super::matmul::MatMul;
use crate::graph::plan::{Absorbed, Follower, Operand, StepRecord};
use crate::tensor::kernels::Element;

/// Fuses in place; `lengths` of values that vanish become 0. `output` is never fused away.
pub(crate) fn fuse<T: Element>(
    steps: &mut Vec<StepRecord<T>>,
    lengths: &mut [usize],
    output: usize,
) {
    fuse_gelu(steps, lengths, output);
    fuse_bias(steps, lengths, output);
    let Steps { mut maker, reader, .. } = Steps::new(steps, lengths.len(), output);
    let mut removed = vec![false; steps.len()];
    for index in 0..steps.len() {
        let Some(follower) = steps[index].step.follower() else { continue };
        let mut candidates: Vec<(usize, usize)> = steps[index]
            .inputs
            .iter()
            .filter_map(|operand| match operand {
                Operand::Live(id) if reader[*id].is_some() => Some((maker[*id]?, *id)),
                _ => None,
            })
            .collect();
        // Of two that could take an addition in, the later one: the other's result is at hand then.
        candidates.sort_unstable();
        let taken = candidates
            .into_iter()
            .rev()
            .find(|&(from, _)| steps[from].step.absorb(&follower) == Absorbed::Yes);
        let Some((from, id)) = taken else { continue };
        let result = steps[index].output;
        steps[from].output = result;
        lengths[id] = 0;
        let at = match follower {
            Follower::Add => {
                // Both run where the addition stood: its other operand is made by then.
                let others = std::mem::take(&mut steps[index].inputs);
                let is_other =
                    |operand: &Operand<T>| !matches!(operand, Operand::Live(other) if *other == id);
                steps[from].inputs.extend(others.into_iter().filter(is_other));
                steps.swap(from, index);
                removed[from] = true;
                index
            }
            Follower::Bounded { .. } | Follower::Halve { .. } => {
                removed[index] = true;
                from
            }
        };
        maker[result] = Some(at);
    }
    retain(steps, &removed);
}

fn retain<T>(steps: &mut Vec<StepRecord<T>>, removed: &[bool]) {
    let mut keep = removed.iter().map(|removed| !removed);
    steps.retain(|_| keep.next().unwrap_or(true));
}

/// Recorded steps, by what makes a value and what alone reads it.
struct Steps<'a, T> {
    steps: &'a [StepRecord<T>],
    maker: Vec<Option<usize>>,
    /// The one reader of a value that is read once and is not the output.
    reader: Vec<Option<usize>>,
}

impl<'a, T: Element> Steps<'a, T> {
    fn new(steps: &'a [StepRecord<T>], values: usize, output: usize) -> Self {
        let mut maker = vec![None; values];
        let mut all: Vec<Vec<usize>> = vec![Vec::new(); values];
        for (index, record) in steps.iter().enumerate() {
            maker[record.output] = Some(index);
            for operand in &record.inputs {
                if let Operand::Live(id) = operand {
                    all[*id].push(index);
                }
            }
        }
        all[output].clear();
        let reader = all.iter().map(|all| if let [one] = all[..] { Some(one) } else { None });
        Self { steps, maker, reader: reader.collect() }
    }

    /// Function and parameters of an element-wise step.
    fn elementwise(&self, index: usize) -> Option<(Function, [f64; 2])> {
        let step = self.steps[index].step.as_any()?.downcast_ref::<Elementwise<T>>()?;
        Some((step.function, [step.a.f64(), step.b.f64()]))
    }

    fn binary(&self, index: usize) -> Option<Binary> {
        Some(self.steps[index].step.as_any()?.downcast_ref::<BinaryStep>()?.function)
    }

    /// The value that step `index` multiplies by about `factor`.
    fn scaled(&self, index: usize, factor: f64) -> Option<usize> {
        let near = |found: f64| (found - factor).abs() < 1e-4 * factor;
        let inputs = &self.steps[index].inputs;
        let [Operand::Live(x), ..] = inputs[..] else { return None };
        match (self.elementwise(index), self.binary(index), inputs.get(1)) {
            (Some((Function::Scale, [a, b])), ..) if near(a) && b == 0.0 => Some(x),
            (_, Some(Binary::Div), Some(Operand::Constant(by)))
                if by.len() == 1 && near(1.0 / by[0].f64()) =>
            {
                Some(x)
            }
            _ => None,
        }
    }

    /// The steps of `x / 2 * (1 + erf(x / sqrt 2))` around the error function at `erf`, the last one last, and `x`.
    fn gelu(&self, erf: usize) -> Option<(Vec<usize>, usize)> {
        let [Operand::Live(inner)] = self.steps[erf].inputs[..] else { return None };
        let divide = self.maker[inner].filter(|_| self.reader[inner].is_some())?;
        let x = self.scaled(divide, std::f64::consts::FRAC_1_SQRT_2)?;
        let plus = self.reader[self.steps[erf].output]?;
        if self.elementwise(plus) != Some((Function::Scale, [1.0, 1.0])) {
            return None;
        }
        let product = self.reader[self.steps[plus].output]?;
        let made = self.steps[plus].output;
        let other = self.steps[product].inputs.iter().find_map(|operand| match operand {
            Operand::Live(id) if *id != made => Some(*id),
            _ => None,
        })?;
        if self.binary(product) != Some(Binary::Mul) {
            return None;
        }
        if other == x {
            let half = self.reader[self.steps[product].output]?;
            self.scaled(half, 0.5)?;
            return Some((vec![divide, erf, plus, product, half], x));
        }
        let half = self.maker[other].filter(|_| self.reader[other].is_some())?;
        (self.scaled(half, 0.5)? == x).then(|| (vec![divide, erf, plus, half, product], x))
    }
}

fn fuse_gelu<T: Element>(steps: &mut Vec<StepRecord<T>>, lengths: &mut [usize], output: usize) {
    let known = Steps::new(steps, lengths.len(), output);
    let is_erf = |&index: &usize| matches!(known.elementwise(index), Some((Function::Erf, _)));
    let found: Vec<_> = (0..steps.len()).filter(is_erf).filter_map(|erf| known.gelu(erf)).collect();
    let mut removed = vec![false; steps.len()];
    for (parts, x) in found {
        let Some((&last, others)) = parts.split_last() else { continue };
        for &index in others {
            lengths[steps[index].output] = 0;
            removed[index] = true;
        }
        let record = &mut steps[last];
        record.step = Box::new(Elementwise { function: Function::Gelu, a: T::ZERO, b: T::ZERO });
        record.inputs = vec![Operand::Live(x)];
    }
    retain(steps, &removed);
}

/// A constant row added to a matrix product that nothing else reads becomes part of it.
fn fuse_bias<T: Element>(steps: &mut Vec<StepRecord<T>>, lengths: &mut [usize], output: usize) {
    let known = Steps::new(steps, lengths.len(), output);
    let biased = |index: usize| {
        let record = &known.steps[index];
        let rows = record.step.as_any()?.downcast_ref::<BinaryStep>()?.rows_plus_row()?;
        let Operand::Live(id) = record.inputs[rows] else { return None };
        let Operand::Constant(bias) = &record.inputs[1 - rows] else { return None };
        let maker = known.maker[id].filter(|_| known.reader[id].is_some())?;
        let product = known.steps[maker].step.as_any()?.downcast_ref::<MatMul<T>>()?;
        Some((maker, index, product.with_bias(bias)?))
    };
    let found: Vec<_> = (0..known.steps.len()).filter_map(biased).collect();
    let mut removed = vec![false; steps.len()];
    for (maker, addition, product) in found {
        let result = steps[addition].output;
        lengths[std::mem::replace(&mut steps[maker].output, result)] = 0;
        steps[maker].step = Box::new(product);
        removed[addition] = true;
    }
    retain(steps, &removed);
}
