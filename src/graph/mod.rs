//! The one graph: values, nodes with ONNX operators, constants; compiled to a frozen plan.
//!
//! An imported ONNX file and a built-in backbone are both a [`Graph`]; export is the reverse of
//! import. A graph holds ONNX operators as they are (`op_type` and attributes); what they mean is in
//! `ops`, one file a family, and [`plan`] lowers them for a concrete input shape.

pub mod check;
pub mod facts;
pub mod ir;
pub(crate) mod ops;
pub mod plan;
pub mod trainable;

pub use ir::{Attribute, ConstantData, ConstantTensor, DataType, Dimension, Graph, Node, Port};
pub use ops::unsupported_ops;
pub use plan::{CompileOptions, Gradient, Plan, Taps, Workspace, evaluate};
pub use trainable::Trainable;
