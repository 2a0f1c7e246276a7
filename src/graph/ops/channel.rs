//! The step of a frozen BatchNormalization: a scale and a shift per channel, the statistics of its input on the
//! way, and what it takes in of the steps that follow: an addition, a bounded activation, 2x2 max pooling.

use rayon::prelude::*;

#[cfg(any(feature = "cuda", test))]
use crate::error::Result;
#[cfg(any(feature = "cuda", test))]
use crate::graph::plan::singles;
use crate::graph::plan::{
    Absorbed, Follower, Mode, Needs, Reads, Step, StepState, TapReference, Target,
};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::channel::{self, Bounds, Channel, Through};

/// Elements that a parallel task takes at least.
const TASK: usize = 1 << 14;

/// `y = halve(bounds(a * x + b + residual))` per channel, with the mean and biased variance of `x` over batch
/// and space (the quantities DeepInversion compares with the running statistics). Input 1 is the residual, where there
/// is one.
#[derive(Debug)]
pub(super) struct ChannelAffine<T> {
    a: Vec<T>,
    b: Vec<T>,
    /// Elements of a channel of an image.
    plane: usize,
    /// Near the mean of each channel: sums of squares are taken around it.
    shift: Vec<T>,
    bounds: Option<Bounds<T>>,
    residual: bool,
    /// Width of the planes, where they are halved.
    halved: Option<usize>,
}

impl<T: Element> ChannelAffine<T> {
    /// A tapped map of planes of `plane` elements.
    pub(super) fn new(a: Vec<T>, b: Vec<T>, plane: usize, tap: &TapReference) -> Self {
        let shift = tap.mean.iter().map(|&mean| T::of(f64::from(mean))).collect();
        Self { a, b, plane, shift, bounds: None, residual: false, halved: None }
    }

    fn channel(&self, plane: usize) -> Channel<T> {
        let c = plane % self.a.len();
        let bounds = self.bounds.unwrap_or_else(Bounds::none);
        Channel { a: self.a[c], b: self.b[c], bounds }
    }

    /// Elements of an output plane.
    fn out_plane(&self) -> usize {
        match self.halved {
            Some(width) => (self.plane / width / 2) * (width / 2),
            None => self.plane,
        }
    }

    /// Planes that a task takes.
    fn task(&self) -> usize {
        (TASK / self.plane).max(1)
    }

    /// Puts the sums of all planes, over `count` elements a channel, together in the order of the images.
    fn merge(&self, sums: &[[T; 2]], count: usize, state: &mut StepState<T>) {
        let channels = self.a.len();
        let count = count.max(1) as f64;
        state.mean.clear();
        state.var.clear();
        for c in 0..channels {
            let (mut first, mut second) = (0.0, 0.0);
            for [sum, square] in sums.iter().skip(c).step_by(channels) {
                first += sum.f64();
                second += square.f64();
            }
            let mean = first / count;
            state.mean.push(T::of(self.shift[c].f64() + mean));
            state.var.push(T::of((second / count - mean * mean).max(0.0)));
        }
    }

    /// The gradient through mean and variance, per channel.
    fn through(&self, elements: usize, state: &StepState<T>) -> Vec<Through<T>> {
        let channels = self.a.len();
        let count = T::of((elements / channels).max(1) as f64);
        (0..channels)
            .map(|c| match (state.d_mean.get(c), state.d_var.get(c)) {
                (Some(&d_mean), Some(&d_var)) => {
                    let factor = T::of(2.0) * d_var / count;
                    Through { offset: d_mean / count - factor * state.mean[c], factor }
                }
                _ => Through { offset: T::ZERO, factor: T::ZERO },
            })
            .collect()
    }
}

/// Channels that lie side by side, [rows, channels].
impl<T: Element> ChannelAffine<T> {
    fn forward_rows(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        let channels = self.a.len();
        let mut sums = vec![[T::ZERO; 2]; channels];
        for (row, (x, y)) in
            inputs[0].chunks_exact(channels).zip(output.chunks_exact_mut(channels)).enumerate()
        {
            for (c, (&x, y)) in x.iter().zip(y).enumerate() {
                let d = x - self.shift[c];
                sums[c][0] += d;
                sums[c][1] += d * d;
                let v = self.a[c] * x + self.b[c];
                let v = if self.residual { v + inputs[1][row * channels + c] } else { v };
                *y = self.bounds.map_or(v, |bounds| bounds.value(v));
            }
        }
        self.merge(&sums, inputs[0].len() / channels, state);
    }

    fn backward_rows(
        &self,
        which: usize,
        inputs: &[&[T]],
        output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        through: &[Through<T>],
    ) {
        let channels = self.a.len();
        let passed = |i: usize| match self.bounds {
            Some(bounds) => {
                let v = match self.residual {
                    true => output[i],
                    false => self.a[i % channels] * inputs[0][i] + self.b[i % channels],
                };
                if bounds.passes(v) { d_output[i] } else { T::ZERO }
            }
            None => d_output[i],
        };
        if which == 1 {
            return target.put(passed);
        }
        target.put(|i| {
            let Through { offset, factor } = through[i % channels];
            self.a[i % channels] * passed(i) + (offset + factor * inputs[0][i])
        });
    }
}

impl<T: Element> Step<T> for ChannelAffine<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        if self.plane == 1 {
            return self.forward_rows(inputs, output, state);
        }
        let (x, channels, task) = (inputs[0], self.a.len(), self.task());
        let out_plane = self.out_plane();
        let mut sums = vec![[T::ZERO; 2]; x.len() / self.plane];
        let work = |first: usize, x: &[T], y: &mut [T], sums: &mut [[T; 2]]| {
            for (i, (x, sums)) in x.chunks_exact(self.plane).zip(sums).enumerate() {
                let channel = self.channel(first + i);
                *sums = channel::moments(self.shift[(first + i) % channels], x);
                let y = &mut y[i * out_plane..(i + 1) * out_plane];
                match self.halved {
                    Some(width) => channel::forward_halved(channel, width, x, y),
                    None if self.residual => {
                        let residual = &inputs[1][(first + i) * self.plane..][..self.plane];
                        channel::forward_residual(channel, x, residual, y);
                    }
                    None => channel::forward(channel, x, y),
                }
            }
        };
        if out_plane == 0 {
            x.chunks(self.plane).zip(&mut sums).enumerate().for_each(|(plane, (x, sums))| {
                *sums = channel::moments(self.shift[plane % channels], x);
            });
        } else {
            x.par_chunks(task * self.plane)
                .zip(output.par_chunks_mut(task * out_plane))
                .zip(sums.par_chunks_mut(task))
                .enumerate()
                .for_each(|(index, ((x, y), sums))| work(index * task, x, y, sums));
        }
        self.merge(&sums, x.len() / channels, state);
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let single = |v: T| v.f64() as f32;
        let parts = cuda::ChannelParts {
            factor: &singles(&self.a),
            offset: &singles(&self.b),
            shift: &singles(&self.shift),
            plane: self.plane,
            bounds: self.bounds.map(|b| [single(b.low), single(b.high), single(b.open)]),
            residual: self.residual,
            halved: self.halved,
        };
        Ok(Some(Box::new(cuda::Channel::new(site, &parts)?)))
    }

    fn needs(&self) -> Needs {
        let output = if self.residual && self.bounds.is_some() { Reads::Yes } else { Reads::No };
        Needs { inputs: Reads::Yes, output }
    }

    fn backward(
        &self,
        which: usize,
        inputs: &[&[T]],
        output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        state: &StepState<T>,
    ) {
        let (task, out_plane, plane) = (self.task(), self.out_plane(), self.plane);
        let through = self.through(target.data.len(), state);
        if plane == 1 {
            return self.backward_rows(which, inputs, output, d_output, target, &through);
        }
        let add = target.mode == Mode::Add;
        target.data.par_chunks_mut(task * plane).enumerate().for_each(|(index, dx)| {
            for (i, dx) in dx.chunks_exact_mut(plane).enumerate() {
                let at = index * task + i;
                let channel = self.channel(at);
                let dy = &d_output[at * out_plane..][..out_plane];
                let own = |values: &'_ [T]| -> std::ops::Range<usize> {
                    if values.is_empty() { 0..0 } else { at * plane..(at + 1) * plane }
                };
                let y = &output[own(output)];
                if which == 1 {
                    match self.bounds {
                        Some(_) => channel::backward_residual(channel, y, dy, dx, add),
                        None => Target { data: dx, mode: target.mode }.put_map(dy, |d| d),
                    }
                    continue;
                }
                let x = &inputs[0][own(inputs[0])];
                let through = through[at % through.len()];
                match self.halved {
                    Some(width) => {
                        channel::backward_halved(channel, through, width, x, dy, dx, add);
                    }
                    None if self.residual && self.bounds.is_some() => {
                        channel::backward_by_output(channel, through, x, y, dy, dx, add);
                    }
                    None => channel::backward(channel, through, x, dy, dx, add),
                }
            }
        });
    }

    fn absorb(&mut self, follower: &Follower) -> Absorbed {
        match follower {
            Follower::Add if !self.residual && self.bounds.is_none() && self.halved.is_none() => {
                self.residual = true;
            }
            Follower::Bounded { low, high, relu }
                if self.bounds.is_none() && self.halved.is_none() =>
            {
                self.bounds = Some(match relu {
                    true => Bounds::relu(),
                    false => Bounds::clip(T::of(*low), T::of(*high)),
                });
            }
            Follower::Halve { width }
                if !self.residual && self.halved.is_none() && self.plane > 1 =>
            {
                self.halved = Some(*width);
            }
            _ => return Absorbed::No,
        }
        Absorbed::Yes
    }
}
