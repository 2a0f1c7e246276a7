//! Operators of ONNX Runtime's own domain (com.microsoft) that its optimiser and the exporters
//! write into vision models: fused activations and biases, normalisation with a skip connection,
//! attention. Each is composed of what the standard operators emit.

use super::Rule;
use super::arrange::part;
use super::attention::{Scores, attend, floats, merge_heads, split_heads};
use super::binary::{Binary, emit};
use super::conv::emit_conv;
use super::elementwise::{Function, apply, function};
use super::matmul::{emit_gemm, product};
use super::normalize::{Centre, moments, standardize};
use super::quantize::along;
use super::quantized_contrib::{channels_first, channels_last, image_rank, softmax_rows};
use super::transpose::permute;
use super::{arrange, axis_index, normalize, select};
use crate::error::{Error, Result};
use crate::graph::ir::{Attribute, Node};
use crate::graph::plan::{Lower, Value, data_dependent};
use crate::tensor::kernels::Element;

/// Operators that ONNX Runtime adds to the standard domain.
pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "SimplifiedLayerNormalization" => Some(simplified_layer_normalization),
        _ => None,
    }
}

/// The rule of an operator of ONNX Runtime's own domain.
pub(super) fn microsoft_rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "FusedConv" => fused_conv,
        "FusedGemm" => fused_gemm,
        "FusedMatMul" | "TransposeMatMul" => fused_matmul,
        "Gelu" | "BiasGelu" | "FastGelu" => gelu,
        "QuickGelu" => quick_gelu,
        "BiasSplitGelu" => bias_split_gelu,
        "BiasAdd" => bias_add,
        "BiasSoftmax" => bias_softmax,
        "SimplifiedLayerNormalization" => simplified_layer_normalization,
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => skip_layer_normalization,
        "GroupNorm" => group_norm,
        "MultiHeadAttention" => multi_head_attention,
        "Attention" => attention,
        "LayerNormalization" => return normalize::rule(op),
        "Trilu" => return select::rule(op),
        "Pad" => return arrange::rule(op),
        _ => return None,
    })
}

/// Whether input or output `index` of a list of names is given.
fn given(names: &[String], index: usize) -> bool {
    names.get(index).is_some_and(|name| !name.is_empty())
}

/// Adds input `index`, if it is given.
fn plus_input<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    x: &Value,
    index: usize,
) -> Result<Value> {
    match lower.optional(node, index)? {
        Some(term) => emit(lower, Binary::Add, x, &term),
        None => Ok(x.clone()),
    }
}

/// Emits the activation that a fused node names; `parameters` are its own attributes.
fn activate<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    name: &str,
    parameters: &[(&str, f32)],
) -> Result<Value> {
    let (function, a, b) = match name {
        "" => return Ok(x.clone()),
        "Clip" => {
            let bound = |key: &str, default: f64| {
                let found = parameters.iter().find(|(name, _)| *name == key);
                found.map_or(default, |&(_, value)| f64::from(value))
            };
            (Function::Clip, bound("min", f64::NEG_INFINITY), bound("max", f64::INFINITY))
        }
        _ => {
            let mut alone = Node::new(name, "", &[], &[]);
            for &(key, value) in parameters {
                alone = alone.with(key, Attribute::Float(value));
            }
            function(&alone).map_err(|_| Error::unsupported(format!("activation `{name}`")))?
        }
    };
    Ok(apply(lower, function, (a, b), x))
}

fn fused_conv<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, weight) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let Some(weight) = weight.constant().cloned() else { return Err(data_dependent(node, 1)) };
    let bias = lower.constant_input(node, 2)?;
    let y = emit_conv(lower, node, &x, &weight, bias.as_deref())?;
    let y = plus_input(lower, node, &y, 3)?;
    let name = node.text("activation", "")?;
    let keys = if name == "Clip" { ["min", "max"] } else { ["alpha", "beta"] };
    let values: &[f32] = match node.attributes.get("activation_params") {
        Some(Attribute::Floats(values)) => values,
        _ => &[],
    };
    let parameters: Vec<(&str, f32)> = keys.into_iter().zip(values.iter().copied()).collect();
    let y = activate(lower, &y, name, &parameters)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn fused_gemm<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let y = emit_gemm(lower, node)?;
    let mut parameters = Vec::new();
    for key in ["alpha", "beta", "gamma"] {
        let name = format!("activation_{key}");
        if node.attributes.contains_key(&name) {
            parameters.push((key, node.float(&name, 0.0)?));
        }
    }
    let y = activate(lower, &y, node.text("activation", "")?, &parameters)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Input `index` as a product reads it: first its leading axis moved before the last ("batch"),
/// then its last two swapped ("trans").
fn oriented<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    index: usize,
    [trans, batch]: [&str; 2],
) -> Result<Value> {
    let x = lower.input(node, index)?;
    let (trans, batch) = (node.int(trans, 0)? != 0, node.int(batch, 0)? != 0);
    let rank = x.rank();
    if rank < 2 || !(trans || batch) {
        return Ok(x);
    }
    let mut order: Vec<usize> = (0..rank).collect();
    if batch {
        order[..rank - 1].rotate_left(1);
    }
    if trans {
        order.swap(rank - 2, rank - 1);
    }
    permute(lower, &x, &order)
}

fn fused_matmul<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let a = oriented(lower, node, 0, ["transA", "transBatchA"])?;
    let b = oriented(lower, node, 1, ["transB", "transBatchB"])?;
    let mut y = product(lower, &a, &b)?;
    let alpha = f64::from(node.float("alpha", 1.0)?);
    if alpha != 1.0 {
        y = apply(lower, Function::Scale, (alpha, 0.0), &y);
    }
    lower.set_output(node, 0, y);
    Ok(())
}

fn gelu<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let x = plus_input(lower, node, &x, 1)?;
    let fast = node.op_type == "FastGelu";
    let function = if fast { Function::GeluTanh } else { Function::Gelu };
    let y = apply(lower, function, (0.0, 0.0), &x);
    lower.set_output(node, 0, y);
    Ok(())
}

fn quick_gelu<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let alpha = f64::from(node.float("alpha", 1.702)?);
    let y = apply(lower, Function::Swish, (alpha, 0.0), &x);
    lower.set_output(node, 0, y);
    Ok(())
}

/// The first half of the features times the GELU of the second.
fn bias_split_gelu<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let x = plus_input(lower, node, &x, 1)?;
    let axis = axis_index(-1, x.rank())?;
    let width = x.shape().get(axis).copied().unwrap_or(0);
    if width == 0 || !width.is_multiple_of(2) {
        return Err(Error::input(format!("splits `{width}` features in halves")));
    }
    let left = part(lower, &x, axis, 0, width / 2)?;
    let right = part(lower, &x, axis, width / 2, width / 2)?;
    let right = apply(lower, Function::Gelu, (0.0, 0.0), &right);
    let y = emit(lower, Binary::Mul, &left, &right)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn bias_add<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let x = plus_input(lower, node, &x, 1)?;
    let y = plus_input(lower, node, &x, 2)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// A row is all axes from `axis` on, as before operator set 13.
fn bias_softmax<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = axis_index(node.int("axis", 1)?, x.rank())?;
    let row: usize = x.shape().iter().skip(axis).product();
    let sum = plus_input(lower, node, &x, 1)?;
    if sum.shape() != x.shape() {
        return Err(Error::input(format!("a bias makes `{:?}` of the scores", sum.shape())));
    }
    let y = softmax_rows(lower, &sum, row)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits the normalisation of all axes from `axis` on, times `scale`.
fn normalised<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    axis: usize,
    epsilon: f32,
    centre: Centre,
    scale: &Value,
) -> Result<Value> {
    let group: usize = x.shape().iter().skip(axis).product();
    let y = standardize(lower, x, group, f64::from(epsilon), centre);
    emit(lower, Binary::Mul, &y, scale)
}

fn simplified_layer_normalization<'g, T: Element>(
    lower: &mut Lower<'g, T>,
    node: &'g Node,
) -> Result<()> {
    if given(&node.outputs, 1) {
        return Err(Error::unsupported("its output of the deviation"));
    }
    let (x, scale) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let axis = axis_index(node.int("axis", -1)?, x.rank())?;
    let y = normalised(lower, &x, axis, node.float("epsilon", 1e-5)?, Centre::Zero, &scale)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn skip_layer_normalization<'g, T: Element>(
    lower: &mut Lower<'g, T>,
    node: &'g Node,
) -> Result<()> {
    let simplified = node.op_type == "SkipSimplifiedLayerNormalization";
    let (centre, bias) = if simplified { (Centre::Zero, 3) } else { (Centre::Mean, 4) };
    let (x, scale) = (lower.input(node, 0)?, lower.input(node, 2)?);
    let sum = plus_input(lower, node, &x, 1)?;
    let sum = plus_input(lower, node, &sum, bias)?;
    let axis = axis_index(-1, sum.rank())?;
    let epsilon = node.float("epsilon", 1e-12)?;
    let mut y = normalised(lower, &sum, axis, epsilon, centre, &scale)?;
    if !simplified {
        y = plus_input(lower, node, &y, 3)?;
    }
    lower.set_output(node, 0, y);
    if given(&node.outputs, 1) || given(&node.outputs, 2) {
        if simplified {
            return Err(Error::unsupported("its outputs of mean and deviation"));
        }
        let (mean, _, inverse) = moments(lower, &sum, &[axis], f64::from(epsilon))?;
        lower.set_output(node, 1, mean);
        lower.set_output(node, 2, inverse);
    }
    lower.set_output(node, 3, sum);
    Ok(())
}

fn group_norm<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let mut x = lower.input(node, 0)?;
    let last = node.int("channels_last", 1)? != 0;
    if last {
        x = channels_first(lower, &x)?;
    }
    let rank = image_rank(&x)?;
    let channels = x.shape()[1];
    let groups = usize::try_from(node.int("groups", 0)?).unwrap_or(0);
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Err(Error::input(format!("{channels} channels in `{groups}` groups")));
    }
    let group = x.shape().iter().skip(1).product::<usize>() / groups;
    let epsilon = f64::from(node.float("epsilon", 1e-5)?);
    let mut y = standardize(lower, &x, group, epsilon, Centre::Mean);
    for (index, binary) in [(1, Binary::Mul), (2, Binary::Add)] {
        let values = lower.input(node, index)?;
        let values = along(lower, &values, 1, rank)?;
        y = emit(lower, binary, &y, &values)?;
    }
    match node.int("activation", 0)? {
        0 => {}
        1 => y = apply(lower, Function::Swish, (1.0, 0.0), &y),
        other => return Err(Error::unsupported(format!("activation number `{other}`"))),
    }
    if last {
        y = channels_last(lower, &y)?;
    }
    lower.set_output(node, 0, y);
    Ok(())
}

/// Refuses a node that continues a sequence: a classifier has none.
fn no_past(node: &Node, inputs: &[usize]) -> Result<()> {
    if inputs.iter().any(|&index| given(&node.inputs, index)) {
        return Err(Error::unsupported("keys and values of earlier steps as inputs"));
    }
    if (1..node.outputs.len()).any(|index| given(&node.outputs, index)) {
        return Err(Error::unsupported("its outputs of keys and values"));
    }
    Ok(())
}

/// What the constant mask at input `index` adds to the scores [batch, heads, length, keys].
fn mask<T: Element>(
    lower: &Lower<'_, T>,
    node: &Node,
    index: usize,
    [batch, length, keys]: [usize; 3],
) -> Result<Option<Value>> {
    let Some(tensor) = lower.constant_input(node, index)? else { return Ok(None) };
    let values = tensor.as_i64().ok_or_else(|| Error::input("its mask must hold integers"))?;
    let hidden = f64::from(node.float("mask_filter_value", -10_000.0)?);
    let weigh = |open: bool| if open { 0.0 } else { hidden };
    let several = |count: usize| count == batch || count == 1;
    let (shape, data): (Vec<usize>, Vec<f64>) = match tensor.shape[..] {
        // The lengths; with as many again, the first positions.
        [count] if count == batch || count == 2 * batch => {
            let (ends, starts) = values.split_at(batch);
            let row = |image: usize| {
                let (end, start) = (ends[image], starts.get(image).copied().unwrap_or(0));
                (0..keys as i64).map(move |key| weigh(start <= key && key < end))
            };
            (vec![batch, 1, 1, keys], (0..batch).flat_map(row).collect())
        }
        [count, k] if several(count) && k == keys => {
            (vec![count, 1, 1, keys], values.iter().map(|&v| weigh(v > 0)).collect())
        }
        [count, s, k] if several(count) && s == length && k == keys => {
            (vec![count, 1, length, keys], values.iter().map(|&v| weigh(v > 0)).collect())
        }
        _ => {
            return Err(Error::unsupported(format!("a mask of shape `{:?}`", tensor.shape)));
        }
    };
    Ok(Some(floats(shape, data)))
}

/// Emits the attention of operands [batch, heads, length, size], with the masks at inputs `mask`
/// (constant integers) and `bias` (added as it is), as [batch, length, heads * size].
fn attended<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    operands: [&Value; 3],
    [mask_input, bias]: [usize; 2],
) -> Result<Value> {
    let [q, k, v] = operands;
    let (&[batch, _, length, size], &[_, _, keys, _], 4) = (q.shape(), k.shape(), v.rank()) else {
        return Err(Error::input("queries, keys and values must have three or four axes"));
    };
    let mut scale = f64::from(node.float("scale", 0.0)?);
    if scale == 0.0 {
        scale = 1.0 / (size.max(1) as f64).sqrt();
    }
    let mut sight = mask(lower, node, mask_input, [batch, length, keys])?;
    if node.int("unidirectional", 0)? != 0 {
        if length != keys {
            let text = format!("attention of {length} queries to the past of `{keys}` keys");
            return Err(Error::unsupported(text));
        }
        let later = |at: usize| if at % keys > at / keys { f64::NEG_INFINITY } else { 0.0 };
        let later = floats(vec![length, keys], (0..length * keys).map(later).collect());
        sight = Some(match sight {
            Some(mask) => emit(lower, Binary::Add, &mask, &later)?,
            None => later,
        });
    }
    let bias = lower.optional(node, bias)?;
    let scores = Scores { scale, mask: bias.as_ref(), sight, softcap: 0.0 };
    let stages = attend(lower, operands, &scores)?;
    merge_heads(lower, &stages.output)
}

/// [batch, length, heads, count, size] as `count` times [batch, length, heads * size].
fn unpacked<T: Element>(lower: &mut Lower<'_, T>, x: &Value, count: usize) -> Result<Vec<Value>> {
    let &[batch, length, heads, packed, size] = x.shape() else {
        return Err(Error::input(format!("needs packed heads, got shape `{:?}`", x.shape())));
    };
    if packed != count {
        return Err(Error::input(format!("packs `{packed}` tensors, not {count}")));
    }
    (0..count)
        .map(|index| {
            let one = part(lower, x, 3, index, 1)?;
            lower.reshape(&one, vec![batch, length, heads * size])
        })
        .collect()
}

/// Adds the parts of `bias`, one after the other, to the features of those that are not split yet,
/// and splits the features into heads.
fn biased_heads<T: Element>(
    lower: &mut Lower<'_, T>,
    sides: Vec<Value>,
    bias: Option<&Value>,
    heads: usize,
) -> Result<[Value; 3]> {
    let mut start = 0;
    let mut split = Vec::new();
    for mut side in sides {
        let &[_, _, width] = side.shape() else {
            split.push(side);
            continue;
        };
        if let Some(bias) = bias {
            if bias.rank() != 1 || start + width > bias.len() {
                return Err(Error::input(format!("a bias of shape `{:?}`", bias.shape())));
            }
            let own = part(lower, bias, 0, start, width)?;
            start += width;
            side = emit(lower, Binary::Add, &side, &own)?;
        }
        split.push(split_heads(lower, &side, heads)?);
    }
    split.try_into().map_err(|_| Error::input("needs queries, keys and values"))
}

fn multi_head_attention<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    no_past(node, &[6, 7])?;
    let query = lower.input(node, 0)?;
    let sides = match (lower.optional(node, 1)?, lower.optional(node, 2)?) {
        (Some(key), Some(value)) => vec![query, key, value],
        (Some(key), None) => {
            let mut sides = unpacked(lower, &key, 2)?;
            sides.insert(0, query);
            sides
        }
        (None, _) => unpacked(lower, &query, 3)?,
    };
    let heads = usize::try_from(node.int("num_heads", 0)?).unwrap_or(0);
    let bias = lower.optional(node, 3)?;
    let [q, k, v] = biased_heads(lower, sides, bias.as_ref(), heads)?;
    let y = attended(lower, node, [&q, &k, &v], [4, 5])?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn attention<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    no_past(node, &[4, 6])?;
    if node.int("do_rotary", 0)? != 0 {
        return Err(Error::unsupported("rotary positions"));
    }
    let (x, weights) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let y = product(lower, &x, &weights)?;
    let y = plus_input(lower, node, &y, 2)?;
    let &[_, _, width] = y.shape() else {
        return Err(Error::unsupported(format!("attention on shape `{:?}`", y.shape())));
    };
    let widths: Vec<usize> = match node.ints("qkv_hidden_sizes")? {
        Some(sizes) => sizes.iter().map(|&size| usize::try_from(size).unwrap_or(0)).collect(),
        None => vec![width / 3; 3],
    };
    if widths.len() != 3 || widths.iter().fold(0, |sum: usize, &w| sum.saturating_add(w)) != width {
        return Err(Error::input(format!("{width} features in parts of `{widths:?}`")));
    }
    let mut start = 0;
    let mut sides = Vec::new();
    for width in widths {
        sides.push(part(lower, &y, 2, start, width)?);
        start += width;
    }
    let heads = usize::try_from(node.int("num_heads", 0)?).unwrap_or(0);
    let [q, k, v] = biased_heads(lower, sides, None, heads)?;
    let y = attended(lower, node, [&q, &k, &v], [3, 5])?;
    lower.set_output(node, 0, y);
    Ok(())
}
