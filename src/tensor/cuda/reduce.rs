//! Reductions of the middle of [outer, group, inner].

use super::{Argument, Operation, Run, Target, View, blocks, each};
use crate::error::Result;

/// Groups that are reduced by one launch at most; longer ones are cut into chunks of this.
const CHUNK: usize = 2048;
/// Outputs that keep a card busy: with fewer, groups are cut.
const BUSY: usize = 1024;
/// Groups shorter than this are left to a thread each.
const BLOCKED: usize = 64;

const MEAN: i32 = 1;
const MIN: i32 = 3;
const LOG_SUM_EXP: i32 = 5;

/// `kind`: 0 sum, 1 mean, 2 largest, 3 least, 4 product, 5 logarithm of the sum of exponentials.
#[derive(Debug, Clone, Copy)]
pub struct Reduce {
    /// Which.
    pub kind: i32,
    /// Elements that become one.
    pub group: usize,
    /// Distance of neighbours of a group.
    pub inner: usize,
    /// Outputs.
    pub outputs: usize,
}

impl Reduce {
    fn chunks(&self) -> usize {
        let cut = self.kind != LOG_SUM_EXP && self.outputs < BUSY && self.group > CHUNK;
        if cut { self.group.div_ceil(CHUNK) } else { 1 }
    }

    /// Chunks of `group` elements of `from` into `to`.
    fn pass(
        &self,
        run: &Run<'_>,
        [from, to]: [View; 2],
        group: usize,
        chunks: usize,
        scale: f32,
    ) -> Result<()> {
        let chunk = group.div_ceil(chunks);
        let n = to.len();
        if self.inner == 1 && group >= BLOCKED && self.kind != LOG_SUM_EXP {
            let arguments = [
                from.into(),
                to.into(),
                self.kind.into(),
                group.into(),
                chunk.into(),
                chunks.into(),
                scale.into(),
            ];
            return blocks(run.device, "reduce_blocks", [n, 1], &arguments);
        }
        let arguments = [
            from.into(),
            to.into(),
            self.kind.into(),
            group.into(),
            self.inner.into(),
            chunk.into(),
            chunks.into(),
            scale.into(),
            n.into(),
        ];
        each(run.device, "reduce_threads", n, &arguments)
    }

    fn scale(&self) -> f32 {
        if self.kind == MEAN { 1.0 / self.group as f32 } else { 1.0 }
    }

    fn has_ties(&self) -> bool {
        self.kind > MEAN && self.kind <= MIN
    }
}

impl Operation for Reduce {
    fn scratch(&self) -> usize {
        let ties = if self.has_ties() { self.outputs } else { 0 };
        ties.max(self.outputs * self.chunks())
    }

    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let chunks = self.chunks();
        if chunks == 1 {
            return self.pass(run, [inputs[0], output], self.group, 1, self.scale());
        }
        let partial = run.scratch.part(0, output.len() * chunks);
        self.pass(run, [inputs[0], partial], self.group, chunks, 1.0)?;
        self.pass(run, [partial, output], chunks, 1, self.scale())
    }

    fn backward(
        &self,
        run: &Run<'_>,
        _which: usize,
        inputs: &[View],
        output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let n = target.view.len();
        let (group, inner) = (Argument::from(self.group), Argument::from(self.inner));
        let present = |view: View| if view.is_empty() { gradient } else { view };
        let (x, y) = (present(inputs[0]), present(output));
        let ties = run.scratch.part(0, if self.has_ties() { self.outputs } else { 0 });
        if self.has_ties() {
            let arguments = [x.into(), y.into(), ties.into(), group, inner, self.outputs.into()];
            each(run.device, "reduce_ties", self.outputs, &arguments)?;
        }
        let arguments = [
            x.into(),
            y.into(),
            gradient.into(),
            ties.into(),
            target.view.into(),
            self.kind.into(),
            group,
            inner,
            self.scale().into(),
            n.into(),
            target.add.into(),
        ];
        each(run.device, "reduce_backward", n, &arguments)
    }
}
