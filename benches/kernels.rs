//! The kernels that the main job spends its time in, fixed data: `cargo kernels`.
//!
//! Throughput is given in multiply-adds, so that a figure can be held against the processor's peak.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use metazoa::tensor::RngStream;
use metazoa::tensor::kernels::conv::{
    Conv2dGeometry, conv2d, conv2d_input_gradient, conv2d_weight_gradient,
};
use metazoa::tensor::kernels::norm_pool::{Block, Channel, FirstCotangents, Maps};
use metazoa::tensor::kernels::product::{
    Level, MatrixRef, Output, Sizes, Start, Threads, product_at,
};

/// Layers of the bundled models, batch 32.
const LAYERS: [(&str, Conv2dGeometry); 4] = [
    ("conv4 first, 3 to 32, 32x32", layer(3, 32, 32, 3, 1, 1)),
    ("conv4 second, 32 to 32, 16x16", layer(32, 32, 16, 3, 1, 1)),
    ("depthwise 48, 16x16", layer(48, 48, 16, 3, 1, 48)),
    ("resnet10 stride 2, 48 to 96, 8x8", layer(48, 96, 8, 3, 2, 1)),
];

const fn layer(
    in_channels: usize,
    out_channels: usize,
    size: usize,
    kernel: usize,
    stride: usize,
    groups: usize,
) -> Conv2dGeometry {
    let pad = kernel / 2;
    Conv2dGeometry {
        batch: 32,
        in_channels,
        input: [size, size],
        out_channels,
        kernel: [kernel, kernel],
        stride: [stride, stride],
        dilation: [1, 1],
        pads: [pad, pad, pad, pad],
        groups,
    }
}

/// Products [m, k] x [k, n] of the networks of `benches/reference/speed.py`, at their batches.
const PRODUCTS: [(&str, Sizes); 9] = [
    ("ViT-tiny, queries keys values", Sizes { m: 1576, n: 576, k: 192 }),
    ("ViT-tiny, first of the MLP", Sizes { m: 1576, n: 768, k: 192 }),
    ("ViT-tiny, attention of a head", Sizes { m: 197, n: 197, k: 64 }),
    ("ConvNeXt-T, first stage", Sizes { m: 6272, n: 384, k: 96 }),
    ("ConvNeXt-T, last stage", Sizes { m: 98, n: 3072, k: 768 }),
    ("ResNet-50, 1x1 of 56x56", Sizes { m: 256, n: 3136, k: 64 }),
    ("ResNet-50, 1x1 of 14x14", Sizes { m: 1024, n: 196, k: 256 }),
    ("ResNet-50, 1x1 of 7x7", Sizes { m: 2048, n: 49, k: 512 }),
    ("Winograd, a point of ResNet-18", Sizes { m: 64, n: 256, k: 256 }),
];

fn products(criterion: &mut Criterion) {
    for (name, sizes) in PRODUCTS {
        let Sizes { m, n, k } = sizes;
        let (a, b, mut c) = (normal("a", m * k), normal("b", k * n), vec![0.0; m * n]);
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements((m * n * k) as u64)).sample_size(20);
        for level in Level::all() {
            group.bench_function(format!("{level:?}, one thread"), |bencher| {
                bencher.iter(|| {
                    let (a, b) = (MatrixRef::rows(black_box(&a), k), MatrixRef::rows(&b, n));
                    let c = Output { data: &mut c, row_stride: n, start: Start::Nothing };
                    product_at(level, sizes, a, b, c, Threads::One);
                });
            });
        }
        group.finish();
    }
}

fn normal(name: &str, n: usize) -> Vec<f32> {
    RngStream::new(0, "bench", name, 0).normals(n)
}

fn convolutions(criterion: &mut Criterion) {
    for (name, geometry) in LAYERS {
        let [height, width] = geometry.output();
        let outputs = geometry.batch * geometry.out_channels * height * width;
        let window =
            geometry.in_channels / geometry.groups * geometry.kernel[0] * geometry.kernel[1];
        let inputs = geometry.batch * geometry.in_channels * geometry.input[0] * geometry.input[1];
        let x = normal("x", inputs);
        let w = normal("w", geometry.out_channels * window);
        let dy = normal("dy", outputs);
        let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());

        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements((outputs * window) as u64)).sample_size(20);
        group.bench_function("forward", |bencher| {
            bencher.iter(|| conv2d(&geometry, black_box(&x), &w, None, &mut y));
        });
        group.bench_function("gradient to the input", |bencher| {
            bencher.iter(|| conv2d_input_gradient(&geometry, black_box(&dy), &w, &mut dx, false));
        });
        group.bench_function("gradient to the weights", |bencher| {
            bencher.iter(|| conv2d_weight_gradient(&geometry, black_box(&x), &dy, &mut dw));
        });
        group.finish();
    }
}

/// The fused block after the convolutions of Conv4-32, 25 images.
fn normalised_pooling(criterion: &mut Criterion) {
    for side in [32, 16, 8, 4] {
        let maps = Maps { images: 25, channels: 32, size: [side; 2] };
        let n = maps.images * maps.channels * side * side;
        let (x, g, h) = (normal("x", n), normal("g", n / 4), normal("h", n));
        let channel = Channel { mean: 0.1, inverse_std: 0.9, scale: 1.1, shift: 0.2 };
        let (channels, cotangents) = ([channel; 32], [FirstCotangents::default(); 32]);
        let block = Block { maps, channels: &channels, x: &x };
        let (mut y, mut dx) = (g.clone(), x.clone());
        let sums = block.first_sums(&g);

        let mut group = criterion.benchmark_group(format!("norm, relu, pool {side}x{side}"));
        group.throughput(Throughput::Elements(n as u64)).sample_size(20);
        group.bench_function("forward", |b| b.iter(|| black_box(&block).forward(&mut y)));
        group.bench_function("gradient", |bencher| {
            bencher.iter(|| block.backward(&g, &black_box(&block).first_sums(&g), &mut dx));
        });
        group.bench_function("gradient of the gradient", |bencher| {
            bencher.iter(|| {
                black_box(&block).second(&g, &h, &sums, &cotangents, &mut dx, &mut y);
            });
        });
        group.finish();
    }
}

criterion_group!(benches, convolutions, products, normalised_pooling);
criterion_main!(benches);
