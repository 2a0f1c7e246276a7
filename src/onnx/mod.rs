//! ONNX files to [`crate::graph::Graph`] and back. Protobuf types come from candle-onnx.
//!
//! Import checks everything a hostile file can get wrong (paths of external data, sizes, types)
//! before memory is taken; export writes what the checker of the `onnx` package accepts.
