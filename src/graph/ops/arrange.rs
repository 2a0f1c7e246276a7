//! Operators that move values without changing them: Concat, Split, Slice, Expand, Tile,
//! Pad, DepthToSpace, SpaceToDepth.

use super::rearrange::{Source, indices, rearrange, rearrange_stretches};
use super::shape::axes;
use super::transpose::permute;
use super::{Rule, axis_index, broadcast_shape, strides};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "Concat" => concat,
        "Split" => split,
        "Slice" => slice,
        "Expand" => expand,
        "Tile" => tile,
        "Pad" => pad,
        "DepthToSpace" => depth_to_space,
        "SpaceToDepth" => space_to_depth,
        _ => return None,
    })
}

pub(super) fn at(position: usize) -> Source {
    Source::Element { input: 0, at: position }
}

pub(super) fn dot(index: &[usize], strides: &[usize]) -> usize {
    index.iter().zip(strides).map(|(i, s)| i * s).sum()
}

/// Emits `parts` one after the other along `axis`.
///
/// # Errors
/// When their other axes differ.
pub(super) fn side_by_side<T: Element>(
    lower: &mut Lower<'_, T>,
    parts: &[Value],
    axis: usize,
) -> Result<Value> {
    let first = parts.first().ok_or_else(|| Error::input("needs at least one input"))?;
    let mut shape = first.shape().to_vec();
    shape[axis] = 0;
    for part in parts {
        let fits = part.rank() == shape.len()
            && (0..shape.len()).all(|a| a == axis || part.shape()[a] == shape[a]);
        if !fits {
            return Err(Error::input(format!(
                "cannot concatenate {:?} and `{:?}` along axis {axis}",
                first.shape(),
                part.shape()
            )));
        }
        shape[axis] += part.shape()[axis];
    }
    let outer: usize = shape[..axis].iter().product();
    let inner: usize = shape[axis + 1..].iter().product();
    let widths: Vec<usize> = parts.iter().map(|part| part.shape()[axis] * inner).collect();
    let stretches = (0..outer).flat_map(|row| {
        let parts = widths.iter().enumerate();
        parts.map(move |(input, &width)| (Source::Element { input, at: row * width }, width))
    });
    rearrange_stretches(lower, parts, shape, 0.0, stretches)
}

fn concat<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let parts: Vec<Value> = (0..node.inputs.len())
        .filter_map(|index| lower.optional(node, index).transpose())
        .collect::<Result<_>>()?;
    let rank = parts.first().map_or(0, Value::rank);
    let axis = axis_index(node.int("axis", 1)?, rank)?;
    let y = side_by_side(lower, &parts, axis)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// A rectangular part of `x` along `axis`.
pub(super) fn part<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    axis: usize,
    start: usize,
    length: usize,
) -> Result<Value> {
    let mut shape = x.shape().to_vec();
    let (size, inner): (usize, usize) = (shape[axis], shape[axis + 1..].iter().product());
    let outer: usize = shape[..axis].iter().product();
    shape[axis] = length;
    let stretches = (0..outer).map(|row| (at((row * size + start) * inner), length * inner));
    rearrange_stretches(lower, std::slice::from_ref(x), shape, 0.0, stretches)
}

fn split<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = axis_index(node.int("axis", 0)?, x.rank())?;
    let size = x.shape()[axis];
    let sizes: Vec<usize> = match lower.integers(node, 1)? {
        Some(sizes) => sizes.iter().map(|&s| s.max(0) as usize).collect(),
        None => match node.ints("split")? {
            Some(sizes) => sizes.iter().map(|&s| s.max(0) as usize).collect(),
            None => {
                let parts = node.int("num_outputs", node.outputs.len() as i64)?.max(1) as usize;
                let each = size.div_ceil(parts);
                (0..parts).map(|i| each.min(size.saturating_sub(i * each))).collect()
            }
        },
    };
    if sizes.iter().sum::<usize>() != size {
        return Err(Error::input(format!("split {sizes:?} does not sum to `{size}`")));
    }
    let mut start = 0;
    for (index, length) in sizes.into_iter().enumerate() {
        if index < node.outputs.len() {
            let y = part(lower, &x, axis, start, length)?;
            lower.set_output(node, index, y);
        }
        start += length;
    }
    Ok(())
}

fn slice<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let rank = x.rank();
    let absent = || Error::input("needs `starts` and `ends`");
    let (starts, ends, slice_axes, steps) = if node.inputs.len() > 1 {
        (
            lower.integers(node, 1)?.ok_or_else(absent)?,
            lower.integers(node, 2)?.ok_or_else(absent)?,
            lower.integers(node, 3)?,
            lower.integers(node, 4)?,
        )
    } else {
        let ints = |name| node.ints(name).map(|v| v.map(<[i64]>::to_vec));
        (
            ints("starts")?.ok_or_else(absent)?,
            ints("ends")?.ok_or_else(absent)?,
            ints("axes")?,
            None,
        )
    };
    let mut first = vec![0i64; rank];
    let mut step = vec![1i64; rank];
    let mut shape = x.shape().to_vec();
    for (i, &start) in starts.iter().enumerate() {
        let axis = match &slice_axes {
            Some(axes) => *axes.get(i).ok_or_else(absent)?,
            None => i as i64,
        };
        let axis = axis_index(axis, rank)?;
        let size = x.shape()[axis] as i64;
        let by = steps.as_ref().and_then(|s| s.get(i)).copied().unwrap_or(1);
        let end = *ends.get(i).ok_or_else(absent)?;
        let wrap = |v: i64| if v < 0 { v.saturating_add(size) } else { v };
        let (from, to) = if by > 0 {
            (wrap(start).clamp(0, size), wrap(end).clamp(0, size))
        } else {
            (wrap(start).clamp(-1, size - 1), wrap(end).clamp(-1, size - 1))
        };
        if by == 0 {
            return Err(Error::input("slice step must not be `0`"));
        }
        let count = if by > 0 { (to - from).max(0) } else { (from - to).max(0) };
        shape[axis] = (count as u64).div_ceil(by.unsigned_abs()) as usize;
        first[axis] = from.max(0);
        step[axis] = by;
    }
    let input_strides = strides(x.shape());
    // The last axis in one piece where nothing is left out of it.
    let outer = if rank > 0 && step[rank - 1] == 1 { rank - 1 } else { rank };
    let piece: usize = shape[outer..].iter().product();
    let start: i64 = (outer..rank).map(|a| first[a] * input_strides[a] as i64).sum();
    let stretches = indices(&shape[..outer]).map(|index| {
        let position: i64 = (0..index.len())
            .map(|a| (first[a] + index[a] as i64 * step[a]) * input_strides[a] as i64)
            .sum();
        (at((start + position) as usize), piece)
    });
    let y = rearrange_stretches(lower, &[x], shape.clone(), 0.0, stretches)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Strides that repeat `from` over the broadcast shape `to` (0 along repeated axes).
pub(super) fn broadcast_strides(from: &[usize], to: &[usize]) -> Vec<usize> {
    let own = strides(from);
    let lead = to.len() - from.len();
    (0..to.len())
        .map(|axis| match axis.checked_sub(lead) {
            Some(i) if from[i] != 1 => own[i],
            _ => 0,
        })
        .collect()
}

/// Repeats `x` to `shape` (to which it must broadcast).
pub(super) fn broadcast_to<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    shape: &[usize],
) -> Result<Value> {
    if x.shape() == shape {
        return Ok(x.clone());
    }
    let repeated = broadcast_strides(x.shape(), shape);
    let map = indices(shape).map(move |index| at(dot(&index, &repeated)));
    rearrange(lower, std::slice::from_ref(x), shape.to_vec(), 0.0, map)
}

fn expand<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let wanted = lower.integers(node, 1)?.ok_or_else(|| Error::input("needs input `1`"))?;
    let wanted: Vec<usize> = wanted.iter().map(|&d| d.max(0) as usize).collect();
    let shape = broadcast_shape(x.shape(), &wanted)?;
    let y = broadcast_to(lower, &x, &shape)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn tile<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let repeats = lower.integers(node, 1)?.ok_or_else(|| Error::input("needs input `1`"))?;
    if repeats.len() != x.rank() || repeats.iter().any(|&r| r < 0) {
        return Err(Error::input(format!("bad repeats `{repeats:?}`")));
    }
    let mut shape = Vec::with_capacity(x.rank());
    for (&d, &r) in x.shape().iter().zip(&repeats) {
        shape.push(d.saturating_mul(r as usize));
    }
    let sizes = x.shape().to_vec();
    let own = strides(&sizes);
    let map = indices(&shape)
        .map(move |index| at((0..index.len()).map(|a| index[a] % sizes[a] * own[a]).sum()));
    let y = rearrange(lower, &[x], shape.clone(), 0.0, map)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Position inside `0..size` for a padded position `i`, by mode; `None` fills.
fn padded_position(i: i64, size: i64, mode: &str) -> Option<usize> {
    let inside = (0..size).contains(&i);
    let position = match mode {
        _ if inside => i,
        "edge" => i.clamp(0, size - 1),
        "reflect" if size > 1 => {
            let period = 2 * (size - 1);
            let j = i.rem_euclid(period);
            if j < size { j } else { period - j }
        }
        "reflect" => 0,
        "wrap" => i.rem_euclid(size),
        _ => return None,
    };
    Some(position as usize)
}

fn pad<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let rank = x.rank();
    let mode = node.text("mode", "constant")?;
    if !matches!(mode, "constant" | "edge" | "reflect" | "wrap") {
        return Err(Error::unsupported(format!("pad mode `{mode}`")));
    }
    let given = match lower.integers(node, 1)? {
        Some(pads) => pads,
        None => match node.ints("pads")? {
            Some(pads) => pads.to_vec(),
            None => node.ints("paddings")?.unwrap_or_default().to_vec(),
        },
    };
    let fill = match lower.constant_input(node, 2)? {
        Some(value) => value.to_f64().first().copied().unwrap_or(0.0),
        None => f64::from(node.float("value", 0.0)?),
    };
    let padded: Vec<usize> = match lower.integers(node, 3)? {
        Some(axes) => axes.iter().map(|&a| axis_index(a, rank)).collect::<Result<_>>()?,
        None => (0..rank).collect(),
    };
    if given.len() != 2 * padded.len() {
        return Err(Error::input(format!("`pads` has {} values for {rank} axes", given.len())));
    }
    let mut before = vec![0i64; rank];
    let mut shape = x.shape().to_vec();
    for (i, &axis) in padded.iter().enumerate() {
        before[axis] = given[i];
        let size = x.shape()[axis] as i64 + given[i] + given[i + padded.len()];
        shape[axis] = usize::try_from(size)
            .ok()
            .filter(|&s| s <= super::shape::CONSTANT_LIMIT)
            .ok_or_else(|| Error::input(format!("`pads` makes an axis of `{size}`")))?;
    }
    let sizes: Vec<i64> = x.shape().iter().map(|&s| s as i64).collect();
    let own = strides(x.shape());
    let mode = mode.to_string();
    if shape.iter().fold(1usize, |a, &b| a.saturating_mul(b)) > super::shape::CONSTANT_LIMIT {
        return Err(Error::input(format!("`pads` makes a tensor of shape `{shape:?}`")));
    }
    let map = indices(&shape).map(move |index| {
        let mut position = 0;
        for axis in 0..index.len() {
            match padded_position(index[axis] as i64 - before[axis], sizes[axis], &mode) {
                Some(i) => position += i * own[axis],
                None => return Source::Fill,
            }
        }
        at(position)
    });
    let y = rearrange(lower, &[x], shape.clone(), fill, map)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn image_dims(x: &Value) -> Result<[usize; 4]> {
    <[usize; 4]>::try_from(x.shape())
        .map_err(|_| Error::input(format!("needs a rank-4 input, got shape `{:?}`", x.shape())))
}

fn block_size(node: &Node) -> Result<usize> {
    usize::try_from(node.int("blocksize", 0)?)
        .ok()
        .filter(|&b| b > 0)
        .ok_or_else(|| Error::input("`blocksize` must be positive"))
}

fn depth_to_space<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let [n, c, h, w] = image_dims(&x)?;
    let block = block_size(node)?;
    let depth = c / (block * block);
    let column_row_depth = node.text("mode", "DCR")? == "CRD";
    let (split, permutation) = if column_row_depth {
        ([n, depth, block, block, h, w], [0, 1, 4, 2, 5, 3])
    } else {
        ([n, block, block, depth, h, w], [0, 3, 4, 1, 5, 2])
    };
    let y = lower.reshape(&x, split.to_vec())?;
    let y = permute(lower, &y, &permutation)?;
    let y = lower.reshape(&y, vec![n, depth, h * block, w * block])?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn space_to_depth<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let [n, c, h, w] = image_dims(&x)?;
    let b = block_size(node)?;
    let y = lower.reshape(&x, vec![n, c, h / b, b, w / b, b])?;
    let y = permute(lower, &y, &[0, 3, 5, 1, 2, 4])?;
    let y = lower.reshape(&y, vec![n, c * b * b, h / b, w / b])?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// The axes of a node as sorted indices; all axes when none are given.
pub(super) fn sorted_axes<T: Element>(
    lower: &Lower<'_, T>,
    node: &Node,
    input: usize,
    rank: usize,
) -> Result<Option<Vec<usize>>> {
    let Some(given) = axes(lower, node, input)? else { return Ok(None) };
    let mut sorted: Vec<usize> =
        given.iter().map(|&a| axis_index(a, rank)).collect::<Result<_>>()?;
    sorted.sort_unstable();
    sorted.dedup();
    Ok(Some(sorted))
}
