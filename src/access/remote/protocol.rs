//! Bodies of the Open Inference Protocol v2: tensors to a request and back.
//!
//! Tensor data goes as JSON numbers, which every server reads, or behind the JSON as raw little-endian bytes where
//! the server lists the `binary_tensor_data` extension (a fifth of the bytes, and no rounding to think of).

use half::f16;
use serde_json::{Value, json};

use crate::access::session::{Tensor, Values};
use crate::error::{Error, Result};
use crate::zoo::remote::{ServedModel, ServedTensor};

/// How tensor data travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Numbers in the JSON.
    Json,
    /// Bytes behind the JSON.
    Binary,
}

/// A request's or an answer's body.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) bytes: Vec<u8>,
    /// Length of the JSON when bytes follow it (`Inference-Header-Content-Length`).
    pub(super) json_length: Option<usize>,
}

/// The body that asks `output` of one `input`.
///
/// # Errors
/// When a value has no JSON form.
pub(super) fn request(
    input_name: &str,
    input: &Tensor,
    output: &str,
    encoding: Encoding,
) -> Result<Body> {
    let datatype = datatype(&input.values);
    match encoding {
        Encoding::Json => {
            // Written by hand: a tree of a million `Value`s takes a hundred times the memory.
            let name = Value::from(input_name);
            let head = format!(
                r#"{{"inputs":[{{"name":{name},"shape":{:?},"datatype":"{datatype}","data":["#,
                input.shape
            );
            let outputs = json!([{ "name": output, "parameters": { "binary_data": false } }]);
            let mut text = head;
            numbers(&input.values, &mut text)?;
            text.push_str(&format!(r#"]}}],"outputs":{outputs}}}"#));
            Ok(Body { bytes: text.into_bytes(), json_length: None })
        }
        Encoding::Binary => {
            let data = little_endian(&input.values);
            let head = json!({
                "inputs": [{
                    "name": input_name,
                    "shape": input.shape,
                    "datatype": datatype,
                    "parameters": { "binary_data_size": data.len() },
                }],
                "outputs": [{ "name": output, "parameters": { "binary_data": true } }],
            });
            let mut bytes = head.to_string().into_bytes();
            let json_length = Some(bytes.len());
            bytes.extend_from_slice(&data);
            Ok(Body { bytes, json_length })
        }
    }
}

/// The tensor `output` of an answer's body.
///
/// # Errors
/// When the body is no such answer.
pub(super) fn answer(body: &Body, output: &str) -> Result<Tensor> {
    let bad = |what: String| Error::input(format!("the server's answer {what}"));
    let (head, mut rest) = match body.json_length {
        Some(length) if length <= body.bytes.len() => body.bytes.split_at(length),
        Some(length) => return Err(bad(format!("is shorter than its JSON of `{length}` bytes"))),
        None => (body.bytes.as_slice(), [].as_slice()),
    };
    let json: Value =
        serde_json::from_slice(head).map_err(|error| bad(format!("is no JSON: `{error}`")))?;
    let outputs = json["outputs"].as_array().ok_or_else(|| bad("has no `outputs`".into()))?;
    let mut found = None;
    for tensor in outputs {
        // Bytes follow in the order of the outputs, also those nobody asked for.
        let data = match tensor["parameters"]["binary_data_size"].as_u64() {
            Some(size) => {
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                if size > rest.len() {
                    return Err(bad(format!("lacks bytes of output `{}`", tensor["name"])));
                }
                let (own, others) = rest.split_at(size);
                rest = others;
                Some(own)
            }
            None => None,
        };
        if tensor["name"] == output {
            found = Some((tensor, data));
        }
    }
    let (tensor, data) = found.ok_or_else(|| bad(format!("has no output `{output}`")))?;
    let shape =
        sizes(&tensor["shape"]).ok_or_else(|| bad(format!("has no shape of `{output}`")))?;
    let datatype = tensor["datatype"].as_str().unwrap_or_default();
    let values = match data {
        Some(bytes) => from_bytes(datatype, bytes),
        None => from_json(datatype, &tensor["data"]),
    }
    .ok_or_else(|| bad(format!("holds no numbers of type `{datatype}` in output `{output}`")))?;
    let product = shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size));
    if product != Some(values.len()) {
        return Err(bad(format!("gives {} values for shape `{shape:?}`", values.len())));
    }
    Ok(Tensor { shape, values })
}

/// Reads "model metadata".
///
/// # Errors
/// When it is none.
pub(super) fn served_model(json: &Value) -> Result<ServedModel> {
    let bad =
        || Error::input("the server's description of the model is not one of the protocol v2");
    let tensors = |key: &str| -> Result<Vec<ServedTensor>> {
        let list = json[key].as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter()
            .map(|tensor| {
                let shape = tensor["shape"].as_array().ok_or_else(bad)?;
                Ok(ServedTensor {
                    name: tensor["name"].as_str().ok_or_else(bad)?.to_owned(),
                    datatype: tensor["datatype"].as_str().ok_or_else(bad)?.to_owned(),
                    shape: shape.iter().map(|size| size.as_i64().unwrap_or(-1)).collect(),
                })
            })
            .collect()
    };
    Ok(ServedModel {
        name: json["name"].as_str().ok_or_else(bad)?.to_owned(),
        platform: json["platform"].as_str().unwrap_or_default().to_owned(),
        inputs: tensors("inputs")?,
        outputs: tensors("outputs")?,
    })
}

fn datatype(values: &Values) -> &'static str {
    match values {
        Values::F32(_) => "FP32",
        Values::F16(_) => "FP16",
        Values::F64(_) => "FP64",
        Values::U8(_) => "UINT8",
        Values::I8(_) => "INT8",
        Values::I32(_) => "INT32",
        Values::I64(_) => "INT64",
        Values::Bool(_) => "BOOL",
    }
}

/// Numbers with commas; the shortest decimal that reads back as the same value.
fn numbers(values: &Values, text: &mut String) -> Result<()> {
    use std::fmt::Write as _;
    fn all<T: std::fmt::Display>(values: impl Iterator<Item = T>, text: &mut String) {
        for (index, value) in values.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            // Writing to a `String` cannot fail.
            let _ = write!(text, "{comma}{value}");
        }
    }
    if values.to_f32().iter().any(|value| !value.is_finite()) {
        return Err(Error::input("an image holds a value that is not finite"));
    }
    match values {
        Values::F32(v) => all(v.iter(), text),
        Values::F16(v) => all(v.iter().map(|v| v.to_f32()), text),
        Values::F64(v) => all(v.iter(), text),
        Values::U8(v) => all(v.iter(), text),
        Values::I8(v) => all(v.iter(), text),
        Values::I32(v) => all(v.iter(), text),
        Values::I64(v) => all(v.iter(), text),
        Values::Bool(v) => all(v.iter(), text),
    }
    Ok(())
}

fn little_endian(values: &Values) -> Vec<u8> {
    match values {
        Values::F32(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::F16(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::F64(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::U8(v) => v.clone(),
        Values::I8(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::I32(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::I64(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::Bool(v) => v.iter().map(|&v| u8::from(v)).collect(),
    }
}

fn from_bytes(datatype: &str, bytes: &[u8]) -> Option<Values> {
    fn each<const N: usize, T>(bytes: &[u8], read: fn([u8; N]) -> T) -> Option<Vec<T>> {
        let (chunks, rest) = bytes.as_chunks::<N>();
        rest.is_empty().then(|| chunks.iter().map(|chunk| read(*chunk)).collect())
    }
    Some(match datatype {
        "FP32" => Values::F32(each(bytes, f32::from_le_bytes)?),
        "FP16" => Values::F16(each(bytes, f16::from_le_bytes)?),
        "FP64" => Values::F64(each(bytes, f64::from_le_bytes)?),
        "UINT8" => Values::U8(bytes.to_vec()),
        "INT8" => Values::I8(each(bytes, i8::from_le_bytes)?),
        "INT32" => Values::I32(each(bytes, i32::from_le_bytes)?),
        "INT64" => Values::I64(each(bytes, i64::from_le_bytes)?),
        "UINT32" => {
            Values::I64(each(bytes, u32::from_le_bytes)?.into_iter().map(i64::from).collect())
        }
        _ => return None,
    })
}

/// Numbers, flat or nested as the shape.
fn from_json(datatype: &str, data: &Value) -> Option<Values> {
    fn flatten(data: &Value, out: &mut Vec<f64>) -> Option<()> {
        match data {
            Value::Array(items) => items.iter().try_for_each(|item| flatten(item, out)),
            number => {
                out.push(number.as_f64()?);
                Some(())
            }
        }
    }
    let mut numbers = Vec::new();
    flatten(data.as_array().map(|_| data)?, &mut numbers)?;
    Some(match datatype {
        "FP32" | "FP16" => Values::F32(numbers.into_iter().map(|v| v as f32).collect()),
        "FP64" => Values::F64(numbers),
        "UINT8" | "INT8" | "UINT16" | "INT16" | "UINT32" | "INT32" | "UINT64" | "INT64" => {
            Values::I64(numbers.into_iter().map(|v| v as i64).collect())
        }
        _ => return None,
    })
}

fn sizes(shape: &Value) -> Option<Vec<usize>> {
    let size = |size: &Value| size.as_u64().and_then(|size| usize::try_from(size).ok());
    shape.as_array()?.iter().map(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_holds_the_values_to_the_bit_in_both_encodings() {
        let values = vec![0.1f32, -3.402_823_5e38, 1.0e-45, 0.0];
        let input = Tensor::f32([2, 2], values.clone());
        let body = request("x \"quoted\"", &input, "y", Encoding::Json).unwrap();
        let json: Value = serde_json::from_slice(&body.bytes).unwrap();
        let tensor = &json["inputs"][0];
        assert_eq!(
            (&tensor["name"], &tensor["datatype"]),
            (&json!("x \"quoted\""), &json!("FP32"))
        );
        assert_eq!(tensor["shape"], json!([2, 2]));
        assert_eq!(from_json("FP32", &tensor["data"]), Some(Values::F32(values.clone())));
        assert_eq!(json["outputs"][0]["name"], "y");
        let body = request("x", &input, "y", Encoding::Binary).unwrap();
        let (head, data) = body.bytes.split_at(body.json_length.unwrap());
        let json: Value = serde_json::from_slice(head).unwrap();
        assert_eq!(json["inputs"][0]["parameters"]["binary_data_size"], 16);
        assert_eq!(from_bytes("FP32", data), Some(Values::F32(values)));
        let nan = Tensor::f32([1], vec![f32::NAN]);
        assert!(request("x", &nan, "y", Encoding::Json).is_err());
    }

    #[test]
    fn an_answer_is_read_flat_nested_and_binary() {
        let flat = br#"{"outputs":[{"name":"a","shape":[1],"datatype":"FP32","data":[9]},
            {"name":"y","shape":[2,2],"datatype":"FP32","data":[1,2.5,3,4]}]}"#;
        let nested =
            br#"{"outputs":[{"name":"y","shape":[2,2],"datatype":"FP32","data":[[1,2.5],[3,4]]}]}"#;
        let expected = Tensor::f32([2, 2], vec![1.0, 2.5, 3.0, 4.0]);
        for json in [flat.as_slice(), nested.as_slice()] {
            let body = Body { bytes: json.to_vec(), json_length: None };
            assert_eq!(answer(&body, "y").unwrap(), expected);
        }
        let head = br#"{"outputs":[
            {"name":"a","shape":[1],"datatype":"UINT8","parameters":{"binary_data_size":1}},
            {"name":"y","shape":[2],"datatype":"INT64","parameters":{"binary_data_size":16}}]}"#;
        let mut bytes = head.to_vec();
        bytes.push(7);
        bytes.extend([5i64, -6].iter().flat_map(|v| v.to_le_bytes()));
        let body = Body { bytes, json_length: Some(head.len()) };
        assert_eq!(answer(&body, "y").unwrap().values, Values::I64(vec![5, -6]));
    }

    #[test]
    fn an_answer_that_is_none_is_refused_and_says_why() {
        let refuse = |json: &str, length: Option<usize>, word: &str| {
            let body = Body { bytes: json.as_bytes().to_vec(), json_length: length };
            let error = answer(&body, "y").unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        };
        refuse("<html>", None, "no JSON");
        refuse("{}", None, "no `outputs`");
        refuse("{}", Some(3), "shorter");
        refuse(r#"{"outputs":[]}"#, None, "no output `y`");
        let one = |rest: &str| format!(r#"{{"outputs":[{{"name":"y",{rest}}}]}}"#);
        refuse(&one(r#""shape":[2],"datatype":"FP32","data":[1]"#), None, "1 values");
        refuse(&one(r#""shape":[1],"datatype":"FP32","data":[null]"#), None, "no numbers");
        refuse(&one(r#""shape":[1],"datatype":"BYTES","data":[1]"#), None, "`BYTES`");
        let huge = one(r#""shape":[4294967296,4294967296],"datatype":"FP32","data":[1]"#);
        refuse(&huge, None, "values for shape");
        let cut = one(r#""shape":[1],"datatype":"FP32","parameters":{"binary_data_size":4}"#);
        refuse(&cut, Some(cut.len()), "lacks bytes");
    }
}
