//! Any classifier's ONNX file as the embedding network: up to the input of its last linear layer.
//!
//! The network takes canonical images and prepares them as the file's sidecar says, inside the graph: resized
//! to the file's own size (bilinear), colours, range, mean and standard deviation, layout. Its weights start as in
//! the file and are free. A checkpoint holds its structure too, so a run does not need the file again.

use std::path::Path;
use std::sync::Arc;

use super::backbone::{Architecture, Backbone};
use super::export::prefix_values;
use crate::error::{Error, Result, ResultExt};
use crate::graph::trainable::free_constants;
use crate::graph::{Attribute, ConstantTensor, DataType, Dimension, Graph, Node, Port};
use crate::onnx::{self, ExternalData};
use crate::tensor::TensorStore;
use crate::zoo::facts::GraphIndex;
use crate::zoo::read::read_file;
use crate::zoo::{Access, BatchDimension, Color, ElementType, Layout, ModelSpec, Preprocess};

/// Before the names of the file's values.
const PREFIX: &str = "model/";
/// Where a store holds the structure, as the bytes of an ONNX file whose weights are inputs.
const STRUCTURE: &str = "graph";
/// Oldest operator set whose `Resize` takes sizes.
const RESIZING_OPSET: i64 = 13;
/// Oldest operator set whose `Resize` can smooth what it shrinks.
const ANTIALIASING_OPSET: i64 = 18;
/// Share of red, green and blue in grey, as teachers' adapters have it (ITU-R BT.601).
const GREY: [f32; 3] = [0.299, 0.587, 0.114];
/// Operators between the last linear layer and the class scores.
const AFTER_LAST: [&str; 14] = [
    "Identity",
    "Flatten",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Cast",
    "Dropout",
    "Softmax",
    "LogSoftmax",
    "Sigmoid",
    "Exp",
    "Log",
    "Relu",
    "GlobalAveragePool",
];

impl Backbone {
    /// The network of the classifier at `path`, read with the sidecar beside it, for canonical images of
    /// `[height, width]`.
    ///
    /// # Errors
    /// When the file is no classifier that our engine can differentiate, its class scores do not come from a
    /// linear layer (naming the node), or it takes a fixed number of images at once.
    pub fn from_onnx(path: &Path, image_size: [usize; 2]) -> Result<Self> {
        let open = || {
            let model = read_file(path)?;
            if model.spec.access != Access::WhiteBox {
                let told = model.notes.iter().find_map(|note| note.strip_prefix("black-box: "));
                let why = told.unwrap_or("its sidecar makes it a black box");
                return Err(Error::unsupported(format!("its weights cannot be trained: {why}"))
                    .hint("choose a file that `metazoa inspect` calls white-box"));
            }
            let root = model.spec.path.parent().unwrap_or(Path::new("/"));
            let graph = onnx::load(&model.spec.path, root)?.graph;
            Self::of_classifier(&graph, &model.spec, image_size)
        };
        open().context(|| format!("backbone `{}`", path.display()))
    }

    /// The network of a classifier, its `graph` as in the file that `spec` tells of.
    ///
    /// # Errors
    /// As [`Backbone::from_onnx`].
    pub fn of_classifier(graph: &Graph, spec: &ModelSpec, image_size: [usize; 2]) -> Result<Self> {
        if let BatchDimension::Fixed(n) = spec.batch {
            let error = format!("the file takes a fixed number of images at once: `{n}`");
            return Err(Error::unsupported(error).hint("export it with a dynamic batch dimension"));
        }
        if spec.preprocess.dtype != ElementType::Float32 {
            return Err(Error::unsupported(format!(
                "input `{}` must be float32 to be trained, found `{:?}`",
                spec.input_name, spec.preprocess.dtype
            ))
            .hint("export the file with a float32 input"));
        }
        let last = last_linear(graph, &spec.logits_output)?;
        let inner = prefix_values(&graph.restricted_to(&last.features), PREFIX);
        let features = format!("{PREFIX}{}", last.features);
        let mut whole = Graph { name: "embedding".into(), ..inner };
        let network = std::mem::take(&mut whole.nodes);
        let [height, width] = image_size;
        let batch = || Dimension::Symbol("batch".into());
        let image = [3, height, width].map(Dimension::Fixed);
        whole.inputs = vec![Port {
            name: "images".into(),
            dtype: DataType::Float32,
            shape: Some(std::iter::once(batch()).chain(image).collect()),
        }];
        let target = format!("{PREFIX}{}", spec.input_name);
        prepare(&mut whole, &spec.preprocess, image_size, &target)?;
        whole.nodes.extend(network);
        let mut rows = features;
        if last.is_convolution {
            let pooled = [rows.as_str()];
            whole.nodes.push(Node::new("GlobalAveragePool", "pooled", &pooled, &["pooled"]));
            rows = "pooled".into();
        }
        let flatten = Node::new("Flatten", "embedding", &[&rows], &["embedding"]);
        whole.nodes.push(flatten.with("axis", Attribute::Int(1)));
        whole.outputs = vec![Port {
            name: "embedding".into(),
            dtype: DataType::Float32,
            shape: Some(vec![batch(), Dimension::Symbol("dimension".into())]),
        }];
        Self::of_whole(whole, image_size)
    }

    /// `graph` from canonical images to the embedding.
    fn of_whole(graph: Graph, image_size: [usize; 2]) -> Result<Self> {
        let names = weights(&graph);
        if names.is_empty() {
            return Err(Error::unsupported(
                "no weight before the last linear layer can be trained",
            )
            .hint("quantised files have none; choose one in float32"));
        }
        let other = |name: &&String| graph.constants[*name].dtype != DataType::Float32;
        if let Some(name) = names.iter().find(other) {
            return Err(Error::unsupported(format!(
                "weight `{}` must be float32 to be trained, found `{:?}`",
                name.trim_start_matches(PREFIX),
                graph.constants[name].dtype
            ))
            .hint("export the file in float32"));
        }
        let own = Self::of_graph(Architecture::Onnx, graph, &names, image_size)?;
        // More than one image: a network that mixes them up is refused.
        own.embed(
            &crate::tensor::Images::zeros([2, 3, image_size[0], image_size[1]]),
            super::BnMode::Running,
        )?;
        Ok(own)
    }

    /// The network that [`write_structure`] wrote, with the weights of the store.
    pub(super) fn of_structure(store: &TensorStore) -> Result<Self> {
        let bytes = store.bytes.get(STRUCTURE).map(|(_, bytes)| bytes.as_slice());
        let bytes = bytes.ok_or_else(|| Error::input("the file has no network"))?;
        let mut graph = onnx::load_bytes(bytes, ExternalData::Refused)?.graph;
        let fixed = |dimension: &Dimension| match dimension {
            Dimension::Fixed(size) => Some(*size),
            Dimension::Symbol(_) => None,
        };
        let sizes =
            |port: &Port| -> Vec<usize> { port.shape.iter().flatten().filter_map(fixed).collect() };
        for port in graph.inputs.split_off(graph.inputs.len().min(1)) {
            let shape = sizes(&port);
            let values = store.tensor(&port.name, &shape)?.to_vec();
            graph.constants.insert(port.name, Arc::new(ConstantTensor::f32(shape, values)));
        }
        let Some(&[_, height, width]) = graph.inputs.first().map(&sizes).as_deref() else {
            return Err(Error::input("the file's network takes no images"));
        };
        Self::of_whole(graph, [height, width])
    }
}

/// Writes `graph` into `store`, without the constants `stored`, which the store holds as tensors.
pub(super) fn write_structure<'a>(
    graph: &Graph,
    stored: impl Iterator<Item = &'a str>,
    store: &mut TensorStore,
) -> Result<()> {
    let mut graph = graph.clone();
    for name in stored {
        if let Some(constant) = graph.constants.remove(name) {
            let shape = constant.shape.iter().map(|&size| Dimension::Fixed(size)).collect();
            let dtype = DataType::Float32;
            graph.inputs.push(Port { name: name.into(), dtype, shape: Some(shape) });
        }
    }
    let bytes = onnx::to_bytes(&graph, &onnx::ExportInfo::new([].into()))?;
    store.bytes.insert(STRUCTURE.into(), (vec![bytes.len()], bytes));
    Ok(())
}

/// The file's weights; the preparation of images has none.
fn weights(graph: &Graph) -> Vec<String> {
    let names = free_constants(graph, "embedding").into_iter();
    names.filter(|name| name.starts_with(PREFIX)).collect()
}

/// Where a classifier's last linear layer begins.
struct LastLinear {
    /// The value it reads.
    features: String,
    /// A convolution: its map is averaged.
    is_convolution: bool,
}

/// Follows `logits` back to the linear layer that makes them.
fn last_linear(graph: &Graph, logits: &str) -> Result<LastLinear> {
    let index = GraphIndex::new(graph);
    let from_images = |value: &str| {
        let is_input = |name: &str| graph.inputs.iter().any(|port| port.name == name);
        is_input(value) || index.ancestors(value).into_iter().any(is_input)
    };
    let none = |found: String| {
        Error::unsupported(format!("no linear layer makes `{logits}`: found {found}"))
            .hint("the last layer must be a Gemm, MatMul or Conv with constant weights; name another output in the sidecar's `logits_output`")
    };
    let mut value = logits.to_owned();
    for _ in 0..=graph.nodes.len() {
        let Some(node) = index.producer(&value) else {
            return Err(none(format!("graph input `{value}`")));
        };
        let data: Vec<&String> =
            node.inputs.iter().filter(|name| !name.is_empty() && from_images(name)).collect();
        let op = node.op_type.as_str();
        value = match (op, data.as_slice()) {
            ("Gemm" | "MatMul", [features]) => {
                return Ok(LastLinear { features: (*features).clone(), is_convolution: false });
            }
            ("Conv", [features]) => {
                return Ok(LastLinear { features: (*features).clone(), is_convolution: true });
            }
            ("Add" | "Sub" | "Mul" | "Div" | "AveragePool" | "ReduceMean", [data]) => {
                (*data).clone()
            }
            // exp(x) / sum(exp(x)), as old exporters write a softmax.
            ("Div", [data, _]) if index.producer(data).is_some_and(|n| n.op_type == "Exp") => {
                (*data).clone()
            }
            (op, [data, ..]) if AFTER_LAST.contains(&op) => (*data).clone(),
            _ => return Err(none(node.describe())),
        };
    }
    Err(none("a cycle".into()))
}

/// Appends the nodes that turn `images` `[batch, 3, height, width]` into the file's own input, called `target`.
fn prepare(
    graph: &mut Graph,
    preprocess: &Preprocess,
    image_size: [usize; 2],
    target: &str,
) -> Result<()> {
    let [channels, height, width] = preprocess.input_size;
    let mut value = "images".to_owned();
    let opset = graph.opset;
    let mut node = |op: &str, inputs: &[&str], output: &str, attributes: &[(&str, Attribute)]| {
        let node = Node::new(op, output, inputs, &[output]);
        let with = |node: Node, (name, value): &(&str, Attribute)| node.with(name, value.clone());
        graph.nodes.push(attributes.iter().fold(node, with));
        output.to_owned()
    };
    let mut constants: Vec<(&str, ConstantTensor)> = Vec::new();
    let ints = |values: &[i64]| ConstantTensor::i64(vec![values.len()], values.to_vec());
    let axis = |axis: i64| [("axis", Attribute::Int(axis))];
    if image_size != [height, width] {
        if opset < RESIZING_OPSET {
            return Err(Error::unsupported(format!(
                "images of {image_size:?} must be resized to [{height}, {width}], which operator set `{}` cannot",
                opset
            ))
            .hint(format!("set `image_size: [{height}, {width}]`, or convert the file to operator set {RESIZING_OPSET} or newer")));
        }
        constants.push(("images.first", ints(&[0])));
        constants.push(("images.size", ints(&[3, height as i64, width as i64])));
        let shape = node("Shape", &[&value], "images.shape", &[]);
        let batch = node("Gather", &[&shape, "images.first"], "images.batch", &axis(0));
        let sizes = node("Concat", &[&batch, "images.size"], "images.sizes", &axis(0));
        let words = [("mode", "linear"), ("coordinate_transformation_mode", "half_pixel")];
        let mut words = words.map(|(name, word)| (name, Attribute::String(word.into()))).to_vec();
        if (height < image_size[0] || width < image_size[1]) && opset >= ANTIALIASING_OPSET {
            words.push(("antialias", Attribute::Int(1)));
        }
        value = node("Resize", &[&value, "", "", &sizes], "images.resized", &words);
    }
    match preprocess.color {
        Color::Rgb => {}
        Color::Bgr => {
            constants.push(("images.order", ints(&[2, 1, 0])));
            value = node("Gather", &[&value, "images.order"], "images.bgr", &axis(1));
        }
        Color::Grey => {
            let shares = ConstantTensor::f32(vec![1, 3, 1, 1], GREY.to_vec());
            constants.push(("images.shares", shares));
            value = node("Conv", &[&value, "images.shares"], "images.grey", &[]);
        }
    }
    let [low, high] = preprocess.value_range;
    let of = |values: &[f32], channel: usize, default: f32| {
        values.get(channel).or(values.first()).copied().unwrap_or(default)
    };
    let std = |channel| of(&preprocess.std, channel, 1.0);
    let scale: Vec<f32> = (0..channels).map(|c| (high - low) / std(c)).collect();
    let shift: Vec<f32> =
        (0..channels).map(|c| (low - of(&preprocess.mean, c, 0.0)) / std(c)).collect();
    for (op, name, output, values, neutral) in [
        ("Mul", "images.scale", "images.scaled", scale, 1.0),
        ("Add", "images.shift", "images.shifted", shift, 0.0),
    ] {
        if values.iter().any(|v| *v != neutral) {
            constants.push((name, ConstantTensor::f32(vec![1, channels, 1, 1], values)));
            value = node(op, &[&value, name], output, &[]);
        }
    }
    if preprocess.layout == Layout::Nhwc {
        let perm = Attribute::Ints(vec![0, 2, 3, 1]);
        value = node("Transpose", &[&value], "images.channels_last", &[("perm", perm)]);
    }
    node("Identity", &[&value], target, &[]);
    let constants = constants.into_iter().map(|(name, value)| (name.to_owned(), Arc::new(value)));
    graph.constants.extend(constants);
    Ok(())
}
