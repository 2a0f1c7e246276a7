//! Dense matrix product on row-major slices, over the crate `gemm`.

use super::Element;

/// `c[m,n] = alpha_c * c + a[m,k] * b[k,n]` with explicit strides (row stride, column stride) so
/// that transposes cost nothing. Single-threaded: callers split work themselves.
#[derive(Debug, Clone, Copy)]
pub struct MatrixRef<'a, T> {
    /// Values; element (i, j) is at `i * row_stride + j * column_stride`.
    pub data: &'a [T],
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub column_stride: usize,
}

impl<'a, T> MatrixRef<'a, T> {
    /// A row-major matrix of `columns` columns.
    pub fn rows(data: &'a [T], columns: usize) -> Self {
        Self { data, row_stride: columns, column_stride: 1 }
    }

    /// The transpose of a row-major matrix of `columns` columns.
    pub fn transposed(data: &'a [T], columns: usize) -> Self {
        Self { data, row_stride: 1, column_stride: columns }
    }
}

/// Matrix product `c = a b` (or `c += a b` when `accumulate`), `c` row-major with row stride
/// `c_row_stride`.
///
/// # Panics
/// When a slice is too short for the sizes given (a defect of the caller).
#[allow(clippy::too_many_arguments)]
pub fn gemm<T: Element>(
    m: usize,
    n: usize,
    k: usize,
    a: MatrixRef<'_, T>,
    b: MatrixRef<'_, T>,
    c: &mut [T],
    c_row_stride: usize,
    accumulate: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * c_row_stride + n <= c.len(), "gemm: output too short");
    if k == 0 {
        if !accumulate {
            for row in 0..m {
                c[row * c_row_stride..row * c_row_stride + n].fill(T::ZERO);
            }
        }
        return;
    }
    assert!((m - 1) * a.row_stride + (k - 1) * a.column_stride < a.data.len(), "gemm: a too short");
    assert!((k - 1) * b.row_stride + (n - 1) * b.column_stride < b.data.len(), "gemm: b too short");
    // The crate's own contract is raw pointers; the three bounds are asserted just above.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
