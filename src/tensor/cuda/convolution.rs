//! Convolutions with constant weights: cuBLAS on patch matrices, the input itself where the kernel is a point, and
//! kernels of their own for depthwise layers. Large planes are one product an image; small ones, too narrow for that, are
//! one product for all images, and a transposition.

use super::product::{Factor, Product};
use super::{Argument, Memory, Operation, Run, Site, Target, View, blocks, each};
use crate::error::Result;
use crate::tensor::kernels::conv::Conv2dGeometry;

/// Elements of the largest patch matrix: 256 MiB.
const PATCHES: usize = 1 << 26;
/// Planes of fewer pixels are multiplied together for all images.
const NARROW: usize = 128;
/// Patch rows that a launch spreads over blocks.
const ROWS: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// One input channel a group.
    Depthwise,
    /// A point kernel of stride 1: the input is its own patch matrix.
    Point,
    /// A patch matrix an image.
    Images,
    /// One patch matrix for all.
    Joint,
}

/// A convolution with frozen weights [O, C / groups, kh, kw] and bias [O].
#[derive(Debug)]
pub struct Convolution {
    geometry: Conv2dGeometry,
    weight: Memory,
    bias: Option<Memory>,
    path: Path,
}

impl Convolution {
    /// Uploads the weights.
    ///
    /// # Errors
    /// When the device has no memory for them.
    pub fn new(
        site: &Site<'_>,
        geometry: Conv2dGeometry,
        weight: &[f32],
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        let weight = Memory::of(site.device, weight)?;
        let bias = bias.map(|bias| Memory::of(site.device, bias)).transpose()?;
        let [rows, columns] = geometry.output();
        let Conv2dGeometry { kernel, stride, pads, groups, in_channels, .. } = geometry;
        let path = if groups > 1 && groups == in_channels {
            Path::Depthwise
        } else if groups == 1 && rows * columns < NARROW && geometry.batch > 1 {
            Path::Joint
        } else if (kernel, stride, pads) == ([1, 1], [1, 1], [0; 4]) {
            Path::Point
        } else {
            Path::Images
        };
        Ok(Self { geometry, weight, bias, path })
    }

    fn plane(&self) -> usize {
        let [rows, columns] = self.geometry.output();
        rows * columns
    }

    /// Rows of the patch matrix, all groups.
    fn patch(&self) -> usize {
        self.geometry.in_channels * self.geometry.kernel[0] * self.geometry.kernel[1]
    }

    /// Images whose patches are made at once.
    fn chunk(&self) -> usize {
        let one = (self.patch() + self.geometry.out_channels) * self.plane();
        (PATCHES / one.max(1)).clamp(1, self.geometry.batch.max(1))
    }

    /// Input sizes, output sizes, kernel, stride, dilation, and the first pads: as the kernels take them.
    fn window(&self) -> Vec<Argument> {
        let g = &self.geometry;
        let [rows, columns] = g.output();
        let pairs = [g.input, [rows, columns], g.kernel, g.stride, g.dilation];
        let pads = [g.pads[0], g.pads[1]];
        pairs.iter().chain([&pads]).flatten().map(|&size| size.into()).collect()
    }

    /// Distances in the patch matrix of `images`: from image to image, from row to row.
    fn patch_strides(&self, images: usize) -> [usize; 2] {
        let plane = self.plane();
        match self.path {
            Path::Joint => [plane, images * plane],
            _ => [self.patch() * plane, plane],
        }
    }

    /// `c = w matrix` or `c = w' matrix` for each group and image, of matrices [rows, plane].
    fn products(
        &self,
        run: &Run<'_>,
        images: usize,
        transposed: bool,
        [from, to]: [View; 2],
        add: bool,
    ) -> Result<()> {
        let groups = self.geometry.groups;
        let (inner, outer) = (self.patch() / groups, self.geometry.out_channels / groups);
        let (m, k) = if transposed { (inner, outer) } else { (outer, inner) };
        let (batch, n) = match self.path {
            Path::Joint => (1, images * self.plane()),
            _ => (images, self.plane()),
        };
        for group in 0..groups {
            let weight = self.weight.view().part(group * inner * outer, inner * outer);
            let tail = |view: View, rows: usize| {
                let start = group * rows * n;
                view.part(start, view.len() - start)
            };
            let product = Product {
                sizes: [m, n, k],
                a: Factor { view: weight, transposed, stride: 0 },
                b: Factor { view: tail(from, k), transposed: false, stride: groups * k * n },
                c: tail(to, m),
                c_stride: groups * m * n,
                batch,
                add,
            };
            product.run(run.device)?;
        }
        Ok(())
    }

    /// [N, O, plane] from [O, N, plane], or the reverse.
    fn swap(
        &self,
        run: &Run<'_>,
        [rows, columns]: [usize; 2],
        [from, to]: [View; 2],
    ) -> Result<()> {
        let n = rows * columns * self.plane();
        let (from, to) = (Argument::from(from), Argument::from(to));
        let sizes = [rows, columns, self.plane(), n].map(Argument::from);
        let arguments = [&[from, to], &sizes[..], &[false.into()]].concat();
        each(run.device, "swap_pieces", n, &arguments)
    }

    fn with_bias(&self, run: &Run<'_>, y: View) -> Result<()> {
        let Some(bias) = &self.bias else { return Ok(()) };
        let (channels, plane) = (self.geometry.out_channels, self.plane());
        let arguments =
            [y.into(), bias.view().into(), channels.into(), plane.into(), y.len().into()];
        each(run.device, "add_bias", y.len(), &arguments)
    }

    /// Images, channels and outputs of a channel.
    fn depthwise_sizes(&self) -> [Argument; 3] {
        let g = &self.geometry;
        [g.batch, g.in_channels, g.out_channels / g.in_channels.max(1)].map(Argument::from)
    }

    /// `y = conv(x) + bias`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn run(&self, run: &Run<'_>, x: View, y: View) -> Result<()> {
        let g = &self.geometry;
        if y.is_empty() {
            return Ok(());
        }
        match self.path {
            Path::Depthwise => {
                let bias = self.bias.as_ref().map_or(View::NOTHING, Memory::view);
                let views = [x, self.weight.view(), bias, y].map(Argument::from);
                let biased = [self.bias.is_some().into()];
                let arguments =
                    [&views[..], &self.depthwise_sizes(), &self.window(), &biased].concat();
                return each(run.device, "depthwise_forward", y.len(), &arguments);
            }
            Path::Point => self.products(run, g.batch, false, [x, y], false)?,
            Path::Images | Path::Joint => {
                let (input, output) = (g.input_stride(), g.output_stride());
                for start in (0..g.batch).step_by(self.chunk()) {
                    let n = self.chunk().min(g.batch - start);
                    let x = x.part(start * input, n * input);
                    let y = y.part(start * output, n * output);
                    let patches = run.scratch.part(0, n * self.patch() * self.plane());
                    self.patches(run, n, "im2col", [x, patches], None)?;
                    if self.path == Path::Joint {
                        let rows = run.scratch.part(patches.len(), y.len());
                        self.products(run, n, false, [patches, rows], false)?;
                        self.swap(run, [g.out_channels, n], [rows, y])?;
                    } else {
                        self.products(run, n, false, [patches, y], false)?;
                    }
                }
            }
        }
        self.with_bias(run, y)
    }

    /// Starts im2col or col2im for `n` images.
    fn patches(
        &self,
        run: &Run<'_>,
        n: usize,
        kernel: &'static str,
        views: [View; 2],
        add: Option<bool>,
    ) -> Result<()> {
        let g = &self.geometry;
        let mut arguments: Vec<Argument> = views.map(Argument::from).to_vec();
        arguments.extend::<[Argument; 2]>([n.into(), g.in_channels.into()]);
        arguments.extend(self.window());
        arguments.extend(self.patch_strides(n).map(Argument::from));
        let Some(add) = add else {
            let across = (n * self.plane()).div_ceil(super::launch::BLOCK);
            return blocks(run.device, kernel, [across, self.patch().min(ROWS)], &arguments);
        };
        arguments.push(add.into());
        each(run.device, kernel, n * g.input_stride(), &arguments)
    }

    /// The gradient of [`Convolution::run`] to its input.
    ///
    /// # Errors
    /// Those of the device.
    pub fn input_gradient(&self, run: &Run<'_>, dy: View, target: Target) -> Result<()> {
        let g = &self.geometry;
        let dx = target.view;
        match self.path {
            Path::Depthwise => {
                let views = [dy, self.weight.view(), dx].map(Argument::from);
                let add = [target.add.into()];
                let arguments =
                    [&views[..], &self.depthwise_sizes(), &self.window(), &add].concat();
                each(run.device, "depthwise_backward", dx.len(), &arguments)
            }
            Path::Point => self.products(run, g.batch, true, [dy, dx], target.add),
            Path::Images | Path::Joint => {
                let (input, output) = (g.input_stride(), g.output_stride());
                for start in (0..g.batch).step_by(self.chunk()) {
                    let n = self.chunk().min(g.batch - start);
                    let dx = dx.part(start * input, n * input);
                    let dy = dy.part(start * output, n * output);
                    let patches = run.scratch.part(0, n * self.patch() * self.plane());
                    if self.path == Path::Joint {
                        let rows = run.scratch.part(patches.len(), dy.len());
                        self.swap(run, [n, g.out_channels], [dy, rows])?;
                        self.products(run, n, true, [rows, patches], false)?;
                    } else {
                        self.products(run, n, true, [dy, patches], false)?;
                    }
                    self.patches(run, n, "col2im", [patches, dx], Some(target.add))?;
                }
                Ok(())
            }
        }
    }
}

impl Operation for Convolution {
    fn scratch(&self) -> usize {
        match self.path {
            Path::Depthwise | Path::Point => 0,
            Path::Images => self.chunk() * self.patch() * self.plane(),
            Path::Joint => {
                self.chunk() * (self.patch() + self.geometry.out_channels) * self.plane()
            }
        }
    }

    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        self.run(run, inputs[0], output)
    }

    fn backward(
        &self,
        run: &Run<'_>,
        _which: usize,
        _inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        self.input_gradient(run, gradient, target)
    }
}

/// The transpose of a convolution: its forward is the gradient, its gradient the forward.
#[derive(Debug)]
pub struct ConvolutionTransposed(pub Convolution);

impl Operation for ConvolutionTransposed {
    fn scratch(&self) -> usize {
        let g = &self.0.geometry;
        self.0.scratch() + g.batch * g.output_stride()
    }

    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        self.0.input_gradient(run, inputs[0], Target { view: output, add: false })
    }

    fn backward(
        &self,
        run: &Run<'_>,
        _which: usize,
        _inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        if !target.add {
            return self.0.run(run, gradient, target.view);
        }
        let n = target.view.len();
        let result = run.scratch.part(self.0.scratch(), n);
        self.0.run(run, gradient, result)?;
        each(run.device, "accumulate", n, &[result.into(), target.view.into(), n.into()])
    }
}
