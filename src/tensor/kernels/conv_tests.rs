//! Convolution against a direct sum, and its gradients against the adjoint identity.

use super::*;
use crate::tensor::RngStream;

fn direct(g: &Conv2dGeometry, x: &[f64], w: &[f64], bias: &[f64]) -> Vec<f64> {
    let [ho, wo] = g.output();
    let (ig, og) = (g.in_channels / g.groups, g.out_channels / g.groups);
    let mut y = Vec::new();
    for n in 0..g.batch {
        for (o, &bias) in bias.iter().enumerate() {
            for oy in 0..ho {
                for ox in 0..wo {
                    let mut sum = bias;
                    for c in 0..ig {
                        for ky in 0..g.kernel[0] {
                            for kx in 0..g.kernel[1] {
                                let iy = (oy * g.stride[0] + ky * g.dilation[0]) as isize
                                    - g.pads[0] as isize;
                                let ix = (ox * g.stride[1] + kx * g.dilation[1]) as isize
                                    - g.pads[1] as isize;
                                if iy < 0
                                    || ix < 0
                                    || iy >= g.input[0] as isize
                                    || ix >= g.input[1] as isize
                                {
                                    continue;
                                }
                                let channel = o / og * ig + c;
                                let xi = ((n * g.in_channels + channel) * g.input[0] + iy as usize)
                                    * g.input[1]
                                    + ix as usize;
                                let wi = ((o * ig + c) * g.kernel[0] + ky) * g.kernel[1] + kx;
                                sum += x[xi] * w[wi];
                            }
                        }
                    }
                    y.push(sum);
                }
            }
        }
    }
    y
}

fn geometries() -> Vec<Conv2dGeometry> {
    let base = Conv2dGeometry {
        batch: 3,
        in_channels: 4,
        input: [7, 9],
        out_channels: 6,
        kernel: [3, 3],
        stride: [1, 1],
        dilation: [1, 1],
        pads: [1, 1, 1, 1],
        groups: 1,
    };
    vec![
        base,
        Conv2dGeometry { stride: [2, 2], ..base },
        Conv2dGeometry { stride: [2, 1], pads: [0, 2, 1, 0], ..base },
        Conv2dGeometry { dilation: [2, 1], pads: [2, 0, 2, 1], ..base },
        Conv2dGeometry { groups: 2, ..base },
        Conv2dGeometry { out_channels: 4, groups: 4, ..base },
        Conv2dGeometry { out_channels: 4, groups: 4, stride: [2, 2], kernel: [5, 3], ..base },
        Conv2dGeometry { out_channels: 8, groups: 4, ..base },
        Conv2dGeometry { kernel: [1, 1], pads: [0; 4], ..base },
        Conv2dGeometry { kernel: [1, 1], pads: [0; 4], input: [16, 16], batch: 5, ..base },
        Conv2dGeometry { kernel: [1, 1], pads: [0; 4], stride: [2, 2], ..base },
        Conv2dGeometry { kernel: [7, 7], pads: [3; 4], stride: [2, 2], ..base },
        Conv2dGeometry { kernel: [1, 7], pads: [0, 3, 0, 3], ..base },
        Conv2dGeometry { pads: [4, 4, 4, 4], ..base },
        Conv2dGeometry { kernel: [4, 4], stride: [4, 4], pads: [0; 4], input: [8, 8], ..base },
        Conv2dGeometry { batch: 40, input: [4, 4], ..base },
        Conv2dGeometry { in_channels: 64, out_channels: 8, input: [40, 37], batch: 2, ..base },
    ]
}

fn values(n: usize, key: &str) -> Vec<f64> {
    let mut rng = RngStream::new(1, "conv-test", key, n as u64);
    (0..n).map(|_| f64::from(rng.normal())).collect()
}

fn assert_close(a: &[f64], b: &[f64], what: &str, g: &Conv2dGeometry) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-9 * (1.0 + b.abs()), "{what}: {a} against {b} in {g:?}");
    }
}

#[test]
fn forward_equals_the_direct_sum() {
    for g in geometries() {
        let x = values(g.batch * g.input_stride(), "x");
        let w = values(g.weights(), "w");
        let bias = values(g.out_channels, "b");
        let mut y = vec![0.0; g.batch * g.output_stride()];
        conv2d(&g, &x, &w, Some(&bias), &mut y);
        assert_close(&y, &direct(&g, &x, &w, &bias), "forward", &g);
    }
}

/// `<dy, conv(x, w)> = <input_gradient(dy, w), x> = <weight_gradient(x, dy), w>`, and accumulation.
#[test]
fn gradients_are_the_adjoints_of_the_forward() {
    for g in geometries() {
        let x = values(g.batch * g.input_stride(), "x");
        let w = values(g.weights(), "w");
        let dy = values(g.batch * g.output_stride(), "dy");
        let mut y = vec![0.0; dy.len()];
        conv2d(&g, &x, &w, None, &mut y);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let expected = dot(&dy, &y);
        let mut dx = vec![1.0; x.len()];
        conv2d_input_gradient(&g, &dy, &w, &mut dx, false);
        let mut dw = vec![7.0; w.len()];
        conv2d_weight_gradient(&g, &x, &dy, &mut dw);
        let scale = 1e-9 * (1.0 + expected.abs());
        assert!((dot(&dx, &x) - expected).abs() < scale, "input gradient of {g:?}");
        assert!((dot(&dw, &w) - expected).abs() < scale, "weight gradient of {g:?}");
        // One basis vector checks each value, not only the sum.
        let mut basis = vec![0.0; x.len()];
        let at = x.len() / 3;
        basis[at] = 1.0;
        let mut response = vec![0.0; dy.len()];
        conv2d(&g, &basis, &w, None, &mut response);
        assert!((dx[at] - dot(&dy, &response)).abs() < 1e-9, "input gradient entry of {g:?}");
        let mut twice = dx.clone();
        conv2d_input_gradient(&g, &dy, &w, &mut twice, true);
        let doubled: Vec<f64> = dx.iter().map(|v| 2.0 * v).collect();
        assert_close(&twice, &doubled, "accumulation", &g);
    }
}

/// Convolutions large enough for the matrix unit: 1x1 with few and many pixels, in groups, with more outputs than
/// pixels; strides; patches; and one that it serves in one direction alone. And depthwise ones of several tasks.
fn large() -> Vec<Conv2dGeometry> {
    let base = Conv2dGeometry {
        batch: 3,
        in_channels: 40,
        input: [14, 15],
        out_channels: 70,
        kernel: [1, 1],
        stride: [1, 1],
        dilation: [1, 1],
        pads: [0; 4],
        groups: 1,
    };
    let depthwise = Conv2dGeometry {
        input: [56, 56],
        out_channels: 40,
        kernel: [7, 7],
        pads: [3; 4],
        groups: 40,
        ..base
    };
    vec![
        base,
        Conv2dGeometry { batch: 9, in_channels: 200, input: [7, 7], out_channels: 300, ..base },
        Conv2dGeometry { in_channels: 80, input: [20, 20], out_channels: 48, groups: 2, ..base },
        Conv2dGeometry { stride: [2, 2], input: [29, 30], ..base },
        Conv2dGeometry { kernel: [3, 3], stride: [2, 2], pads: [1; 4], input: [31, 28], ..base },
        Conv2dGeometry { kernel: [7, 7], stride: [2, 2], pads: [3; 4], in_channels: 3, ..base },
        Conv2dGeometry { kernel: [4, 4], stride: [4, 4], input: [32, 64], in_channels: 3, ..base },
        Conv2dGeometry { kernel: [2, 3], input: [33, 5], ..base },
        depthwise,
        Conv2dGeometry { stride: [2, 2], ..depthwise },
    ]
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn distance(found: &[f32], exact: &[f64]) -> f64 {
    let off: f64 = found.iter().zip(exact).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
    (off / exact.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

#[test]
fn large_convolutions_in_single_precision_agree_with_double_and_with_any_number_of_threads() {
    let mut rng = RngStream::new(0, "conv", "large", 0);
    for g in large() {
        let outputs = g.batch * g.output_stride();
        let x = rng.normals(g.batch * g.input_stride());
        let (w, bias) = (rng.normals(g.weights()), rng.normals(g.out_channels));
        let dy = rng.normals(outputs);
        let mut y_exact = vec![0.0; outputs];
        conv2d(&g, &wide(&x), &wide(&w), Some(&wide(&bias)), &mut y_exact);
        let mut plain_exact = vec![0.0; outputs];
        conv2d(&g, &wide(&x), &wide(&w), None, &mut plain_exact);
        let mut dx_exact = vec![0.0; x.len()];
        conv2d_input_gradient(&g, &wide(&dy), &wide(&w), &mut dx_exact, false);
        let sum_exact: Vec<f64> = dx_exact.iter().zip(&x).map(|(d, &x)| d + f64::from(x)).collect();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut y, mut plain) = (vec![f32::NAN; outputs], vec![f32::NAN; outputs]);
                let (mut dx, mut sum) = (vec![f32::NAN; x.len()], x.clone());
                conv2d(&g, &x, &w, Some(&bias), &mut y);
                conv2d(&g, &x, &w, None, &mut plain);
                conv2d_input_gradient(&g, &dy, &w, &mut dx, false);
                conv2d_input_gradient(&g, &dy, &w, &mut sum, true);
                [y, plain, dx, sum]
            })
        };
        let found = run(1);
        for (found, exact) in found.iter().zip([&y_exact, &plain_exact, &dx_exact, &sum_exact]) {
            assert!(distance(found, exact) < 1e-6, "{g:?}: {:e}", distance(found, exact));
        }
        for threads in [2, 5] {
            assert_eq!(found, run(threads), "{g:?} on {threads} threads");
        }
    }
}
