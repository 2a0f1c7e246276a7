//! Free pixels that stay on the device: the way to a model's input and back, the priors, Adam.

use std::sync::Arc;

use super::{Argument, Device, Memory, View, blocks, each};
use crate::error::Result;
use crate::tensor::AdamOptions;

/// Taps of a resize along one axis: output `o` sums old values from `starts[o]` on with `weights[ends[o - 1]..ends[o]]`.
#[derive(Debug, Clone, Default)]
pub struct AxisTaps {
    /// Old values.
    pub from: usize,
    /// First old value of each new one.
    pub starts: Vec<usize>,
    /// End of the weights of each new value.
    pub ends: Vec<usize>,
    /// Weights.
    pub weights: Vec<f32>,
}

/// How a model's input comes from canonical images [n, 3, height, width].
#[derive(Debug, Clone)]
pub struct InputMap {
    /// Rows.
    pub vertical: AxisTaps,
    /// Columns.
    pub horizontal: AxisTaps,
    /// Share of each canonical channel in each input channel.
    pub mix: Vec<[f32; 3]>,
    /// Factor of each input channel.
    pub scale: Vec<f32>,
    /// Offset of each input channel.
    pub offset: Vec<f32>,
    /// Distance of channels and of pixels in the input.
    pub steps: [usize; 2],
    /// Whether values are rounded to bytes.
    pub bytes: bool,
}

/// Middle and unit of the free pixels in canonical values, and their bound in units.
#[derive(Debug, Clone, Copy)]
pub struct Standard {
    /// Canonical value of 0.
    pub middle: f32,
    /// Canonical length of 1.
    pub unit: f32,
    /// Pixels stay within this, both ways.
    pub range: f32,
}

/// Blocks of the priors' sums.
const PARTS: usize = 256;

#[derive(Debug)]
struct Axis {
    from: usize,
    to: usize,
    starts: Memory,
    ends: Memory,
    weights: Memory,
    offsets: Memory,
    places: Memory,
    place_weights: Memory,
}

impl Axis {
    fn new(device: &Arc<dyn Device>, taps: &AxisTaps) -> Result<Self> {
        let mut lists: Vec<Vec<(u32, f32)>> = vec![Vec::new(); taps.from];
        let mut begin = 0;
        for (to, (&start, &end)) in taps.starts.iter().zip(&taps.ends).enumerate() {
            for (old, &weight) in lists[start..].iter_mut().zip(&taps.weights[begin..end]) {
                old.push((to as u32, weight));
            }
            begin = end;
        }
        let mut offsets = vec![0];
        lists.iter().for_each(|list| offsets.push(offsets[offsets.len() - 1] + list.len() as u32));
        let flat: Vec<(u32, f32)> = lists.into_iter().flatten().collect();
        let positions = |values: &[usize]| {
            let values: Vec<u32> = values.iter().map(|&v| v as u32).collect();
            Memory::of_positions(device, &values)
        };
        Ok(Self {
            from: taps.from,
            to: taps.starts.len(),
            starts: positions(&taps.starts)?,
            ends: positions(&taps.ends)?,
            weights: Memory::of(device, &taps.weights)?,
            offsets: Memory::of_positions(device, &offsets)?,
            places: Memory::of_positions(device, &flat.iter().map(|p| p.0).collect::<Vec<_>>())?,
            place_weights: Memory::of(device, &flat.iter().map(|p| p.1).collect::<Vec<_>>())?,
        })
    }
}

/// Free pixels [n, 3, height, width] with their gradient and the state of Adam.
#[derive(Debug)]
pub struct Pixels {
    device: Arc<dyn Device>,
    images: usize,
    vertical: Axis,
    horizontal: Axis,
    mix: Memory,
    scale: Memory,
    offset: Memory,
    channels: usize,
    steps: [usize; 2],
    bytes: bool,
    standard: Standard,
    z: Memory,
    gradient: Memory,
    moments: [Memory; 2],
    partial: Memory,
    sums: Memory,
}

impl Pixels {
    /// Uploads the pixels `z`.
    ///
    /// # Errors
    /// When the device has no memory for them.
    pub fn new(
        device: &Arc<dyn Device>,
        map: &InputMap,
        standard: Standard,
        z: &[f32],
    ) -> Result<Self> {
        let plane = 3 * map.vertical.from * map.horizontal.from;
        let zeros = || Memory::of(device, &vec![0.0; z.len()]);
        Ok(Self {
            device: Arc::clone(device),
            images: z.len() / plane.max(1),
            vertical: Axis::new(device, &map.vertical)?,
            horizontal: Axis::new(device, &map.horizontal)?,
            mix: Memory::of(device, map.mix.as_flattened())?,
            scale: Memory::of(device, &map.scale)?,
            offset: Memory::of(device, &map.offset)?,
            channels: map.mix.len(),
            steps: map.steps,
            bytes: map.bytes,
            standard,
            z: Memory::of(device, z)?,
            gradient: Memory::new(device, z.len())?,
            moments: [zeros()?, zeros()?],
            partial: Memory::new(device, 5 * PARTS)?,
            sums: Memory::new(device, 5)?,
        })
    }

    fn len(&self) -> usize {
        self.z.view().len()
    }

    /// Images, height, width, channels and size of the input.
    fn sizes(&self) -> [Argument; 6] {
        let (v, h) = (&self.vertical, &self.horizontal);
        [self.images, v.from, h.from, self.channels, v.to, h.to].map(Argument::from)
    }

    /// Bounds the pixels, shifts the images cyclically by (down, right) and writes the model's input.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward(&self, input: View, [down, right]: [i32; 2]) -> Result<()> {
        let Standard { middle, unit, range } = self.standard;
        let arguments = [self.z.view().into(), range.into(), self.len().into()];
        each(&*self.device, "clamp_pixels", self.len(), &arguments)?;
        let mut arguments: Vec<Argument> = vec![self.z.view().into(), input.into()];
        arguments.extend(self.sizes());
        let constants = [&self.mix, &self.scale, &self.offset];
        let axes = [&self.vertical, &self.horizontal];
        let taps = axes.into_iter().flat_map(|axis| [&axis.starts, &axis.ends, &axis.weights]);
        arguments.extend(constants.into_iter().chain(taps).map(|m| Argument::from(m.view())));
        arguments.extend(self.steps.map(Argument::from));
        arguments.extend::<[Argument; 2]>([middle.into(), unit.into()]);
        arguments.extend::<[Argument; 3]>([down.into(), right.into(), self.bytes.into()]);
        each(&*self.device, "pixels_forward", input.len(), &arguments)
    }

    /// The gradient to the pixels from the gradient to the model's input, and that of the priors: `variation` times total
    /// variation, `size` times the norm.
    ///
    /// # Errors
    /// Those of the device.
    pub fn backward(
        &self,
        d_input: View,
        [down, right]: [i32; 2],
        variation: f32,
        size: f32,
    ) -> Result<()> {
        let (device, n) = (&*self.device, self.len());
        let mut arguments: Vec<Argument> = vec![d_input.into(), self.gradient.view().into()];
        arguments.extend(self.sizes());
        let axes = [&self.vertical, &self.horizontal];
        let lists =
            axes.into_iter().flat_map(|axis| [&axis.offsets, &axis.places, &axis.place_weights]);
        let constants = [&self.mix, &self.scale];
        arguments.extend(constants.into_iter().chain(lists).map(|m| Argument::from(m.view())));
        arguments.extend(self.steps.map(Argument::from));
        let unit = self.standard.unit;
        arguments.extend::<[Argument; 3]>([unit.into(), down.into(), right.into()]);
        each(device, "pixels_backward", n, &arguments)?;
        let (height, width) = (self.vertical.from, self.horizontal.from);
        let parts = n.div_ceil(1024).clamp(1, PARTS);
        let (z, sums) = (Argument::from(self.z.view()), self.sums.view());
        let partial = self.partial.view();
        let arguments = [z, partial.into(), height.into(), width.into(), n.into()];
        blocks(device, "prior_sums", [parts, 1], &arguments)?;
        let arguments = [partial.into(), sums.into(), 5_usize.into(), parts.into(), false.into()];
        each(device, "sum_parts", 5, &arguments)?;
        let arguments = [
            z,
            sums.into(),
            self.gradient.view().into(),
            height.into(),
            width.into(),
            variation.into(),
            size.into(),
            n.into(),
        ];
        each(device, "prior_gradient", n, &arguments)
    }

    /// One step of Adam, the `count`th (from 1), against the last gradient.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(&self, options: AdamOptions, count: u64, rate: f64) -> Result<()> {
        let AdamOptions { beta1, beta2, epsilon } = options;
        let t = count.min(i32::MAX as u64) as i32;
        let size = (rate / (1.0 - beta1.powi(t))) as f32;
        let root = (1.0 - beta2.powi(t)).sqrt() as f32;
        let [m, v] = self.moments.each_ref().map(|m| Argument::from(m.view()));
        let numbers = [beta1, 1.0 - beta1, beta2, 1.0 - beta2, epsilon].map(|v| v as f32);
        let mut arguments: Vec<Argument> =
            vec![self.z.view().into(), m, v, self.gradient.view().into(), size.into(), root.into()];
        arguments.extend(numbers.map(Argument::from));
        arguments.push(self.len().into());
        each(&*self.device, "adam_step", self.len(), &arguments)
    }

    /// Total variation and norm of the pixels at the last [`Pixels::backward`]. Waits for the device.
    ///
    /// # Errors
    /// Those of the device.
    pub fn priors(&self) -> Result<[f64; 2]> {
        let norms: Vec<f64> = self.sums.read()?.iter().map(|&s| f64::from(s).sqrt()).collect();
        Ok([norms[..4].iter().sum(), norms[4]])
    }

    /// The pixels, bounded.
    ///
    /// # Errors
    /// Those of the device.
    pub fn read(&self) -> Result<Vec<f32>> {
        let mut z = self.z.read()?;
        let range = self.standard.range;
        z.iter_mut().for_each(|v| *v = v.clamp(-range, range));
        Ok(z)
    }
}
