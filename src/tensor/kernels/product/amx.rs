//! The matrix unit of newer x86 processors (AMX, bf16): whether it may be used, and the micro-kernel on packed tiles.
//!
//! A tile register holds 16 rows of 64 bytes; `tdpbf16ps` adds the product of two of them, 16x32 by 32x16, to one of
//! 16x16 `f32`. Rust has no stable intrinsics for it, so these few instructions are assembly.

#![allow(unsafe_code)]

use std::sync::OnceLock;

use super::pack::{BLOCK, LINES};

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

/// Floats that [`Tiles::square`] fetches ahead with each block: its share where a task has four panels, the most; where it
/// has fewer, what is left comes when it is loaded.
pub(super) const AHEAD: usize = BLOCK / 4;

/// Where a square of the result lies.
#[derive(Clone, Copy)]
pub(super) struct Square {
    pub(super) at: *mut f32,
    /// Floats from a row to the next.
    pub(super) stride: usize,
    pub(super) rows: usize,
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

/// This thread's tile registers: four of a square of the result, two of each operand. Released when dropped.
pub(super) struct Tiles {
    /// The configuration belongs to the thread that loaded it.
    _this_thread: std::marker::PhantomData<*const ()>,
}

impl Tiles {
    /// The registers, not yet of any shape; `None` where there are none to use.
    pub(super) fn take() -> Option<Self> {
        usable().then_some(Self { _this_thread: std::marker::PhantomData })
    }

    /// Configures them for squares of so many rows and columns. A lower half that there is not is given one row, which
    /// counts for nothing. Waits for all that the registers are at.
    ///
    /// # Panics
    /// Unless there are 1 to [`LINES`] rows and columns of both halves (a defect of the caller).
    pub(super) fn shape(&self, [rows, columns]: [usize; 2]) {
        assert!((1..=LINES).contains(&rows) && (LINES / 2 + 1..=LINES).contains(&columns));
        let halves = |lines: usize| [lines.min(16) as u8, lines.clamp(17, LINES) as u8 - 16];
        let ([top, bottom], [left, right]) = (halves(rows), halves(columns));
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        configuration.rows[..8].copy_from_slice(&[top, top, bottom, bottom, top, bottom, 16, 16]);
        let columns = [left, right, left, right, 16, 16, left, right];
        for (bytes, columns) in configuration.row_bytes.iter_mut().zip(columns) {
            *bytes = 4 * u16::from(columns);
        }
        // SAFETY: the processor has the instruction and the process the permission (`usable`); no tile is empty or too
        // large.
        unsafe {
            std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack));
        }
    }

    /// A square of the result: `c (+)= a b` over `blocks` blocks of depth. `a` and `b` are packed panels (see
    /// [`super::pack`]). It starts from `start`, where there is one: as many rows and columns, with its own distance
    /// between rows (0: one row for all). What lies at `ahead` is fetched meanwhile, [`AHEAD`] floats a block.
    ///
    /// # Safety
    /// The registers have the shape of `c`. The panels hold `blocks` blocks
    /// from there on, `c` and `start` their rows and columns. `nowhere` is a row of [`LINES`] to read and write.
    #[inline(always)]
    pub(super) unsafe fn square(
        &self,
        [a, b]: [*const f32; 2],
        blocks: usize,
        c: Square,
        start: Option<(*const f32, usize)>,
        ahead: *const f32,
        nowhere: *mut f32,
    ) {
        let (from, from_stride) = start.unwrap_or((c.at, c.stride));
        let (f1, c1) = match c.rows > LINES / 2 {
            true => (from.wrapping_add(16 * from_stride), c.at.wrapping_add(16 * c.stride)),
            false => (nowhere.cast_const(), nowhere),
        };
        // SAFETY: the caller's duty; the registers are configured while `self` lives.
        unsafe {
            // Six products a block; 14 loads for 24 instructions, each some instructions ahead of its use. Between them
            // what comes next is fetched: `ahead`, and the rows of the result, eight a block, to be written. All processors
            // with the unit have `prefetchw`; a prefetch of an address that there is not does nothing.
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
                "prefetcht1 [{p} + 0]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht1 [{p} + 64]",
                "tileloadd tmm6, [{b} + {s}*1 + 2048]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht1 [{p} + 128]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht1 [{p} + 192]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                // a1 b2
                "tileloadd tmm7, [{b} + {s}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "prefetcht1 [{p} + 256]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht1 [{p} + 320]",
                "tileloadd tmm6, [{b} + {s}*1 + 4096]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht1 [{p} + 384]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht1 [{p} + 448]",
                // a1 b1
                "tileloadd tmm7, [{b} + {s}*1 + 5120]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "prefetcht1 [{p} + 512]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht1 [{p} + 576]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                "tileloadd tmm4, [{a} + {s}*1 + 2048]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht1 [{p} + 640]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht1 [{p} + 704]",
                // a3 b1
                "tileloadd tmm5, [{a} + {s}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "prefetcht1 [{p} + 768]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht1 [{p} + 832]",
                "tileloadd tmm4, [{a} + {s}*1 + 4096]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht1 [{p} + 896]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht1 [{p} + 960]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                // a2 b1
                "tileloadd tmm5, [{a} + {s}*1 + 5120]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "prefetcht1 [{p} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht1 [{p} + 1088]",
                "tileloadd tmm6, [{b} + {s}*1 + 2048]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht1 [{p} + 1152]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht1 [{p} + 1216]",
                // a2 b2
                "tileloadd tmm7, [{b} + {s}*1 + 3072]",
                "add {a}, {step}",
                "add {b}, {step}",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "prefetcht1 [{p} + 1280]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht1 [{p} + 1344]",
                "prefetchw [{q}]",
                "prefetchw [{q} + 64]",
                "add {q}, {cs}",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht1 [{p} + 1408]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht1 [{p} + 1472]",
                "add {p}, {share}",
                "dec {blocks}",
                "jnz 3b",
                "tilestored [{c0} + {cs}*1], tmm0",
                "tilestored [{c0} + {cs}*1 + 64], tmm1",
                "tilestored [{c1} + {cs}*1], tmm2",
                "tilestored [{c1} + {cs}*1 + 64], tmm3",
                step = const 4 * BLOCK,
                share = const 4 * AHEAD,
                add = in(reg) u32::from(start.is_some()),
                f0 = in(reg) from,
                f1 = in(reg) f1,
                fs = in(reg) from_stride,
                a = inout(reg) a => _,
                p = inout(reg) ahead => _,
                b = inout(reg) b => _,
                blocks = inout(reg) blocks => _,
                c0 = in(reg) c.at,
                c1 = in(reg) c1,
                cs = in(reg) 4 * c.stride,
                q = inout(reg) c.at => _,
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
        // SAFETY: the processor has the instruction (`usable`); the registers are this thread's (this cannot be sent).
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) }
    }
}
