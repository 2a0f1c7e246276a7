//! Files made to hurt a reader: refused by name, quickly, without the memory they ask for.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use candle_onnx::onnx::StringStringEntryProto;
use candle_onnx::onnx::tensor_proto::DataLocation;
use metazoa::onnx::{ExternalData, load, load_bytes, to_bytes};
use proptest::prelude::*;

use super::*;
use crate::support::{repository, shared, temp_dir};

/// What a file of `fixtures/hostile` must give: nothing when it is sound to read (a bomb that only
/// goes off when run), else words of the message.
const EXPECTED: [(&str, Option<&str>); 59] = [
    ("bomb_cos_2g", None),
    ("bomb_cos_4g", None),
    ("bomb_cos_64g", None),
    ("bomb_cos_max", None),
    ("bomb_run_expand", None),
    ("bomb_tile_16g", None),
    ("cycle", Some("nodes form a cycle: `Relu_1` -> `Add_0` -> `Relu_1`")),
    ("dangling", Some("node `Relu_0` (Relu): nothing makes the value that is read: `nowhere`")),
    ("ext_abs_passwd", Some("external data `/etc/passwd`: location is an absolute path")),
    ("ext_dev", Some("location is an absolute path")),
    ("ext_fifo", Some("not a regular file")),
    ("ext_hugedims", Some("more than 1073741824 elements")),
    ("ext_inout", Some("location leaves the folder by `..`")),
    ("ext_memtag", Some("location names a memory address")),
    ("ext_missing", Some("data file is missing")),
    ("ext_negoff", Some("field `offset` must be a number of bytes, found `-16`")),
    ("ext_overflow", Some("48 bytes from offset 9223372036854775800 lie outside the file of `64`")),
    ("ext_parent", Some("location leaves the folder by `..`")),
    ("ext_proc", Some("location is an absolute path")),
    (
        "ext_short",
        Some("field `length` must be 16777216 for the tensor's shape and type, found `48`"),
    ),
    ("ext_symlink", Some("a link leads outside")),
    ("ext_symlink_inside", None),
    ("ext_traverse_passwd", Some("location leaves the folder by `..`")),
    ("ext_url", Some("location is a URL")),
    ("func_exp24", Some("more than 262144 nodes once its functions are inlined")),
    ("func_recursive", Some("function `loc.F`: function calls itself")),
    ("html", Some("looks like a web page")),
    ("huge_input_dim", None),
    ("init_1e12_noraw", Some("more than 1073741824 elements")),
    ("init_2p62", Some("more than 1073741824 elements")),
    ("init_4g", Some("must hold 1073741824 values for shape [4, 268435456], found `0`")),
    ("init_4g_noraw", Some("must hold 1073741824 values for shape [4, 268435456], found `0`")),
    ("init_neg_noraw", Some("field `dims` holds a negative size: `[-1, 4]`")),
    ("init_overflow", Some("more than 1073741824 elements")),
    ("init_rawlong", Some("field `raw_data` must hold 48 bytes for shape [4, 3], found `4800`")),
    ("init_rawshort", Some("field `raw_data` must hold 48 bytes for shape [4, 3], found `40`")),
    ("init_zero_noraw", None),
    ("intdiv0_const", None),
    ("ir0", Some("field `ir_version` must be 1 or more, found `0`")),
    ("ir99", Some("newer than 14, the newest known: `99`")),
    ("loop_run_inf", None),
    ("neg_input_dim", None),
    ("nest_if8", None),
    ("nest_lin25", None),
    ("norank_input", None),
    ("opset0", Some("must be 1 or more, found `0`")),
    ("opset27", None),
    ("opset28", None),
    ("pad_64g", None),
    ("pool_hugepad", None),
    ("reshape_bad", None),
    ("split_badaxis", None),
    ("string_io", None),
    ("text", Some("looks like a Git LFS pointer")),
    ("trunc50", Some("the file is cut short: graph announces 466737 bytes")),
    ("trunc90", Some("the file is cut short")),
    ("trunc_lastbyte", Some("the file is cut short")),
    ("u8_io", None),
    ("zip", Some("looks like a zip archive")),
];

#[test]
fn every_hostile_file_is_read_or_refused_by_name() {
    let Some(fixtures) = shared("fixtures/hostile") else { return };
    let temp = temp_dir();
    let zoo = temp.path().join("zoo");
    fs::create_dir(&zoo).unwrap();
    // The files that the models name: one outside of the zoo, and links to both.
    fs::write(temp.path().join("outside.bin"), [0; 64]).unwrap();
    fs::write(zoo.join("ok.bin"), [0; 64]).unwrap();
    std::os::unix::fs::symlink("../outside.bin", zoo.join("link.bin")).unwrap();
    std::os::unix::fs::symlink("ok.bin", zoo.join("link_in.bin")).unwrap();
    fs::create_dir(zoo.join("sub")).unwrap();
    assert!(Command::new("mkfifo").arg(zoo.join("fifo")).status().unwrap().success());
    let mut seen = 0;
    for entry in fs::read_dir(&fixtures).unwrap() {
        let source = entry.unwrap().path();
        let name = source.file_stem().unwrap().to_string_lossy().into_owned();
        let file = zoo.join(source.file_name().unwrap());
        fs::copy(&source, &file).unwrap();
        let expected = EXPECTED.iter().find(|(known, _)| *known == name);
        let (_, expected) = expected.unwrap_or_else(|| panic!("no expectation for `{name}`"));
        let start = Instant::now();
        let result = load(&file, &zoo);
        assert!(start.elapsed() < Duration::from_secs(2), "{name}: {:?}", start.elapsed());
        match (result, expected) {
            (Ok(_), None) => {}
            (Err(error), Some(words)) => {
                let text = error.to_string();
                assert!(text.contains(words), "{name}: `{words}` is not in: {text}");
                assert!(
                    text.starts_with("model `") && error.hint_text().is_some(),
                    "{name}: {text}"
                );
            }
            (Ok(_), Some(words)) => panic!("{name} was read; expected: {words}"),
            (Err(error), None) => panic!("{name} was refused: {error}"),
        }
        seen += 1;
    }
    assert_eq!(seen, EXPECTED.len());
}

/// The two suites of this module that hold bombs, again in a process with 1 GiB of address space.
#[test]
fn hostile_files_take_no_memory() {
    for suite in ["every_hostile_file_is_read_or_refused_by_name", "bombs_made_here_are_refused"] {
        let output = Command::new("sh")
            .args(["-c", "ulimit -v 1048576 && exec \"$0\" \"$@\""])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--test-threads=1", &format!("onnx::hostile::{suite}")])
            .current_dir(repository())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{suite}: {text}");
    }
}

fn refused_bytes(bytes: &[u8], words: &str) {
    let start = Instant::now();
    let error = load_bytes(bytes, ExternalData::Refused).expect_err(words).to_string();
    assert!(error.contains(words), "`{words}` is not in: {error}");
    assert!(start.elapsed() < Duration::from_secs(2), "{words}: {:?}", start.elapsed());
}

/// A field of a message on the wire.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

#[test]
fn bombs_made_here_are_refused() {
    // Six million empty nodes of two bytes; each would take some 200 bytes of memory.
    refused_bytes(&field(7, &[0x0a, 0].repeat(6_000_000)), "more than 2097152 protobuf messages");
    // Sub-graphs (graph, node, attribute) nested ten thousand deep.
    let mut deep = Vec::new();
    for _ in 0..10_000 {
        deep = field(1, &field(5, &field(6, &deep)));
    }
    refused_bytes(&field(7, &deep), "messages nest deeper than 96 levels");
    // Sixteen levels of functions in sub-graphs of functions: few messages deep, many graphs.
    let choice = |name: &str| {
        let inner = GraphProto {
            name: "b".into(),
            node: vec![call(name, &["a"], &["o"])],
            output: vec![value("o", &[])],
            ..Default::default()
        };
        with(node("If", &["a"], &["b"]), graph_attribute("then_branch", inner))
    };
    let mut nested = model(graph(vec![call("F0", &["x"], &["y"])]));
    nested.functions = (0..20)
        .map(|i| function(&format!("F{i}"), &["a"], &["b"], vec![choice(&format!("F{}", i + 1))]))
        .collect();
    nested.functions.push(function("F20", &["a"], &["b"], vec![node("Neg", &["a"], &["b"])]));
    refused(&nested, &["nest deeper than 32 levels"]);
    // A function of 1 MiB that is called ten thousand times.
    let weights = floats("w", &[1 << 18], &vec![0.0; 1 << 18]);
    let body = with(node("Constant", &[], &["b"]), tensor_attribute(weights));
    let mut heavy =
        model(graph((0..10_000).map(|i| call("F", &["x"], &[&format!("y{i}")])).collect()));
    heavy.functions = vec![function("F", &["a"], &["b"], vec![body])];
    refused(&heavy, &["inlining the functions"]);
    // Twenty thousand functions that call each other in a ring.
    let ring = |i: usize| {
        function(
            &format!("F{i}"),
            &["a"],
            &["b"],
            vec![call(&format!("F{}", (i + 1) % 20_000), &["a"], &["b"])],
        )
    };
    let mut round = model(graph(vec![call("F0", &["x"], &["y"])]));
    round.functions = (0..20_000).map(ring).collect();
    let start = Instant::now();
    refused(&round, &["calls itself"]);
    assert!(start.elapsed() < Duration::from_secs(2));
}

fn external(location: &str, dims: &[i64], more: &[(&str, &str)]) -> TensorProto {
    let entry =
        |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
    let mut external_data = vec![entry("location", location)];
    external_data.extend(more.iter().map(|(key, value)| entry(key, value)));
    TensorProto {
        name: "w".into(),
        dims: dims.to_vec(),
        data_type: Element::Float as i32,
        data_location: DataLocation::External as i32,
        external_data,
        ..Default::default()
    }
}

#[test]
fn external_data_is_read_from_the_models_folder_only() {
    let temp = temp_dir();
    let (root, folder) = (temp.path(), temp.path().join("inner/deep"));
    fs::create_dir_all(&folder).unwrap();
    let bytes: Vec<u8> = (0..8_u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    fs::write(folder.join("w.bin"), &bytes).unwrap();
    let path = folder.join("m.onnx");
    let mut file = model(graph(vec![node("Add", &["x", "w"], &["y"])]));
    let mut load_with = |tensor| {
        file.graph.as_mut().unwrap().initializer = vec![tensor];
        fs::write(&path, file.encode_to_vec()).unwrap();
        load(&path, root)
    };
    let read = load_with(external("./w.bin", &[4], &[("offset", "16"), ("length", "16")])).unwrap();
    assert_eq!(read.graph.constants["w"].to_f32(), [4.0, 5.0, 6.0, 7.0]);
    assert_eq!(read.external_files, [folder.join("w.bin").canonicalize().unwrap()]);
    let mut refuse = |tensor, words: &str| {
        let text = load_with(tensor).expect_err(words).to_string();
        assert!(text.contains(words), "`{words}` is not in: {text}");
    };
    refuse(
        external("w.bin", &[4], &[("offset", "20")]),
        "16 bytes from offset 20 lie outside the file of `32`",
    );
    refuse(external("w.bin", &[9], &[]), "36 bytes from offset 0 lie outside");
    refuse(external("", &[4], &[]), "without a `location`");
    refuse(external(".", &[4], &[]), "not a regular file");
    refuse(external("w\0.bin", &[4], &[]), "NUL");
    load_with(external("w.bin", &[4], &[])).unwrap();
    let error = load(&path, &folder.join("nowhere")).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
    // A model outside of the root may not bring data from beside itself.
    fs::create_dir(root.join("other")).unwrap();
    let error = load(&path, &root.join("other")).unwrap_err();
    assert!(error.to_string().contains("leads outside"), "{error}");
}

#[test]
fn tensors_that_share_the_bytes_of_a_file_without_end_are_refused() {
    let temp = temp_dir();
    let file = fs::File::create(temp.path().join("w.bin")).unwrap();
    // Takes no disk: a hole.
    file.set_len(64 << 20).unwrap();
    let mut shared = graph(vec![node("Relu", &["x"], &["y"])]);
    let named = |i| TensorProto { name: format!("w{i}"), ..external("w.bin", &[16 << 20], &[]) };
    shared.initializer = (0..1000).map(named).collect();
    let path = temp.path().join("m.onnx");
    fs::write(&path, model(shared).encode_to_vec()).unwrap();
    let text = load(&path, temp.path()).unwrap_err().to_string();
    assert!(text.contains("initialiser `w2`") && text.contains("again and again"), "{text}");
}

#[test]
fn a_folder_a_pipe_and_a_missing_file_are_no_models() {
    let temp = temp_dir();
    let pipe = temp.path().join("pipe.onnx");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let refuse = |path: &Path, words: &str| {
        let text = load(path, temp.path()).unwrap_err().to_string();
        assert!(text.contains(words), "`{words}` is not in: {text}");
    };
    refuse(&pipe, "not a regular file");
    refuse(temp.path(), "not a regular file");
    refuse(&temp.path().join("gone.onnx"), "gone.onnx");
    let large = temp.path().join("large.onnx");
    fs::File::create(&large).unwrap().set_len(3 << 30).unwrap();
    refuse(&large, "larger than 2 GiB");
}

#[test]
fn files_of_other_kinds_are_told_by_name() {
    let looks = |bytes: &[u8], words: &str| refused_bytes(bytes, words);
    looks(b"", "an empty file");
    looks(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer");
    looks(b"\n<!DOCTYPE html><html>", "a web page");
    looks(b"PK\x03\x04\x14\0\0\0", "a zip archive");
    looks(b"\x89HDF\r\n\x1a\n", "Keras");
    looks(b"\x80\x02\x8a\nl\xfc\x9cF", "a Python pickle");
    looks(b"\x1c\0\0\0TFL3\0\0", "TensorFlow Lite");
    looks(b"\x1c\0\0\0ORTM\0\0", "`.ort`");
    looks(b"\x40\0\0\0\0\0\0\0{\"__metadata__\":{}}", "safetensors");
    looks(&[0; 100], "a file of zeros");
    looks(b"import torch\n", "a text file");
    looks(b"\xff\xfe\xfd\xfc\x01\x02", "not a valid protobuf");
}

/// A small model with a function, sub-graphs, constants of several kinds and a name of each sort.
fn seed_model() -> Vec<u8> {
    let branch = |op: &str| GraphProto {
        name: op.into(),
        node: vec![node(op, &["h", "w"], &["o"])],
        output: vec![value("o", &[-1, 4])],
        ..Default::default()
    };
    let mut choice =
        with(node("If", &["c"], &["z"]), graph_attribute("then_branch", branch("Mul")));
    choice = with(choice, graph_attribute("else_branch", branch("Add")));
    let half = TensorProto {
        dims: vec![2],
        data_type: 10,
        int32_data: vec![0x3c00, 0x4000],
        ..Default::default()
    };
    let mut graph = graph(vec![
        with(node("Constant", &[], &["k"]), tensor_attribute(half)),
        node("Identity", &["k"], &["k2"]),
        with(call("F", &["x"], &["h"]), float_attribute("slope", 0.1)),
        choice,
        node("Softmax", &["z"], &["y"]),
    ]);
    graph.input.push(typed("c", Element::Bool, &[]));
    graph.initializer.push(floats("w", &[4], &[1.0; 4]));
    let raw = TensorProto {
        raw_data: vec![7; 8],
        float_data: vec![],
        data_type: 7,
        ..floats("i", &[1], &[])
    };
    graph.initializer.push(raw);
    graph.initializer.push(external("README.md", &[1], &[("offset", "0")]));
    graph.initializer[2].name = "e".into();
    let leaky = with(node("LeakyRelu", &["a"], &["b"]), reference("alpha", "slope"));
    let mut file = model(graph);
    file.functions = vec![function("F", &["a"], &["b"], vec![leaky])];
    file.encode_to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    /// Whatever happens to the bytes, reading ends in a model or an error, soon; and what was read
    /// can be written, read and written again to the same bytes.
    #[test]
    fn a_damaged_model_never_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
        copied in prop::option::weighted(0.2, any::<(prop::sample::Index, prop::sample::Index, prop::sample::Index)>()),
    ) {
        // The seed takes four bytes of a file that is there anyway as weights.
        let zoo = repository().join("zoo");
        let external = ExternalData::Within { folder: &zoo, root: &zoo };
        let mut bytes = seed_model();
        prop_assert!(load_bytes(&bytes, external).is_ok());
        for (place, byte) in edits {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Some((from, to, target)) = copied {
            let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
            let piece = bytes[from.min(to)..from.max(to)].to_vec();
            let target = target.index(bytes.len());
            bytes.splice(target..target, piece);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let start = Instant::now();
        if let Ok(model) = load_bytes(&bytes, external) {
            let written = to_bytes(&model.graph, &model.export_info()).unwrap();
            let again = load_bytes(&written, ExternalData::Refused).unwrap();
            prop_assert_eq!(written, to_bytes(&again.graph, &again.export_info()).unwrap());
        }
        prop_assert!(start.elapsed() < Duration::from_secs(2));
    }
}
