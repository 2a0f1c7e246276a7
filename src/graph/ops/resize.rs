//! Resize and Upsample. Every output position is a weighted sum of input positions, axis by axis: each
//! axis that changes is one sparse matrix, and the gradient is its transpose.

use rayon::prelude::*;

use super::sample::check_length;
use super::{Rule, axis_index};
use crate::error::{Error, Result};
use crate::graph::ir::{Attribute, Node};
use crate::graph::plan::{Lower, Mode, Needs, Step, StepState, Target, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "Resize" | "Upsample" => Some(resize),
        _ => None,
    }
}

/// Positions that [`along`] may make of an axis.
pub(super) const POSITIONS: usize = 1 << 24;

/// Output elements a parallel task computes.
const CHUNK: usize = 1 << 14;

/// Input positions and their weights in one output position.
type Taps = Vec<(usize, f64)>;

/// A sparse matrix by rows: which columns each row sums, and with which weights.
#[derive(Debug)]
pub(super) struct Sparse<T> {
    pub(super) starts: Vec<usize>,
    pub(super) columns: Vec<u32>,
    pub(super) weights: Vec<T>,
}

impl<T: Element> Sparse<T> {
    /// A matrix without rows.
    pub(super) fn new() -> Self {
        Self { starts: vec![0], columns: Vec::new(), weights: Vec::new() }
    }

    fn from_rows<'a>(rows: impl IntoIterator<Item = &'a [(usize, f64)]>) -> Self {
        let mut matrix = Self::new();
        for row in rows {
            row.iter().for_each(|&(column, weight)| matrix.push(column, T::of(weight)));
            matrix.end_row();
        }
        matrix
    }

    /// Adds an entry to the row that is being written.
    pub(super) fn push(&mut self, column: usize, weight: T) {
        self.columns.push(column as u32);
        self.weights.push(weight);
    }

    /// Ends the row that is being written.
    pub(super) fn end_row(&mut self) {
        self.starts.push(self.columns.len());
    }

    /// The columns and weights of a row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> impl Iterator<Item = (usize, T)> {
        let range = self.starts[row]..self.starts[row + 1];
        let weights = self.weights[range.clone()].iter().copied();
        self.columns[range].iter().map(|&column| column as usize).zip(weights)
    }

    /// The product with `x` at `row`.
    #[inline(always)]
    pub(super) fn dot(&self, row: usize, x: &[T]) -> T {
        self.row(row).map(|(column, weight)| weight * x[column]).sum()
    }
}

/// Multiplies the middle of [outer, size, inner] by a sparse matrix and adds a constant to each row.
#[derive(Debug)]
struct AxisLinear<T> {
    matrix: Sparse<T>,
    transposed: Sparse<T>,
    /// Constant of each output position; empty where all are zero.
    offset: Vec<T>,
    input: usize,
    output: usize,
    inner: usize,
}

impl<T: Element> AxisLinear<T> {
    /// `rows` holds the taps of each output position, `None` where it is `outside`.
    fn new(rows: &[Option<Taps>], input: usize, inner: usize, outside: f64) -> Self {
        let mut transposed = vec![Vec::new(); input];
        for (row, taps) in rows.iter().enumerate() {
            for &(column, weight) in taps.iter().flatten() {
                transposed[column].push((row, weight));
            }
        }
        let constant = |taps: &Option<Taps>| if taps.is_none() { T::of(outside) } else { T::ZERO };
        let any = rows.iter().any(Option::is_none);
        Self {
            matrix: Sparse::from_rows(rows.iter().map(|taps| taps.as_deref().unwrap_or_default())),
            transposed: Sparse::from_rows(transposed.iter().map(Vec::as_slice)),
            offset: if any { rows.iter().map(constant).collect() } else { Vec::new() },
            input,
            output: rows.len(),
            inner,
        }
    }
}

/// Puts `matrix * x` in `y`, along the middle axis (of `from`, made `to`) of [outer, size, inner].
fn product<T: Element>(
    matrix: &Sparse<T>,
    [from, to]: [usize; 2],
    inner: usize,
    x: &[T],
    y: &mut [T],
    mode: Mode,
) {
    let (from, to) = (from * inner, to * inner);
    if from == 0 || to == 0 {
        return;
    }
    let many = (CHUNK / to).max(1);
    y.par_chunks_mut(many * to).zip(x.par_chunks(many * from)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(to).zip(x.chunks_exact(from)) {
            if inner == 1 {
                Target { data: y, mode }.put(|row| matrix.dot(row, x));
                continue;
            }
            for (row, y) in y.chunks_exact_mut(inner).enumerate() {
                let mut mode = mode;
                for (column, weight) in matrix.row(row) {
                    let x = &x[column * inner..(column + 1) * inner];
                    Target { data: &mut *y, mode }.put_map(x, |x| weight * x);
                    mode = Mode::Add;
                }
                if mode == Mode::Write {
                    y.fill(T::ZERO);
                }
            }
        }
    });
}

impl<T: Element> Step<T> for AxisLinear<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let sizes = [self.input, self.output];
        product(&self.matrix, sizes, self.inner, inputs[0], output, Mode::Write);
        if self.offset.is_empty() || output.is_empty() {
            return;
        }
        for (row, y) in output.chunks_exact_mut(self.inner).enumerate() {
            let constant = self.offset[row % self.output];
            y.iter_mut().for_each(|y| *y += constant);
        }
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn backward(
        &self,
        _which: usize,
        _inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        let sizes = [self.output, self.input];
        product(&self.transposed, sizes, self.inner, d_output, target.data, target.mode);
    }
}

/// Where an output position lies in the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    HalfPixelForNearest,
    AlignCorners,
    Asymmetric,
    CropAndResize,
}

/// Which of two neighbours is the nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rounding {
    PreferFloor,
    PreferCeil,
    Floor,
    Ceil,
    /// Down when enlarging, up when shrinking: Upsample, and Resize before opset 11.
    AwayFromOutput,
}

/// How neighbours are weighted.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Filter {
    Nearest(Rounding),
    Linear,
    /// With Keys' coefficient.
    Cubic(f64),
}

/// Keys' cubic kernel of coefficient `a` at `distance`, and its slope.
pub(super) fn cubic(a: f64, distance: f64) -> [f64; 2] {
    let (t, sign) = (distance.abs(), distance.signum());
    if t <= 1.0 {
        let (three, two) = (a + 2.0, a + 3.0);
        [(three * t - two) * t * t + 1.0, sign * (3.0 * three * t - 2.0 * two) * t]
    } else if t < 2.0 {
        [a * (((t - 5.0) * t + 8.0) * t - 4.0), sign * a * ((3.0 * t - 10.0) * t + 8.0)]
    } else {
        [0.0, 0.0]
    }
}

impl Rounding {
    fn apply(self, position: f64, axis: &Axis) -> f64 {
        // A scale has 24 bits: what would be whole or half-way but for that is.
        let half = (2.0 * position).round() / 2.0;
        let noise = 1e-7 * (position.abs() + 1.0);
        let p = if (position - half).abs() <= noise { half } else { position };
        match self {
            Self::PreferFloor => (p - 0.5).ceil(),
            Self::PreferCeil => (p + 0.5).floor(),
            Self::Ceil => p.ceil(),
            Self::AwayFromOutput if axis.extent < axis.input as f64 => p.ceil(),
            Self::Floor | Self::AwayFromOutput => p.floor(),
        }
    }
}

/// An axis that is resized.
struct Axis {
    input: usize,
    output: usize,
    /// Input times scale: the output's size before rounding.
    extent: f64,
    /// The output's size between whose ends `align_corners` spreads the input.
    length: f64,
    /// First and last place to read, as shares of the input.
    region: [f64; 2],
}

impl Axis {
    /// Where output position `o` lies in the input; `None` outside it.
    fn position(&self, coordinates: Coordinates, o: usize) -> Option<f64> {
        let (size, count, at) = (self.input as f64, self.output as f64, o as f64);
        let (last, end) = (size - 1.0, count - 1.0);
        let centred = (at + 0.5) * size / self.extent - 0.5;
        let several = self.output > 1;
        let position = match coordinates {
            Coordinates::HalfPixel => centred,
            Coordinates::HalfPixelSymmetric => size / 2.0 * (1.0 - count / self.extent) + centred,
            Coordinates::HalfPixelForNearest => centred + 0.5,
            Coordinates::Asymmetric => at * size / self.extent,
            Coordinates::PytorchHalfPixel if several => centred,
            Coordinates::AlignCorners if several => at * last / (self.length - 1.0),
            Coordinates::PytorchHalfPixel | Coordinates::AlignCorners => 0.0,
            Coordinates::CropAndResize => {
                let [from, to] = self.region;
                let place = if several {
                    ((end - at) * from + at * to) * last / end
                } else {
                    0.5 * (from + to) * last
                };
                return (0.0..=last).contains(&place).then_some(place);
            }
        };
        Some(position)
    }
}

/// The attributes of a node.
struct Method {
    filter: Filter,
    coordinates: Coordinates,
    /// Whether weights of positions outside the input are dropped, not given to the edge.
    exclude_outside: bool,
    /// Whether filters widen when shrinking.
    antialias: bool,
    /// Value of positions outside a cropped region.
    outside: f64,
}

impl Method {
    fn new(node: &Node, old: bool) -> Result<Self> {
        let default = if old { "asymmetric" } else { "half_pixel" };
        let coordinates = match node.text("coordinate_transformation_mode", default)? {
            "half_pixel" => Coordinates::HalfPixel,
            "half_pixel_symmetric" => Coordinates::HalfPixelSymmetric,
            "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
            "tf_half_pixel_for_nn" => Coordinates::HalfPixelForNearest,
            "align_corners" => Coordinates::AlignCorners,
            "asymmetric" => Coordinates::Asymmetric,
            "tf_crop_and_resize" => Coordinates::CropAndResize,
            other => return Err(Error::unsupported(format!("coordinates `{other}`"))),
        };
        let rounding = match node.text("nearest_mode", "round_prefer_floor")? {
            _ if old => Rounding::AwayFromOutput,
            "round_prefer_floor" => Rounding::PreferFloor,
            "round_prefer_ceil" => Rounding::PreferCeil,
            "floor" => Rounding::Floor,
            "ceil" => Rounding::Ceil,
            other => return Err(Error::unsupported(format!("nearest_mode `{other}`"))),
        };
        let filter = match node.text("mode", "nearest")? {
            "nearest" => Filter::Nearest(rounding),
            "linear" | "bilinear" => Filter::Linear,
            "cubic" => Filter::Cubic(f64::from(node.float("cubic_coeff_a", -0.75)?)),
            other => return Err(Error::unsupported(format!("resize mode `{other}`"))),
        };
        Ok(Self {
            filter,
            coordinates,
            exclude_outside: node.int("exclude_outside", 0)? != 0,
            antialias: node.int("antialias", 0)? != 0,
            outside: f64::from(node.float("extrapolation_value", 0.0)?),
        })
    }

    /// What makes output position `o`; `None` for the value outside.
    fn taps(&self, axis: &Axis, o: usize) -> Option<Taps> {
        let position = axis.position(self.coordinates, o)?;
        let last = axis.input as f64 - 1.0;
        let (reach, nearest) = match self.filter {
            Filter::Nearest(rounding) => (0.0, rounding.apply(position, axis)),
            Filter::Linear => (1.0, position.round()),
            Filter::Cubic(_) => (2.0, position.round()),
        };
        let edge = |at: f64| at.clamp(0.0, last) as usize;
        let single = vec![(edge(nearest), 1.0)];
        if reach == 0.0 {
            return Some(single);
        }
        let shrink = if self.antialias { (axis.extent / axis.input as f64).min(1.0) } else { 1.0 };
        let first = (position - reach / shrink).ceil() as i64;
        let end = (position + reach / shrink).floor() as i64;
        let mut taps = Taps::new();
        for at in (first..=end).map(|at| at as f64) {
            let distance = (at - position) * shrink;
            let weight = match self.filter {
                Filter::Cubic(a) => cubic(a, distance)[0],
                _ => (1.0 - distance.abs()).max(0.0),
            };
            if weight == 0.0 || (self.exclude_outside && !(0.0..=last).contains(&at)) {
                continue;
            }
            let column = edge(at);
            match taps.last_mut() {
                Some((same, sum)) if *same == column => *sum += weight,
                _ => taps.push((column, weight)),
            }
        }
        let total: f64 = taps.iter().map(|&(_, weight)| weight).sum();
        if total <= 0.0 {
            return Some(single);
        }
        taps.iter_mut().for_each(|(_, weight)| *weight /= total);
        Some(taps)
    }
}

/// The scales given, as attribute (Upsample before opset 9) or input.
fn scales<T: Element>(lower: &Lower<'_, T>, node: &Node, old: bool) -> Result<Option<Vec<f32>>> {
    if let Some(Attribute::Floats(values)) = node.attributes.get("scales") {
        return Ok(Some(values.clone()));
    }
    let given = lower.constant_input(node, if old { 1 } else { 2 })?;
    Ok(given.map(|tensor| tensor.to_f32()).filter(|values| !values.is_empty()))
}

/// For each axis of `input` elements in turn: the output's size, that before rounding, and the one
/// that corners are aligned to.
fn extents<T: Element>(
    lower: &Lower<'_, T>,
    node: &Node,
    old: bool,
    input: &[usize],
) -> Result<Vec<(usize, f64, f64)>> {
    let scales = scales(lower, node, old)?;
    let sizes = if old || scales.is_some() { None } else { lower.integers(node, 3)? };
    let mut ratios: Vec<[f64; 2]> = match (&scales, sizes) {
        (Some(scales), _) => scales.iter().map(|&scale| [f64::from(scale), 1.0]).collect(),
        (None, Some(sizes)) => {
            let input = input.iter().chain(std::iter::repeat(&1));
            sizes.iter().zip(input).map(|(&to, &from)| [to as f64, from as f64]).collect()
        }
        (None, None) => return Err(Error::input("needs scales or sizes")),
    };
    let policy = node.text("keep_aspect_ratio_policy", "stretch")?;
    if !matches!(policy, "stretch" | "not_larger" | "not_smaller") {
        return Err(Error::unsupported(format!("keep_aspect_ratio_policy `{policy}`")));
    }
    if scales.is_none() && policy != "stretch" {
        let chosen = ratios.iter().copied().reduce(|a, b| {
            let smaller = b[0] * a[1] < a[0] * b[1];
            if smaller == (policy == "not_larger") { b } else { a }
        });
        ratios.fill(chosen.unwrap_or([1.0, 1.0]));
    }
    if ratios.len() != input.len() {
        let (given, axes) = (ratios.len(), input.len());
        return Err(Error::input(format!("{given} scales or sizes for `{axes}` axes")));
    }
    let extent = |(&size, [to, from]): (&usize, &[f64; 2])| {
        let extent = size as f64 * to / from;
        // In single precision, as shapes stated in files are. The test data of ONNX align corners to
        // the size before rounding.
        let (output, length) = match scales {
            Some(_) => (f64::from((size as f32 * *to as f32).floor()), extent),
            None => ((extent + 0.5).floor(), (extent + 0.5).floor()),
        };
        match (1.0..=POSITIONS as f64).contains(&output) {
            true => Ok((output as usize, extent, length)),
            false => Err(Error::input(format!("cannot resize an axis of {size} to `{output}`"))),
        }
    };
    input.iter().zip(&ratios).map(extent).collect()
}

fn resize<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let rank = x.rank();
    if x.is_empty() {
        return Err(Error::input(format!("cannot resize a tensor of shape `{:?}`", x.shape())));
    }
    let old = node.op_type == "Upsample" || lower.opset < 11;
    let method = Method::new(node, old)?;
    let axes: Vec<usize> = match node.ints("axes")? {
        Some(axes) => axes.iter().map(|&axis| axis_index(axis, rank)).collect::<Result<_>>()?,
        None => (0..rank).collect(),
    };
    if axes.iter().enumerate().any(|(i, axis)| axes[..i].contains(axis)) {
        return Err(Error::input(format!("repeated axis in `{axes:?}`")));
    }
    let input: Vec<usize> = axes.iter().map(|&axis| x.shape()[axis]).collect();
    let extents = extents(lower, node, old, &input)?;
    let mut regions = vec![[0.0, 1.0]; axes.len()];
    if method.coordinates == Coordinates::CropAndResize {
        let given = lower.constant_input(node, 1)?.map(|tensor| tensor.to_f64());
        let given = given.filter(|values| values.len() == 2 * axes.len()).ok_or_else(|| {
            Error::input(format!("needs a region of `{}` numbers", 2 * axes.len()))
        })?;
        let (starts, ends) = given.split_at(axes.len());
        regions = starts.iter().zip(ends).map(|(&start, &end)| [start, end]).collect();
    }
    let mut shape = x.shape().to_vec();
    let mut resized: Vec<(usize, Axis)> = Vec::new();
    for (k, (&axis, (output, extent, length))) in axes.iter().zip(extents).enumerate() {
        let plan = Axis { input: input[k], output, extent, length, region: regions[k] };
        shape[axis] = output;
        // Of equal size, and not a part of the input.
        let same = extent == plan.input as f64 && method.coordinates != Coordinates::CropAndResize;
        if !same {
            resized.push((axis, plan));
        }
    }
    check_length(&shape)?;
    // Axes that shrink first leave less to do for those that grow.
    let growth = |axis: &Axis| axis.output as f64 / axis.input as f64;
    resized.sort_by(|a, b| growth(&a.1).total_cmp(&growth(&b.1)));
    let mut y = x;
    for (axis, plan) in resized {
        let rows: Vec<Option<Taps>> = (0..plan.output).map(|o| method.taps(&plan, o)).collect();
        y = along(lower, &y, axis, &rows, method.outside);
    }
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits the step that makes each position of `axis` of `x` from the positions and weights in `rows`,
/// or as `outside` where there are none.
pub(super) fn along<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    axis: usize,
    rows: &[Option<Taps>],
    outside: f64,
) -> Value {
    let mut shape = x.shape().to_vec();
    let copied =
        |(o, taps): (usize, &Option<Taps>)| taps.as_deref().is_some_and(|t| t == [(o, 1.0)]);
    if rows.len() == shape[axis] && rows.iter().enumerate().all(copied) {
        return x.clone();
    }
    let inner = shape[axis + 1..].iter().product();
    let step = AxisLinear::<T>::new(rows, shape[axis], inner, outside);
    shape[axis] = rows.len();
    lower.emit(Box::new(step), std::slice::from_ref(x), shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resized(filter: Filter, x: &[f64], output: usize) -> (Vec<f64>, Vec<f64>) {
        let method = Method {
            filter,
            coordinates: Coordinates::HalfPixel,
            exclude_outside: false,
            antialias: true,
            outside: 0.0,
        };
        let extent = output as f64;
        let axis = Axis { input: x.len(), output, extent, length: extent, region: [0.0, 1.0] };
        let rows: Vec<_> = (0..output).map(|o| method.taps(&axis, o)).collect();
        let step = AxisLinear::<f64>::new(&rows, x.len(), 1, 0.0);
        let (mut y, mut d) = (vec![9.0; output], vec![9.0; x.len()]);
        let mut state = StepState::default();
        step.forward(&[x], &mut y, &mut state);
        let target = Target { data: &mut d, mode: Mode::Write };
        step.backward(0, &[], &[], &vec![1.0; output], target, &state);
        (y, d)
    }

    #[test]
    fn doubling_two_values_linearly_reads_quarters() {
        let (y, d) = resized(Filter::Linear, &[1.0, 2.0], 4);
        assert_eq!(y, [1.0, 1.25, 1.75, 2.0]);
        assert_eq!(d, [2.0, 2.0]);
    }

    #[test]
    fn halving_with_a_widened_triangle_reads_four_pixels() {
        // Weights 3/8 at distance 1/2 and 1/8 at 3/2; the edge takes those of what is outside.
        let (y, d) = resized(Filter::Linear, &[0.0, 8.0, 16.0, 24.0], 2);
        assert_eq!(y, [5.0, 19.0]);
        assert_eq!(d, [0.5, 0.5, 0.5, 0.5]);
    }
}
