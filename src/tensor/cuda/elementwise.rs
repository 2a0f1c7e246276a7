//! Functions of one number, element by element.

use super::{Operation, Run, Target, View, each};
use crate::error::Result;

/// `y = f(x)`; `function` is the number that `kernels/elementwise.cu` gives it.
#[derive(Debug, Clone, Copy)]
pub struct Elementwise {
    /// Which function.
    pub function: i32,
    /// Its parameters.
    pub parameters: [f32; 2],
}

impl Operation for Elementwise {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let [a, b] = self.parameters;
        let (n, x) = (output.len(), inputs[0]);
        let arguments =
            [self.function.into(), a.into(), b.into(), x.into(), output.into(), n.into()];
        each(run.device, "unary_forward", n, &arguments)
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
        let [a, b] = self.parameters;
        let n = gradient.len();
        // A value that is not read is not there: any other stands in.
        let present = |view: View| if view.is_empty() { gradient } else { view };
        let arguments = [
            self.function.into(),
            a.into(),
            b.into(),
            present(inputs[0]).into(),
            present(output).into(),
            gradient.into(),
            target.view.into(),
            n.into(),
            target.add.into(),
        ];
        each(run.device, "unary_backward", n, &arguments)
    }
}
