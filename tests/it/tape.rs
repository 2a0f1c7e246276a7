//! The tape's gradients against central differences in f64, first and second order.

use candle_core::{DType, Device, Tensor};
use metazoa::Result;
use metazoa::tensor::RngStream;
use metazoa::tensor::tape::{Activation, ConvOptions, KeepDims, Order, Tape, Var, grad, vjp};

/// Relative error allowed against central differences of step 1e-5 in f64.
const TOLERANCE: f64 = 2e-7;
const STEP: f64 = 1e-5;

fn tensor(values: Vec<f64>, dims: &[usize]) -> Tensor {
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn noise(dims: &[usize], index: u64) -> Tensor {
    let values = RngStream::new(11, "tape", "", index).normals(dims.iter().product());
    tensor(values.into_iter().map(f64::from).collect(), dims)
}

/// Positive values, away from 0.
fn positive(dims: &[usize], index: u64) -> Tensor {
    noise(dims, index).abs().unwrap().affine(1.0, 0.3).unwrap()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let gap = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
    gap / b.iter().map(|b| b * b).sum::<f64>().sqrt().max(1.0)
}

type Function<'a> = &'a dyn Fn(&[Var]) -> Result<Var>;

/// A scalar of the function: its output times fixed noise, summed.
fn scalar(f: Function<'_>, inputs: &[Var]) -> Var {
    let y = f(inputs).unwrap();
    let weights = y.tape().constant(noise(y.dims(), 99).to_dtype(y.dtype()).unwrap());
    y.mul(&weights).unwrap().sum_all().unwrap()
}

fn leaves(tape: &Tape, inputs: &[Tensor]) -> Vec<Var> {
    inputs.iter().map(|t| tape.leaf(t.clone())).collect()
}

fn value(f: Function<'_>, inputs: &[Tensor]) -> f64 {
    scalar(f, &leaves(&Tape::new(), inputs)).scalar().unwrap()
}

fn flat_gradient(f: Function<'_>, inputs: &[Tensor], order: Order) -> Vec<f64> {
    let vars = leaves(&Tape::new(), inputs);
    let wrt: Vec<&Var> = vars.iter().collect();
    let gradients = grad(&scalar(f, &vars), &wrt, order).unwrap();
    for (gradient, var) in gradients.iter().zip(&vars) {
        assert_eq!(gradient.dims(), var.dims());
    }
    gradients.iter().flat_map(|g| numbers(g.value())).collect()
}

/// The gradient of <gradient, v> by the tape: a Hessian-vector product.
fn hessian_vector(f: Function<'_>, inputs: &[Tensor], v: &[Tensor], last: Order) -> Vec<f64> {
    let tape = Tape::new();
    let vars = leaves(&tape, inputs);
    let wrt: Vec<&Var> = vars.iter().collect();
    let gradients = grad(&scalar(f, &vars), &wrt, Order::Higher).unwrap();
    let products: Vec<Var> = gradients
        .iter()
        .zip(v)
        .map(|(g, v)| g.mul(&tape.constant(v.clone())).unwrap().sum_all().unwrap())
        .collect();
    let total = products.into_iter().reduce(|a, b| a.add(&b).unwrap()).unwrap();
    grad(&total, &wrt, last).unwrap().iter().flat_map(|g| numbers(g.value())).collect()
}

fn shifted(inputs: &[Tensor], v: &[Tensor], step: f64) -> Vec<Tensor> {
    inputs.iter().zip(v).map(|(x, v)| (x + (v * step).unwrap()).unwrap()).collect()
}

/// First order by both modes, and second order, against central differences.
fn check(name: &str, inputs: &[Tensor], f: Function<'_>) {
    let mut expected = Vec::new();
    for (slot, input) in inputs.iter().enumerate() {
        let base = numbers(input);
        for at in 0..base.len() {
            let moved = |step: f64| {
                let mut values = base.clone();
                values[at] += step;
                let mut all = inputs.to_vec();
                all[slot] = tensor(values, input.dims());
                value(f, &all)
            };
            expected.push((moved(STEP) - moved(-STEP)) / (2.0 * STEP));
        }
    }
    for order in [Order::First, Order::Higher] {
        let gap = distance(&flat_gradient(f, inputs, order), &expected);
        assert!(gap < TOLERANCE, "{name}: gradient ({order:?}) off by {gap:e}");
    }
    let v: Vec<Tensor> =
        inputs.iter().enumerate().map(|(i, t)| noise(t.dims(), 50 + i as u64)).collect();
    let plus = flat_gradient(f, &shifted(inputs, &v, STEP), Order::First);
    let minus = flat_gradient(f, &shifted(inputs, &v, -STEP), Order::First);
    let expected: Vec<f64> = plus.iter().zip(&minus).map(|(p, m)| (p - m) / (2.0 * STEP)).collect();
    for last in [Order::First, Order::Higher] {
        let gap = distance(&hessian_vector(f, inputs, &v, last), &expected);
        assert!(gap < TOLERANCE, "{name}: Hessian-vector product ({last:?}) off by {gap:e}");
    }
}

#[test]
fn arithmetic_with_broadcasting() {
    let shapes: [(&[usize], &[usize]); 5] = [
        (&[3, 4], &[3, 4]),
        (&[3, 4], &[4]),
        (&[2, 3, 1, 2], &[1, 3, 2, 1]),
        (&[], &[5]),
        (&[2, 1], &[1, 3]),
    ];
    for (a, b) in shapes {
        let inputs = [noise(a, 1), positive(b, 2)];
        check("add", &inputs, &|v| v[0].square()?.add(&v[1].square()?));
        check("sub", &inputs, &|v| v[0].sub(&v[1])?.square());
        check("mul", &inputs, &|v| v[0].mul(&v[1])?.mul(&v[1]));
        check("div", &inputs, &|v| v[0].div(&v[1]));
        check("affine", &inputs, &|v| v[0].mul(&v[1].neg()?)?.affine(1.7, -0.3)?.square());
    }
}

#[test]
fn functions_of_one_variable() {
    for dims in [&[7][..], &[2, 3, 2][..]] {
        let x = [noise(dims, 3)];
        let p = [positive(dims, 4)];
        check("exp", &x, &|v| v[0].exp());
        check("log", &p, &|v| v[0].log());
        check("sqrt", &p, &|v| v[0].sqrt());
        check("square", &x, &|v| v[0].square()?.mul(&v[0]));
        check("relu", &x, &|v| v[0].relu()?.mul(&v[0]));
        check("leaky_relu", &x, &|v| v[0].leaky_relu(0.2)?.mul(&v[0]));
        check("sigmoid", &x, &|v| v[0].sigmoid());
        check("tanh", &x, &|v| v[0].tanh());
    }
}

#[test]
fn reductions_and_broadcasts() {
    let x = [noise(&[2, 3, 4, 2], 5)];
    for axes in [&[0, 2, 3][..], &[1], &[3], &[0], &[0, 1, 2, 3], &[2, 3], &[1, 3]] {
        for keep in [KeepDims::Keep, KeepDims::Drop] {
            check("sum", &x, &|v| v[0].square()?.sum(axes, keep)?.square());
            check("mean", &x, &|v| v[0].square()?.mean(axes, keep)?.square());
        }
    }
    check("mean_all", &x, &|v| v[0].exp()?.mean_all()?.square());
    check("broadcast", &[noise(&[3, 1], 6)], &|v| {
        v[0].square()?.broadcast_to(&[2, 3, 4])?.square()
    });
}

#[test]
fn operations_that_move_values() {
    let x = [noise(&[3, 4, 2], 7), noise(&[3, 1, 2], 8)];
    check("reshape", &x, &|v| v[0].square()?.reshape(&[6, 4])?.square());
    check("transpose", &x, &|v| v[0].square()?.transpose(0, 2)?.exp());
    check("concat", &x, &|v| Var::concat(&[&v[0].square()?, &v[1], &v[0]], 1)?.square());
    check("narrow", &x, &|v| v[0].square()?.narrow(1, 1, 2)?.square());
    check("pad", &x, &|v| v[0].square()?.pad(2, 1, 2)?.square());
    check("rows", &x, &|v| v[0].square()?.index_select_rows(&[2, 0, 2, 1])?.square());
    check("flatten", &x, &|v| v[0].square()?.flatten_rows()?.tanh());
}

#[test]
fn matrix_products() {
    check("plain", &[noise(&[3, 4], 9), noise(&[4, 2], 10)], &|v| v[0].matmul(&v[1])?.tanh());
    check("batched", &[noise(&[2, 3, 4], 9), noise(&[2, 4, 2], 10)], &|v| {
        v[0].matmul(&v[1])?.tanh()
    });
    check("transposed", &[noise(&[4, 3], 9), noise(&[2, 4], 10)], &|v| {
        v[0].transpose(0, 1)?.matmul(&v[1].transpose(0, 1)?)?.square()
    });
    let tape = Tape::new();
    let (a, b) = (noise(&[130, 7], 1), noise(&[7, 5], 2));
    let product = tape.leaf(a.clone()).matmul(&tape.leaf(b.clone())).unwrap();
    let gap = distance(&numbers(product.value()), &numbers(&a.matmul(&b).unwrap()));
    assert!(gap < 1e-14, "row blocks: {gap:e}");
}

#[test]
fn log_softmax_and_cross_entropy() {
    let x = [noise(&[4, 5], 12)];
    check("log_softmax", &x, &|v| v[0].log_softmax());
    check("cross_entropy", &x, &|v| v[0].cross_entropy(&[0, 4, 2, 2]));
    let tape = Tape::new();
    let huge = tape.leaf(tensor(vec![1e4, -1e4, 0.0, 1e4, 1e4, 1e4], &[2, 3]));
    let y = numbers(huge.log_softmax().unwrap().value());
    let third = -(3f64.ln());
    assert!(distance(&y, &[0.0, -2e4, -1e4, third, third, third]) < 1e-12, "{y:?}");
}

#[test]
fn convolutions_of_several_shapes() {
    for (x, w, stride, padding) in [
        ([2, 2, 5, 4], [3, 2, 3, 3], 1, 1),
        ([1, 3, 6, 5], [2, 3, 3, 3], 2, 1),
        ([2, 2, 4, 4], [2, 2, 2, 2], 2, 0),
        ([2, 3, 3, 3], [4, 3, 1, 1], 1, 0),
        ([1, 1, 5, 7], [1, 1, 3, 3], 3, 0),
    ] {
        let inputs = [noise(&x, 13), noise(&w, 14), noise(&w[..1], 15)];
        let options = ConvOptions { stride, padding };
        check("conv2d", &inputs, &|v| v[0].conv2d(&v[1], Some(&v[2]), options)?.tanh());
        check("conv2d without bias", &inputs[..2], &|v| {
            v[0].conv2d(&v[1], None, options)?.square()
        });
    }
}

/// The third derivative against differences of the second.
fn check_third(name: &str, inputs: &[Tensor], f: Function<'_>) {
    let v: Vec<Tensor> =
        inputs.iter().enumerate().map(|(i, t)| noise(t.dims(), 18 + i as u64)).collect();
    let tape = Tape::new();
    let vars = leaves(&tape, inputs);
    let wrt: Vec<&Var> = vars.iter().collect();
    let along = |loss: &Var| {
        let gradients = grad(loss, &wrt, Order::Higher).unwrap();
        let dot =
            |(g, v): (&Var, &Tensor)| g.mul(&tape.constant(v.clone())).unwrap().sum_all().unwrap();
        gradients.iter().zip(&v).map(dot).reduce(|a, b| a.add(&b).unwrap()).unwrap()
    };
    let second = along(&along(&scalar(f, &vars)));
    let third: Vec<f64> = grad(&second, &wrt, Order::First)
        .unwrap()
        .iter()
        .flat_map(|g| numbers(g.value()))
        .collect();
    let at = |step: f64| {
        // d/dstep of the Hessian-vector product along v is the third derivative on (v, v).
        hessian_vector(f, &shifted(inputs, &v, step), &v, Order::First)
    };
    let expected: Vec<f64> =
        at(STEP).iter().zip(at(-STEP)).map(|(p, m)| (p - m) / (2.0 * STEP)).collect();
    let gap = distance(&third, &expected);
    assert!(gap < TOLERANCE, "{name}: {gap:e}");
}

#[test]
fn third_order_matches_differences_of_the_second() {
    let inputs = [noise(&[1, 2, 4, 4], 16), noise(&[2, 2, 3, 3], 17)];
    check_third("conv2d", &inputs, &|v| v[0].conv2d(&v[1], None, ConvOptions::same(3))?.tanh());
    let inputs = [noise(&[2, 2, 4, 5], 16), positive(&[2], 17), positive(&[2], 18)];
    check_third("batch_norm_relu_pool", &inputs, &|v| {
        v[0].batch_norm_relu_pool(&v[1], &v[2], 1e-1)?.0.tanh()
    });
}

#[test]
fn pooling_and_up_sampling() {
    for dims in [[2, 2, 4, 4], [1, 3, 5, 7]] {
        let x = [noise(&dims, 20)];
        for side in [2, 3] {
            check("max_pool2d", &x, &|v| v[0].square()?.max_pool2d(side)?.square());
            check("avg_pool2d", &x, &|v| v[0].square()?.avg_pool2d(side)?.square());
        }
        check("global_avg_pool", &x, &|v| v[0].square()?.global_avg_pool()?.square());
        check("global_max_pool", &x, &|v| v[0].square()?.global_max_pool()?.square());
        let w = noise(&[2, dims[1], 3, 3], 21);
        check("upsampled_conv2d", &[x[0].clone(), w], &|v| {
            v[0].square()?.upsampled_conv2d(&v[1])?.square()
        });
        check("upsample", &x, &|v| v[0].square()?.upsample_nearest(2)?.square());
    }
}

#[test]
fn a_tie_in_max_pooling_goes_to_the_first() {
    let tape = Tape::new();
    let x = tape.leaf(tensor(vec![1.0, 3.0, 3.0, 3.0], &[1, 1, 2, 2]));
    let y = x.max_pool2d(2).unwrap().sum_all().unwrap();
    let g = grad(&y, &[&x], Order::First).unwrap();
    assert_eq!(numbers(g[0].value()), [0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn batch_normalisation_with_and_without_relu() {
    for dims in [[3, 2, 2, 3], [2, 4, 1, 1], [4, 1, 5, 5]] {
        let c = dims[1];
        let inputs = [noise(&dims, 21), positive(&[c], 22), noise(&[c], 23)];
        for activation in [Activation::None, Activation::Relu, Activation::LeakyRelu(0.2)] {
            check("batch_norm", &inputs, &|v| {
                v[0].batch_norm(&v[1], &v[2], 1e-2, activation)?.0.mul(&v[0])?.exp()?.log()
            });
            check("channel_affine", &inputs, &|v| {
                v[0].channel_affine(&v[1], &v[2], activation)?.mul(&v[0])
            });
        }
    }
}

#[test]
fn batch_normalisation_relu_and_pooling_in_one_equal_the_three() {
    for dims in [[3, 2, 4, 6], [2, 3, 5, 7], [4, 1, 2, 2]] {
        let c = dims[1];
        // A negative factor too: the maximum is taken after the affine map.
        let factor = tensor((0..c).map(|i| if i % 2 == 0 { 1.2 } else { -0.7 }).collect(), &[c]);
        let inputs = [noise(&dims, 21), factor, noise(&[c], 23).affine(0.3, 0.1).unwrap()];
        let fused: Function<'_> = &|v| v[0].batch_norm_relu_pool(&v[1], &v[2], 1e-2)?.0.square();
        let three: Function<'_> = &|v| {
            let (y, _) = v[0].batch_norm(&v[1], &v[2], 1e-2, Activation::Relu)?;
            y.max_pool2d(2)?.square()
        };
        check("batch_norm_relu_pool", &inputs, fused);
        assert!((value(fused, &inputs) - value(three, &inputs)).abs() < 1e-12);
    }
}

#[test]
fn batch_normalisation_gives_unit_statistics_and_reports_them() {
    let tape = Tape::new();
    let x = noise(&[6, 3, 4, 5], 24).affine(3.0, 100.0).unwrap();
    let ones = tape.constant(Tensor::ones(3, DType::F64, &Device::Cpu).unwrap());
    let zeros = tape.constant(Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap());
    let (y, statistics) =
        tape.leaf(x.clone()).batch_norm(&ones, &zeros, 1e-12, Activation::None).unwrap();
    assert_eq!(statistics.count, 120);
    for c in 0..3 {
        let own = numbers(&x.narrow(1, c, 1).unwrap().contiguous().unwrap());
        let mean = own.iter().sum::<f64>() / 120.0;
        let variance = own.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / 120.0;
        assert!((statistics.mean[c] - mean).abs() < 1e-10);
        assert!((statistics.variance[c] - variance).abs() < 1e-10);
        let out = numbers(&y.value().narrow(1, c, 1).unwrap().contiguous().unwrap());
        assert!((out.iter().map(|v| v * v).sum::<f64>() / 120.0 - 1.0).abs() < 1e-9);
    }
}

/// loss = (w^2 x - y)^2 / 2 after one step w' = w - a dloss/dw: all derivatives by hand.
#[test]
fn the_derivative_through_a_gradient_step_equals_the_hand_derived_one() {
    let (w, x, y, a) = (0.7f64, 1.3f64, 0.4f64, 0.1f64);
    let tape = Tape::new();
    let one = |v: f64| tape.constant(tensor(vec![v], &[1]));
    let loss = |w: &Var| {
        let gap = w.square().unwrap().mul(&one(x)).unwrap().sub(&one(y)).unwrap();
        gap.square().unwrap().scale(0.5).unwrap().sum_all().unwrap()
    };
    let var = tape.leaf(tensor(vec![w], &[1]));
    let inner = grad(&loss(&var), &[&var], Order::Higher).unwrap().remove(0);
    let slope = |w: f64| 2.0 * w * x * (w * w * x - y);
    let curvature = |w: f64| 6.0 * w * w * x * x - 2.0 * x * y;
    assert!((inner.scalar().unwrap() - slope(w)).abs() < 1e-14);
    let fast = var.sub(&inner.scale(a).unwrap()).unwrap();
    let outer = grad(&loss(&fast), &[&var, &fast], Order::First).unwrap();
    let stepped = w - a * slope(w);
    assert!((outer[1].scalar().unwrap() - slope(stepped)).abs() < 1e-14);
    let expected = slope(stepped) * (1.0 - a * curvature(w));
    assert!((outer[0].scalar().unwrap() - expected).abs() < 1e-14);
}

/// Two conv - BN - ReLU - pool blocks and a linear head; parameters in order.
fn network(images: &Var, p: &[Var]) -> Result<Var> {
    let mut x = images.clone();
    for block in p[..8].chunks_exact(4) {
        let y = x.conv2d(&block[0], Some(&block[1]), ConvOptions::same(3))?;
        let (y, _) = y.batch_norm(&block[2], &block[3], 1e-3, Activation::Relu)?;
        x = y.max_pool2d(2)?;
    }
    x.flatten_rows()?.matmul(&p[8])?.add(&p[9])
}

/// Meta-loss of MAML with two inner steps on the support set.
fn maml(p: &[Var]) -> Var {
    let tape = p[0].tape().clone();
    let support = tape.constant(noise(&[4, 2, 8, 8], 30));
    let query = tape.constant(noise(&[6, 2, 8, 8], 31));
    let mut fast: Vec<Var> = p.to_vec();
    for _ in 0..2 {
        let loss = network(&support, &fast).unwrap().cross_entropy(&[0, 1, 2, 0]).unwrap();
        let wrt: Vec<&Var> = fast.iter().collect();
        let gradients = grad(&loss, &wrt, Order::Higher).unwrap();
        fast = fast
            .iter()
            .zip(&gradients)
            .map(|(w, g)| w.sub(&g.scale(0.1).unwrap()).unwrap())
            .collect();
    }
    network(&query, &fast).unwrap().cross_entropy(&[0, 1, 2, 0, 1, 2]).unwrap()
}

#[test]
fn two_step_maml_meta_gradient_equals_central_differences() {
    let c = 3;
    let inputs = [
        noise(&[c, 2, 3, 3], 32),
        noise(&[c], 33),
        positive(&[c], 34),
        noise(&[c], 35),
        noise(&[c, c, 3, 3], 36),
        noise(&[c], 37),
        positive(&[c], 38),
        noise(&[c], 39),
        noise(&[c * 4, 3], 40),
        noise(&[3], 41),
    ];
    let tape = Tape::new();
    let vars = leaves(&tape, &inputs);
    let wrt: Vec<&Var> = vars.iter().collect();
    let meta = maml(&vars);
    let gradients = grad(&meta, &wrt, Order::First).unwrap();
    // Along the gradient of each parameter, and along one random direction of all of them.
    let mut directions: Vec<Vec<Tensor>> = (0..inputs.len())
        .map(|slot| {
            inputs
                .iter()
                .enumerate()
                .map(|(i, t)| if i == slot { noise(t.dims(), 60) } else { t.zeros_like().unwrap() })
                .collect()
        })
        .collect();
    directions
        .push(inputs.iter().enumerate().map(|(i, t)| noise(t.dims(), 70 + i as u64)).collect());
    for (at, v) in directions.iter().enumerate() {
        let slope: f64 = gradients
            .iter()
            .zip(v)
            .flat_map(|(g, v)| numbers(g.value()).into_iter().zip(numbers(v)))
            .map(|(g, v)| g * v)
            .sum();
        let moved =
            |step: f64| maml(&leaves(&Tape::new(), &shifted(&inputs, v, step))).scalar().unwrap();
        let step = 1e-6;
        let expected = (moved(step) - moved(-step)) / (2.0 * step);
        let gap = (slope - expected).abs() / expected.abs().max(1.0);
        assert!(gap < 1e-6, "direction {at}: {slope} against {expected}");
    }
}

#[test]
fn f32_gradients_are_close_to_f64_ones() {
    let inputs =
        [noise(&[4, 2, 8, 8], 1), noise(&[3, 2, 3, 3], 2), positive(&[3], 3), noise(&[3], 4)];
    let f: Function<'_> = &|v| {
        let y = v[0].conv2d(&v[1], None, ConvOptions::same(3))?;
        y.batch_norm(&v[2], &v[3], 1e-5, Activation::Relu)?.0.avg_pool2d(2)?.tanh()
    };
    let narrow: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
    for order in [Order::First, Order::Higher] {
        let gap = distance(&flat_gradient(f, &narrow, order), &flat_gradient(f, &inputs, order));
        assert!(gap < 1e-5, "{order:?}: {gap:e}");
    }
}

/// The vectors of the fused block at first and second order, where rows are whole vectors and where they are not.
#[test]
fn f32_hessian_products_of_the_fused_block_are_close_to_f64_ones() {
    for [height, width] in [[32, 32], [8, 8], [10, 21], [4, 4]] {
        let inputs = [
            noise(&[3, 2, height, width], 1),
            tensor(vec![1.2, -0.7], &[2]),
            tensor(vec![0.3, 0.1], &[2]),
        ];
        let narrow = |tensors: &[Tensor]| -> Vec<Tensor> {
            tensors.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect()
        };
        let wide = |tensors: &[Tensor]| -> Vec<Tensor> {
            tensors.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect()
        };
        // Both sides start from what f32 holds, so that no maximum changes place.
        let inputs = wide(&narrow(&inputs));
        let v: Vec<Tensor> =
            inputs.iter().enumerate().map(|(i, t)| noise(t.dims(), 50 + i as u64)).collect();
        let v = wide(&narrow(&v));
        let f: Function<'_> = &|v| v[0].batch_norm_relu_pool(&v[1], &v[2], 1e-5)?.0.tanh();
        let first = |inputs: &[Tensor]| flat_gradient(f, inputs, Order::First);
        let gap = distance(&first(&narrow(&inputs)), &first(&inputs));
        assert!(gap < 1e-5, "{height}x{width}: {gap:e}");
        let second = |inputs: &[Tensor], v: &[Tensor]| hessian_vector(f, inputs, v, Order::First);
        let gap = distance(&second(&narrow(&inputs), &narrow(&v)), &second(&inputs, &v));
        assert!(gap < 1e-5, "{height}x{width}, second order: {gap:e}");
    }
}

#[test]
fn long_chains_do_not_overflow_the_stack() {
    let tape = Tape::new();
    let x = tape.leaf(tensor(vec![1.0], &[1]));
    let mut y = x.clone();
    for _ in 0..100_000 {
        y = y.affine(1.0, 1e-6).unwrap();
    }
    let g = grad(&y, &[&x], Order::First).unwrap();
    assert_eq!(g[0].scalar().unwrap(), 1.0);
}

#[test]
fn constants_are_not_recorded_and_first_order_leaves_nothing_behind() {
    let tape = Tape::new();
    let c = tape.constant(noise(&[3], 1));
    let _ = c.exp().unwrap().mul(&c).unwrap();
    assert_eq!(tape.len(), 0);
    let x = tape.leaf(noise(&[3], 2));
    let loss = x.mul(&c).unwrap().exp().unwrap().sum_all().unwrap();
    let before = tape.len();
    let g = grad(&loss, &[&x], Order::First).unwrap();
    assert_eq!(tape.len(), before);
    assert!(grad(&g[0].sum_all().unwrap(), &[&x], Order::First).is_ok(), "zero, not an error");
}

#[test]
fn nan_is_not_hidden() {
    let tape = Tape::new();
    let x = tape.leaf(tensor(vec![f64::NAN, -1.0, 2.0, 0.5], &[1, 1, 2, 2]));
    let one = tape.constant(tensor(vec![1.0], &[1]));
    let is_nan = |v: &Var| numbers(v.value()).iter().any(|v| v.is_nan());
    assert!(is_nan(&x.relu().unwrap()) && is_nan(&x.leaky_relu(0.1).unwrap()));
    assert!(is_nan(&x.max_pool2d(2).unwrap()) && is_nan(&x.global_max_pool().unwrap()));
    assert!(is_nan(&x.channel_affine(&one, &one, Activation::Relu).unwrap()));
    assert!(is_nan(&x.batch_norm_relu_pool(&one, &one, 1e-5).unwrap().0));
}

#[test]
fn misuse_is_an_error() {
    let (one, two) = (Tape::new(), Tape::new());
    let (a, b) = (one.leaf(noise(&[3], 1)), two.leaf(noise(&[3], 2)));
    assert!(a.add(&b).is_err());
    assert!(grad(&a, &[&a], Order::First).is_err(), "three elements");
    let loss = a.sum_all().unwrap();
    assert!(grad(&loss, &[&b], Order::First).is_err());
    assert!(grad(&loss, &[&a.detach()], Order::First).is_err());
    assert!(vjp(&a, &a.sum_all().unwrap(), &[&a], Order::First).is_err());
    assert!(a.matmul(&a).is_err());
    assert!(a.sum(&[1], KeepDims::Keep).is_err());
    assert!(a.index_select_rows(&[3]).is_err());
}
