//! The forms a meta-model leaves in, as graphs composed around one copy of its embedding.
//!
//! `episode_graph` is the whole few-shot learner in one file: it takes the labelled support images
//! and the query images and answers with logits, so that any ONNX runtime learns new classes without
//! a program around it; `adapting_graph` is the same for a head that adapts (ANIL), its steps unrolled.
//! The first holds ProtoNet's rule: class means of embeddings, negative squared Euclidean distance.
//! `classifier_graph` is an ordinary classifier: a linear head that has seen its classes.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{Attribute, ConstantTensor, DataType, Dimension, Graph, Node, Port};

/// Oldest operator set whose `OneHot`, `Slice` and `Where` the composed nodes are written in.
const OLDEST_OPSET: i64 = 11;

/// A few-shot learner as one graph.
///
/// `embedding` maps images `[batch, c, h, w]` to embeddings (a rank above 2 is flattened); its first
/// output named `embedding`, or else its first, is used. The result has the inputs `support_images`
/// `[n_support, c, h, w]`, `support_labels` `[n_support]` (int64, from 0) and `query_images`
/// `[n_query, c, h, w]`, and the output `logits` `[n_query, way]`, where way is the largest label
/// plus 1. A class without support images gets the logit -inf.
///
/// # Errors
/// When `embedding` is no float32 network of one input with a free batch size, or its operator set
/// is older than 11.
pub fn episode_graph(embedding: &Graph) -> Result<Graph> {
    let (mut graph, Support { support, query, one_hot, .. }) = labelled(embedding)?;
    let counts = graph.reduce_sum(&one_hot, 0, "shots");
    let by_class =
        graph.node("Transpose", &[&one_hot], "by_class", [("perm", Attribute::Ints(vec![1, 0]))]);
    let sums = graph.node("MatMul", &[&by_class, &support], "sums", []);
    let at_least = graph.constant("at_least_one", ConstantTensor::f32(vec![], vec![1.0]));
    let divisor = graph.node("Max", &[&counts, &at_least], "divisor", []);
    let column = graph.ints("column", &[-1, 1]);
    let divisor = graph.node("Reshape", &[&divisor, &column], "divisor_column", []);
    let prototypes = graph.node("Div", &[&sums, &divisor], "prototypes", []);

    let similarity = graph.similarity(&query, &prototypes, "similarity");
    let none = graph.constant("none", ConstantTensor::f32(vec![], vec![0.0]));
    let present = graph.node("Greater", &[&counts, &none], "present", []);
    let never = graph.constant("never", ConstantTensor::f32(vec![], vec![f32::NEG_INFINITY]));
    graph.node("Where", &[&present, &similarity, &never], "logits", []);
    Ok(graph.finish("logits", query_logits()))
}

/// A linear head before its first step.
#[derive(Debug)]
pub struct Head {
    /// The row `[1, d]` of every class.
    pub row: ConstantTensor,
    /// Its offset `[1]`.
    pub offset: ConstantTensor,
    /// Gradient steps on the support set.
    pub steps: usize,
    /// Their learning rate.
    pub learning_rate: f64,
}

/// As [`episode_graph`], for a linear head that takes gradient steps on the mean cross-entropy of the
/// support set (ANIL): the steps are unrolled. Ports are the same; no class is left out.
///
/// # Errors
/// As [`episode_graph`], and when the head does not fit the embedding's declared size.
pub fn adapting_graph(embedding: &Graph, head: Head) -> Result<Graph> {
    let &[1, size] = head.row.shape.as_slice() else {
        return Err(Error::internal(format!("a head of shape `{:?}`", head.row.shape)));
    };
    let (mut graph, Support { support, query, one_hot, way, size: declared }) =
        labelled(embedding)?;
    if declared.is_some_and(|declared| declared != size) {
        return Err(Error::internal(format!("a head of {size} for embeddings of `{declared:?}`")));
    }
    let axis = |axis| [("axis", Attribute::Int(axis))];
    let swap = || [("perm", Attribute::Ints(vec![1, 0]))];
    let minus_one = graph.ints("minus_one", &[-1]);
    let ways = graph.node("Reshape", &[&way, &minus_one], "ways", []);
    let length = graph.ints("dimension", &[size as i64]);
    let shape = graph.node("Concat", &[&ways, &length], "head_shape", axis(0));
    let row = graph.constant("head.weight", head.row);
    let offset = graph.constant("head.bias", head.offset);
    let mut weight = graph.node("Expand", &[&row, &shape], "weight.0", []);
    let mut bias = graph.node("Expand", &[&offset, &ways], "bias.0", []);
    // The cotangent of the logits, times the learning rate: (softmax - one-hot) rate / n.
    let to = ("to", Attribute::Int(1));
    let count = graph.node("Cast", &["n_support"], "support_count", [to]);
    let rate = ConstantTensor::f32(vec![], vec![head.learning_rate as f32]);
    let rate = graph.constant("learning_rate", rate);
    let rate = graph.node("Div", &[&rate, &count], "rate", []);
    let logits = |graph: &mut Composer, x: &str, weight: &str, bias: &str, output: &str| {
        let columns = graph.node("Transpose", &[weight], &format!("{output}.columns"), swap());
        let product = graph.node("MatMul", &[x, &columns], &format!("{output}.product"), []);
        graph.node("Add", &[&product, bias], output, [])
    };
    for step in 1..=head.steps {
        let name = |what: &str| format!("{what}.{step}");
        let own = logits(&mut graph, &support, &weight, &bias, &name("logits"));
        let share = graph.node("Softmax", &[&own], &name("softmax"), axis(-1));
        let error = graph.node("Sub", &[&share, &one_hot], &name("error"), []);
        let error = graph.node("Mul", &[&error, &rate], &name("step"), []);
        let rows = graph.node("Transpose", &[&error], &name("step.rows"), swap());
        let change = graph.node("MatMul", &[&rows, &support], &name("weight.step"), []);
        weight = graph.node("Sub", &[&weight, &change], &name("weight"), []);
        let change = graph.reduce_sum(&error, 0, &name("bias.step"));
        bias = graph.node("Sub", &[&bias, &change], &name("bias"), []);
    }
    logits(&mut graph, &query, &weight, &bias, "logits");
    Ok(graph.finish("logits", query_logits()))
}

fn query_logits() -> Vec<Dimension> {
    ["n_query", "way"].map(|name| Dimension::Symbol(name.into())).to_vec()
}

/// What an episode's inputs become: names of values.
struct Support {
    /// Embeddings of the support images `[n_support, d]`.
    support: String,
    /// Embeddings of the queries `[n_query, d]`.
    query: String,
    /// Labels, one hot: `[n_support, way]`.
    one_hot: String,
    /// The largest label plus 1, a scalar or `[1]`.
    way: String,
    /// Length of an embedding, if declared.
    size: Option<usize>,
}

/// A graph that embeds support and query images together and reads the labels.
fn labelled(embedding: &Graph) -> Result<(Composer, Support)> {
    let parts = Embedding::of(embedding)?;
    let images = |batch: &str| -> Option<Vec<Dimension>> {
        let sizes = parts.image.clone()?;
        Some(std::iter::once(Dimension::Symbol(batch.into())).chain(sizes).collect())
    };
    let symbol = |name: &str| Dimension::Symbol(name.into());
    let mut graph = Composer::new("episode", parts.graph);
    graph.input("support_images", DataType::Float32, images("n_support"));
    graph.input("support_labels", DataType::Int64, Some(vec![symbol("n_support")]));
    graph.input("query_images", DataType::Float32, images("n_query"));

    let axis = |axis| ("axis", Attribute::Int(axis));
    graph.first("Concat", &["support_images", "query_images"], &parts.input, [axis(0)]);
    let rows = graph.node("Flatten", &[&parts.output], "embeddings", [axis(1)]);
    let n_support = graph.node("Shape", &["support_labels"], "n_support", []);
    let start = graph.ints("zero", &[0]);
    let end = graph.ints("last", &[i64::MAX]);
    let support = graph.node("Slice", &[&rows, &start, &n_support, &start], "support", []);
    let query = graph.node("Slice", &[&rows, &n_support, &end, &start], "query", []);

    let keep = |dims| ("keepdims", Attribute::Int(dims));
    let largest = graph.node("ReduceMax", &["support_labels"], "largest_label", [keep(0)]);
    let one = graph.constant("one", ConstantTensor::i64(vec![], vec![1]));
    let way = graph.node("Add", &[&largest, &one], "way", []);
    let off_on = graph.constant("off_on", ConstantTensor::f32(vec![2], vec![0.0, 1.0]));
    let one_hot = graph.node("OneHot", &["support_labels", &way, &off_on], "one_hot", [axis(-1)]);
    let size = parts.size;
    Ok((graph, Support { support, query, one_hot, way, size }))
}

/// A classifier with a fixed linear head of `weight` `[way, d]` and `bias` `[way]`: input `images` `[batch, c, h, w]`,
/// output `logits` `[batch, way]`.
///
/// # Errors
/// As [`episode_graph`], and when the head is no matrix and vector of float32, or does not fit the embedding's
/// declared size.
pub fn classifier_graph(
    embedding: &Graph,
    weight: ConstantTensor,
    bias: ConstantTensor,
) -> Result<Graph> {
    let parts = Embedding::of(embedding)?;
    let fits = weight.dtype == DataType::Float32 && bias.dtype == DataType::Float32;
    let (&[way, size], &[biases]) = (weight.shape.as_slice(), bias.shape.as_slice()) else {
        return Err(Error::internal(format!(
            "a head of shapes {:?} and `{:?}`",
            weight.shape, bias.shape
        )));
    };
    if !fits || biases != way || parts.size.is_some_and(|expected| expected != size) {
        return Err(Error::internal(format!(
            "a head of {:?} and {biases} values does not fit an embedding of size `{:?}`",
            weight.shape, parts.size
        )));
    }
    let batch = Dimension::Symbol("batch".into());
    let shape = parts.image.map(|sizes| std::iter::once(batch.clone()).chain(sizes).collect());
    let mut graph = Composer::new("classifier", parts.graph);
    graph.input("images", DataType::Float32, shape);
    graph.first("Identity", &["images"], &parts.input, []);
    let rows = graph.node("Flatten", &[&parts.output], "embeddings", [("axis", Attribute::Int(1))]);
    let weight = graph.constant("head.weight", weight);
    let bias = graph.constant("head.bias", bias);
    graph.node("Gemm", &[&rows, &weight, &bias], "logits", [("transB", Attribute::Int(1))]);
    Ok(graph.finish("logits", vec![batch, Dimension::Fixed(way)]))
}

/// The same graph with `prefix` before the name of every value and node, sub-graphs included, so
/// that it can stand beside other nodes in one graph.
#[must_use]
pub fn prefix_values(graph: &Graph, prefix: &str) -> Graph {
    let value = |name: &String| -> String {
        if name.is_empty() { String::new() } else { format!("{prefix}{name}") }
    };
    let ports = |ports: &[Port]| -> Vec<Port> {
        ports.iter().map(|port| Port { name: value(&port.name), ..port.clone() }).collect()
    };
    let attribute = |attribute: &Attribute| match attribute {
        // Values taken from the outer graph get the same prefix there.
        Attribute::Graph(inner) => Attribute::Graph(Arc::new(prefix_values(inner, prefix))),
        other => other.clone(),
    };
    let node = |node: &Node| Node {
        name: format!("{prefix}{}", node.name),
        inputs: node.inputs.iter().map(value).collect(),
        outputs: node.outputs.iter().map(value).collect(),
        attributes: node.attributes.iter().map(|(name, a)| (name.clone(), attribute(a))).collect(),
        ..node.clone()
    };
    Graph {
        name: graph.name.clone(),
        opset: graph.opset,
        inputs: ports(&graph.inputs),
        outputs: ports(&graph.outputs),
        nodes: graph.nodes.iter().map(node).collect(),
        constants: graph.constants.iter().map(|(name, c)| (value(name), Arc::clone(c))).collect(),
    }
}

/// An embedding network made ready to be composed.
struct Embedding {
    graph: Graph,
    input: String,
    output: String,
    /// Dimensions of an image, if declared.
    image: Option<Vec<Dimension>>,
    /// Length of an embedding, if declared.
    size: Option<usize>,
}

impl Embedding {
    fn of(graph: &Graph) -> Result<Self> {
        if graph.opset < OLDEST_OPSET {
            return Err(Error::unsupported(format!(
                "export needs operator set {OLDEST_OPSET} or newer, the backbone has `{}`",
                graph.opset
            ))
            .hint("convert the backbone (`onnx.version_converter`) or export `--form embedding`"));
        }
        let [input] = graph.inputs.as_slice() else {
            return Err(Error::unsupported(format!(
                "an embedding has one input, found `{}`",
                graph.inputs.len()
            ))
            .hint("use a backbone with images as its only input"));
        };
        let named = graph.outputs.iter().find(|port| port.name == "embedding");
        let Some(output) = named.or(graph.outputs.first()) else {
            return Err(Error::unsupported("an embedding needs an output"));
        };
        for port in [input, output] {
            if port.dtype != DataType::Float32 {
                return Err(Error::unsupported(format!(
                    "`{}` must be float32, found `{:?}`",
                    port.name, port.dtype
                ))
                .hint("use a backbone that takes and gives float32"));
            }
        }
        let image = match &input.shape {
            Some(shape)
                if matches!(shape.first(), Some(Dimension::Fixed(_))) || shape.len() != 4 =>
            {
                return Err(Error::unsupported(format!(
                    "`{}` must have 4 dimensions with a free batch size, found `{shape:?}`",
                    input.name
                ))
                .hint("export the backbone with a dynamic batch dimension"));
            }
            shape => shape.as_ref().map(|shape| shape.iter().skip(1).cloned().collect()),
        };
        let sizes = output.shape.as_deref().and_then(|shape| shape.get(1..)).unwrap_or_default();
        let size = sizes.iter().try_fold(1_usize, |size, dimension| match dimension {
            Dimension::Fixed(n) => size.checked_mul(*n),
            Dimension::Symbol(_) => None,
        });
        let size = size.filter(|_| !sizes.is_empty());
        let prefix = "backbone/";
        Ok(Self {
            input: format!("{prefix}{}", input.name),
            output: format!("{prefix}{}", output.name),
            graph: prefix_values(graph, prefix),
            image,
            size,
        })
    }
}

/// A graph that grows around the embedding's nodes; a node is named like its output.
struct Composer {
    graph: Graph,
    before: Vec<Node>,
}

impl Composer {
    fn new(name: &str, embedding: Graph) -> Self {
        let graph =
            Graph { name: name.into(), inputs: Vec::new(), outputs: Vec::new(), ..embedding };
        Self { graph, before: Vec::new() }
    }

    fn input(&mut self, name: &str, dtype: DataType, shape: Option<Vec<Dimension>>) {
        self.graph.inputs.push(Port { name: name.into(), dtype, shape });
    }

    fn constant(&mut self, name: &str, value: ConstantTensor) -> String {
        self.graph.constants.insert(name.into(), Arc::new(value));
        name.into()
    }

    fn ints(&mut self, name: &str, values: &[i64]) -> String {
        self.constant(name, ConstantTensor::i64(vec![values.len()], values.to_vec()))
    }

    /// A node before the embedding, which makes its input.
    fn first<const N: usize>(
        &mut self,
        op: &str,
        inputs: &[&str],
        output: &str,
        attributes: [(&str, Attribute); N],
    ) {
        self.before.push(node(op, inputs, output, attributes));
    }

    /// A node after the embedding; returns its output.
    fn node<const N: usize>(
        &mut self,
        op: &str,
        inputs: &[&str],
        output: &str,
        attributes: [(&str, Attribute); N],
    ) -> String {
        self.graph.nodes.push(node(op, inputs, output, attributes));
        output.into()
    }

    /// The sum over one axis, which is dropped; the axis is an attribute before operator set 13.
    fn reduce_sum(&mut self, input: &str, axis: i64, output: &str) -> String {
        let drop = ("keepdims", Attribute::Int(0));
        if self.graph.opset < 13 {
            return self.node(
                "ReduceSum",
                &[input],
                output,
                [drop, ("axes", Attribute::Ints(vec![axis]))],
            );
        }
        let axes = self.ints(&format!("{output}_axis"), &[axis]);
        self.node("ReduceSum", &[input, &axes], output, [drop])
    }

    /// Negative squared Euclidean distances `[n, way]` of `queries` `[n, d]` to `prototypes`
    /// `[way, d]`, from differences: the expanded square loses digits when a distance is small.
    fn similarity(&mut self, queries: &str, prototypes: &str, output: &str) -> String {
        let rows = self.ints("rows", &[0, 1, -1]);
        let queries = self.node("Reshape", &[queries, &rows], "query_rows", []);
        let difference = self.node("Sub", &[&queries, prototypes], "difference", []);
        let square = self.node("Mul", &[&difference, &difference], "square", []);
        let distance = self.reduce_sum(&square, 2, "distance");
        self.node("Neg", &[&distance], output, [])
    }

    fn finish(mut self, output: &str, shape: Vec<Dimension>) -> Graph {
        self.before.append(&mut self.graph.nodes);
        self.graph.nodes = self.before;
        self.graph.outputs =
            vec![Port { name: output.into(), dtype: DataType::Float32, shape: Some(shape) }];
        self.graph
    }
}

fn node<const N: usize>(
    op: &str,
    inputs: &[&str],
    output: &str,
    attributes: [(&str, Attribute); N],
) -> Node {
    let node = Node::new(op, output, inputs, &[output]);
    attributes.into_iter().fold(node, |node, (name, value)| node.with(name, value))
}
