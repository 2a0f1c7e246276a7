//! The image input: which one it is, its axes, size, type, and what the graph does to it first.
//!
//! The first nodes tell much: a `Transpose` to the first convolution settles the layout, a division
//! by 255 the value range, a reversal of the channels that the file wants BGR.

use super::index::GraphIndex;
use crate::error::{Error, Result};
use crate::graph::{Attribute, DataType, Dimension, Node, Port};
use crate::zoo::sidecar::MAX_SIDE;
use crate::zoo::spec::{BatchDimension, Color, ElementType, Layout};

/// Largest fixed batch accepted; a bigger one is a mistake or an attack on memory.
const MAX_BATCH: usize = 1024;

/// What the graph says of its image input.
#[derive(Debug, Clone, PartialEq)]
pub struct InputFacts {
    /// Value name.
    pub name: String,
    /// Axis order, if the first convolution or the declared shape settles it.
    pub layout: Option<Layout>,
    /// Element type.
    pub dtype: ElementType,
    /// Channels, declared or taken from the first convolution.
    pub channels: Option<usize>,
    /// Height, when declared.
    pub height: Option<usize>,
    /// Width, when declared.
    pub width: Option<usize>,
    /// The batch axis.
    pub batch: BatchDimension,
    /// Values the input expects, when the type or the first arithmetic settles it.
    pub value_range: Option<[f32; 2]>,
    /// Whether the graph itself scales or shifts its input.
    pub normalised_inside: Normalised,
    /// Channel order, when there is one channel or the graph reverses three.
    pub color: Option<Color>,
}

/// Where the input's normalisation happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalised {
    /// The graph scales or shifts its input.
    Inside,
    /// The graph feeds its input to the network as it is; the caller must normalise.
    Outside,
}

/// Reads the input facts. `fallback` is the axis order the sidecar gives, for files that leave it
/// open.
///
/// # Errors
/// When no single image input of rank 4 exists, or its type or channel count cannot be fed.
pub fn input_facts(index: &GraphIndex<'_>, fallback: Option<Layout>) -> Result<InputFacts> {
    let port = image_port(index)?;
    let place = || format!("input `{}`", port.name);
    let dtype = element_type(port.dtype).ok_or_else(|| {
        Error::input(format!(
            "element type of an image must be float or uint8, found `{:?}`",
            port.dtype
        ))
        .context(place())
        .hint("export the model with a float or uint8 image input")
    })?;
    let first = first_steps(index, &port.name);
    let axes = port.shape.as_deref();
    let layout = layout(axes, &first);
    let axis = |position: usize| axes.and_then(|axes| size(axes.get(position)));
    let order = layout.or(fallback).unwrap_or(Layout::Nchw);
    let (declared, height, width) = match order {
        Layout::Nchw => (axis(1), axis(2), axis(3)),
        Layout::Nhwc => (axis(3), axis(1), axis(2)),
    };
    let channels = declared.or(first.channels);
    if let Some(channels) = channels
        && !matches!(channels, 1 | 3)
    {
        return Err(Error::input(format!("images have 1 or 3 channels, found `{channels}`"))
            .context(place())
            .hint("metazoa feeds grey and RGB images; export the model for one of them"));
    }
    for side in [height, width].into_iter().flatten() {
        if side == 0 || side > MAX_SIDE {
            return Err(Error::input(format!(
                "image sides go from 1 to {MAX_SIDE} pixels, found `{side}`"
            ))
            .context(place()));
        }
    }
    let batch = match axis(0) {
        None => BatchDimension::Free,
        Some(n) if (1..=MAX_BATCH).contains(&n) => BatchDimension::Fixed(n),
        Some(n) => {
            return Err(Error::input(format!("batch goes from 1 to {MAX_BATCH}, found `{n}`"))
                .context(place())
                .hint("export the model with a free batch axis"));
        }
    };
    let inside = first.scale != 1.0 || first.offset != 0.0;
    Ok(InputFacts {
        name: port.name.clone(),
        layout,
        dtype,
        channels,
        height,
        width,
        batch,
        value_range: value_range(dtype, &first),
        normalised_inside: if inside { Normalised::Inside } else { Normalised::Outside },
        color: match channels {
            Some(1) => Some(Color::Grey),
            Some(3) if first.reverses(order) => Some(Color::Bgr),
            _ => None,
        },
    })
}

/// The one input that is an image: rank 4, or without a declared rank.
fn image_port<'a>(index: &GraphIndex<'a>) -> Result<&'a Port> {
    let inputs = &index.graph.inputs;
    match inputs.as_slice() {
        [port] => match port.shape.as_ref().map(Vec::len) {
            Some(4) | None => Ok(port),
            Some(rank) => Err(Error::input(format!(
                "not an image classifier: the input must have 4 axes (batch, channels, height, width), found `{rank}`"
            ))
            .context(format!("input `{}`", port.name))
            .hint("only image classifiers can be used; remove the file from the zoo")),
        },
        [] => Err(Error::input("the graph has no input")),
        many => {
            let names: Vec<_> = many.iter().map(|port| port.name.as_str()).collect();
            Err(Error::input(format!(
                "the graph must have one input, the image, found `{}`",
                names.join(", ")
            ))
            .hint("export the model with the image as its only input"))
        }
    }
}

fn element_type(dtype: DataType) -> Option<ElementType> {
    Some(match dtype {
        DataType::Float32 => ElementType::Float32,
        DataType::Float16 => ElementType::Float16,
        DataType::Float64 => ElementType::Float64,
        DataType::Uint8 => ElementType::Uint8,
        _ => return None,
    })
}

fn size(dimension: Option<&Dimension>) -> Option<usize> {
    match dimension {
        Some(Dimension::Fixed(n)) => Some(*n),
        _ => None,
    }
}

/// The convolution decides; without one, the axis that can be channels.
fn layout(axes: Option<&[Dimension]>, first: &FirstSteps) -> Option<Layout> {
    match first.channel_axis {
        Some(1) => return Some(Layout::Nchw),
        Some(3) => return Some(Layout::Nhwc),
        _ => {}
    }
    let axes = axes?;
    let channels = |position| matches!(size(axes.get(position)), Some(1 | 3 | 4));
    match (channels(1), channels(3)) {
        (true, false) => Some(Layout::Nchw),
        (false, true) => Some(Layout::Nhwc),
        _ => None,
    }
}

/// uint8 holds bytes; a float input is 0..255 when the graph divides by about 255 or subtracts a
/// mean no [0, 1] image can have; it is 0..1 when the graph normalises such values.
fn value_range(dtype: ElementType, first: &FirstSteps) -> Option<[f32; 2]> {
    if dtype == ElementType::Uint8 {
        return Some([0.0, 255.0]);
    }
    if first.scale == 1.0 && first.offset == 0.0 {
        return None;
    }
    let centre = -first.offset / first.scale;
    if first.scale.abs() < 0.1 || centre > 2.0 { Some([0.0, 255.0]) } else { Some([0.0, 1.0]) }
}

/// What happens to the image before the network proper, channels averaged.
#[derive(Debug, PartialEq)]
struct FirstSteps {
    scale: f64,
    offset: f64,
    /// The input's axes that are reversed, once for each time.
    reversed: Vec<usize>,
    /// The input's axis that the first convolution reads as channels.
    channel_axis: Option<usize>,
    /// Input channels of the first convolution.
    channels: Option<usize>,
}

impl FirstSteps {
    /// Whether the channels come out in the opposite order.
    fn reverses(&self, layout: Layout) -> bool {
        let channels = match layout {
            Layout::Nchw => 1,
            Layout::Nhwc => 3,
        };
        self.reversed.iter().filter(|&&axis| axis == channels).count() % 2 == 1
    }
}

/// Follows the input through casts, transposes, arithmetic with constants and channel reversals.
fn first_steps(index: &GraphIndex<'_>, input: &str) -> FirstSteps {
    let mut steps = FirstSteps {
        scale: 1.0,
        offset: 0.0,
        reversed: Vec::new(),
        channel_axis: None,
        channels: None,
    };
    let mut axes = [0, 1, 2, 3];
    let mut value = input;
    // Each turn moves one node down the graph, which is finite and in topological order.
    for _ in 0..64 {
        // dynamo's exports also read the input's shape.
        let mut readers = index.consumers(value).iter().filter(|node| node.op_type != "Shape");
        let (Some(node), None) = (readers.next(), readers.next()) else { break };
        match node.op_type.as_str() {
            "Conv" | "QLinearConv" | "ConvInteger" => {
                steps.channel_axis = axes.get(1).copied();
                steps.channels = convolution_channels(index, node);
                break;
            }
            "Cast" | "Identity" | "Dropout" => {}
            "QuantizeLinear" | "DequantizeLinear" => {}
            "Transpose" => {
                let Ok(Some(order)) = node.ints("perm") else { break };
                let Some(next) = permuted(axes, order) else { break };
                axes = next;
            }
            "Add" | "Sub" | "Mul" | "Div" => {
                let Some(()) = arithmetic(index, node, value, &mut steps) else { break };
            }
            "BatchNormalization" => {
                let Some(()) = batch_normalisation(index, node, &mut steps) else { break };
            }
            "Slice" | "Gather" => {
                let Some(axis) = reversed_axis(index, node) else { break };
                let Some(axis) = axes.get(axis) else { break };
                steps.reversed.push(*axis);
            }
            _ => break,
        }
        let Some(next) = node.outputs.first() else { break };
        value = next;
    }
    steps
}

fn convolution_channels(index: &GraphIndex<'_>, node: &Node) -> Option<usize> {
    let weight = if node.op_type == "QLinearConv" {
        index.constant_input(node, 3)?
    } else {
        weight_behind(index, node.inputs.get(1)?)?
    };
    let group = usize::try_from(node.int("group", 1).ok()?).ok()?;
    weight.shape.get(1)?.checked_mul(group)
}

/// A weight, or the integers behind its `DequantizeLinear`.
fn weight_behind(
    index: &GraphIndex<'_>,
    value: &str,
) -> Option<std::sync::Arc<crate::graph::ConstantTensor>> {
    index.constant(value).or_else(|| {
        let node = index.producer(value)?;
        (node.op_type == "DequantizeLinear").then(|| index.constant_input(node, 0))?
    })
}

fn permuted(axes: [usize; 4], order: &[i64]) -> Option<[usize; 4]> {
    let mut next = [0; 4];
    if order.len() != 4 {
        return None;
    }
    for (to, &from) in next.iter_mut().zip(order) {
        *to = *axes.get(usize::try_from(from).ok()?)?;
    }
    Some(next)
}

fn arithmetic(
    index: &GraphIndex<'_>,
    node: &Node,
    value: &str,
    steps: &mut FirstSteps,
) -> Option<()> {
    let [left, right] = node.inputs.as_slice() else { return None };
    let (constant, image_first) =
        if left == value { (index.constant(right)?, true) } else { (index.constant(left)?, false) };
    // Per-channel or scalar constants only: a bigger one is a position embedding, not a mean.
    if constant.data.is_empty() || constant.data.len() > 4 {
        return None;
    }
    let values = constant.to_f64();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    match (node.op_type.as_str(), image_first) {
        ("Add", _) => steps.offset += mean,
        ("Sub", true) => steps.offset -= mean,
        ("Sub", false) => {
            steps.scale = -steps.scale;
            steps.offset = mean - steps.offset;
        }
        ("Mul", _) => {
            steps.scale *= mean;
            steps.offset *= mean;
        }
        ("Div", true) if mean != 0.0 => {
            steps.scale /= mean;
            steps.offset /= mean;
        }
        _ => return None,
    }
    Some(())
}

/// A normalisation of the input itself says what it expects: (x - mean) * scale / std + bias.
fn batch_normalisation(index: &GraphIndex<'_>, node: &Node, steps: &mut FirstSteps) -> Option<()> {
    let mut average = [0.0; 4];
    for (position, slot) in average.iter_mut().enumerate() {
        let values = index.constant_input(node, position + 1)?.to_f64();
        *slot = values.iter().sum::<f64>() / values.len().max(1) as f64;
    }
    let [gamma, beta, mean, variance] = average;
    let slope = gamma / (variance + f64::from(node.float("epsilon", 1e-5).ok()?)).sqrt();
    steps.scale *= slope;
    steps.offset = (steps.offset - mean) * slope + beta;
    Some(())
}

/// The axis that `x[:, ::-1]` or `x[:, [2, 1, 0]]` reverses.
fn reversed_axis(index: &GraphIndex<'_>, node: &Node) -> Option<usize> {
    let numbers = |position: usize, name: &str| match node.attributes.get(name) {
        Some(Attribute::Ints(values)) => Some(values.clone()),
        _ => index.constant_input(node, position)?.as_i64().map(<[i64]>::to_vec),
    };
    let axis = if node.op_type == "Gather" {
        let order = index.constant_input(node, 1)?;
        (order.as_i64()? == [2, 1, 0]).then_some(node.int("axis", 0).ok()?)?
    } else {
        let (axes, steps) = (numbers(3, "axes")?, numbers(4, "steps")?);
        match (axes.as_slice(), steps.as_slice()) {
            ([axis], [-1]) => *axis,
            _ => return None,
        }
    };
    usize::try_from(if axis < 0 { axis + 4 } else { axis }).ok()
}
