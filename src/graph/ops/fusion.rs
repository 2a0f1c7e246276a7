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

#[cfg(test)]
mod tests {
    use crate::graph::ir::{ConstantTensor, DataType, Graph, Node, Port};
    use crate::graph::plan::{CompileOptions, Gradient, Plan, Taps};
    use crate::tensor::RngStream;
    use crate::tensor::kernels::Element;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    const SHAPE: [usize; 3] = [2, 33, 40];
    const WIDTH: usize = 48;

    /// The graph of `nodes` over an input `x` [2, 33, 40], weights `w` [40, 48] and a row `b` [48]; output `y`.
    fn graph(nodes: Vec<Node>) -> Graph {
        let mut rng = RngStream::new(3, "fusion", "", 0);
        let port = |name: &str| Port { name: name.into(), dtype: DataType::Float32, shape: None };
        let constants = BTreeMap::from([
            ("w".to_owned(), ConstantTensor::f32([40, WIDTH], rng.normals(40 * WIDTH))),
            ("b".to_owned(), ConstantTensor::f32([WIDTH], rng.normals(WIDTH))),
        ]);
        Graph {
            name: "g".into(),
            opset: 17,
            inputs: vec![port("x")],
            outputs: vec![port("y")],
            nodes,
            constants: constants.into_iter().map(|(name, c)| (name, Arc::new(c))).collect(),
        }
    }

    fn node(op: &str, inputs: [&str; 2], output: &str) -> Node {
        Node::new(op, output, &inputs, &[output])
    }

    /// Steps, output, and the gradient of the output's sum.
    fn run<T: Element>(nodes: Vec<Node>) -> (usize, Vec<f64>, Vec<f64>) {
        let options = CompileOptions {
            input: "x".into(),
            input_shape: SHAPE.to_vec(),
            output: "y".into(),
            gradient: Gradient::Wanted,
            taps: Taps::Norms,
        };
        let plan = Plan::<T>::compile(&graph(nodes), &options).unwrap();
        let mut workspace = plan.workspace();
        let mut rng = RngStream::new(4, "fusion", "x", 0);
        let x: Vec<T> =
            (0..SHAPE.iter().product()).map(|_| T::of(f64::from(rng.normal()))).collect();
        let y: Vec<f64> = plan.forward(&mut workspace, &x).iter().map(|v| v.f64()).collect();
        let dy = vec![T::ONE; y.len()];
        let dx = plan.backward(&mut workspace, &dy).iter().map(|v| v.f64()).collect();
        (plan.step_count(), y, dx)
    }

    fn assert_close(a: &[f64], b: &[f64]) {
        assert!(a.len() == b.len() && !a.is_empty());
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a} against {b}");
        }
    }

    #[test]
    fn a_row_added_to_a_product_joins_it_on_either_side() {
        // The same sum in two steps that do not fuse: the row comes behind an identity of its own.
        let apart = vec![
            node("MatMul", ["x", "w"], "p"),
            Node::new("Neg", "n", &["p"], &["n"]),
            node("Sub", ["b", "n"], "y"),
        ];
        let (steps, y, dx) = run::<f64>(apart);
        assert_eq!(steps, 3);
        for sides in [["p", "b"], ["b", "p"]] {
            let nodes = || vec![node("MatMul", ["x", "w"], "p"), node("Add", sides, "y")];
            let (steps, double, gradient) = run::<f64>(nodes());
            assert_eq!(steps, 1);
            assert_close(&double, &y);
            assert_close(&gradient, &dx);
            let (steps, single, gradient) = run::<f32>(nodes());
            assert_eq!(steps, 1);
            assert_close(&single, &y);
            assert_close(&gradient, &dx);
        }
    }

    #[test]
    fn a_product_that_is_read_twice_keeps_its_own_value() {
        let nodes = || {
            vec![
                node("MatMul", ["x", "w"], "p"),
                node("Add", ["p", "b"], "s"),
                node("Mul", ["s", "p"], "y"),
            ]
        };
        let (steps, y, dx) = run::<f64>(nodes());
        assert_eq!(steps, 3);
        let (_, product, _) = run::<f64>(vec![node("MatMul", ["x", "w"], "y")]);
        let row = graph(Vec::new()).constants["b"].to_f64();
        let wanted: Vec<f64> =
            product.iter().enumerate().map(|(i, p)| (p + row[i % WIDTH]) * p).collect();
        assert_close(&y, &wanted);
        let (_, single, gradient) = run::<f32>(nodes());
        assert_close(&single, &y);
        assert!(gradient.iter().zip(&dx).all(|(a, b)| (a - b).abs() < 1e-3 * (1.0 + b.abs())));
    }
}
