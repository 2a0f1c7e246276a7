//! Matrix products: row-major ones as the plan has them, in the column-major terms of BLAS.

use super::binary::{self, Spread};
use super::{Device, Memory, Operation, Run, Target, View, each};
use crate::error::Result;

/// One factor of a batch of products.
#[derive(Debug, Clone, Copy)]
pub struct Factor {
    /// First matrix.
    pub view: View,
    /// Whether it is stored transposed.
    pub transposed: bool,
    /// Elements from one matrix of the batch to the next; 0 where all products share it.
    pub stride: usize,
}

/// `c[i] = a[i] b[i]` (plus `c[i]`), row-major; `a` [m, k], `b` [k, n], `c` [m, n].
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Rows, columns, and the length of the sums.
    pub sizes: [usize; 3],
    /// Left factor.
    pub a: Factor,
    /// Right factor.
    pub b: Factor,
    /// Result.
    pub c: View,
    /// Elements from one result to the next.
    pub c_stride: usize,
    /// Products.
    pub batch: usize,
    /// Whether the result is added.
    pub add: bool,
}

/// The same to BLAS, whose matrices are column-major: `C = op(A) op(B) + beta C`, C of `m` rows and `n` columns,
/// `leading` the distance of columns. The arguments of `cublasGemmStridedBatchedEx`, in its order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ColumnMajor {
    /// Whether op transposes A, B.
    pub transposed: [bool; 2],
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Columns of op(A).
    pub k: usize,
    /// Addresses of A, B, C.
    pub addresses: [u64; 3],
    /// Leading dimensions of A, B, C.
    pub leading: [usize; 3],
    /// Batch strides of A, B, C.
    pub strides: [usize; 3],
    /// 0 or 1.
    pub beta: f32,
    /// Products.
    pub batch: usize,
}

impl Product {
    /// A row-major matrix is its transpose in column-major terms: the factors change places.
    pub fn column_major(&self) -> ColumnMajor {
        let [m, n, k] = self.sizes;
        let Self { a, b, .. } = self;
        ColumnMajor {
            transposed: [b.transposed, a.transposed],
            m: n,
            n: m,
            k,
            addresses: [b.view.address(), a.view.address(), self.c.address()],
            leading: [if b.transposed { k } else { n }, if a.transposed { m } else { k }, n],
            strides: [b.stride, a.stride, self.c_stride],
            beta: if self.add { 1.0 } else { 0.0 },
            batch: self.batch,
        }
    }

    /// Starts it.
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// When a matrix lies outside its view (a defect of the caller).
    pub fn run(&self, device: &dyn Device) -> Result<()> {
        let [m, n, k] = self.sizes;
        if m * n * self.batch == 0 {
            return Ok(());
        }
        let last = self.batch - 1;
        assert!(last * self.a.stride + m * k <= self.a.view.len(), "left factor");
        assert!(last * self.b.stride + k * n <= self.b.view.len(), "right factor");
        assert!(last * self.c_stride + m * n <= self.c.len(), "product");
        device.multiply(&self.column_major())
    }
}

/// A step of products `y[i] = a[batch_a[i]] b[batch_b[i]]`, with a row added to each row where there is one.
#[derive(Debug)]
pub struct MatMul {
    /// Rows, columns, and the length of the sums.
    pub sizes: [usize; 3],
    /// Whether each factor is stored transposed.
    pub transposed: [bool; 2],
    /// Which matrix of each factor a product reads.
    pub batches: [Vec<usize>; 2],
    /// One value a column.
    pub bias: Option<Memory>,
}

/// Products that one call covers: from `start` on `count`, factors moving by these numbers of matrices.
struct Stretch {
    start: usize,
    count: usize,
    steps: [usize; 2],
}

impl MatMul {
    /// Cuts the batch into stretches in which each factor moves evenly; `single` keeps products of one target
    /// apart, since a call must not add to one place twice.
    fn stretches(&self, single: Option<usize>) -> Vec<Stretch> {
        let [a, b] = &self.batches;
        let mut stretches: Vec<Stretch> = Vec::new();
        for i in 0..a.len() {
            if let Some(last) = stretches.last_mut() {
                let at = last.start + last.count - 1;
                let moved = [a[i].checked_sub(a[at]), b[i].checked_sub(b[at])];
                if let [Some(x), Some(y)] = moved
                    && (last.count == 1 || last.steps == [x, y])
                    && single.is_none_or(|which| [x, y][which] != 0)
                {
                    last.steps = [x, y];
                    last.count += 1;
                    continue;
                }
            }
            stretches.push(Stretch { start: i, count: 1, steps: [0, 0] });
        }
        stretches
    }
}

impl MatMul {
    /// Adds the bias in place.
    fn add_bias(&self, run: &Run<'_>, output: View) -> Result<()> {
        let Some(bias) = &self.bias else { return Ok(()) };
        let spread = Spread::Channel { inner: 1, count: self.sizes[1] };
        binary::add_in_place(run, output, bias.view(), &spread)
    }
}

impl Operation for MatMul {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let [m, n, k] = self.sizes;
        if k == 0 {
            let arguments = [output.into(), 0.0.into(), output.len().into()];
            each(run.device, "fill", output.len(), &arguments)?;
            return self.add_bias(run, output);
        }
        for Stretch { start, count, steps } in self.stretches(None) {
            let factor = |which: usize, size: usize| {
                let first = self.batches[which][start] * size;
                let view = inputs[which].part(first, inputs[which].len() - first);
                let stride = steps[which] * size;
                Factor { view, transposed: self.transposed[which], stride }
            };
            let (a, b) = (factor(0, m * k), factor(1, k * n));
            let c = output.part(start * m * n, count * m * n);
            let product =
                Product { sizes: self.sizes, a, b, c, c_stride: m * n, batch: count, add: false };
            product.run(run.device)?;
        }
        self.add_bias(run, output)
    }

    fn backward(
        &self,
        run: &Run<'_>,
        which: usize,
        inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let [m, n, k] = self.sizes;
        let own = if which == 0 { m * k } else { k * n };
        let other = 1 - which;
        let other_size = if which == 0 { k * n } else { m * k };
        let length = target.view.len();
        // Matrices that no product reads, or several do, are summed onto zeros.
        let once = self.batches[which].iter().copied().eq(0..length / own.max(1));
        let add = target.add || !once;
        if !target.add && !once {
            let arguments = [target.view.into(), 0.0.into(), length.into()];
            each(run.device, "fill", length, &arguments)?;
        }
        for Stretch { start, count, steps } in self.stretches(Some(which)) {
            let dy = gradient.part(start * m * n, count * m * n);
            let first = self.batches[other][start] * other_size;
            let view = inputs[other].part(first, inputs[other].len() - first);
            let known = Factor {
                view,
                transposed: !self.transposed[other],
                stride: steps[other] * other_size,
            };
            let given = Factor { view: dy, transposed: false, stride: m * n };
            let turned = Factor { transposed: true, ..given };
            let known_turned = Factor { transposed: !known.transposed, ..known };
            // da = dy b', db = a' dy; of a factor stored transposed, the transpose of that.
            let (sizes, a, b) = match (which, self.transposed[which]) {
                (0, false) => ([m, k, n], given, known),
                (0, true) => ([k, m, n], known_turned, turned),
                (_, false) => ([k, n, m], known, given),
                (_, true) => ([n, k, m], turned, known_turned),
            };
            let first = self.batches[which][start] * own;
            let c = target.view.part(first, length - first);
            let c_stride = steps[which] * own;
            Product { sizes, a, b, c, c_stride, batch: count, add }.run(run.device)?;
        }
        Ok(())
    }
}
