//! The backbone as a graph of ONNX operators, for export and for ONNX Runtime.

use std::sync::Arc;

use super::backbone::{Backbone, EPSILON, IMAGE_MEAN, IMAGE_STD, numbers};
use crate::error::Result;
use crate::graph::{Attribute, ConstantTensor, DataType, Dimension, Graph, Node, Port};

/// Operator set the graph is written in.
const OPSET: i64 = 17;

impl Backbone {
    /// The embedding network for images of `height` x `width`: input `images` `[batch, 3, H, W]`,
    /// canonical ([0, 1], RGB), normalised inside; output `embedding` `[batch, d]`. Normalisation uses
    /// the running statistics.
    ///
    /// # Errors
    /// When the images are smaller than 16 x 16.
    pub fn to_graph(&self, height: usize, width: usize) -> Result<Graph> {
        let dim = self.embedding_dim(height, width)?;
        let batch = || Dimension::Symbol("batch".into());
        let port = |name: &str, sizes: &[usize]| Port {
            name: name.into(),
            dtype: DataType::Float32,
            shape: Some(
                std::iter::once(batch())
                    .chain(sizes.iter().map(|&n| Dimension::Fixed(n)))
                    .collect(),
            ),
        };
        let mut graph = Graph {
            name: "embedding".into(),
            opset: OPSET,
            inputs: vec![port("images", &[3, height, width])],
            outputs: vec![port("embedding", &[dim])],
            ..Graph::default()
        };
        let mut constant = |name: &str, shape: &[usize], values: Vec<f32>| {
            graph.constants.insert(name.into(), Arc::new(ConstantTensor::f32(shape, values)));
        };
        constant("image_mean", &[], vec![IMAGE_MEAN as f32]);
        constant("image_std", &[], vec![IMAGE_STD as f32]);
        for parameter in self.parameters() {
            constant(&parameter.name, parameter.value.dims(), numbers(&parameter.value)?);
        }
        for (at, running) in self.running().iter().enumerate() {
            let name = |what| format!("norm{}.running_{what}", at + 1);
            constant(&name("mean"), &[self.width()], running.mean.clone());
            constant(&name("var"), &[self.width()], running.variance.clone());
        }
        graph.nodes = nodes(self.running().len());
        Ok(graph)
    }
}

fn nodes(blocks: usize) -> Vec<Node> {
    let ints = |values: &[i64]| Attribute::Ints(values.to_vec());
    let mut nodes = vec![
        Node::new("Sub", "normalise/Sub", &["images", "image_mean"], &["centred"]),
        Node::new("Div", "normalise/Div", &["centred", "image_std"], &["block0"]),
    ];
    for block in 1..=blocks {
        let value = |what: &str| format!("{what}{block}");
        let parameter = |layer: &str, what: &str| format!("{layer}{block}.{what}");
        let input = format!("block{}", block - 1);
        nodes.push(
            Node::new(
                "Conv",
                &format!("block{block}/Conv"),
                &[&input, &parameter("conv", "weight"), &parameter("conv", "bias")],
                &[&value("conv")],
            )
            .with("kernel_shape", ints(&[3, 3]))
            .with("pads", ints(&[1, 1, 1, 1]))
            .with("strides", ints(&[1, 1]))
            .with("dilations", ints(&[1, 1]))
            .with("group", Attribute::Int(1)),
        );
        nodes.push(
            Node::new(
                "BatchNormalization",
                &format!("block{block}/BatchNormalization"),
                &[
                    &value("conv"),
                    &parameter("norm", "weight"),
                    &parameter("norm", "bias"),
                    &parameter("norm", "running_mean"),
                    &parameter("norm", "running_var"),
                ],
                &[&value("norm")],
            )
            .with("epsilon", Attribute::Float(EPSILON as f32)),
        );
        let name = format!("block{block}/Relu");
        nodes.push(Node::new("Relu", &name, &[&value("norm")], &[&value("relu")]));
        nodes.push(
            Node::new(
                "MaxPool",
                &format!("block{block}/MaxPool"),
                &[&value("relu")],
                &[&value("block")],
            )
            .with("kernel_shape", ints(&[2, 2]))
            .with("strides", ints(&[2, 2])),
        );
    }
    let last = format!("block{blocks}");
    nodes.push(
        Node::new("Flatten", "Flatten", &[&last], &["embedding"]).with("axis", Attribute::Int(1)),
    );
    nodes
}
