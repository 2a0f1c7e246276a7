//! The intermediate representation: plain data, no behaviour beyond look-up and checks.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};

/// Element type of a tensor as the file declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DataType {
    Float32,
    Float64,
    Float16,
    BFloat16,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Bool,
    String,
}

impl DataType {
    /// Whether values of this type carry gradients.
    pub fn is_float(self) -> bool {
        matches!(self, Self::Float32 | Self::Float64 | Self::Float16 | Self::BFloat16)
    }

    /// Smallest and largest value of an integer type.
    pub fn integer_range(self) -> Option<(i64, i64)> {
        Some(match self {
            Self::Int8 => (i64::from(i8::MIN), i64::from(i8::MAX)),
            Self::Int16 => (i64::from(i16::MIN), i64::from(i16::MAX)),
            Self::Int32 => (i64::from(i32::MIN), i64::from(i32::MAX)),
            Self::Int64 | Self::Uint64 => (i64::MIN, i64::MAX),
            Self::Uint8 => (0, 255),
            Self::Uint16 => (0, 65_535),
            Self::Uint32 => (0, i64::from(u32::MAX)),
            Self::Bool => (0, 1),
            _ => return None,
        })
    }
}

/// Values of a constant: half precisions are widened to `f32`, all integers and booleans to `i64`.
#[derive(Debug, Clone, PartialEq)]
pub enum ConstantData {
    /// float16, bfloat16, float32.
    F32(Vec<f32>),
    /// float64.
    F64(Vec<f64>),
    /// Any integer, or bool as 0 and 1.
    I64(Vec<i64>),
}

impl ConstantData {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::I64(v) => v.len(),
        }
    }

    /// No element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A constant tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct ConstantTensor {
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// Type as declared (decides integer wrap, quantised range, and the type on export).
    pub dtype: DataType,
    /// Values; length = product of `shape`.
    pub data: ConstantData,
}

impl ConstantTensor {
    /// A float32 tensor.
    pub fn f32(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        Self { shape: shape.into(), dtype: DataType::Float32, data: ConstantData::F32(data) }
    }

    /// An int64 tensor.
    pub fn i64(shape: impl Into<Vec<usize>>, data: Vec<i64>) -> Self {
        Self { shape: shape.into(), dtype: DataType::Int64, data: ConstantData::I64(data) }
    }

    /// The integers, if it holds integers.
    pub fn as_i64(&self) -> Option<&[i64]> {
        if let ConstantData::I64(v) = &self.data { Some(v) } else { None }
    }

    /// The values as `f32`, converting.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            ConstantData::F32(v) => v.clone(),
            ConstantData::F64(v) => v.iter().map(|&x| x as f32).collect(),
            ConstantData::I64(v) => v.iter().map(|&x| x as f32).collect(),
        }
    }

    /// The values as `f64`, converting.
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.data {
            ConstantData::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            ConstantData::F64(v) => v.clone(),
            ConstantData::I64(v) => v.iter().map(|&x| x as f64).collect(),
        }
    }
}

/// An attribute of a node.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// A number.
    Float(f32),
    /// An integer.
    Int(i64),
    /// Text (UTF-8).
    String(String),
    /// A tensor.
    Tensor(Arc<ConstantTensor>),
    /// Numbers.
    Floats(Vec<f32>),
    /// Integers.
    Ints(Vec<i64>),
    /// Texts.
    Strings(Vec<String>),
    /// A sub-graph (`If`, `Loop`, `Scan`).
    Graph(Arc<Graph>),
}

/// One operator application. Values are named, as in ONNX; an absent optional input is "".
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Name for messages; never empty after import.
    pub name: String,
    /// ONNX operator (`Conv`).
    pub op_type: String,
    /// Operator domain; "" for the standard one.
    pub domain: String,
    /// Names of the inputs; "" where an optional one is absent.
    pub inputs: Vec<String>,
    /// Names of the outputs; "" where an optional one is absent.
    pub outputs: Vec<String>,
    /// Attributes by name.
    pub attributes: BTreeMap<String, Attribute>,
}

/// A dimension of a graph input or output as declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dimension {
    /// A number.
    Fixed(usize),
    /// A symbol ("batch"); "" when nothing is said.
    Symbol(String),
}

/// A graph input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Value name.
    pub name: String,
    /// Element type.
    pub dtype: DataType,
    /// Dimensions; `None` when the file gives no rank.
    pub shape: Option<Vec<Dimension>>,
}

/// A graph of ONNX operators in topological order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Graph {
    /// Graph name.
    pub name: String,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Inputs that are fed (initialisers listed as inputs are not among them).
    pub inputs: Vec<Port>,
    /// Outputs.
    pub outputs: Vec<Port>,
    /// Nodes, each after the nodes it reads.
    pub nodes: Vec<Node>,
    /// Initialisers by value name.
    pub constants: BTreeMap<String, Arc<ConstantTensor>>,
}

impl Node {
    /// A node of the standard domain.
    pub fn new(op_type: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        Self {
            name: name.into(),
            op_type: op_type.into(),
            domain: String::new(),
            inputs: inputs.iter().map(|&s| s.into()).collect(),
            outputs: outputs.iter().map(|&s| s.into()).collect(),
            attributes: BTreeMap::new(),
        }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: Attribute) -> Self {
        self.attributes.insert(name.into(), value);
        self
    }

    /// "node `/conv1/Conv` (Conv)", for messages.
    pub fn describe(&self) -> String {
        format!("node `{}` ({})", self.name, self.op_type)
    }

    /// An integer attribute, or `default` when absent.
    ///
    /// # Errors
    /// When the attribute is there with another type.
    pub fn int(&self, name: &str, default: i64) -> Result<i64> {
        match self.attributes.get(name) {
            None => Ok(default),
            Some(Attribute::Int(v)) => Ok(*v),
            Some(_) => Err(self.wrong_type(name, "an integer")),
        }
    }

    /// A float attribute, or `default` when absent.
    ///
    /// # Errors
    /// When the attribute is there with another type.
    pub fn float(&self, name: &str, default: f32) -> Result<f32> {
        match self.attributes.get(name) {
            None => Ok(default),
            Some(Attribute::Float(v)) => Ok(*v),
            Some(_) => Err(self.wrong_type(name, "a float")),
        }
    }

    /// A list of integers, `None` when absent.
    ///
    /// # Errors
    /// When the attribute is there with another type.
    pub fn ints(&self, name: &str) -> Result<Option<&[i64]>> {
        match self.attributes.get(name) {
            None => Ok(None),
            Some(Attribute::Ints(v)) => Ok(Some(v)),
            Some(_) => Err(self.wrong_type(name, "integers")),
        }
    }

    /// A text attribute, or `default` when absent.
    ///
    /// # Errors
    /// When the attribute is there with another type.
    pub fn text<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str> {
        match self.attributes.get(name) {
            None => Ok(default),
            Some(Attribute::String(v)) => Ok(v),
            Some(_) => Err(self.wrong_type(name, "a text")),
        }
    }

    fn wrong_type(&self, name: &str, expected: &str) -> Error {
        Error::input(format!("attribute `{name}` must be {expected}")).context(self.describe())
    }
}

impl Graph {
    /// The node that makes `value`, if any.
    pub fn producer(&self, value: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.outputs.iter().any(|o| o == value && !o.is_empty()))
    }

    /// How often each operator occurs, sub-graphs included.
    pub fn op_counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        self.count_ops(&mut counts);
        counts
    }

    fn count_ops(&self, counts: &mut BTreeMap<String, usize>) {
        for node in &self.nodes {
            let name = if node.domain.is_empty() {
                node.op_type.clone()
            } else {
                format!("{}.{}", node.domain, node.op_type)
            };
            *counts.entry(name).or_default() += 1;
            for attribute in node.attributes.values() {
                if let Attribute::Graph(graph) = attribute {
                    graph.count_ops(counts);
                }
            }
        }
    }
}
