//! Vector instructions behind one trait, so that a kernel is written once and compiled for each level.
//!
//! A kernel is an `#[inline(always)]` function generic over [`Vector`], called from one small function a level that
//! switches the level's instructions on; [`Level::detected`] says which may be called. All methods compile to one
//! or a few instructions there.

#![allow(unsafe_code)]

use std::sync::OnceLock;

/// Vector instructions in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// 512 bits, fused multiply-add.
    Avx512,
    /// 256 bits, fused multiply-add.
    Avx2,
}

impl Level {
    /// Floats of a vector.
    pub(super) fn lanes(self) -> usize {
        match self {
            Self::Avx512 => 16,
            Self::Avx2 => 8,
        }
    }

    /// The best this processor has.
    pub(super) fn detected() -> Option<Self> {
        static LEVEL: OnceLock<Option<Level>> = OnceLock::new();
        *LEVEL.get_or_init(detect)
    }

    /// All that this processor has, best first.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        match Self::detected() {
            Some(Self::Avx512) => vec![Self::Avx512, Self::Avx2],
            Some(level) => vec![level],
            None => Vec::new(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Option<Level> {
    if is_x86_feature_detected!("avx512f") {
        Some(Level::Avx512)
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        Some(Level::Avx2)
    } else {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Option<Level> {
    None
}

/// Defines `$name`, which runs `$body` with the best vector instructions there are. What `$body` calls must be
/// inlined into it, and must itself use no intrinsics.
macro_rules! at_each_level {
    (
        $(#[$doc:meta])* $visible:vis $name:ident $(<$f:ident: $bound:path>)? = $body:ident(
            $($arg:ident: $type:ty),* $(,)?
        ) $(-> $result:ty)?
    ) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, unsafe_code)]
        $visible fn $name<T: Element $(, $f: $bound)?>($($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::tensor::kernels::vector::Level;
                #[target_feature(enable = "avx512f")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<T: Element $(, $f: $bound)?>($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<T: Element $(, $f: $bound)?>($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                match Level::detected() {
                    // SAFETY: the processor has the instructions (`Level::detected`).
                    Some(Level::Avx512) => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Some(Level::Avx2) => return unsafe { avx2($($arg),*) },
                    None => {}
                }
            }
            $body($($arg),*)
        }
    };
}
pub(super) use at_each_level;

/// A vector of `f32`.
///
/// # Safety
/// Every method needs the instructions of the implementing level; those with pointers need them valid for
/// [`Vector::LANES`] floats (any alignment), or as they say.
pub(super) trait Vector: Copy {
    /// Floats of a vector.
    const LANES: usize;

    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// From `LANES` floats.
    unsafe fn load(from: *const f32) -> Self;
    /// To `LANES` floats.
    unsafe fn store(self, to: *mut f32);
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self - other`.
    unsafe fn sub(self, other: Self) -> Self;
    /// `self * other`.
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + term`, rounded once.
    unsafe fn fma(self, factor: Self, term: Self) -> Self;
    /// The larger of each pair of lanes.
    unsafe fn max(self, other: Self) -> Self;
    /// Each of `LANES / 2` floats twice.
    unsafe fn load_twice(from: *const f32) -> Self;
    /// Neighbouring lanes exchanged.
    unsafe fn swap_pairs(self) -> Self;
    /// The even lanes to `LANES / 2` floats.
    unsafe fn store_even(self, to: *mut f32);
    /// NaN in the even lanes.
    unsafe fn odd_or_nan(self) -> Self;
    /// `self` where `a == b`, else 0.
    unsafe fn where_equal(self, a: Self, b: Self) -> Self;
    /// `self` unless `a == b`, else 0.
    unsafe fn unless_equal(self, a: Self, b: Self) -> Self;
    /// `self` where `low <= v <= high`, else 0.
    unsafe fn where_between(self, low: Self, v: Self, high: Self) -> Self;
    /// The square of `LANES` rows of `LANES` floats, rows `from_stride` apart, transposed to rows
    /// `to_stride` apart.
    unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
}

#[cfg(target_arch = "x86_64")]
// One contract for all: the trait's.
#[allow(unsafe_op_in_unsafe_fn)]
pub(super) mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _CMP_EQ_OQ, _CMP_GE_OQ, _CMP_LE_OQ, _CMP_NEQ_UQ, _mm_loadu_ps,
        _mm_storeu_ps, _mm256_add_ps, _mm256_and_ps, _mm256_blend_ps, _mm256_castps128_ps256,
        _mm256_castps256_ps128, _mm256_cmp_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps,
        _mm256_mul_ps, _mm256_permute_ps, _mm256_permute2f128_ps, _mm256_permutevar8x32_ps,
        _mm256_set1_ps, _mm256_setr_epi32, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_sub_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps, _mm512_add_ps, _mm512_castps256_ps512,
        _mm512_castps512_ps256, _mm512_cmp_ps_mask, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_mask_mov_ps, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_permute_ps,
        _mm512_permutexvar_ps, _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_ps,
        _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_storeu_ps, _mm512_sub_ps,
        _mm512_unpackhi_ps, _mm512_unpacklo_ps,
    };

    use super::Vector;

    /// 16 floats.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512);

    /// 8 floats.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(__m256);

    impl Vector for Avx512 {
        const LANES: usize = 16;

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Self(_mm512_set1_ps(value))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(_mm512_loadu_ps(from))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            _mm512_storeu_ps(to, self.0);
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Self(_mm512_add_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            Self(_mm512_sub_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            Self(_mm512_mul_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn fma(self, factor: Self, term: Self) -> Self {
            Self(_mm512_fmadd_ps(self.0, factor.0, term.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Self(_mm512_max_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn load_twice(from: *const f32) -> Self {
            let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            let half = _mm512_castps256_ps512(_mm256_loadu_ps(from));
            Self(_mm512_permutexvar_ps(twice, half))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn swap_pairs(self) -> Self {
            Self(_mm512_permute_ps::<0b10_11_00_01>(self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn store_even(self, to: *mut f32) {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
            let half = _mm512_castps512_ps256(_mm512_permutexvar_ps(even, self.0));
            _mm256_storeu_ps(to, half);
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn odd_or_nan(self) -> Self {
            Self(_mm512_mask_mov_ps(_mm512_set1_ps(f32::NAN), 0xAAAA, self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn where_equal(self, a: Self, b: Self) -> Self {
            Self(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a.0, b.0), self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn unless_equal(self, a: Self, b: Self) -> Self {
            Self(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a.0, b.0), self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn where_between(self, low: Self, v: Self, high: Self) -> Self {
            let above = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(v.0, low.0);
            let below = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(v.0, high.0);
            Self(_mm512_maskz_mov_ps(above & below, self.0))
        }

        // Pairs of rows are woven together, then pairs of pairs, then the quarters of the registers.
        // SAFETY: the trait's contract.
        #[inline(always)]
        #[allow(clippy::needless_range_loop)]
        unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            let mut rows = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                rows[i] = _mm512_loadu_ps(from.add(i * from_stride));
            }
            let mut woven = rows;
            for i in 0..8 {
                woven[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                woven[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            // After this, rows[4 q + j] holds column 4 l + j of rows 4 q .. 4 q + 4 in quarter l.
            for q in 0..4 {
                let (a, b) = (woven[4 * q], woven[4 * q + 1]);
                let (c, d) = (woven[4 * q + 2], woven[4 * q + 3]);
                rows[4 * q] = _mm512_shuffle_ps::<0b01_00_01_00>(a, c);
                rows[4 * q + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(a, c);
                rows[4 * q + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(b, d);
                rows[4 * q + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(b, d);
            }
            for j in 0..4 {
                let (a, b, c, d) = (rows[j], rows[4 + j], rows[8 + j], rows[12 + j]);
                let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                let low2 = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
                let high2 = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
                let columns = [
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(low, low2),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(high, high2),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(low, low2),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(high, high2),
                ];
                for l in 0..4 {
                    _mm512_storeu_ps(to.add((4 * l + j) * to_stride), columns[l]);
                }
            }
        }
    }

    impl Vector for Avx2 {
        const LANES: usize = 8;

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Self(_mm256_set1_ps(value))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(_mm256_loadu_ps(from))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            _mm256_storeu_ps(to, self.0);
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Self(_mm256_add_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            Self(_mm256_sub_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            Self(_mm256_mul_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn fma(self, factor: Self, term: Self) -> Self {
            Self(_mm256_fmadd_ps(self.0, factor.0, term.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Self(_mm256_max_ps(self.0, other.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn load_twice(from: *const f32) -> Self {
            let twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
            let half = _mm256_castps128_ps256(_mm_loadu_ps(from));
            Self(_mm256_permutevar8x32_ps(half, twice))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn swap_pairs(self) -> Self {
            Self(_mm256_permute_ps::<0b10_11_00_01>(self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn store_even(self, to: *mut f32) {
            let even = _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0);
            _mm_storeu_ps(to, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(self.0, even)));
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn odd_or_nan(self) -> Self {
            Self(_mm256_blend_ps::<0b1010_1010>(_mm256_set1_ps(f32::NAN), self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn where_equal(self, a: Self, b: Self) -> Self {
            Self(_mm256_and_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(a.0, b.0), self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn unless_equal(self, a: Self, b: Self) -> Self {
            Self(_mm256_and_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(a.0, b.0), self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        unsafe fn where_between(self, low: Self, v: Self, high: Self) -> Self {
            let above = _mm256_cmp_ps::<_CMP_GE_OQ>(v.0, low.0);
            let below = _mm256_cmp_ps::<_CMP_LE_OQ>(v.0, high.0);
            Self(_mm256_and_ps(_mm256_and_ps(above, below), self.0))
        }

        // SAFETY: the trait's contract.
        #[inline(always)]
        #[allow(clippy::needless_range_loop)]
        unsafe fn transpose(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            let mut rows = [_mm256_set1_ps(0.0); 8];
            for i in 0..8 {
                rows[i] = _mm256_loadu_ps(from.add(i * from_stride));
            }
            let mut woven = rows;
            for i in 0..4 {
                woven[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                woven[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            for q in 0..2 {
                let (a, b) = (woven[4 * q], woven[4 * q + 1]);
                let (c, d) = (woven[4 * q + 2], woven[4 * q + 3]);
                rows[4 * q] = _mm256_shuffle_ps::<0b01_00_01_00>(a, c);
                rows[4 * q + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(a, c);
                rows[4 * q + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(b, d);
                rows[4 * q + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(b, d);
            }
            for j in 0..4 {
                let (a, b) = (rows[j], rows[4 + j]);
                let low = _mm256_permute2f128_ps::<0x20>(a, b);
                let high = _mm256_permute2f128_ps::<0x31>(a, b);
                _mm256_storeu_ps(to.add(j * to_stride), low);
                _mm256_storeu_ps(to.add((4 + j) * to_stride), high);
            }
        }
    }
}
