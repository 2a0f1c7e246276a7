//! Convolution, its gradient to the input and its gradient to the weights: three operations closed
//! under differentiation, so any order follows.
//!
//! With C(x, w) the convolution, I(g, w) and W(x, g) its two gradients, all bilinear:
//! C: x <- I(g, w), w <- W(x, g); I(z, w): z <- C(g, w), w <- W(g, z); W(x, z): x <- I(z, g), z <- C(x, g).
//! On the CPU each is a kernel; elsewhere each is an ordinary convolution of flipped or transposed
//! operands, since candle's own transposed convolution is slow on every device.

use candle_core::Tensor;

use super::memory::{Value, empty};
use super::reduce::KeepDims;
use super::value::{Float, Slice, build, by_dtype, from_vec};
use super::{Order, Rule, Step, Var};
use crate::error::{Error, Result};
use crate::tensor::kernels::conv::{
    Conv2dGeometry, conv2d, conv2d_input_gradient, conv2d_weight_gradient,
};
use crate::tensor::kernels::weight_gradient::upsampled_weight_gradient;

/// Stride and zero padding of a square convolution, the same on all sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvOptions {
    /// Stride down and right.
    pub stride: usize,
    /// Zeros added on each side.
    pub padding: usize,
}

impl ConvOptions {
    /// Stride 1 with the padding that keeps the size for an odd kernel of side `kernel`.
    pub fn same(kernel: usize) -> Self {
        Self { stride: 1, padding: kernel / 2 }
    }

    fn geometry(self, x: [usize; 4], w: [usize; 4]) -> Conv2dGeometry {
        Conv2dGeometry {
            batch: x[0],
            in_channels: x[1],
            input: [x[2], x[3]],
            out_channels: w[0],
            kernel: [w[2], w[3]],
            stride: [self.stride; 2],
            dilation: [1, 1],
            pads: [self.padding; 4],
            groups: 1,
        }
    }
}

/// Which of the three bilinear maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// (x, w) -> y.
    Forward,
    /// (gradient of y, w) -> gradient of x.
    Input,
    /// (x, gradient of y) -> gradient of w.
    Weight,
}

#[derive(Debug, Clone, Copy)]
struct Conv {
    kind: Kind,
    geometry: Conv2dGeometry,
}

impl Conv {
    fn output_dims(&self) -> [usize; 4] {
        let g = &self.geometry;
        let [height, width] = g.output();
        match self.kind {
            Kind::Forward => [g.batch, g.out_channels, height, width],
            Kind::Input => [g.batch, g.in_channels, g.input[0], g.input[1]],
            Kind::Weight => [g.out_channels, g.in_channels / g.groups, g.kernel[0], g.kernel[1]],
        }
    }

    fn apply(self, a: &Var, b: &Var) -> Result<Var> {
        let value = if a.device().is_cpu() {
            let (a, b) = (a.value.contiguous()?, b.value.contiguous()?);
            by_dtype(
                a.dtype(),
                || self.kernel::<f32>(&a, &b, None),
                || self.kernel::<f64>(&a, &b, None),
            )?
        } else {
            self.by_candle(&a.value, &b.value)?.into()
        };
        a.tape.record(&[a, b], value, self)
    }

    fn kernel<T: Float>(&self, a: &Tensor, b: &Tensor, bias: Option<&Tensor>) -> Result<Value> {
        let (a, b) = (Slice::<T>::new(a)?, Slice::<T>::new(b)?);
        let bias = bias.map(Slice::<T>::new).transpose()?;
        build::<T>(&self.output_dims(), |y| match self.kind {
            Kind::Forward => conv2d(&self.geometry, &a, &b, bias.as_deref(), y),
            Kind::Input => conv2d_input_gradient(&self.geometry, &a, &b, y, false),
            Kind::Weight => conv2d_weight_gradient(&self.geometry, &a, &b, y),
        })
    }

    /// The same by candle's forward convolution only.
    fn by_candle(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let g = &self.geometry;
        let (stride, padding) = (g.stride[0], g.pads[0]);
        let square = g.stride == [stride; 2] && g.pads == [padding; 4] && g.dilation == [1, 1];
        if !square || g.groups != 1 {
            return Err(Error::unsupported(format!(
                "a convolution with uneven strides or pads, dilation or groups on this device: `{g:?}`"
            )));
        }
        Ok(match self.kind {
            Kind::Forward => a.conv2d(b, padding, stride, 1, 1)?,
            Kind::Input => {
                let side = g.kernel[0];
                if g.kernel[0] != g.kernel[1] || padding >= side {
                    return Err(Error::unsupported(format!(
                        "input gradient of a convolution with kernel {:?} and padding `{padding}` on this device",
                        g.kernel
                    )));
                }
                let flipped = b.flip(&[2, 3])?.transpose(0, 1)?.contiguous()?;
                self.spread(a)?.conv2d(&flipped, side - 1 - padding, 1, 1, 1)?
            }
            Kind::Weight => {
                let x = a.transpose(0, 1)?.contiguous()?;
                let g = self.spread(b)?.transpose(0, 1)?.contiguous()?;
                x.conv2d(&g, padding, 1, 1, 1)?.transpose(0, 1)?.contiguous()?
            }
        })
    }

    /// The gradient of the output with zeros between its elements (stride) and after them (rows and
    /// columns that the stride left over), as a convolution of stride 1 would have it.
    fn spread(&self, gradient: &Tensor) -> Result<Tensor> {
        let g = &self.geometry;
        let mut spread = gradient.contiguous()?;
        for axis in 0..2 {
            let (stride, dim) = (g.stride[axis], axis + 2);
            let full = (g.input[axis] + g.pads[axis] + g.pads[axis + 2] + 1) - g.kernel[axis];
            if stride > 1 {
                let mut dims = spread.dims().to_vec();
                let len = dims[dim];
                let wide = spread.unsqueeze(dim + 1)?.pad_with_zeros(dim + 1, 0, stride - 1)?;
                dims[dim] = len * stride;
                spread = wide.reshape(dims)?.narrow(dim, 0, (len - 1) * stride + 1)?;
            }
            let len = spread.dims()[dim];
            spread = spread.pad_with_zeros(dim, 0, full.saturating_sub(len))?;
        }
        Ok(spread.contiguous()?)
    }

    fn of(&self, kind: Kind) -> Self {
        Self { kind, geometry: self.geometry }
    }
}

impl Rule for Conv {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let (a, b, g) = (&step.inputs[0], &step.inputs[1], step.cotangent);
        let to_a = || match self.kind {
            Kind::Forward => self.of(Kind::Input).apply(g, b),
            Kind::Input => self.of(Kind::Forward).apply(g, b),
            Kind::Weight => self.of(Kind::Input).apply(b, g),
        };
        let to_b = || match self.kind {
            Kind::Forward => self.of(Kind::Weight).apply(a, g),
            Kind::Input => self.of(Kind::Weight).apply(g, a),
            Kind::Weight => self.of(Kind::Forward).apply(a, g),
        };
        Ok(vec![
            if step.needs[0] { Some(to_a()?) } else { None },
            if step.needs[1] { Some(to_b()?) } else { None },
        ])
    }
}

/// Convolution plus bias, in one pass forward.
struct BiasedConv(Conv);

impl Rule for BiasedConv {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let inner = Step { inputs: &step.inputs[..2], needs: &step.needs[..2], ..*step };
        let mut gradients = self.0.vjp(&inner)?;
        gradients.push(if step.needs[2] {
            Some(step.cotangent.sum(&[0, 2, 3], KeepDims::Drop)?)
        } else {
            None
        });
        Ok(gradients)
    }
}

/// Nearest up-sampling by two, then a 3x3 convolution of padding 1: the up-sampled images are not kept.
struct UpsampledConv(Conv);

impl UpsampledConv {
    /// The gradient to the weights from the images before up-sampling, where there is a kernel for it.
    fn weight_gradient<T: Float>(&self, x: &Tensor, g: &Tensor) -> Result<Option<Value>> {
        let (x, g) = (Slice::<T>::new(x)?, Slice::<T>::new(g)?);
        let mut dw = empty(self.0.geometry.weights());
        if !upsampled_weight_gradient(&self.0.geometry, &x, &g, &mut dw) {
            return Ok(None);
        }
        from_vec(dw, &self.0.of(Kind::Weight).output_dims()).map(Some)
    }
}

impl Rule for UpsampledConv {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let (x, w, g) = (&step.inputs[0], &step.inputs[1], step.cotangent);
        let to_x = || self.0.of(Kind::Input).apply(g, w)?.sum_of_blocks(2);
        let to_w = || {
            if step.order == Order::First && g.device().is_cpu() {
                let (xv, gv) = (x.value.contiguous()?, g.value.contiguous()?);
                let found = by_dtype(
                    gv.dtype(),
                    || self.weight_gradient::<f32>(&xv, &gv),
                    || self.weight_gradient::<f64>(&xv, &gv),
                )?;
                if let Some(found) = found {
                    return Ok(g.constant_like(found));
                }
            }
            self.0.of(Kind::Weight).apply(&x.upsample_nearest(2)?, g)
        };
        Ok(vec![
            if step.needs[0] { Some(to_x()?) } else { None },
            if step.needs[1] { Some(to_w()?) } else { None },
        ])
    }
}

impl Var {
    /// [`Var::upsample_nearest`] by two, then [`Var::conv2d`] with weights `[O, C, 3, 3]`, padding 1 and no bias.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn upsampled_conv2d(&self, weight: &Self) -> Result<Self> {
        let same = ConvOptions::same(3);
        let ([n, c, height, width], w) = (self.dims4()?, weight.dims4()?);
        if w[2..] != [3, 3] {
            return Err(Error::internal(format!("convolution 3x3 with weights of shape `{w:?}`")));
        }
        // As constants: only the result is recorded.
        let value = self.detach().upsample_nearest(2)?.conv2d(&weight.detach(), None, same)?.value;
        let geometry = same.geometry([n, c, 2 * height, 2 * width], w);
        let rule = UpsampledConv(Conv { kind: Kind::Forward, geometry });
        self.tape.record(&[self, weight], value, rule)
    }

    /// 2-D convolution of images `[N, C, H, W]` with weights `[O, C, k, k]` and a bias `[O]`:
    /// `[N, O, Ho, Wo]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn conv2d(&self, weight: &Self, bias: Option<&Self>, options: ConvOptions) -> Result<Self> {
        self.convolve(weight, bias, options.geometry(self.dims4()?, weight.dims4()?))
    }

    /// 2-D convolution of any geometry: images `[N, C, H, W]`, weights `[O, C / groups, kh, kw]`, bias
    /// `[O]`; strides, dilations, pads and groups as `geometry` says, whose sizes are those of the operands.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn convolve(
        &self,
        weight: &Self,
        bias: Option<&Self>,
        geometry: Conv2dGeometry,
    ) -> Result<Self> {
        let (x, w, g) = (self.dims4()?, weight.dims4()?, geometry);
        let fits = g.stride[0] * g.stride[1] * g.groups > 0
            && x == [g.batch, g.in_channels, g.input[0], g.input[1]]
            && w == [g.out_channels, g.in_channels / g.groups, g.kernel[0], g.kernel[1]]
            && g.in_channels % g.groups == 0
            && g.out_channels % g.groups == 0
            && g.output()[0] * g.output()[1] > 0
            && bias.is_none_or(|b| b.dims() == [w[0]]);
        if !fits {
            return Err(Error::internal(format!(
                "convolution of {x:?} with weights {w:?}, {geometry:?} and bias `{:?}`",
                bias.map(Self::dims)
            )));
        }
        let conv = Conv { kind: Kind::Forward, geometry };
        let Some(bias) = bias else { return conv.apply(self, weight) };
        let value = if self.device().is_cpu() {
            let (x, w) = (self.value.contiguous()?, weight.value.contiguous()?);
            let b = bias.value.contiguous()?;
            by_dtype(
                x.dtype(),
                || conv.kernel::<f32>(&x, &w, Some(&b)),
                || conv.kernel::<f64>(&x, &w, Some(&b)),
            )?
        } else {
            let plain = conv.by_candle(&self.value, &weight.value)?;
            plain.broadcast_add(&bias.value.reshape((1, w[0], 1, 1))?)?.into()
        };
        self.tape.record(&[self, weight, bias], value, BiasedConv(conv))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::tensor::RngStream;

    fn noise(dims: &[usize], index: u64) -> Tensor {
        let n = dims.iter().product();
        let values: Vec<f64> =
            RngStream::new(3, "conv", "", index).normals(n).into_iter().map(f64::from).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    #[test]
    fn kernels_and_candle_convolutions_agree_for_all_three_maps() {
        for (x, w, stride, padding) in [
            ([2, 3, 6, 7], [4, 3, 3, 3], 1, 1),
            ([2, 3, 7, 6], [4, 3, 3, 3], 2, 1),
            ([1, 2, 9, 6], [3, 2, 2, 2], 3, 0),
            ([2, 5, 4, 4], [2, 5, 1, 1], 1, 0),
        ] {
            let geometry = ConvOptions { stride, padding }.geometry(x, w);
            let forward = Conv { kind: Kind::Forward, geometry };
            let (xt, wt) = (noise(&x, 0), noise(&w, 1));
            let g = noise(&forward.output_dims(), 2);
            for (kind, a, b) in
                [(Kind::Forward, &xt, &wt), (Kind::Input, &g, &wt), (Kind::Weight, &xt, &g)]
            {
                let conv = forward.of(kind);
                let kernel = conv.kernel::<f64>(a, b, None).unwrap();
                let candle = conv.by_candle(a, b).unwrap();
                assert_eq!(kernel.dims(), candle.dims(), "{kind:?} {x:?}");
                let gap = (&*kernel - candle).unwrap().abs().unwrap().max_all().unwrap();
                assert!(gap.to_vec0::<f64>().unwrap() < 1e-10, "{kind:?} {x:?} {stride} {padding}");
            }
        }
    }
}
