//! Sound but awkward models are read as they are meant; unsound ones are refused by name.

use candle_onnx::onnx::{AttributeProto, SparseTensorProto, StringStringEntryProto};
use metazoa::ErrorKind;
use metazoa::graph::{Attribute, ConstantData, DataType, Dimension};

use super::*;
use crate::support::shared;

#[test]
fn every_element_type_is_read_from_raw_and_from_typed_fields() {
    use Element as E;
    // Type, little-endian bytes of one element, the typed field, the value, whether it is a float.
    type Case = (E, Vec<u8>, fn(&mut TensorProto), f64, DataType);
    let cases: [Case; 13] = [
        (E::Float, vec![0, 0, 0xc0, 0x3f], |t| t.float_data = vec![1.5], 1.5, DataType::Float32),
        (
            E::Double,
            1e-3_f64.to_le_bytes().into(),
            |t| t.double_data = vec![1e-3],
            1e-3,
            DataType::Float64,
        ),
        (E::Float16, vec![0x00, 0x3e], |t| t.int32_data = vec![0x3e00], 1.5, DataType::Float16),
        (E::Bfloat16, vec![0x20, 0xc0], |t| t.int32_data = vec![0xc020], -2.5, DataType::BFloat16),
        (E::Int8, vec![0xfd], |t| t.int32_data = vec![-3], -3.0, DataType::Int8),
        (E::Int16, vec![0xd4, 0xfe], |t| t.int32_data = vec![-300], -300.0, DataType::Int16),
        (
            E::Int32,
            (-70_000_i32).to_le_bytes().into(),
            |t| t.int32_data = vec![-70_000],
            -70_000.0,
            DataType::Int32,
        ),
        (
            E::Int64,
            (1_i64 << 33).to_le_bytes().into(),
            |t| t.int64_data = vec![1 << 33],
            8_589_934_592.0,
            DataType::Int64,
        ),
        (E::Uint8, vec![200], |t| t.int32_data = vec![200], 200.0, DataType::Uint8),
        (E::Uint16, vec![0x60, 0xea], |t| t.int32_data = vec![60_000], 60_000.0, DataType::Uint16),
        (
            E::Uint32,
            4_000_000_000_u32.to_le_bytes().into(),
            |t| t.uint64_data = vec![4_000_000_000],
            4e9,
            DataType::Uint32,
        ),
        (
            E::Uint64,
            (1_u64 << 40).to_le_bytes().into(),
            |t| t.uint64_data = vec![1 << 40],
            1_099_511_627_776.0,
            DataType::Uint64,
        ),
        (E::Bool, vec![1], |t| t.int32_data = vec![1], 1.0, DataType::Bool),
    ];
    for (element, raw, set_field, expected, dtype) in cases {
        let base = TensorProto {
            name: "k".into(),
            dims: vec![1],
            data_type: element as i32,
            ..Default::default()
        };
        let mut in_field = base.clone();
        set_field(&mut in_field);
        for tensor in [TensorProto { raw_data: raw, ..base }, in_field] {
            let mut graph = graph(vec![node("Relu", &["x"], &["y"])]);
            graph.initializer.push(tensor);
            let read = read(&model(graph)).unwrap();
            let constant = &read.graph.constants["k"];
            assert_eq!((constant.dtype, constant.to_f64()), (dtype, vec![expected]), "{element:?}");
        }
    }
}

#[test]
fn values_outside_their_type_and_types_we_do_not_hold_are_refused() {
    let tensor = |element: i32, values: Vec<i32>| TensorProto {
        name: "k".into(),
        dims: vec![values.len() as i64],
        data_type: element,
        int32_data: values,
        ..Default::default()
    };
    let with_constant = |tensor| {
        let mut graph = graph(vec![node("Relu", &["x"], &["y"])]);
        graph.initializer.push(tensor);
        model(graph)
    };
    let refused_constant = |tensor, parts: &[&str]| refused(&with_constant(tensor), parts);
    refused_constant(
        tensor(Element::Int8 as i32, vec![128]),
        &["initialiser `k`", "int32_data", "`128`"],
    );
    refused_constant(tensor(Element::Bool as i32, vec![2]), &["`2`"]);
    refused_constant(tensor(Element::Float16 as i32, vec![-1]), &["`-1`"]);
    refused_constant(tensor(Element::Float as i32, vec![1]), &["`float_data`", "`int32_data`"]);
    refused_constant(tensor(Element::Complex64 as i32, vec![]), &["`COMPLEX64`"]);
    refused_constant(tensor(Element::Float8e5m2 as i32, vec![]), &["`FLOAT8E5M2`", "float32"]);
    refused_constant(tensor(22, vec![]), &["element type number `22`"]);
    refused_constant(tensor(77, vec![]), &["`77` does not exist"]);
    let both = TensorProto { raw_data: vec![1], ..tensor(Element::Int8 as i32, vec![1]) };
    refused_constant(both, &["both `raw_data` and `int32_data`"]);
    let int4 = with_constant(tensor(22, vec![]));
    assert_eq!(read(&int4).unwrap_err().kind(), ErrorKind::Unsupported);
    let large = TensorProto {
        name: "k".into(),
        data_type: Element::Uint64 as i32,
        raw_data: u64::MAX.to_le_bytes().into(),
        ..Default::default()
    };
    refused_constant(large, &["uint64"]);
}

#[test]
fn constants_in_all_forms_become_constants_of_the_graph() {
    let attribute = |name: &str, kind: AttributeType| AttributeProto {
        name: name.into(),
        r#type: kind as i32,
        ..Default::default()
    };
    let constant = |attribute, output: &str| with(node("Constant", &[], &[output]), attribute);
    let read = read(&model(graph(vec![
        constant(tensor_attribute(floats("", &[1, 2], &[1.0, 2.0])), "a"),
        constant(AttributeProto { f: 3.0, ..attribute("value_float", AttributeType::Float) }, "b"),
        constant(
            AttributeProto {
                floats: vec![4.0],
                ..attribute("value_floats", AttributeType::Floats)
            },
            "c",
        ),
        constant(AttributeProto { i: 5, ..attribute("value_int", AttributeType::Int) }, "d"),
        constant(
            AttributeProto { ints: vec![6, 7], ..attribute("value_ints", AttributeType::Ints) },
            "e",
        ),
        node("Relu", &["x"], &["y"]),
    ])))
    .unwrap();
    let found = |name: &str| {
        let constant = &read.graph.constants[name];
        (constant.shape.clone(), constant.data.clone())
    };
    assert_eq!(found("a"), (vec![1, 2], ConstantData::F32(vec![1.0, 2.0])));
    assert_eq!(found("b"), (vec![], ConstantData::F32(vec![3.0])));
    assert_eq!(found("c"), (vec![1], ConstantData::F32(vec![4.0])));
    assert_eq!(found("d"), (vec![], ConstantData::I64(vec![5])));
    assert_eq!(found("e"), (vec![2], ConstantData::I64(vec![6, 7])));
    assert_eq!(read.graph.nodes.len(), 1);

    let sparse = AttributeProto {
        sparse_tensor: Some(SparseTensorProto::default()),
        ..attribute("sparse_value", AttributeType::SparseTensor)
    };
    let mut named = constant(sparse, "s");
    named.name = "the_sparse_one".into();
    refused(
        &model(graph(vec![named, node("Relu", &["x"], &["y"])])),
        &["the_sparse_one", "sparse"],
    );
}

#[test]
fn text_constants_are_refused_only_where_a_node_reads_them() {
    let text = TensorProto {
        name: "labels".into(),
        dims: vec![1],
        data_type: Element::String as i32,
        string_data: vec![b"cat".to_vec()],
        ..Default::default()
    };
    let mut unused = graph(vec![node("Relu", &["x"], &["y"])]);
    unused.initializer.push(text);
    let mut used = unused.clone();
    assert!(read(&model(unused)).unwrap().graph.constants.is_empty());
    used.node = vec![node("Add", &["x", "labels"], &["y"])];
    refused(&model(used), &["node `Add_0` (Add)", "string tensor", "`labels`"]);
}

#[test]
fn identity_of_a_constant_is_a_second_name_for_it() {
    let mut shared = graph(vec![
        node("Identity", &["w"], &["w1"]),
        node("Identity", &["w1"], &["w2"]),
        node("Add", &["x", "w2"], &["h"]),
        node("Identity", &["h"], &["y"]),
    ]);
    shared.initializer.push(floats("w", &[4], &[1.0, 2.0, 3.0, 4.0]));
    let graph = read(&model(shared)).unwrap().graph;
    assert_eq!(listing(&graph), ["Add(x, w2) -> h", "Identity(h) -> y"]);
    assert!(std::sync::Arc::ptr_eq(&graph.constants["w"], &graph.constants["w2"]));
}

#[test]
fn initialisers_listed_as_inputs_are_no_inputs() {
    let mut old = graph(vec![node("Add", &["x", "w"], &["y"])]);
    old.input.push(value("w", &[4]));
    old.initializer.push(floats("w", &[4], &[1.0; 4]));
    let read = read(&ModelProto { ir_version: 3, ..model(old) }).unwrap();
    assert_eq!(read.graph.inputs.iter().map(|port| port.name.as_str()).collect::<Vec<_>>(), ["x"]);
    assert_eq!(read.ir_version, 3);
}

#[test]
fn nodes_get_names_and_an_order_that_keeps_the_files_where_it_can() {
    let named = NodeProto { name: "Relu_1".into(), ..node("Relu", &["a"], &["b"]) };
    let graph = read(&model(graph(vec![
        node("Add", &["b", "c"], &["y"]),
        node("Relu", &["x"], &["c"]),
        named,
        node("Neg", &["x"], &["a"]),
    ])))
    .unwrap()
    .graph;
    assert_eq!(listing(&graph), ["Relu(x) -> c", "Neg(x) -> a", "Relu(a) -> b", "Add(b, c) -> y"]);
    let names: Vec<_> = graph.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["Relu_1_", "Neg_3", "Relu_1", "Add_0"]);
}

#[test]
fn a_sub_graph_waits_for_the_outer_values_it_reads() {
    let branch = |op: &str| GraphProto {
        name: op.into(),
        node: vec![node(op, &["late", "two"], &["o"])],
        output: vec![value("o", &[-1, 4])],
        ..Default::default()
    };
    let mut choice =
        with(node("If", &["c"], &["y"]), graph_attribute("then_branch", branch("Mul")));
    choice = with(choice, graph_attribute("else_branch", branch("Add")));
    let mut outer = graph(vec![choice, node("Relu", &["x"], &["late"])]);
    outer.input.push(typed("c", Element::Bool, &[]));
    let dangling = model(outer.clone());
    outer.initializer.push(floats("two", &[], &[2.0]));
    let graph = read(&model(outer)).unwrap().graph;
    assert_eq!(listing(&graph), ["Relu(x) -> late", "If(c) -> y"]);
    let Attribute::Graph(inner) = &graph.nodes[1].attributes["then_branch"] else { panic!() };
    assert_eq!(listing(inner), ["Mul(late, two) -> o"]);
    refused(&dangling, &["(Mul)", "`two`"]);
}

#[test]
fn local_functions_are_inlined_with_arguments_and_defaults() {
    let leaky = with(node("LeakyRelu", &["a"], &["t"]), reference("alpha", "slope"));
    let act = function(
        "Act",
        &["a", "bound"],
        &["b", "same"],
        vec![leaky, node("Clip", &["t", "bound"], &["b"]), node("Identity", &["a"], &["same"])],
    );
    let mut act = act;
    act.attribute_proto.push(float_attribute("slope", 0.25));
    let twice = function(
        "Twice",
        &["p"],
        &["q"],
        vec![
            with(call("Act", &["p"], &["m", ""]), float_attribute("slope", 0.5)),
            call("Act", &["m", "p"], &["q"]),
        ],
    );
    let mut file = model(graph(vec![call("Twice", &["x"], &["h"]), call("Twice", &["h"], &["y"])]));
    file.functions = vec![act, twice];
    let graph = read(&file).unwrap().graph;
    assert_eq!(
        listing(&graph)[..3],
        [
            "LeakyRelu(x) -> Twice_0/Act_0/t",
            "Clip(Twice_0/Act_0/t, ) -> Twice_0/m",
            "Identity(x) -> Twice_0/Act_0/same",
        ]
    );
    assert_eq!(listing(&graph)[4], "Clip(Twice_0/Act_1/t, x) -> h");
    assert_eq!(graph.nodes.len(), 12);
    assert_eq!(graph.outputs[0].name, "y");
    let slopes: Vec<f32> = graph
        .nodes
        .iter()
        .filter(|node| node.op_type == "LeakyRelu")
        .map(|node| node.float("alpha", 0.0).unwrap())
        .collect();
    assert_eq!(slopes, [0.5, 0.25, 0.5, 0.25]);
}

#[test]
fn a_function_that_returns_its_input_still_makes_its_output() {
    let mut file = model(graph(vec![call("Same", &["x"], &["y"])]));
    file.functions = vec![function("Same", &["a"], &["a"], vec![])];
    assert_eq!(listing(&read(&file).unwrap().graph), ["Identity(x) -> y"]);
}

#[test]
fn names_inside_functions_never_meet_names_of_the_caller() {
    let body = vec![node("Neg", &["a"], &["t"]), node("Abs", &["t"], &["b"])];
    let mut file =
        model(graph(vec![node("Relu", &["x"], &["F_1/t"]), call("F", &["F_1/t"], &["y"])]));
    file.functions = vec![function("F", &["a"], &["b"], body)];
    assert_eq!(
        listing(&read(&file).unwrap().graph),
        ["Relu(x) -> F_1/t", "Neg(F_1/t) -> F_1/t_", "Abs(F_1/t_) -> y"]
    );
}

#[test]
fn functions_of_another_operator_set_and_doubled_functions_are_unsupported() {
    let body = || vec![node("Neg", &["a"], &["b"])];
    let mut older = function("F", &["a"], &["b"], body());
    older.opset_import = vec![opset("", 12)];
    let mut file = model(graph(vec![call("F", &["x"], &["y"])]));
    file.functions = vec![older];
    refused(&file, &["local.F", "operator set 12", "inline"]);
    assert_eq!(read(&file).unwrap_err().kind(), ErrorKind::Unsupported);
    file.functions = vec![function("F", &["a"], &["b"], body()); 2];
    refused(&file, &["local.F", "more than once"]);
}

#[test]
fn a_doubled_name_a_cycle_and_a_missing_value_are_named() {
    let both = vec![node("Relu", &["x"], &["y"]), node("Neg", &["x"], &["y"])];
    refused(&model(graph(both)), &["more than once", "`y`", "Neg_1"]);
    let input = vec![node("Relu", &["y"], &["x"]), node("Neg", &["x"], &["y"])];
    refused(&model(graph(input)), &["more than once", "`x`"]);
    let ring = vec![
        node("Add", &["x", "b"], &["a"]),
        node("Neg", &["a"], &["b"]),
        node("Abs", &["b"], &["y"]),
    ];
    refused(&model(graph(ring)), &["cycle", "`Neg_1` -> `Add_0` -> `Neg_1`"]);
    refused(&model(graph(vec![node("Relu", &["x"], &["z"])])), &["graph output", "`y`"]);
    let mut doubled = graph(vec![node("Relu", &["x"], &["y"])]);
    doubled.initializer = vec![floats("w", &[1], &[1.0]), floats("w", &[1], &[1.0])];
    refused(&model(doubled), &["more than once", "`w`"]);
}

#[test]
fn the_header_is_checked_field_by_field() {
    let sound = || model(graph(vec![node("Relu", &["x"], &["y"])]));
    refused(&ModelProto { ir_version: 0, ..sound() }, &["`ir_version`", "`0`"]);
    refused(&ModelProto { ir_version: 99, ..sound() }, &["newer than 14", "`99`"]);
    refused(&ModelProto { opset_import: vec![], ..sound() }, &["`opset_import`"]);
    refused(&ModelProto { opset_import: vec![opset("", 0)], ..sound() }, &["`0`"]);
    refused(
        &ModelProto { opset_import: vec![opset("", 29)], ..sound() },
        &["`29`", "opset_version=28"],
    );
    let doubled = vec![opset("", 17), opset("ai.onnx", 18)];
    refused(&ModelProto { opset_import: doubled, ..sound() }, &["two versions", "ai.onnx"]);
    refused(&ModelProto { graph: None, ..sound() }, &["no graph"]);
}

#[test]
fn what_the_file_says_about_itself_is_kept() {
    let mut file = model(graph(vec![node("Relu", &["x"], &["y"])]));
    file.producer_name = "pytorch".into();
    file.producer_version = "2.15.0".into();
    file.opset_import.push(opset("com.microsoft", 1));
    file.metadata_props.push(StringStringEntryProto { key: "author".into(), value: "me".into() });
    let read = read(&file).unwrap();
    assert_eq!(read.producer, "pytorch 2.15.0");
    assert_eq!(read.metadata["author"], "me");
    assert_eq!(read.domains["com.microsoft"], 1);
    assert_eq!((read.opset, read.graph.opset), (17, 17));
    let shape = read.graph.inputs[0].shape.as_deref().unwrap();
    assert_eq!(shape, [Dimension::Symbol("n".into()), Dimension::Fixed(4)]);
}

#[test]
fn an_output_without_a_type_takes_it_from_the_nodes() {
    let mut untyped = graph(vec![node("Shape", &["x"], &["y"])]);
    untyped.output = vec![ValueInfoProto { name: "y".into(), ..Default::default() }];
    assert_eq!(read(&model(untyped.clone())).unwrap().graph.outputs[0].dtype, DataType::Int64);
    untyped.node = vec![NodeProto { domain: "my.ops".into(), ..node("Thing", &["x"], &["y"]) }];
    refused(&model(untyped), &["value `y`", "element type"]);
}

/// The files of `fixtures/architectures` come without weights; zeros take their place here.
#[test]
fn every_architecture_is_read_from_every_exporter_with_its_batchnorm_statistics() {
    let Some(folder) = shared("fixtures/architectures") else { return };
    let (mut models, mut norms) = (0, 0);
    for path in super::export::models(&folder) {
        let bytes = std::fs::read(&path).unwrap();
        let mut file = ModelProto::decode(bytes.as_slice()).unwrap();
        let weights = &mut file.graph.as_mut().unwrap().initializer;
        let size = |tensor: &TensorProto| tensor.dims.iter().product::<i64>() as usize;
        if weights.iter().map(size).sum::<usize>() > 16_000_000 {
            continue;
        }
        for tensor in weights.iter_mut().filter(|tensor| tensor.doc_string.contains("hydrate")) {
            tensor.raw_data = vec![0; 4 * size(tensor)];
        }
        let read = read(&file).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let graph = &read.graph;
        assert_eq!((read.opset, graph.outputs.len()), (20, 1), "{}", path.display());
        for node in graph.nodes.iter().filter(|node| node.op_type == "BatchNormalization") {
            let known = node.inputs[1..].iter().all(|name| graph.constants.contains_key(name));
            assert!(known, "{}: {}", path.display(), node.describe());
            norms += 1;
        }
        models += 1;
    }
    assert!(models >= 40 && norms >= 500, "{models} models with {norms} norm layers");
}
