//! Pooling over non-overlapping blocks, global pooling and nearest up-sampling.
//!
//! Max pooling differentiates as gather and scatter at the places of the maxima; average pooling and
//! up-sampling are each other's transpose.

use std::rc::Rc;

use candle_core::Tensor;

use super::memory::Value;
use super::reduce::KeepDims;
use super::value::{Float, Slice, build, by_dtype, from_vec};
use super::{Rule, Step, Var};
use crate::error::{Error, Result};
use crate::tensor::kernels::blocks::{
    Blocks, block_gather, block_max, block_repeat, block_scatter, block_sum,
};

/// Where in its block each maximum lies, row-major from the top left.
#[derive(Debug, Clone)]
pub(super) enum Places {
    /// One byte a block.
    Bytes(Rc<Vec<u8>>),
    /// `[N, C, h, w, 1]`, `U32`, on another device.
    Device(Tensor),
}

/// The large side `[N, C, H, W]` and the block side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) large: [usize; 4],
    pub(super) side: usize,
}

impl Shape {
    pub(super) fn blocks(self) -> Blocks {
        let [n, c, h, w] = self.large;
        Blocks { planes: n * c, large: [h, w], side: self.side }
    }

    pub(super) fn small(self) -> [usize; 4] {
        let [n, c, h, w] = self.large;
        [n, c, h / self.side, w / self.side]
    }

    /// `[N, C, H, W]` to `[N, C, h, w, side * side]` by candle operations.
    fn windows(self, x: &Tensor) -> Result<Tensor> {
        let [n, c, h, w] = self.small();
        let k = self.side;
        Ok(x.narrow(2, 0, h * k)?
            .narrow(3, 0, w * k)?
            .contiguous()?
            .reshape(&[n, c, h, k, w, k])?
            .transpose(3, 4)?
            .contiguous()?
            .reshape(&[n, c, h, w, k * k])?)
    }

    /// The transpose of [`Shape::windows`].
    fn unwindows(self, x: &Tensor) -> Result<Tensor> {
        let [n, c, h, w] = self.small();
        let k = self.side;
        Ok(x.reshape(&[n, c, h, w, k, k])?
            .transpose(3, 4)?
            .contiguous()?
            .reshape(&[n, c, h * k, w * k])?
            .pad_with_zeros(2, 0, self.large[2] - h * k)?
            .pad_with_zeros(3, 0, self.large[3] - w * k)?)
    }
}

/// `y[block] = x[block at place]`.
struct Gather {
    shape: Shape,
    places: Places,
}

/// Its transpose.
struct Scatter {
    shape: Shape,
    places: Places,
}

impl Rule for Gather {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(scatter(step.cotangent, self.shape, &self.places)?)])
    }
}

impl Rule for Scatter {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(gather(step.cotangent, self.shape, &self.places)?)])
    }
}

fn gather(x: &Var, shape: Shape, places: &Places) -> Result<Var> {
    let value = match places {
        Places::Bytes(bytes) => {
            let x = x.value.contiguous()?;
            by_dtype(
                x.dtype(),
                || gather_on::<f32>(&x, shape, bytes),
                || gather_on::<f64>(&x, shape, bytes),
            )?
        }
        Places::Device(at) => shape.windows(&x.value)?.gather(at, 4)?.squeeze(4)?.into(),
    };
    x.tape.record(&[x], value, Gather { shape, places: places.clone() })
}

fn gather_on<T: Float>(x: &Tensor, shape: Shape, places: &[u8]) -> Result<Value> {
    let x = Slice::<T>::new(x)?;
    build::<T>(&shape.small(), |y| block_gather(&shape.blocks(), &x, places, y))
}

pub(super) fn scatter(g: &Var, shape: Shape, places: &Places) -> Result<Var> {
    let value = match places {
        Places::Bytes(bytes) => {
            let g = g.value.contiguous()?;
            by_dtype(
                g.dtype(),
                || scatter_on::<f32>(&g, shape, bytes),
                || scatter_on::<f64>(&g, shape, bytes),
            )?
        }
        Places::Device(at) => {
            let [n, c, h, w] = shape.small();
            let k = shape.side;
            let zeros = Tensor::zeros(&[n, c, h, w, k * k], g.dtype(), g.device())?;
            shape
                .unwindows(&zeros.scatter_add(at, &g.value.contiguous()?.unsqueeze(4)?, 4)?)?
                .into()
        }
    };
    g.tape.record(&[g], value, Scatter { shape, places: places.clone() })
}

fn scatter_on<T: Float>(g: &Tensor, shape: Shape, places: &[u8]) -> Result<Value> {
    let g = Slice::<T>::new(g)?;
    build::<T>(&shape.large, |x| block_scatter(&shape.blocks(), &g, places, x))
}

fn maxima<T: Float>(x: &Tensor, shape: Shape) -> Result<(Value, Places)> {
    let x = Slice::<T>::new(x)?;
    let small = shape.small();
    let n = small.iter().product();
    let (mut y, mut places) = (vec![T::ZERO; n], vec![0; n]);
    block_max(&shape.blocks(), &x, &mut y, &mut places);
    Ok((from_vec(y, &small)?, Places::Bytes(Rc::new(places))))
}

/// `y[block] = sum of the block`.
struct BlockSum(Shape);

/// `x[every element of the block] = y[block]`.
struct BlockRepeat(Shape);

impl Rule for BlockSum {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(repeat(step.cotangent, self.0)?)])
    }
}

impl Rule for BlockRepeat {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(total(step.cotangent, self.0)?)])
    }
}

fn total(x: &Var, shape: Shape) -> Result<Var> {
    let value = if x.device().is_cpu() {
        let x = x.value.contiguous()?;
        by_dtype(x.dtype(), || total_on::<f32>(&x, shape), || total_on::<f64>(&x, shape))?
    } else {
        shape.windows(&x.value)?.sum(4)?.into()
    };
    x.tape.record(&[x], value, BlockSum(shape))
}

fn total_on<T: Float>(x: &Tensor, shape: Shape) -> Result<Value> {
    let x = Slice::<T>::new(x)?;
    build::<T>(&shape.small(), |y| block_sum(&shape.blocks(), &x, y))
}

fn repeat(y: &Var, shape: Shape) -> Result<Var> {
    let value = if y.device().is_cpu() {
        let y = y.value.contiguous()?;
        by_dtype(y.dtype(), || repeat_on::<f32>(&y, shape), || repeat_on::<f64>(&y, shape))?
    } else {
        let [n, c, h, w] = shape.small();
        let k = shape.side;
        let all = y.value.unsqueeze(4)?.broadcast_as(&[n, c, h, w, k * k])?.contiguous()?;
        shape.unwindows(&all)?.into()
    };
    y.tape.record(&[y], value, BlockRepeat(shape))
}

fn repeat_on<T: Float>(y: &Tensor, shape: Shape) -> Result<Value> {
    let y = Slice::<T>::new(y)?;
    build::<T>(&shape.large, |x| block_repeat(&shape.blocks(), &y, x))
}

impl Var {
    fn pool_shape(&self, side: usize) -> Result<Shape> {
        let large = self.dims4()?;
        if !(1..=15).contains(&side) || large[2] < side || large[3] < side {
            return Err(Error::internal(format!(
                "pooling of {large:?} in blocks of side `{side}`"
            )));
        }
        Ok(Shape { large, side })
    }

    /// Largest value of each `side x side` block of `[N, C, H, W]` (kernel = stride = `side`, at most
    /// 15); odd edges are left out; the first of equals gets the gradient, as in PyTorch.
    ///
    /// # Errors
    /// When the image is smaller than a block.
    pub fn max_pool2d(&self, side: usize) -> Result<Self> {
        let shape = self.pool_shape(side)?;
        let (value, places) = if self.device().is_cpu() {
            let x = self.value.contiguous()?;
            by_dtype(x.dtype(), || maxima::<f32>(&x, shape), || maxima::<f64>(&x, shape))?
        } else {
            let windows = shape.windows(&self.value)?;
            let at = windows.argmax_keepdim(4)?;
            (windows.gather(&at, 4)?.squeeze(4)?.into(), Places::Device(at))
        };
        self.tape.record(&[self], value, Gather { shape, places })
    }

    /// Sum of each `side x side` block; the transpose of [`Var::upsample_nearest`].
    pub(super) fn sum_of_blocks(&self, side: usize) -> Result<Self> {
        total(self, self.pool_shape(side)?)
    }

    /// Mean of each `side x side` block of `[N, C, H, W]` (kernel = stride = `side`, at most 15);
    /// odd edges are left out.
    ///
    /// # Errors
    /// When the image is smaller than a block.
    pub fn avg_pool2d(&self, side: usize) -> Result<Self> {
        self.sum_of_blocks(side)?.scale(1.0 / (side * side) as f64)
    }

    /// Mean of each plane: `[N, C, H, W]` to `[N, C]`.
    ///
    /// # Errors
    /// When the shape is not `[N, C, H, W]`.
    pub fn global_avg_pool(&self) -> Result<Self> {
        self.dims4()?;
        self.mean(&[2, 3], KeepDims::Drop)
    }

    /// Largest value of each plane: `[N, C, H, W]` to `[N, C]`; the first of equals gets the gradient.
    ///
    /// # Errors
    /// When the shape is not `[N, C, H, W]` or a plane is empty.
    pub fn global_max_pool(&self) -> Result<Self> {
        let [n, c, h, w] = self.dims4()?;
        if h * w == 0 {
            return Err(Error::internal("global maximum of an empty plane"));
        }
        let planes: Vec<Vec<f64>> =
            self.value.reshape((n * c, h * w))?.to_dtype(candle_core::DType::F64)?.to_vec2()?;
        let flat: Vec<usize> = planes
            .iter()
            .enumerate()
            .map(|(plane, values)| {
                let mut best = 0;
                for (at, value) in values.iter().enumerate() {
                    if *value > values[best] || (value.is_nan() && !values[best].is_nan()) {
                        best = at;
                    }
                }
                plane * h * w + best
            })
            .collect();
        self.reshape(&[n * c * h * w])?.index_select_rows(&flat)?.reshape(&[n, c])
    }

    /// Nearest up-sampling of `[N, C, H, W]` by an integer factor (at most 15).
    ///
    /// # Errors
    /// When the shape is not `[N, C, H, W]` or the factor is out of range.
    pub fn upsample_nearest(&self, factor: usize) -> Result<Self> {
        let [n, c, h, w] = self.dims4()?;
        if !(1..=15).contains(&factor) {
            return Err(Error::internal(format!("up-sampling by `{factor}`")));
        }
        repeat(self, Shape { large: [n, c, h * factor, w * factor], side: factor })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::tensor::RngStream;
    use crate::tensor::tape::{Order, Tape, vjp};

    #[test]
    fn candle_operations_pool_and_unpool_as_the_kernels_do() {
        let values = RngStream::new(1, "pool", "", 0).normals(2 * 3 * 5 * 7);
        let x = Tensor::from_vec(values, (2, 3, 5, 7), &Device::Cpu).unwrap();
        let shape = Shape { large: [2, 3, 5, 7], side: 2 };
        let (y, places) = maxima::<f32>(&x, shape).unwrap();
        let Places::Bytes(bytes) = &places else { panic!("CPU places") };
        let windows = shape.windows(&x).unwrap();
        let at = windows.argmax_keepdim(4).unwrap();
        let expected: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).collect();
        assert_eq!(at.flatten_all().unwrap().to_vec1::<u32>().unwrap(), expected);
        let tape = Tape::new();
        let (x, y) = (tape.leaf(x), tape.unrecorded(y));
        let on_device = Places::Device(at);
        let same = |a: &Var, b: &Var| {
            assert_eq!(
                a.value.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                b.value.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            );
        };
        same(&gather(&x, shape, &on_device).unwrap(), &y);
        same(&scatter(&y, shape, &on_device).unwrap(), &scatter(&y, shape, &places).unwrap());
        let pooled = gather(&x, shape, &on_device).unwrap();
        let back = vjp(&pooled, &y, &[&x], Order::First).unwrap();
        same(&back[0], &scatter(&y, shape, &places).unwrap());
    }
}
