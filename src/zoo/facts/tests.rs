//! Facts of graphs built here, each for one way exporters write things.

use std::sync::Arc;

use super::input::{Normalised, input_facts};
use super::norm::norm_facts;
use super::output::{Certainty, output_facts};
use super::*;
use crate::graph::{Attribute, ConstantTensor, DataType, Dimension, Graph, Node, Port};
use crate::zoo::spec::{BatchDimension, Color, ElementType, Layout, OutputKind};

fn port(name: &str, dtype: DataType, shape: &[i64]) -> Port {
    let shape = shape.iter().map(|&n| match usize::try_from(n) {
        Ok(n) => Dimension::Fixed(n),
        Err(_) => Dimension::Symbol("n".into()),
    });
    Port { name: name.into(), dtype, shape: Some(shape.collect()) }
}

fn floats(shape: &[usize], value: f32) -> Arc<ConstantTensor> {
    Arc::new(ConstantTensor::f32(shape.to_vec(), vec![value; shape.iter().product()]))
}

/// Image -> conv (3 to 8 channels) -> relu -> pool -> flatten -> dense to 5.
fn classifier(first: Vec<Node>, image: Port) -> Graph {
    let before = first.last().map_or(image.name.clone(), |node| node.outputs[0].clone());
    let mut nodes = first;
    nodes.extend([
        Node::new("Conv", "conv", &[&before, "w", "b"], &["c"]),
        Node::new("Relu", "relu", &["c"], &["r"]),
        Node::new("GlobalAveragePool", "pool", &["r"], &["p"]),
        Node::new("Flatten", "flat", &["p"], &["embedding"]),
        Node::new("Gemm", "head", &["embedding", "hw", "hb"], &["logits"])
            .with("transB", Attribute::Int(1)),
    ]);
    let constants = [
        ("w", floats(&[8, 3, 3, 3], 0.1)),
        ("b", floats(&[8], 0.1)),
        ("hw", floats(&[5, 8], 0.1)),
        ("hb", floats(&[5], 0.0)),
        ("255", floats(&[], 255.0)),
        ("mean", floats(&[1, 3, 1, 1], 0.5)),
        ("std", floats(&[1, 3, 1, 1], 0.25)),
    ];
    Graph {
        name: "g".into(),
        opset: 17,
        inputs: vec![image],
        outputs: vec![port("logits", DataType::Float32, &[-1, 5])],
        nodes,
        constants: constants.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
    }
}

fn image() -> Port {
    port("x", DataType::Float32, &[-1, 3, 32, 32])
}

fn input_of(graph: &Graph) -> InputFacts {
    input_facts(&GraphIndex::new(graph), None).unwrap()
}

#[test]
fn a_plain_classifier() {
    let graph = classifier(vec![], image());
    let facts = input_of(&graph);
    assert_eq!((facts.layout, facts.channels), (Some(Layout::Nchw), Some(3)));
    assert_eq!(
        (facts.height, facts.width, facts.batch),
        (Some(32), Some(32), BatchDimension::Free)
    );
    assert_eq!((facts.value_range, facts.color), (None, None));
    let facts = output_facts(&GraphIndex::new(&graph), None, None).unwrap();
    assert_eq!((facts.name.as_str(), facts.classes), ("logits", 5));
    assert_eq!((facts.kind, facts.certainty), (OutputKind::Logits, Certainty::Proven));
}

#[test]
fn the_first_convolution_settles_the_layout_even_when_the_shape_is_open() {
    let transpose =
        Node::new("Transpose", "t", &["x"], &["t"]).with("perm", Attribute::Ints(vec![0, 3, 1, 2]));
    let open = port("x", DataType::Float32, &[-1, -1, -1, -1]);
    let facts = input_of(&classifier(vec![transpose.clone()], open));
    assert_eq!((facts.layout, facts.channels, facts.height), (Some(Layout::Nhwc), Some(3), None));
    // 3 rows of 3 channels: the shape alone says nothing.
    let square = port("x", DataType::Float32, &[1, 3, 3, 3]);
    assert_eq!(input_of(&classifier(vec![transpose], square)).layout, Some(Layout::Nhwc));
}

#[test]
fn arithmetic_before_the_network_tells_the_value_range() {
    let div = |from: &str| Node::new("Div", "d", &[from, "255"], &["d"]);
    let normalise = || {
        vec![
            Node::new("Sub", "s", &["d", "mean"], &["s"]),
            Node::new("Div", "v", &["s", "std"], &["v"]),
        ]
    };
    let mut nodes = vec![div("x")];
    nodes.extend(normalise());
    let facts = input_of(&classifier(nodes, image()));
    assert_eq!(facts.value_range, Some([0.0, 255.0]));
    assert_eq!(facts.normalised_inside, Normalised::Inside);

    let mut nodes = vec![Node::new("Identity", "i", &["x"], &["d"])];
    nodes.extend(normalise());
    assert_eq!(input_of(&classifier(nodes, image())).value_range, Some([0.0, 1.0]));

    // Caffe: only a mean of bytes is subtracted.
    let subtract = Node::new("Sub", "s", &["x", "255"], &["s"]);
    assert_eq!(input_of(&classifier(vec![subtract], image())).value_range, Some([0.0, 255.0]));

    let bytes = port("x", DataType::Uint8, &[-1, 3, 32, 32]);
    let cast = Node::new("Cast", "c", &["x"], &["k"]).with("to", Attribute::Int(1));
    let facts = input_of(&classifier(vec![cast, div("k")], bytes));
    assert_eq!((facts.dtype, facts.value_range), (ElementType::Uint8, Some([0.0, 255.0])));
}

#[test]
fn a_reversal_of_channels_means_bgr_and_one_of_columns_does_not() {
    let reverse = |axis: i64| {
        let gather =
            Node::new("Gather", "g", &["x", "order"], &["g"]).with("axis", Attribute::Int(axis));
        let mut graph = classifier(vec![gather], image());
        graph.constants.insert("order".into(), Arc::new(ConstantTensor::i64([3], vec![2, 1, 0])));
        graph
    };
    assert_eq!(input_of(&reverse(1)).color, Some(Color::Bgr));
    assert_eq!(input_of(&reverse(-3)).color, Some(Color::Bgr));
    assert_eq!(input_of(&reverse(3)).color, None);
}

#[test]
fn inputs_that_are_no_images_are_refused() {
    let refuse = |image: Port, expected: &str| {
        let graph = classifier(vec![], image);
        let error = input_facts(&GraphIndex::new(&graph), None).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.exit_code(), 1);
    };
    refuse(port("x", DataType::Float32, &[-1, 4]), "must have 4 axes");
    refuse(port("x", DataType::Int64, &[-1, 3, 32, 32]), "found `Int64`");
    refuse(port("x", DataType::Float32, &[-1, 2, 32, 32]), "1 or 3 channels, found `2`");
    refuse(port("x", DataType::Float32, &[1 << 40, 3, 32, 32]), "batch goes from 1");
    refuse(port("x", DataType::Float32, &[1, 3, 1 << 40, 32]), "image sides go from 1");
    let mut two = classifier(vec![], image());
    two.inputs.push(port("mask", DataType::Float32, &[-1, 1]));
    let error = input_facts(&GraphIndex::new(&two), None).unwrap_err();
    assert!(error.to_string().contains("found `x, mask`"), "{error}");
}

fn with_tail(nodes: Vec<Node>, outputs: Vec<Port>) -> Graph {
    let mut graph = classifier(vec![], image());
    graph.nodes.extend(nodes);
    graph.outputs = outputs;
    graph
}

fn output_of(graph: &Graph) -> OutputFacts {
    output_facts(&GraphIndex::new(graph), None, None).unwrap()
}

#[test]
fn the_last_operators_tell_what_the_scores_are() {
    let kind = |nodes: Vec<Node>| {
        let name = nodes.last().unwrap().outputs[0].clone();
        output_of(&with_tail(nodes, vec![port(&name, DataType::Float32, &[-1, 5])])).kind
    };
    let softmax = || Node::new("Softmax", "s", &["logits"], &["p"]);
    assert_eq!(kind(vec![softmax()]), OutputKind::Probabilities);
    assert_eq!(
        kind(vec![softmax(), Node::new("Identity", "i", &["p"], &["q"])]),
        OutputKind::Probabilities
    );
    assert_eq!(
        kind(vec![softmax(), Node::new("Log", "l", &["p"], &["q"])]),
        OutputKind::LogProbabilities
    );
    assert_eq!(
        kind(vec![Node::new("LogSoftmax", "l", &["logits"], &["q"])]),
        OutputKind::LogProbabilities
    );
    assert_eq!(
        kind(vec![
            Node::new("Exp", "e", &["logits"], &["e"]),
            Node::new("ReduceSum", "t", &["e"], &["t"]),
            Node::new("Div", "d", &["e", "t"], &["q"]),
        ]),
        OutputKind::Probabilities
    );
}

#[test]
fn labels_are_told_from_scores() {
    let graph = with_tail(
        vec![Node::new("ArgMax", "a", &["logits"], &["label"])],
        vec![port("label", DataType::Int64, &[-1])],
    );
    let facts = output_of(&graph);
    assert_eq!((facts.kind, facts.classes), (OutputKind::Labels, 5));
    assert_eq!(facts.scores_behind, Some(("logits".into(), OutputKind::Logits)));
    // Beside scores, labels are left alone.
    let graph = with_tail(
        vec![
            Node::new("ArgMax", "a", &["logits"], &["label"]),
            Node::new("Softmax", "s", &["logits"], &["probs"]),
        ],
        vec![port("label", DataType::Int64, &[-1]), port("probs", DataType::Float32, &[-1, 5])],
    );
    assert_eq!(output_of(&graph).name, "probs");
}

#[test]
fn embeddings_and_rescaled_logits_are_not_chosen() {
    let embedding = port("embedding", DataType::Float32, &[-1, 8]);
    let logits = port("logits", DataType::Float32, &[-1, 5]);
    let probs = port("probs", DataType::Float32, &[-1, 5]);
    let softmax = Node::new("Softmax", "s", &["logits"], &["probs"]);
    let graph = with_tail(vec![], vec![embedding.clone(), logits.clone()]);
    assert_eq!(output_of(&graph).name, "logits");
    let graph = with_tail(vec![softmax], vec![probs, embedding, logits]);
    let facts = output_of(&graph);
    assert_eq!((facts.name.as_str(), facts.kind), ("logits", OutputKind::Logits));
    assert_eq!(facts.alternatives, Vec::<String>::new());
}

#[test]
fn two_heads_are_chosen_between_by_label_count_or_refused() {
    let mut graph = with_tail(
        vec![Node::new("Gemm", "other", &["embedding", "ow"], &["style"])],
        vec![
            port("style", DataType::Float32, &[-1, 7]),
            port("scores", DataType::Float32, &[-1, 5]),
        ],
    );
    graph.nodes.push(Node::new("Identity", "i", &["logits"], &["scores"]));
    graph.constants.insert("ow".into(), floats(&[8, 7], 0.1));
    let index = GraphIndex::new(&graph);
    let error = output_facts(&index, None, None).unwrap_err();
    assert!(error.to_string().contains("`style (7), scores (5)`"), "{error}");
    assert!(error.hint_text().unwrap().contains("logits_output"));
    assert_eq!(output_facts(&index, None, Some(5)).unwrap().name, "scores");
    assert_eq!(output_facts(&index, Some("style"), None).unwrap().classes, 7);
    let error = output_facts(&index, Some("score"), None).unwrap_err();
    assert_eq!(error.hint_text(), Some("did you mean `scores`?"));
}

#[test]
fn undeclared_shapes_take_the_class_count_from_the_head() {
    for (rank, expected) in [(None, 5), (Some(vec![-1, -1]), 5)] {
        let mut output = port("logits", DataType::Float32, rank.as_deref().unwrap_or(&[]));
        if rank.is_none() {
            output.shape = None;
        }
        assert_eq!(output_of(&with_tail(vec![], vec![output])).classes, expected);
    }
    let graph = with_tail(vec![], vec![port("logits", DataType::Float32, &[-1, 5, 1, 1])]);
    assert_eq!(output_of(&graph).classes, 5);
}

#[test]
fn outputs_without_class_scores_are_refused_with_their_shapes() {
    let graph = with_tail(vec![], vec![port("mask", DataType::Float32, &[-1, 5, 32, 32])]);
    let error = output_facts(&GraphIndex::new(&graph), None, None).unwrap_err();
    assert!(error.to_string().contains("`mask` has shape [n, 5, 32, 32]"), "{error}");
    let graph = with_tail(vec![], vec![port("logits", DataType::Float32, &[-1, 1])]);
    let error = output_facts(&GraphIndex::new(&graph), None, None).unwrap_err();
    assert!(error.to_string().contains("has `1` class"), "{error}");
}

fn batch_norm(statistics: [&str; 4]) -> Graph {
    let [scale, bias, mean, var] = statistics;
    let mut graph = classifier(vec![], image());
    graph.nodes[1].inputs = vec!["n".into()];
    let node = Node::new("BatchNormalization", "bn", &["c", scale, bias, mean, var], &["n"]);
    graph.nodes.insert(1, node);
    graph.constants.insert("s".into(), floats(&[8], 1.0));
    graph
}

#[test]
fn running_statistics_are_found_behind_identity_and_cast_and_in_training_mode() {
    let mut graph = batch_norm(["s", "s", "m", "v"]);
    graph.nodes.insert(0, Node::new("Identity", "i", &["s"], &["m"]));
    graph.nodes.insert(1, Node::new("Cast", "k", &["m"], &["v"]));
    let node = graph.nodes.iter_mut().find(|n| n.name == "bn").unwrap();
    node.attributes.insert("training_mode".into(), Attribute::Int(1));
    let facts = norm_facts(&GraphIndex::new(&graph));
    assert_eq!((facts.taps, facts.in_training_mode, facts.maybe_folded), (1, 1, 0));
    assert!(facts.note().unwrap().contains("training mode"));
    let facts = norm_facts(&GraphIndex::new(&batch_norm(["s", "s", "c", "c"])));
    assert_eq!((facts.taps, facts.without_statistics), (0, 1));
}

#[test]
fn a_folded_network_is_told_with_the_call_that_keeps_the_statistics() {
    let facts = norm_facts(&GraphIndex::new(&classifier(vec![], image())));
    assert_eq!((facts.taps, facts.maybe_folded, facts.convolutions), (0, 1, 1));
    let note = facts.note().unwrap();
    assert!(note.contains("optimize=False") && note.contains("TrainingMode.PRESERVE"), "{note}");
    let mut layer_norm = classifier(vec![], image());
    layer_norm.nodes.push(Node::new("LayerNormalization", "ln", &["embedding", "s"], &["l"]));
    assert_eq!(norm_facts(&GraphIndex::new(&layer_norm)).note(), None);
}
