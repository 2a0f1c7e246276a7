use candle_core::Device;

use super::*;

fn vector(values: [f64; 2]) -> Tensor {
    Tensor::from_slice(&values.map(|v| v as f32), 2, &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_vec1().unwrap()
}

/// Of two quadratics `0.5 x A x`: g = A x, H = A, so the way back is `(g1 + g2 - e A2 g1) / 2`.
#[test]
fn the_way_back_holds_the_product_of_curvature_and_the_others_gradient() {
    let matrices = [[[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.25], [-0.25, 3.0]]];
    let times = |m: [[f64; 2]; 2], v: [f64; 2]| m.map(|row| row[0] * v[0] + row[1] * v[1]);
    let (start, rate) = ([1.0, -2.0], 0.05);
    let mut gradient = |number: usize, at: &[Tensor]| {
        let at = numbers(&at[0]);
        let at = [f64::from(at[0]), f64::from(at[1])];
        Ok(vec![vector(times(matrices[number], at))])
    };
    let inner = Inner { rate, adam: false, scale: None };
    let found = way_back(&[vector(start)], inner, 2, &mut gradient).unwrap();
    let [g1, g2] = matrices.map(|m| times(m, start));
    let bent = times(matrices[1], g1);
    for (at, found) in numbers(&found[0]).into_iter().enumerate() {
        let expected = 0.5 * (g1[at] + g2[at] - rate * bent[at]);
        assert!((f64::from(found) - expected).abs() < 1e-4, "{found} {expected}");
    }
    // One model alone, and a factor of one's own.
    let alone = way_back(&[vector(start)], inner, 1, &mut gradient).unwrap();
    for (found, g) in numbers(&alone[0]).into_iter().zip(g1) {
        assert!((f64::from(found) - g).abs() < 1e-4);
    }
    let scaled = Inner { scale: Some(67.0), ..inner };
    let scaled = way_back(&[vector(start)], scaled, 1, &mut gradient).unwrap();
    for (found, g) in numbers(&scaled[0]).into_iter().zip(g1) {
        assert!((f64::from(found) - 67.0 * rate * g).abs() < 1e-3);
    }
    // Adam's first step is its rate, whatever the gradient.
    let adam = Inner { adam: true, ..inner };
    let adam = way_back(&[vector(start)], adam, 1, &mut gradient).unwrap();
    for (found, g) in numbers(&adam[0]).into_iter().zip(g1) {
        assert!((f64::from(found) - g.signum()).abs() < 1e-3);
    }
}
