//! The matrix unit of newer x86 processors (AMX, bf16): whether it may be used, and the micro-kernel on packed tiles.
//!
//! A tile register holds 16 rows of 64 bytes; `tdpbf16ps` adds the product of two of them, 16x32 by 32x16, to one of
//! 16x16 `f32`. Rust has no stable intrinsics for it, so these few instructions are assembly.

#![allow(unsafe_code)]

use std::sync::OnceLock;

use super::pack::BLOCK;

/// Whether this processor has the unit and the system lets this process use it.
pub(super) fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && has_bf16_tiles()
            && permitted()
    })
}

/// CPUID leaf 7: AMX-BF16 is bit 22 of EDX, AMX-TILE bit 24.
fn has_bf16_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let both = (1 << 22) | (1 << 24);
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & both == both
}

/// Asks Linux to save tile registers for this process (`ARCH_REQ_XCOMP_PERM`); other threads, running or to come,
/// are included. Refused where the kernel is too old, or a thread's signal stack too small for the registers.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Other systems have ways of their own, which are not asked.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Shape of the tile registers, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tile registers, configured: eight of 16 rows of 64 bytes. Released when dropped.
pub(super) struct Tiles {
    /// The configuration belongs to the thread that loaded it.
    _this_thread: std::marker::PhantomData<*const ()>,
}

impl Tiles {
    /// Configures the registers; `None` where there are none to use.
    pub(super) fn configure() -> Option<Self> {
        if !usable() {
            return None;
        }
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        configuration.row_bytes[..8].fill(64);
        configuration.rows[..8].fill(16);
        // SAFETY: the processor has the instruction and the process the permission (`usable`).
        unsafe {
            std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack));
        }
        Some(Self { _this_thread: std::marker::PhantomData })
    }

    /// A square of 2x2 tiles: `c (+)= a b` over `blocks` blocks of depth. `a` and `b` are packed panels
    /// (see [`super::pack`]); `c` is 32x32 with rows `c_stride` floats apart. It starts from `start`, where there
    /// is one: 32x32 too, with its own distance between rows (0: one row for all).
    ///
    /// # Safety
    /// The panels hold `blocks` blocks from there on, `c` and `start` their 32 rows.
    #[inline(always)]
    pub(super) unsafe fn square(
        &self,
        a: *const f32,
        b: *const f32,
        blocks: usize,
        c: *mut f32,
        c_stride: usize,
        start: Option<(*const f32, usize)>,
    ) {
        let (from, from_stride) = start.unwrap_or((c, c_stride));
        // SAFETY: the caller's duty; the registers are configured while `self` lives.
        unsafe {
            // Six products a block; 14 loads for 24 instructions, each some instructions ahead of its use.
            std::arch::asm!(
                "test {add:e}, {add:e}",
                "jz 2f",
                "tileloadd tmm0, [{f0} + {fs}*4]",
                "tileloadd tmm1, [{f0} + {fs}*4 + 64]",
                "tileloadd tmm2, [{f1} + {fs}*4]",
                "tileloadd tmm3, [{f1} + {fs}*4 + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                // a1 b3
                "tileloadd tmm4, [{a} + {s}*1]",
                "tileloadd tmm6, [{b} + {s}*1]",
                "tileloadd tmm5, [{a} + {s}*1 + 1024]",
                "tileloadd tmm7, [{b} + {s}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm6, [{b} + {s}*1 + 2048]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // a1 b2
                "tileloadd tmm7, [{b} + {s}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm6, [{b} + {s}*1 + 4096]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // a1 b1
                "tileloadd tmm7, [{b} + {s}*1 + 5120]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a} + {s}*1 + 2048]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // a3 b1
                "tileloadd tmm5, [{a} + {s}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a} + {s}*1 + 4096]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // a2 b1
                "tileloadd tmm5, [{a} + {s}*1 + 5120]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm6, [{b} + {s}*1 + 2048]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // a2 b2
                "tileloadd tmm7, [{b} + {s}*1 + 3072]",
                "add {a}, {step}",
                "add {b}, {step}",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {blocks}",
                "jnz 3b",
                "tilestored [{c0} + {cs}*4], tmm0",
                "tilestored [{c0} + {cs}*4 + 64], tmm1",
                "tilestored [{c1} + {cs}*4], tmm2",
                "tilestored [{c1} + {cs}*4 + 64], tmm3",
                step = const 4 * BLOCK,
                add = in(reg) u32::from(start.is_some()),
                f0 = in(reg) from,
                f1 = in(reg) from.add(16 * from_stride),
                fs = in(reg) from_stride,
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                blocks = inout(reg) blocks => _,
                c0 = in(reg) c,
                c1 = in(reg) c.add(16 * c_stride),
                cs = in(reg) c_stride,
                s = in(reg) 64_usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: they were configured when this was made, on this thread (it cannot be sent).
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) }
    }
}
