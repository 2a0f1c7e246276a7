//! Which buffer each activation and each gradient lives in, decided once at compile time.
//!
//! Forward and backward are laid on one time axis (forward of step i at i, backward of step i at
//! 2n-1-i). A value's buffer is busy from when it is made to when it is last read on that axis, then
//! serves another value: the backward frees activations as early as it can.

use super::lower::StepRecord;
use super::step::{Differentiable, Operand, Reads};

/// Buffers of a plan.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// Elements of each buffer.
    pub sizes: Vec<usize>,
    /// Buffer of each value.
    pub forward: Vec<usize>,
    /// Buffer of each value's gradient; `None` where no gradient is needed.
    pub gradient: Vec<Option<usize>>,
}

/// A stretch of time in which a buffer of `size` is needed.
struct Interval {
    start: usize,
    end: usize,
    size: usize,
    value: usize,
    is_gradient: bool,
}

impl Schedule {
    /// Lays out all values of `steps`; `lengths` are their sizes in elements.
    pub(crate) fn new<T: crate::tensor::kernels::Element>(
        steps: &[StepRecord<T>],
        lengths: &[usize],
        input: usize,
        output: usize,
    ) -> Self {
        let n = steps.len();
        let backward = |step: usize| 2 * n - 1 - step;
        let end_of_time = 2 * n;
        let mut made = vec![0; lengths.len()];
        let mut last = vec![0; lengths.len()];
        let mut gradient_from = vec![usize::MAX; lengths.len()];
        let mut gradient_to = vec![0; lengths.len()];
        let wanted = wants_gradient(steps, lengths.len(), input);
        gradient_to[input] = end_of_time;
        for (i, record) in steps.iter().enumerate() {
            made[record.output] = i;
            let needs = record.step.needs();
            let has_backward = wanted[record.output];
            for operand in &record.inputs {
                let Operand::Live(id) = operand else { continue };
                last[*id] = last[*id].max(i);
                if has_backward && needs.inputs == Reads::Yes {
                    last[*id] = last[*id].max(backward(i));
                }
                if has_backward {
                    gradient_from[*id] = gradient_from[*id].min(backward(i));
                }
            }
            last[record.output] = last[record.output].max(i);
            if has_backward {
                gradient_to[record.output] = gradient_to[record.output].max(backward(i));
                gradient_from[record.output] = gradient_from[record.output].min(backward(i));
                if needs.output == Reads::Yes {
                    last[record.output] = last[record.output].max(backward(i));
                }
            }
        }
        // The caller reads the output until it starts the backward, and writes its gradient then.
        last[output] = last[output].max(n);
        gradient_from[output] = gradient_from[output].min(n.saturating_sub(1));
        let mut intervals = Vec::new();
        for value in 0..lengths.len() {
            let size = lengths[value];
            let start = made[value];
            let end = last[value].max(start);
            intervals.push(Interval { start, end, size, value, is_gradient: false });
            if wanted[value] {
                let start = gradient_from[value].min(gradient_to[value]);
                let end = gradient_to[value].max(start);
                intervals.push(Interval { start, end, size, value, is_gradient: true });
            }
        }
        assign(intervals, lengths.len())
    }
}

/// Values on a differentiable path from the input.
fn wants_gradient<T: crate::tensor::kernels::Element>(
    steps: &[StepRecord<T>],
    values: usize,
    input: usize,
) -> Vec<bool> {
    let mut wanted = vec![false; values];
    wanted[input] = true;
    for record in steps {
        wanted[record.output] = record.inputs.iter().enumerate().any(|(which, operand)| {
            matches!(operand, Operand::Live(id) if wanted[*id])
                && record.step.differentiable(which) == Differentiable::Yes
        });
    }
    wanted
}

/// Best fit: the smallest free buffer that holds the value, else the largest grown, else a new one.
fn assign(mut intervals: Vec<Interval>, values: usize) -> Schedule {
    intervals.sort_by_key(|i| (i.start, std::cmp::Reverse(i.size), i.value, i.is_gradient));
    let mut schedule =
        Schedule { sizes: Vec::new(), forward: vec![0; values], gradient: vec![None; values] };
    let mut busy_until: Vec<usize> = Vec::new();
    let mut free_since_start: Vec<bool> = Vec::new();
    for interval in intervals {
        for (slot, free) in free_since_start.iter_mut().enumerate() {
            *free = busy_until[slot] < interval.start;
        }
        let free = (0..busy_until.len()).filter(|&slot| free_since_start[slot]);
        let best = free.min_by_key(|&slot| {
            let size = schedule.sizes[slot];
            if size >= interval.size {
                (0, size - interval.size)
            } else {
                (1, interval.size - size)
            }
        });
        let slot = best.unwrap_or_else(|| {
            schedule.sizes.push(0);
            busy_until.push(0);
            free_since_start.push(false);
            busy_until.len() - 1
        });
        schedule.sizes[slot] = schedule.sizes[slot].max(interval.size);
        busy_until[slot] = interval.end;
        if interval.is_gradient {
            schedule.gradient[interval.value] = Some(slot);
        } else {
            schedule.forward[interval.value] = slot;
        }
    }
    schedule
}
