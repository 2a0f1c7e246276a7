//! Peephole fusion on recorded steps: a ReLU that alone reads a channel-affine step joins it, so that
//! the activation is one pass and the value between needs no buffer.

use crate::graph::plan::{Operand, StepRecord};
use crate::tensor::kernels::Element;

/// Fuses in place; `lengths` of values that vanish become 0. `output` is never fused away.
pub(crate) fn fuse<T: Element>(
    steps: &mut Vec<StepRecord<T>>,
    lengths: &mut [usize],
    output: usize,
) {
    let mut readers = vec![0usize; lengths.len()];
    let mut maker = vec![usize::MAX; lengths.len()];
    for (index, record) in steps.iter().enumerate() {
        maker[record.output] = index;
        for operand in &record.inputs {
            if let Operand::Live(id) = operand {
                readers[*id] += 1;
            }
        }
    }
    let mut removed = vec![false; steps.len()];
    for index in 0..steps.len() {
        let [Operand::Live(id)] = steps[index].inputs[..] else { continue };
        let from = maker[id];
        if !steps[index].step.is_relu() || from == usize::MAX || readers[id] != 1 || id == output {
            continue;
        }
        if steps[from].step.absorb_relu() == crate::graph::plan::Absorbed::Yes {
            steps[from].output = steps[index].output;
            lengths[id] = 0;
            removed[index] = true;
        }
    }
    let mut keep = removed.iter().map(|removed| !removed);
    steps.retain(|_| keep.next().unwrap_or(true));
}
