//! First contact with the bytes of a model: what they are, whether they are whole, then decoding.
//!
//! The protobuf library takes up to a hundred times the file's size in memory when a file repeats
//! empty messages, and says "invalid wire type" for a web page. So the bytes are walked once without
//! taking memory (bounds, nesting, number of messages), and a failure is explained by what the bytes
//! look like.

use candle_onnx::onnx::ModelProto;
use prost::Message as _;

use crate::error::{Error, Result};

/// Most messages and strings of a file; the largest public graphs have some 200 thousand.
const MAX_ITEMS: usize = 1 << 21;
/// Deepest nesting of messages; the decoder itself stops at 100.
const MAX_MESSAGE_DEPTH: usize = 96;

/// Decodes a model after checking that walking it is cheap and safe.
///
/// # Errors
/// When the bytes are no protobuf, are cut short, or hold too many or too deep messages.
pub(super) fn decode(bytes: &[u8]) -> Result<ModelProto> {
    if let Err(error) = scan(bytes) {
        return Err(foreign(bytes).unwrap_or(error));
    }
    ModelProto::decode(bytes).map_err(|error| {
        foreign(bytes).unwrap_or_else(|| {
            Error::input(format!("not a valid ONNX model: `{error}`"))
                .hint("export or download the file again")
        })
    })
}

/// What the bytes are if they are something else than ONNX.
pub(super) fn foreign(bytes: &[u8]) -> Option<Error> {
    let (what, hint) = looks_like(bytes)?;
    Some(Error::input(format!("not an ONNX model: looks like {what}")).hint(hint))
}

fn looks_like(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    let export =
        "export the network to ONNX (`torch.onnx.export`, `tf2onnx`) and put that file here";
    let tag = bytes.get(4..8).unwrap_or_default();
    let start = String::from_utf8_lossy(bytes.get(..64).unwrap_or(bytes)).to_ascii_lowercase();
    let start = start.trim_start_matches('\u{feff}').trim_start();
    Some(if bytes.is_empty() {
        ("an empty file", "download or export the file again")
    } else if bytes.starts_with(b"version https://git-lfs") {
        ("a Git LFS pointer", "run `git lfs pull` in the repository the file came from")
    } else if start.starts_with("<!doctype")
        || start.starts_with("<html")
        || start.starts_with("<?xml")
    {
        ("a web page", "the download saved a page instead of the file; download it again")
    } else if bytes.starts_with(b"PK\x03\x04") {
        ("a zip archive (a PyTorch checkpoint, a NumPy archive or a packed model)", export)
    } else if bytes.starts_with(b"\x1f\x8b") {
        ("a gzip archive", "unpack it")
    } else if bytes.starts_with(b"\x89HDF") {
        ("an HDF5 file (Keras)", export)
    } else if bytes.starts_with(b"\x80\x02") || bytes.starts_with(b"\x80\x04") {
        ("a Python pickle (an old PyTorch checkpoint)", export)
    } else if tag == b"ORTM" {
        ("an ONNX Runtime `.ort` file", "use the `.onnx` file it was made from")
    } else if tag == b"TFL3" {
        ("a TensorFlow Lite model", "convert it with `tf2onnx --tflite`")
    } else if bytes.starts_with(b"GGUF") {
        ("a GGUF file", export)
    } else if bytes.get(8) == Some(&b'{') && bytes.get(7) == Some(&0) {
        ("a safetensors file (weights without a graph)", export)
    } else if bytes.iter().take(4096).all(|&byte| byte == 0) {
        ("a file of zeros", "download or export the file again")
    } else if is_text(bytes) {
        ("a text file", "put an `.onnx` file here")
    } else {
        return None;
    })
}

/// The first bytes are printable text; a model starts with a version number, which is not.
fn is_text(bytes: &[u8]) -> bool {
    let head = bytes.get(..256).unwrap_or(bytes);
    head.iter().all(|&byte| matches!(byte, b'\t' | b'\n' | b'\r' | 32..=126) || byte >= 0x80)
        && head.iter().filter(|byte| byte.is_ascii()).count() * 2 >= head.len()
}

/// The messages that can hold many or nested messages; everything else is skipped as a whole.
#[derive(Clone, Copy)]
enum Kind {
    Model,
    Graph,
    Node,
    Attribute,
    Function,
    Training,
    Tensor,
    Sparse,
    ValueInfo,
    Type,
    TypeBody,
    Shape,
    Other,
}

/// The message that field `field` of `kind` holds, with its name for messages; field numbers are
/// those of `onnx.proto3`.
fn child(kind: Kind, field: u64) -> Option<(Kind, &'static str)> {
    Some(match (kind, field) {
        (Kind::Model, 7) => (Kind::Graph, "graph"),
        (Kind::Model, 8) => (Kind::Other, "opset_import"),
        (Kind::Model, 14) => (Kind::Other, "metadata_props"),
        (Kind::Model, 20) => (Kind::Training, "training_info"),
        (Kind::Model, 25) => (Kind::Function, "functions"),
        (Kind::Training, 1 | 2) => (Kind::Graph, "training graph"),
        (Kind::Graph, 1) | (Kind::Function, 7) => (Kind::Node, "node"),
        (Kind::Graph, 5) => (Kind::Tensor, "initializer"),
        (Kind::Graph, 15) => (Kind::Sparse, "sparse_initializer"),
        (Kind::Graph, 11..=13) => (Kind::ValueInfo, "value_info"),
        (Kind::Node, 5) | (Kind::Function, 11) => (Kind::Attribute, "attribute"),
        (Kind::Attribute, 5 | 10) | (Kind::Sparse, 1 | 2) => (Kind::Tensor, "tensor"),
        (Kind::Attribute, 6 | 11) => (Kind::Graph, "sub-graph"),
        (Kind::Attribute, 22 | 23) => (Kind::Sparse, "sparse tensor"),
        (Kind::Attribute, 14 | 15) | (Kind::ValueInfo, 2) => (Kind::Type, "type"),
        (Kind::Type, 1 | 4 | 5 | 8 | 9) => (Kind::TypeBody, "type"),
        // The inner type of a sequence or optional is field 1, of a map field 2; for a tensor,
        // field 2 is the shape: walking either as the other is harmless.
        (Kind::TypeBody, 1) => (Kind::Type, "type"),
        (Kind::TypeBody, 2) => (Kind::Shape, "shape"),
        (Kind::Shape, 1) => (Kind::Other, "dim"),
        _ => return None,
    })
}

/// Walks the wire format without decoding: every length lies inside its message, and messages are
/// neither too many nor too deep.
fn scan(bytes: &[u8]) -> Result<()> {
    let mut open = vec![(bytes.len(), Kind::Model)];
    let mut at = 0;
    let mut items = 0_usize;
    while let Some(&(end, kind)) = open.last() {
        if at >= end {
            open.pop();
            continue;
        }
        let key = varint(bytes, &mut at, end)?;
        match key & 7 {
            0 => {
                varint(bytes, &mut at, end)?;
            }
            1 => at = advance(at, 8, end, open.len(), "a number")?,
            5 => at = advance(at, 4, end, open.len(), "a number")?,
            2 => {
                let length = varint(bytes, &mut at, end)?;
                let inner = child(kind, key >> 3);
                let name = inner.map_or("a field", |(_, name)| name);
                let after = advance(at, length, end, open.len(), name)?;
                items += 1;
                if items > MAX_ITEMS {
                    return Err(Error::input(format!(
                        "the file holds more than {MAX_ITEMS} protobuf messages"
                    ))
                    .hint("this is no usual network; simplify it (`onnxsim`) or leave it out"));
                }
                match inner {
                    Some(_) if open.len() >= MAX_MESSAGE_DEPTH => {
                        return Err(Error::input(format!(
                            "messages nest deeper than {MAX_MESSAGE_DEPTH} levels"
                        ))
                        .hint("flatten the nested sub-graphs of the model"));
                    }
                    Some((inner, _)) => open.push((after, inner)),
                    None => at = after,
                }
            }
            _ => return Err(damaged(at)),
        }
    }
    Ok(())
}

fn advance(at: usize, length: u64, end: usize, depth: usize, name: &str) -> Result<usize> {
    let left = end - at;
    match usize::try_from(length) {
        Ok(length) if length <= left => Ok(at + length),
        _ if depth == 1 => Err(Error::input(format!(
            "the file is cut short: {name} announces {length} bytes at byte {at}, `{left}` are left"
        ))
        .hint("download or export the file again")),
        _ => Err(damaged(at)),
    }
}

fn damaged(at: usize) -> Error {
    Error::input(format!("not a valid protobuf: the wire format breaks at byte `{at}`"))
        .hint("download or export the file again")
}

fn varint(bytes: &[u8], at: &mut usize, end: usize) -> Result<u64> {
    let mut value = 0_u64;
    for shift in (0..70).step_by(7) {
        let byte = bytes.get(*at).filter(|_| *at < end).ok_or_else(|| damaged(*at))?;
        *at += 1;
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(damaged(*at))
}
