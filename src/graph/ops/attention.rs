//! Attention and RotaryEmbedding: composed of matrix products, a masked softmax and copies, so their
//! gradient is that of the parts.

use std::sync::Arc;

use super::arrange::side_by_side;
use super::binary::{Binary, emit};
use super::elementwise::{Function, apply};
use super::matmul::product;
use super::rearrange::{Source, rearrange};
use super::select::choose;
use super::softmax::masked_softmax;
use super::transpose::permute;
use super::{Rule, broadcast_shape};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantData, ConstantTensor, DataType, Node};
use crate::graph::plan::{Lower, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "Attention" => attention,
        "RotaryEmbedding" => rotary_embedding,
        _ => return None,
    })
}

/// A float constant.
pub(super) fn floats(shape: Vec<usize>, values: Vec<f64>) -> Value {
    let data = ConstantData::F64(values);
    Value::Constant(Arc::new(ConstantTensor { shape, dtype: DataType::Float64, data }))
}

/// [B, S, heads * size] to [B, heads, S, size]; four axes stay.
pub(super) fn split_heads<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    heads: usize,
) -> Result<Value> {
    let &[batch, length, hidden] = x.shape() else { return Ok(x.clone()) };
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(Error::input(format!("`{hidden}` features do not split in {heads} heads")));
    }
    let x = lower.reshape(x, vec![batch, length, heads, hidden / heads])?;
    permute(lower, &x, &[0, 2, 1, 3])
}

/// [B, heads, S, size] to [B, S, heads * size].
pub(super) fn merge_heads<T: Element>(lower: &mut Lower<'_, T>, x: &Value) -> Result<Value> {
    let &[batch, heads, length, size] = x.shape() else { return Ok(x.clone()) };
    let x = permute(lower, x, &[0, 2, 1, 3])?;
    lower.reshape(&x, vec![batch, length, heads * size])
}

/// Each head `times` times in a row (grouped-query attention).
fn repeat_heads<T: Element>(lower: &mut Lower<'_, T>, x: &Value, times: usize) -> Result<Value> {
    if times == 1 {
        return Ok(x.clone());
    }
    let &[batch, heads, length, size] = x.shape() else { return Ok(x.clone()) };
    let block = length * size;
    let map = (0..batch * heads * times * block)
        .map(move |i| Source::Element { input: 0, at: i / (times * block) * block + i % block });
    let shape = vec![batch, heads * times, length, size];
    rearrange(lower, std::slice::from_ref(x), shape, 0.0, map)
}

/// Which keys the queries may see by position.
#[derive(Debug, Clone, Copy)]
struct Sight {
    /// Positions before and after the query's own; `None` without a bound.
    before: Option<i64>,
    after: Option<i64>,
}

/// What scaled dot-product attention is to compute, beside its three operands.
pub(super) struct Scores<'a> {
    pub(super) scale: f64,
    /// Added to the scores (a float) or choosing among them (a bool); broadcasts to
    /// [B, heads, queries, keys].
    pub(super) mask: Option<&'a Value>,
    /// Added to the scores: 0 or minus infinity.
    pub(super) sight: Option<Value>,
    pub(super) softcap: f64,
}

/// The stages of attention scores [B, heads, queries, keys].
pub(super) struct Stages {
    raw: Value,
    capped: Value,
    biased: Value,
    weights: Value,
    pub(super) output: Value,
}

/// Emits attention of `q`, `k`, `v` [B, heads, length, size] with equal numbers of heads. A query that
/// sees no key gets zeros.
pub(super) fn attend<T: Element>(
    lower: &mut Lower<'_, T>,
    [q, k, v]: [&Value; 3],
    scores: &Scores<'_>,
) -> Result<Stages> {
    // The root of the scale on both sides, as the operator's definition has it.
    let root = scores.scale.sqrt();
    let q = apply(lower, Function::Scale, (root, 0.0), q);
    let k = apply(lower, Function::Scale, (root, 0.0), k);
    let k = permute(lower, &k, &[0, 1, 3, 2])?;
    let raw = product(lower, &q, &k)?;
    let mut capped = raw.clone();
    if scores.softcap != 0.0 {
        let small = apply(lower, Function::Scale, (1.0 / scores.softcap, 0.0), &raw);
        let bent = apply(lower, Function::Tanh, (0.0, 0.0), &small);
        capped = apply(lower, Function::Scale, (scores.softcap, 0.0), &bent);
    }
    let mut biased = capped.clone();
    if let Some(sight) = &scores.sight {
        biased = emit(lower, Binary::Add, &biased, sight)?;
    }
    if let Some(mask) = scores.mask {
        let keys = biased.shape().last().copied().unwrap_or(0);
        let mask = padded_mask(lower, mask, keys)?;
        biased = match mask.dtype() {
            DataType::Bool => {
                let never = floats(Vec::new(), vec![f64::NEG_INFINITY]);
                choose(lower, &mask, &biased, &never)?
            }
            _ => emit(lower, Binary::Add, &biased, &mask)?,
        };
    }
    let weights = masked_softmax(lower, &biased);
    let output = product(lower, &weights, v)?;
    Ok(Stages { raw, capped, biased, weights, output })
}

/// A mask that is shorter than the keys hides the rest.
fn padded_mask<T: Element>(lower: &mut Lower<'_, T>, mask: &Value, keys: usize) -> Result<Value> {
    let own = mask.shape().last().copied().unwrap_or(0);
    if own == keys || own == 1 {
        return Ok(mask.clone());
    }
    if own > keys {
        return Err(Error::input(format!("a mask for {own} keys where there are `{keys}`")));
    }
    let mut shape = mask.shape().to_vec();
    let rows: usize = shape[..shape.len() - 1].iter().product();
    if let Some(last) = shape.last_mut() {
        *last = keys;
    }
    let map = (0..rows).flat_map(move |row| {
        (0..keys).map(move |key| match key < own {
            true => Source::Element { input: 0, at: row * own + key },
            false => Source::Fill,
        })
    });
    let hidden = if mask.dtype() == DataType::Bool { 0.0 } else { f64::NEG_INFINITY };
    rearrange(lower, std::slice::from_ref(mask), shape, hidden, map)
}

/// 0 where query i of `queries` may see key j of `keys`, minus infinity elsewhere, one table for each
/// of `offsets` (valid keys before the first query) and `valid` (keys that are not padding).
fn sight_table(sight: Sight, queries: usize, keys: usize, rows: &[(i64, i64)]) -> Value {
    let mut values = Vec::with_capacity(rows.len() * queries * keys);
    for &(offset, valid) in rows {
        for i in 0..queries as i64 {
            for j in 0..keys as i64 {
                let position = i + offset;
                let seen = j < valid
                    && sight.before.is_none_or(|before| j >= position - before)
                    && sight.after.is_none_or(|after| j <= position + after);
                values.push(if seen { 0.0 } else { f64::NEG_INFINITY });
            }
        }
    }
    floats(vec![rows.len(), 1, queries, keys], values)
}

fn attention<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let heads = |name| -> Result<usize> { Ok(usize::try_from(node.int(name, 0)?).unwrap_or(0)) };
    let flat = lower.input(node, 0)?.rank() == 3;
    let q = lower.input(node, 0)?;
    let q = split_heads(lower, &q, heads("q_num_heads")?)?;
    let mut cache = Vec::new();
    for index in [1, 2] {
        let x = lower.input(node, index)?;
        let x = split_heads(lower, &x, heads("kv_num_heads")?)?;
        cache.push(match lower.optional(node, index + 3)? {
            Some(past) => side_by_side(lower, &[past, x], 2)?,
            None => x,
        });
    }
    let past = lower.optional(node, 4)?.map_or(0, |past| past.shape()[2]);
    let (&[batch, q_heads, queries, size], &[_, kv_heads, keys, _], 4) =
        (q.shape(), cache[0].shape(), cache[1].rank())
    else {
        return Err(Error::input("query, key and value must have three or four axes alike"));
    };
    if kv_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
        return Err(Error::input(format!("{q_heads} query heads for `{kv_heads}` key heads")));
    }
    let k = repeat_heads(lower, &cache[0], q_heads / kv_heads)?;
    let v = repeat_heads(lower, &cache[1], q_heads / kv_heads)?;
    let bound =
        |name| -> Result<Option<i64>> { Ok(Some(node.int(name, -1)?).filter(|&size| size >= 0)) };
    let mut sight =
        Sight { before: bound("left_window_size")?, after: bound("right_window_size")? };
    if node.int("is_causal", 0)? != 0 {
        sight.after = Some(0);
    }
    let rows: Vec<(i64, i64)> = match lower.integers(node, 6)? {
        Some(valid) => valid.iter().map(|&n| (n - queries as i64, n)).collect(),
        None => vec![(past as i64, keys as i64)],
    };
    let limited =
        sight.before.is_some() || sight.after.is_some() || lower.integers(node, 6)?.is_some();
    if rows.len() != 1 && rows.len() != batch {
        return Err(Error::input(format!("{} lengths for `{batch}` sequences", rows.len())));
    }
    let mask = lower.optional(node, 3)?;
    let scores = Scores {
        scale: match node.attributes.contains_key("scale") {
            true => f64::from(node.float("scale", 1.0)?),
            false => 1.0 / (size as f64).sqrt(),
        },
        mask: mask.as_ref(),
        sight: limited.then(|| sight_table(sight, queries, keys, &rows)),
        softcap: f64::from(node.float("softcap", 0.0)?),
    };
    let stages = attend(lower, [&q, &k, &v], &scores)?;
    let y = if flat { merge_heads(lower, &stages.output)? } else { stages.output };
    lower.set_output(node, 0, y);
    for (index, value) in cache.into_iter().enumerate() {
        lower.set_output(node, 1 + index, value);
    }
    let shown = match node.int("qk_matmul_output_mode", 0)? {
        0 => stages.raw,
        1 => stages.capped,
        2 => stages.biased,
        _ => stages.weights,
    };
    lower.set_output(node, 3, shown);
    Ok(())
}

/// Elements `start, start + step, ...` (`count` of them) of the last axis.
fn every<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    start: usize,
    step: usize,
    count: usize,
) -> Result<Value> {
    let mut shape = x.shape().to_vec();
    let width = shape.pop().unwrap_or(1);
    let rows: usize = shape.iter().product();
    shape.push(count);
    let map = (0..rows).flat_map(move |row| {
        (0..count).map(move |i| Source::Element { input: 0, at: row * width + start + i * step })
    });
    rearrange(lower, std::slice::from_ref(x), shape, 0.0, map)
}

fn rotary_embedding<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let given = lower.input(node, 0)?;
    let heads = usize::try_from(node.int("num_heads", 0)?).unwrap_or(0);
    let x = split_heads(lower, &given, heads)?;
    let &[batch, _, length, size] = x.shape() else {
        return Err(Error::input(format!("needs 3 or 4 axes, got shape `{:?}`", given.shape())));
    };
    let turned = match usize::try_from(node.int("rotary_embedding_dim", 0)?).unwrap_or(0) {
        0 => size,
        turned => turned,
    };
    let half = turned / 2;
    if turned > size || !turned.is_multiple_of(2) {
        return Err(Error::input(format!("cannot turn `{turned}` of {size} features")));
    }
    let positions = lower.integers(node, 3)?;
    let mut angles = Vec::new();
    for index in [1, 2] {
        let table = lower.input(node, index)?;
        let rows = table.shape().first().copied().unwrap_or(0);
        if table.shape().last() != Some(&half) {
            let shape = table.shape();
            return Err(Error::input(format!("a table of shape `{shape:?}` for {half} pairs")));
        }
        let picked = match &positions {
            Some(positions) => {
                let inside = |&p: &i64| usize::try_from(p).ok().filter(|&p| p < rows);
                let places: Option<Vec<usize>> = positions.iter().map(inside).collect();
                let places = places.filter(|p| p.len() == batch * length);
                let places = places.ok_or_else(|| {
                    Error::input(format!("positions do not fit a table of `{rows}` rows"))
                })?;
                let map = places.into_iter().flat_map(move |row| {
                    (0..half).map(move |i| Source::Element { input: 0, at: row * half + i })
                });
                rearrange(lower, &[table], vec![batch, length, half], 0.0, map)?
            }
            None => table,
        };
        let shape = broadcast_shape(picked.shape(), &[batch, length, half])?;
        let picked = super::arrange::broadcast_to(lower, &picked, &shape)?;
        angles.push(lower.reshape(&picked, vec![batch, 1, length, half])?);
    }
    let interleaved = node.int("interleaved", 0)? != 0;
    let (step, second) = if interleaved { (2, 1) } else { (1, half) };
    let a = every(lower, &x, 0, step, half)?;
    let b = every(lower, &x, second, step, half)?;
    let mut times = |x: &Value, angle: &Value| emit(lower, Binary::Mul, x, angle);
    let (ac, bs) = (times(&a, &angles[0])?, times(&b, &angles[1])?);
    let (a_s, bc) = (times(&a, &angles[1])?, times(&b, &angles[0])?);
    let real = emit(lower, Binary::Sub, &ac, &bs)?;
    let imaginary = emit(lower, Binary::Add, &a_s, &bc)?;
    let rest = every(lower, &x, turned, 1, size - turned)?;
    let rows = x.len() / size.max(1);
    let map = (0..rows).flat_map(move |row| {
        (0..size).map(move |i| {
            let (input, at) = match i {
                i if i >= turned => (2, row * (size - turned) + i - turned),
                i if interleaved => (i % 2, row * half + i / 2),
                i => (i / half, row * half + i % half),
            };
            Source::Element { input, at }
        })
    });
    let y = rearrange(lower, &[real, imaginary, rest], x.shape().to_vec(), 0.0, map)?;
    let y = if given.rank() == 3 { merge_heads(lower, &y)? } else { y };
    lower.set_output(node, 0, y);
    Ok(())
}
