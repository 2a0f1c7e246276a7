//! The built-in backbones as graphs of ONNX operators: the form in which they are trained, exported
//! and run in ONNX Runtime.
//!
//! Each takes `images` `[batch, 3, H, W]`, canonical ([0, 1], RGB), normalises them itself, and gives
//! `embedding` `[batch, d]`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{Attribute, ConstantTensor, DataType, Dimension, Graph, Node, Port};
use crate::tensor::RngStream;

/// Added to variances, PyTorch's default.
pub const EPSILON: f64 = 1e-5;
/// Mean that canonical images are normalised with, every channel.
pub const IMAGE_MEAN: f64 = 0.5;
/// Standard deviation that canonical images are normalised with, every channel.
pub const IMAGE_STD: f64 = 0.25;
/// Channels of the published Conv4 of PURER, BiDf-MKD and FREE (methods.md 1.3).
pub const STANDARD_WIDTH: usize = 32;

/// Operator set the graphs are written in.
const OPSET: i64 = 17;
const CHANNELS: usize = 3;

/// An embedding network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Four blocks of conv 3x3 (bias), batch normalisation, ReLU and 2x2 maxima, of `width` channels
    /// each; the embedding is the flattened last map (methods.md 1.3).
    Conv4 {
        /// Channels of every block.
        width: usize,
    },
    /// One block of two convolutions at each of 64, 128, 256, 512 channels (methods.md 1.3).
    ResNet10,
    /// Four blocks of three convolutions of 64, 160, 320, 640 channels with 2x2 maxima (Lee et al. 2019).
    ResNet12,
    /// Two blocks of two convolutions at each of 64, 128, 256, 512 channels (methods.md 1.3).
    ResNet18,
    /// A classifier's ONNX file up to its last linear layer ([`super::Backbone::from_onnx`]).
    Onnx,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conv4 { width } => write!(f, "conv4-{width}"),
            Self::ResNet10 => f.write_str("resnet10"),
            Self::ResNet12 => f.write_str("resnet12"),
            Self::ResNet18 => f.write_str("resnet18"),
            Self::Onnx => f.write_str("onnx"),
        }
    }
}

impl FromStr for Architecture {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match (text, text.strip_prefix("conv4-").map(str::parse)) {
            ("resnet10", _) => Ok(Self::ResNet10),
            ("resnet12", _) => Ok(Self::ResNet12),
            ("resnet18", _) => Ok(Self::ResNet18),
            ("onnx", _) => Ok(Self::Onnx),
            (_, Some(Ok(width))) => Ok(Self::Conv4 { width }),
            _ => Err(Error::unsupported(format!("backbone architecture `{text}`"))
                .hint("known are conv4-WIDTH, resnet10, resnet12 and resnet18")),
        }
    }
}

impl Architecture {
    /// The network with fresh weights: convolutions N(0, 2 / (k k C_out)), their biases uniform within
    /// 1 / sqrt(fan in) as PyTorch's, normalisation 1 and 0 (methods.md 1.3).
    ///
    /// # Errors
    /// When there are no channels, or the weights come from a file.
    pub fn graph(self, seed: u64) -> Result<Graph> {
        let mut builder = Builder::new(seed);
        let x = builder.normalised();
        match self {
            Self::Conv4 { width } => {
                if width == 0 {
                    return Err(Error::usage("a backbone needs channels, got width `0`"));
                }
                builder.conv4(x, width);
            }
            Self::ResNet10 => builder.resnet(x, 1),
            Self::ResNet12 => builder.resnet12(x),
            Self::ResNet18 => builder.resnet(x, 2),
            Self::Onnx => return Err(Error::internal("a file's network is not made anew")),
        }
        Ok(builder.graph)
    }
}

/// A convolution's sizes.
#[derive(Debug, Clone, Copy)]
struct Conv {
    inputs: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    bias: Bias,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bias {
    Added,
    None,
}

/// A graph that grows; each method returns the name of the value it makes.
struct Builder {
    graph: Graph,
    seed: u64,
}

impl Builder {
    fn new(seed: u64) -> Self {
        let symbol = |name: &str| Dimension::Symbol(name.into());
        let port = |name: &str, shape: Vec<Dimension>| Port {
            name: name.into(),
            dtype: DataType::Float32,
            shape: Some(shape),
        };
        let image =
            vec![symbol("batch"), Dimension::Fixed(CHANNELS), symbol("height"), symbol("width")];
        let graph = Graph {
            name: "embedding".into(),
            opset: OPSET,
            inputs: vec![port("images", image)],
            outputs: vec![port("embedding", vec![symbol("batch"), symbol("dimension")])],
            ..Graph::default()
        };
        Self { graph, seed }
    }

    fn constant(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        self.graph.constants.insert(name.into(), Arc::new(ConstantTensor::f32(shape, values)));
    }

    fn node(&mut self, op: &str, inputs: &[&str], output: &str, attributes: &[(&str, Attribute)]) {
        let node = Node::new(op, &format!("{output}/{op}"), inputs, &[output]);
        let with = |node: Node, (name, value): &(&str, Attribute)| node.with(name, value.clone());
        self.graph.nodes.push(attributes.iter().fold(node, with));
    }

    fn normalised(&mut self) -> String {
        self.constant("image_mean", &[], vec![IMAGE_MEAN as f32]);
        self.constant("image_std", &[], vec![IMAGE_STD as f32]);
        self.node("Sub", &["images", "image_mean"], "centred", &[]);
        self.node("Div", &["centred", "image_std"], "normalised", &[]);
        "normalised".into()
    }

    /// A convolution that keeps the size but for its stride: parameters `name.weight`, `name.bias`.
    fn conv(&mut self, x: &str, name: &str, conv: Conv) -> String {
        let Conv { inputs, outputs, kernel, stride, bias } = conv;
        let (weight, offset) = (format!("{name}.weight"), format!("{name}.bias"));
        let mut rng = RngStream::new(self.seed, "initialise", &weight, 0);
        let std = (2.0 / (kernel * kernel * outputs) as f32).sqrt();
        let n = outputs * inputs * kernel * kernel;
        let values = rng.normals(n).into_iter().map(|v| v * std).collect();
        self.constant(&weight, &[outputs, inputs, kernel, kernel], values);
        let mut operands = vec![x, weight.as_str()];
        if bias == Bias::Added {
            let mut rng = RngStream::new(self.seed, "initialise", &offset, 0);
            let bound = 1.0 / ((inputs * kernel * kernel) as f32).sqrt();
            let values = (0..outputs).map(|_| rng.uniform_in(-bound, bound)).collect();
            self.constant(&offset, &[outputs], values);
            operands.push(&offset);
        }
        let ints = |values: &[usize]| Attribute::Ints(values.iter().map(|&v| v as i64).collect());
        let attributes = [
            ("kernel_shape", ints(&[kernel; 2])),
            ("pads", ints(&[kernel / 2; 4])),
            ("strides", ints(&[stride; 2])),
            ("dilations", ints(&[1, 1])),
            ("group", Attribute::Int(1)),
        ];
        self.node("Conv", &operands, name, &attributes);
        name.into()
    }

    /// Batch normalisation: parameters `name.weight`, `name.bias`, statistics `name.running_mean`, `name.running_var`.
    fn norm(&mut self, x: &str, name: &str, channels: usize) -> String {
        let value = |what: &str| format!("{name}.{what}");
        let names = ["weight", "bias", "running_mean", "running_var"].map(value);
        for (name, value) in names.iter().zip([1.0, 0.0, 0.0, 1.0]) {
            self.constant(name, &[channels], vec![value; channels]);
        }
        let [weight, bias, mean, var] = names.each_ref().map(String::as_str);
        let epsilon = [("epsilon", Attribute::Float(EPSILON as f32))];
        self.node("BatchNormalization", &[x, weight, bias, mean, var], name, &epsilon);
        name.into()
    }

    fn relu(&mut self, x: &str) -> String {
        let output = format!("{x}.relu");
        self.node("Relu", &[x], &output, &[]);
        output
    }

    fn leaky_relu(&mut self, x: &str) -> String {
        let output = format!("{x}.leaky_relu");
        self.node("LeakyRelu", &[x], &output, &[("alpha", Attribute::Float(0.1))]);
        output
    }

    fn halve(&mut self, x: &str) -> String {
        let output = format!("{x}.pool");
        let two = || Attribute::Ints(vec![2, 2]);
        self.node("MaxPool", &[x], &output, &[("kernel_shape", two()), ("strides", two())]);
        output
    }

    fn flatten(&mut self, x: &str) {
        self.node("Flatten", &[x], "embedding", &[("axis", Attribute::Int(1))]);
    }

    fn conv4(&mut self, mut x: String, width: usize) {
        let mut inputs = CHANNELS;
        for block in 1..=4 {
            let conv = Conv { inputs, outputs: width, kernel: 3, stride: 1, bias: Bias::Added };
            let y = self.conv(&x, &format!("conv{block}"), conv);
            let y = self.norm(&y, &format!("norm{block}"), width);
            let y = self.relu(&y);
            x = self.halve(&y);
            inputs = width;
        }
        self.flatten(&x);
    }

    /// `depth` blocks at each of four widths; a stem without activation, as in the published programs.
    fn resnet(&mut self, x: String, depth: usize) {
        let stem = Conv { inputs: CHANNELS, outputs: 64, kernel: 3, stride: 1, bias: Bias::None };
        let y = self.conv(&x, "stem.conv", stem);
        let mut x = self.norm(&y, "stem.norm", 64);
        let mut inputs = 64;
        for (stage, outputs) in [64, 128, 256, 512].into_iter().enumerate() {
            for block in 0..depth {
                let name = format!("stage{}.{block}", stage + 1);
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                x = self.basic_block(&x, &name, [inputs, outputs], stride);
                inputs = outputs;
            }
        }
        self.node("GlobalAveragePool", &[&x], "pooled", &[]);
        self.flatten("pooled");
    }

    fn basic_block(
        &mut self,
        x: &str,
        name: &str,
        [inputs, outputs]: [usize; 2],
        stride: usize,
    ) -> String {
        let conv = Conv { inputs, outputs, kernel: 3, stride, bias: Bias::None };
        let y = self.conv(x, &format!("{name}.conv1"), conv);
        let y = self.norm(&y, &format!("{name}.norm1"), outputs);
        let y = self.relu(&y);
        let second = Conv { inputs: outputs, stride: 1, ..conv };
        let y = self.conv(&y, &format!("{name}.conv2"), second);
        let y = self.norm(&y, &format!("{name}.norm2"), outputs);
        let shortcut = if inputs == outputs && stride == 1 {
            x.to_owned()
        } else {
            let point = Conv { kernel: 1, ..conv };
            let y = self.conv(x, &format!("{name}.shortcut.conv"), point);
            self.norm(&y, &format!("{name}.shortcut.norm"), outputs)
        };
        let sum = format!("{name}.sum");
        self.node("Add", &[&y, &shortcut], &sum, &[]);
        self.relu(&sum)
    }

    fn resnet12(&mut self, mut x: String) {
        let mut inputs = CHANNELS;
        for (stage, outputs) in [64, 160, 320, 640].into_iter().enumerate() {
            let name = format!("stage{}", stage + 1);
            let mut y = x.clone();
            for layer in 1..=3 {
                let from = if layer == 1 { inputs } else { outputs };
                let conv = Conv { inputs: from, outputs, kernel: 3, stride: 1, bias: Bias::None };
                y = self.conv(&y, &format!("{name}.conv{layer}"), conv);
                y = self.norm(&y, &format!("{name}.norm{layer}"), outputs);
                if layer < 3 {
                    y = self.leaky_relu(&y);
                }
            }
            let point = Conv { inputs, outputs, kernel: 1, stride: 1, bias: Bias::None };
            let shortcut = self.conv(&x, &format!("{name}.shortcut.conv"), point);
            let shortcut = self.norm(&shortcut, &format!("{name}.shortcut.norm"), outputs);
            let sum = format!("{name}.sum");
            self.node("Add", &[&y, &shortcut], &sum, &[]);
            let y = self.leaky_relu(&sum);
            x = self.halve(&y);
            inputs = outputs;
        }
        self.node("GlobalAveragePool", &[&x], "pooled", &[]);
        self.flatten("pooled");
    }
}
