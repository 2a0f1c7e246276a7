use super::*;
use crate::tensor::RngStream;

fn preprocess(size: [usize; 3]) -> Preprocess {
    Preprocess {
        input_size: size,
        layout: Layout::Nchw,
        dtype: ElementType::Float32,
        value_range: [0.0, 1.0],
        color: if size[0] == 1 { Color::Grey } else { Color::Rgb },
        mean: vec![],
        std: vec![],
        crop_pct: 1.0,
    }
}

fn random(seed: u64, shape: [usize; 4]) -> Images {
    let mut rng = RngStream::new(seed, "test", "adapter", 0);
    let data = (0..shape.iter().product()).map(|_| rng.uniform()).collect();
    Images::new(data, shape).unwrap()
}

/// The plane the Pillow figures below were made from, in all three channels: 7 wide, 5 high.
fn plane() -> Images {
    let plane: Vec<f32> = (0..35)
        .map(|i| (i % 7, i / 7))
        .map(|(x, y)| ((3 * x * x + 7 * y * x + 5 * y) % 11) as f32 / 10.0)
        .collect();
    Images::new(plane.repeat(3), [1, 3, 5, 7]).unwrap()
}

/// `Image.fromarray(plane, "F").resize(size, BILINEAR, box)` of Pillow 13.0.0.
#[test]
fn resizes_as_pillow_does() {
    let cases: [([usize; 2], f32, &[f32]); 3] = [
        ([2, 3], 1.0, &[0.450000, 0.526471, 0.482143, 0.571429, 0.497059, 0.550000]),
        (
            [6, 9],
            1.0,
            &[
                0.000000, 0.200000, 0.211111, 0.188889, 0.500000, 0.422222, 0.677778, 0.900000,
                0.900000, 0.375000, 0.375000, 0.519444, 0.722222, 0.800000, 0.488889, 0.511111,
                0.500000, 0.300000, 0.791667, 0.569444, 0.576852, 0.673148, 0.491667, 0.420370,
                0.325926, 0.269444, 0.275000, 0.750000, 0.611111, 0.512037, 0.450926, 0.366667,
                0.392593, 0.395370, 0.436111, 0.525000, 0.525000, 0.591667, 0.447222, 0.330556,
                0.700000, 0.466667, 0.566667, 0.725000, 0.775000, 0.900000, 0.766667, 0.388889,
                0.222222, 1.000000, 0.533333, 0.400000, 0.600000, 1.000000,
            ],
        ),
        (
            [3, 4],
            0.8,
            &[
                0.377143, 0.627368, 0.538947, 0.565714, 0.589683, 0.514912, 0.387719, 0.327778,
                0.564762, 0.417895, 0.545263, 0.648571,
            ],
        ),
    ];
    for ([h, w], crop_pct, expected) in cases {
        let adapter = Adapter::new(&Preprocess { crop_pct, ..preprocess([3, h, w]) }).unwrap();
        let got = adapter.forward(&plane()).unwrap();
        for (got, expected) in got[..h * w].iter().zip(expected) {
            assert!((got - expected).abs() < 2e-6, "{h}x{w} crop {crop_pct}: {got} {expected}");
        }
    }
}

#[test]
fn keeps_an_image_of_the_right_size_bit_for_bit() {
    let images = random(1, [2, 3, 8, 6]);
    let adapter = Adapter::new(&preprocess([3, 8, 6])).unwrap();
    assert_eq!(adapter.forward(&images).unwrap(), images.data());
    assert_eq!(adapter.forward_part(&images, 1..2).unwrap(), images.image(1));
    assert_eq!(adapter.backward(images.data(), images.shape()).unwrap(), images);
}

#[test]
fn backward_is_the_transpose_of_forward() {
    let sizes = [([9, 7], [9, 7]), ([32, 32], [84, 84]), ([84, 84], [32, 28]), ([31, 13], [8, 40])];
    let mut case = 0;
    for ([h, w], [to_h, to_w]) in sizes {
        for layout in [Layout::Nchw, Layout::Nhwc] {
            for color in [Color::Rgb, Color::Bgr, Color::Grey] {
                for crop_pct in [1.0, 0.875] {
                    case += 1;
                    let channels = if color == Color::Grey { 1 } else { 3 };
                    let adapter = Adapter::new(&Preprocess {
                        layout,
                        color,
                        crop_pct,
                        value_range: [-1.0, 3.0],
                        std: [0.25, 0.5, 2.0][..channels].to_vec(),
                        mean: vec![0.5],
                        ..preprocess([channels, to_h, to_w])
                    })
                    .unwrap();
                    let x = random(case, [2, 3, h, w]);
                    let y = random(case + 1000, [2, channels, to_h, to_w]).into_data();
                    let constant = adapter.forward(&Images::zeros(x.shape())).unwrap();
                    let dot = |a: &[f32], b: &[f32]| -> f64 {
                        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                    };
                    let left = dot(&adapter.forward(&x).unwrap(), &y) - dot(&constant, &y);
                    let right = dot(x.data(), adapter.backward(&y, x.shape()).unwrap().data());
                    let error = (left - right).abs() / right.abs();
                    assert!(error < 2e-6, "{layout:?} {color:?} {h}x{w}: {left} {right} {error:e}");
                }
            }
        }
    }
}

#[test]
fn puts_channels_layout_range_and_normalisation_where_the_model_wants_them() {
    // One pixel: red 0.2, green 0.4, blue 0.8.
    let pixel = Images::new(vec![0.2, 0.4, 0.8], [1, 3, 1, 1]).unwrap();
    let run = |p: Preprocess| Adapter::new(&p).unwrap().forward(&pixel).unwrap();
    let close = |got: Vec<f32>, expected: &[f32]| {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() <= 1e-5 * expected.abs(), "{got} {expected}");
        }
    };
    let bgr = Preprocess { color: Color::Bgr, value_range: [0.0, 255.0], ..preprocess([3, 1, 1]) };
    close(run(bgr.clone()), &[204.0, 102.0, 51.0]);
    // mean and std are in units of value_range and in the model's channel order.
    let caffe = Preprocess { mean: vec![104.0, 117.0, 123.0], std: vec![1.0, 2.0, 4.0], ..bgr };
    close(run(caffe), &[100.0, -7.5, -18.0]);
    close(run(preprocess([1, 1, 1])), &[0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.8]);
    let bytes = Preprocess {
        dtype: ElementType::Uint8,
        layout: Layout::Nhwc,
        value_range: [0.0, 255.0],
        ..preprocess([3, 1, 1])
    };
    close(run(bytes), &[51.0, 102.0, 204.0]);
}

#[test]
fn lays_pixels_out_channel_last_when_asked() {
    let images = random(3, [2, 3, 4, 5]);
    let nhwc = Preprocess { layout: Layout::Nhwc, ..preprocess([3, 4, 5]) };
    let adapter = Adapter::new(&nhwc).unwrap();
    assert_eq!(adapter.input_shape(2), [2, 4, 5, 3]);
    let got = adapter.forward(&images).unwrap();
    for (n, c, y, x) in [(0, 0, 0, 0), (0, 2, 3, 4), (1, 1, 2, 3), (1, 2, 0, 4)] {
        let expected = images.data()[((n * 3 + c) * 4 + y) * 5 + x];
        assert_eq!(got[((n * 4 + y) * 5 + x) * 3 + c], expected);
    }
}

#[test]
fn bytes_round_to_the_nearest_level_and_stay_in_range() {
    let values = vec![-0.3, 0.0, 0.49 / 255.0, 0.51 / 255.0, 200.0 / 255.0, 1.7];
    let bytes = Preprocess {
        dtype: ElementType::Uint8,
        value_range: [0.0, 255.0],
        ..preprocess([3, 1, 2])
    };
    let adapter = Adapter::new(&bytes).unwrap();
    let got = adapter.forward(&Images::new(values, [1, 3, 1, 2]).unwrap()).unwrap();
    assert_eq!(got, [0.0, 0.0, 0.0, 1.0, 200.0, 255.0]);
    assert!((adapter.quantum() - 1.0 / 255.0).abs() < 1e-9);
    // Rounding is passed straight through: the gradient is that of the linear part.
    let back = adapter.backward(&[1.0; 6], [1, 3, 1, 2]).unwrap();
    assert_eq!(back.data(), [255.0; 6]);
    // Every 8-bit image comes back as it was.
    let all: Vec<f32> = (0..256).map(|v| v as f32 / 255.0).collect();
    let wide = Preprocess { input_size: [3, 1, 256], ..bytes };
    let got = Adapter::new(&wide)
        .unwrap()
        .forward(&Images::new(all.repeat(3), [1, 3, 1, 256]).unwrap())
        .unwrap();
    assert!(got.iter().enumerate().all(|(i, &v)| v == (i % 256) as f32));
}

#[test]
fn half_floats_are_what_the_model_will_see() {
    let half = Preprocess { dtype: ElementType::Float16, ..preprocess([3, 4, 4]) };
    let images = random(5, [1, 3, 4, 4]);
    let got = Adapter::new(&half).unwrap().forward(&images).unwrap();
    for (got, x) in got.iter().zip(images.data()) {
        assert_eq!(f16::from_f32(*got).to_f32(), *got);
        assert!((got - x).abs() <= x * 5e-4);
    }
}

#[test]
fn contradicting_fields_are_refused_by_name() {
    let base = preprocess([3, 4, 4]);
    let cases = [
        (Preprocess { color: Color::Grey, ..base.clone() }, "Grey"),
        (Preprocess { mean: vec![0.0; 2], ..base.clone() }, "mean"),
        (Preprocess { std: vec![1.0, 0.0, 1.0], ..base.clone() }, "std"),
        (Preprocess { std: vec![f32::NAN], ..base.clone() }, "std"),
        (Preprocess { value_range: [1.0, 1.0], ..base.clone() }, "value_range"),
        (Preprocess { crop_pct: 0.0, ..base.clone() }, "crop_pct"),
        (Preprocess { input_size: [3, 0, 4], ..base.clone() }, "input size"),
    ];
    for (preprocess, word) in cases {
        let error = Adapter::new(&preprocess).unwrap_err();
        assert!(error.to_string().contains(word), "{error} should name {word}");
    }
    let adapter = Adapter::new(&base).unwrap();
    assert!(adapter.forward(&Images::zeros([1, 1, 4, 4])).is_err());
    assert!(adapter.backward(&[0.0; 7], [1, 3, 4, 4]).is_err());
}

#[test]
fn a_part_of_the_images_is_filled_up_with_its_last_and_gradients_are_added() {
    let adapter = Adapter::new(&preprocess([3, 4, 6])).unwrap();
    let images = random(6, [5, 3, 8, 8]);
    let all = adapter.forward(&images).unwrap();
    let stride = 3 * 4 * 6;
    let mut input = vec![f32::NAN; 4 * stride];
    adapter.forward_into(&images, 2..4, &mut input).unwrap();
    for (got, wanted) in input.chunks(stride).zip([2, 3, 3, 3]) {
        assert_eq!(got, &all[wanted * stride..][..stride]);
    }
    for (part, length) in
        [(2..4, stride), (2..4, 2 * stride + 1), (4..6, 2 * stride), (2..2, stride)]
    {
        let error = adapter.forward_into(&images, part.clone(), &mut vec![0.0; length]);
        assert!(error.is_err(), "{part:?} into {length}");
    }
    assert_eq!(adapter.forward_part(&images, 2..2).unwrap(), Vec::<f32>::new());

    let shape = [2, 3, 8, 8];
    let gradient = adapter.backward(&input[..2 * stride], shape).unwrap();
    let mut d_images = vec![0.5; gradient.data().len()];
    adapter.backward_into(&input[..2 * stride], shape, &mut d_images).unwrap();
    for (got, wanted) in d_images.iter().zip(gradient.data()) {
        assert!((got - (wanted + 0.5)).abs() < 1e-5);
    }
    assert!(adapter.backward_into(&input[..2 * stride], shape, &mut d_images[1..]).is_err());
}
