//! The product at every level against sums in `f64`.

use super::*;
use crate::tensor::RngStream;

/// How an operand lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lies {
    Rows,
    Columns,
    /// Rows, 3 more than needed apart, every second value.
    Sparse,
}

const WAYS: [Lies; 3] = [Lies::Rows, Lies::Columns, Lies::Sparse];

/// `values` [rows, columns] laid out in `way`, and a look at it.
struct Laid {
    data: Vec<f32>,
    strides: [usize; 2],
}

impl Laid {
    fn new(values: &[f32], [rows, columns]: [usize; 2], way: Lies) -> Self {
        let strides = match way {
            Lies::Rows => [columns, 1],
            Lies::Columns => [1, rows],
            Lies::Sparse => [2 * columns + 3, 2],
        };
        let length = (rows - 1) * strides[0] + (columns - 1) * strides[1] + 1;
        let mut data = vec![f32::NAN; length];
        for row in 0..rows {
            for column in 0..columns {
                data[row * strides[0] + column * strides[1]] = values[row * columns + column];
            }
        }
        Self { data, strides }
    }

    fn view(&self) -> MatrixRef<'_, f32> {
        let [row_stride, column_stride] = self.strides;
        MatrixRef { data: &self.data, row_stride, column_stride }
    }
}

fn normals(name: &str, n: usize) -> Vec<f32> {
    RngStream::new(0, "product", name, 0).normals(n)
}

fn exact(Sizes { m, n, k }: Sizes, a: &[f32], b: &[f32]) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                c[i * n + j] += f64::from(a[i * k + p]) * f64::from(b[p * n + j]);
            }
        }
    }
    c
}

fn distance(c: &[f32], exact: &[f64]) -> f64 {
    let norm = |v: f64| v * v;
    let off: f64 = c.iter().zip(exact).map(|(&c, &e)| norm(f64::from(c) - e)).sum();
    (off / exact.iter().map(|&e| norm(e)).sum::<f64>().max(f64::MIN_POSITIVE)).sqrt()
}

/// Sums one after the other in `f32`.
fn plain(Sizes { m, n, k }: Sizes, a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + p] * b[p * n + j];
            }
        }
    }
    c
}

fn rows(n: usize, data: &mut [f32]) -> Output<'_, f32> {
    Output { data, row_stride: n, start: Start::Nothing }
}

#[test]
fn any_size_stride_and_level_gives_the_product_and_leaves_the_rest_alone() {
    let sizes = [1, 15, 16, 17, 31, 33, 64, 130];
    for level in Level::all() {
        for (case, &m) in sizes.iter().enumerate() {
            for &n in &sizes {
                let k = sizes[(case + n) % sizes.len()];
                let sizes = Sizes { m, n, k };
                let (a, b) = (normals("a", m * k), normals("b", k * n));
                let (way_a, way_b) = (WAYS[(m + k) % 3], WAYS[(n + case) % 3]);
                let [a_laid, b_laid] = [Laid::new(&a, [m, k], way_a), Laid::new(&b, [k, n], way_b)];
                let mut wanted = exact(sizes, &a, &b);
                let row_stride = n + case % 2 * 5;
                let before = normals("c", (m - 1) * row_stride + n);
                let bias = normals("bias", n);
                let product = wanted.clone();
                for start in [Start::Nothing, Start::Result, Start::Row(&bias)] {
                    let mut data = before.clone();
                    for (i, wanted) in wanted.iter_mut().enumerate() {
                        let plus = match start {
                            Start::Nothing => 0.0,
                            Start::Result => before[i / n * row_stride + i % n],
                            Start::Row(bias) => bias[i % n],
                        };
                        *wanted = product[i] + f64::from(plus);
                    }
                    let c = Output { data: &mut data, row_stride, start };
                    product_at(level, sizes, a_laid.view(), b_laid.view(), c, Threads::All);
                    let found: Vec<f32> =
                        data.chunks(row_stride).flat_map(|row| &row[..n]).copied().collect();
                    let off = distance(&found, &wanted);
                    assert!(off < 1e-6, "{level:?} {sizes:?} {way_a:?} {way_b:?}: {off:e}");
                    for (i, (now, before)) in data.iter().zip(&before).enumerate() {
                        assert!(i % row_stride < n || now == before, "value {i} was changed");
                    }
                }
            }
        }
    }
}

#[test]
fn every_way_to_lie_in_memory_is_packed_alike() {
    let sizes = Sizes { m: 70, n: 66, k: 75 };
    let (a, b) = (normals("a", 70 * 75), normals("b", 75 * 66));
    for level in Level::all() {
        let mut results = Vec::new();
        for way_a in WAYS {
            for way_b in WAYS {
                let [a, b] = [Laid::new(&a, [70, 75], way_a), Laid::new(&b, [75, 66], way_b)];
                let mut c = vec![0.0; 70 * 66];
                product_at(level, sizes, a.view(), b.view(), rows(66, &mut c), Threads::One);
                results.push(c);
            }
        }
        let wanted = exact(sizes, &a, &b);
        for c in &results {
            assert!(distance(c, &wanted) < 1e-6, "{level:?}");
        }
        if level == Level::Tiles {
            assert!(results.iter().all(|c| c == &results[0]));
        }
    }
}

#[test]
fn cut_panels_are_right_at_any_depth() {
    // More depth than a task packs at once; the last panels have up to and more than half their lines.
    for (m, n, k) in [(98, 70, 1100), (40, 57, 600), (310, 200, 520), (33, 1000, 545)] {
        let sizes = Sizes { m, n, k };
        let (a, b) = (normals("a", m * k), normals("b", k * n));
        let wanted = exact(sizes, &a, &b);
        for level in Level::all() {
            let mut c = vec![f32::NAN; m * n];
            let (a, b) = (MatrixRef::rows(&a, k), MatrixRef::rows(&b, n));
            product_at(level, sizes, a, b, rows(n, &mut c), Threads::All);
            assert!(distance(&c, &wanted) < 1e-6, "{level:?} {sizes:?}");
        }
    }
}

#[test]
fn errors_are_at_most_those_of_plain_sums() {
    for level in Level::all() {
        for k in [32, 100, 768, 3072] {
            for positive in [false, true] {
                let sizes = Sizes { m: 64, n: 96, k };
                let [mut a, mut b] = [normals("a", 64 * k), normals("b", k * 96)];
                if positive {
                    // All of one sign: what the split drops would add up, had it a sign.
                    a.iter_mut().chain(&mut b).for_each(|v| *v = v.abs());
                }
                let wanted = exact(sizes, &a, &b);
                let mut c = vec![0.0; 64 * 96];
                let (a_view, b_view) = (MatrixRef::rows(&a, k), MatrixRef::rows(&b, 96));
                product_at(level, sizes, a_view, b_view, rows(96, &mut c), Threads::All);
                let (ours, plain) =
                    (distance(&c, &wanted), distance(&plain(sizes, &a, &b), &wanted));
                assert!(ours <= 1.5 * plain, "{level:?} {k} {positive}: {ours:e}, plain {plain:e}");
            }
        }
    }
}

#[test]
fn numbers_of_any_magnitude_keep_their_digits() {
    // One term a sum, so that the split alone decides; the largest and nearly the smallest exponents.
    let n = 64;
    for level in Level::all() {
        for scale in [f32::MAX, 1e30, 1.0, 1e-20, 1e-32] {
            let values: Vec<f32> = normals("v", n * n).iter().map(|v| v.sin() * scale).collect();
            let mut unit = vec![0.0; n * n];
            (0..n).for_each(|i| unit[i * n + i] = 1.0);
            let mut c = vec![0.0; n * n];
            let (a, b) = (MatrixRef::rows(&values, n), MatrixRef::rows(&unit, n));
            product_at(level, Sizes { m: n, n, k: n }, a, b, rows(n, &mut c), Threads::One);
            for (c, v) in c.iter().zip(&values) {
                // Parts below 2^-126 are lost.
                assert!((c - v).abs() <= v.abs() * 1e-7 + 2e-38, "{level:?}: {c:e} of {v:e}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so_and_spoils_only_its_row_or_column() {
    let (m, n, k) = (70, 65, 64);
    let low_payload = f32::from_bits(0x7F80_0001);
    let all_ones = f32::from_bits(0x7FFF_FFFF);
    let odd = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, low_payload, all_ones];
    for level in Level::all() {
        for value in odd.into_iter().chain(odd.map(|v| -v)) {
            for left in [true, false] {
                let (mut a, mut b) = (normals("a", m * k), normals("b", k * n));
                let (row, column) = (40, 7);
                if left {
                    a[row * k + 20] = value;
                } else {
                    b[20 * n + column] = value;
                }
                let mut c = vec![0.0; m * n];
                let (a, b) = (MatrixRef::rows(&a, k), MatrixRef::rows(&b, n));
                product_at(level, Sizes { m, n, k }, a, b, rows(n, &mut c), Threads::One);
                for (i, c) in c.iter().enumerate() {
                    let spoilt = if left { i / n == row } else { i % n == column };
                    assert_eq!(!c.is_finite(), spoilt, "{level:?} {value}: {c} at {i}");
                }
            }
        }
    }
}

#[test]
fn threads_change_no_byte() {
    for (m, n, k) in [(300, 200, 600), (40, 1000, 100), (1100, 70, 33)] {
        let (a, b) = (normals("a", m * k), normals("b", k * n));
        for level in Level::all() {
            let run = |count: usize, threads: Threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
                let mut c = vec![0.0; m * n];
                let (a, b) = (MatrixRef::rows(&a, k), MatrixRef::rows(&b, n));
                pool.install(|| {
                    product_at(level, Sizes { m, n, k }, a, b, rows(n, &mut c), threads);
                });
                c.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            let one = run(1, Threads::All);
            assert_eq!(one, run(2, Threads::All), "{level:?}");
            assert_eq!(one, run(5, Threads::All), "{level:?}");
            if level == Level::Tiles {
                assert_eq!(one, run(1, Threads::One));
            }
        }
    }
}

#[test]
fn sums_of_nothing_are_zero_and_nothing_is_written_to_an_empty_result() {
    for level in Level::all() {
        let mut c = vec![1.0_f32; 6];
        let (a, b) = (MatrixRef::rows(&[], 0), MatrixRef::rows(&[], 3));
        product_at(level, Sizes { m: 2, n: 3, k: 0 }, a, b, rows(3, &mut c), Threads::All);
        assert_eq!(c, vec![0.0; 6]);
        let mut none: [f32; 0] = [];
        let sizes = Sizes { m: 0, n: 3, k: 2 };
        product_at(level, sizes, a, b, rows(3, &mut none), Threads::All);
    }
}
