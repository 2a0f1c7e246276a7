//! The kernels on the processor, for tests: the same text, compiled as C++ under `shim.h` and loaded; matrix
//! products by the CPU's own kernel from BLAS's description of them.
//!
//! Fresh memory is full of NaN, and every allocation stands between guards, so that reading what nobody wrote and
//! writing outside are seen.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::super::source::{self, Signature};
use super::super::{Argument, ColumnMajor, Device, Launch};
use crate::error::{Error, Result};
use crate::tensor::kernels::gemm::{MatrixRef, gemm};

/// What a launch calls: grid, block, and the addresses of the arguments.
type Entry = unsafe extern "C" fn(c_int, c_int, c_int, *mut *mut c_void);

/// Words on either side of an allocation.
const GUARD: usize = 64;
const GUARDED: u32 = 0xfeed_beef;
/// A NaN.
const FRESH: u32 = 0x7fc0_dead;

#[derive(Debug)]
struct Kernel {
    signature: Signature,
    entry: Entry,
}

/// The processor as a device.
#[derive(Debug)]
pub(crate) struct Emulation {
    kernels: &'static HashMap<String, Kernel>,
    memory: Mutex<HashMap<u64, Box<[u32]>>>,
    launches: Mutex<HashMap<&'static str, usize>>,
}

fn compile() -> std::result::Result<HashMap<String, Kernel>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let folder = tempfile::tempdir().map_err(|e| text(&e))?;
    let signatures = source::signatures().map_err(|e| text(&e))?;
    let exports: String = signatures
        .iter()
        .map(|s| format!("EXPORT({}, {})\n", s.name, i32::from(s.barriers)))
        .collect();
    let shim = include_str!("shim.h");
    let (from, to) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
    std::fs::write(&from, format!("{shim}\n{}\n{exports}", source::program()))
        .map_err(|e| text(&e))?;
    let flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-o"];
    let output = Command::new("c++").args(flags).arg(&to).arg(&from).output();
    let output = output.map_err(|e| format!("no C++ compiler `c++`: {e}"))?;
    assert!(
        output.status.success(),
        "the kernels do not compile as C++:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let path = CString::new(to.to_string_lossy().as_bytes()).map_err(|e| text(&e))?;
    // SAFETY: a library that was just made here, without constructors of its own; it is never closed.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!library.is_null(), "the compiled kernels do not load");
    let kernels = signatures.into_iter().map(|signature| {
        let name = CString::new(format!("emulate_{}", signature.name)).map_err(|e| text(&e))?;
        // SAFETY: an open library and a terminated name.
        let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
        assert!(!symbol.is_null(), "no kernel {}", signature.name);
        // SAFETY: EXPORT gives the symbol this very type.
        let entry = unsafe { std::mem::transmute::<*mut c_void, Entry>(symbol) };
        Ok((signature.name.clone(), Kernel { signature, entry }))
    });
    kernels.collect()
}

/// An emulated device; `None`, said loudly, where there is no C++ compiler.
///
/// # Panics
/// When the kernels do not compile or load.
pub(crate) fn open() -> Option<Arc<Emulation>> {
    static KERNELS: OnceLock<std::result::Result<HashMap<String, Kernel>, String>> =
        OnceLock::new();
    match KERNELS.get_or_init(compile) {
        Ok(kernels) => Some(Arc::new(Emulation {
            kernels,
            memory: Mutex::default(),
            launches: Mutex::default(),
        })),
        Err(reason) => {
            eprintln!("SKIPPED: CUDA kernels were not compared on the processor: {reason}");
            None
        }
    }
}

impl Emulation {
    /// # Panics
    /// When something wrote outside an allocation.
    pub(crate) fn check_guards(&self) {
        for memory in self.memory.lock().unwrap_or_else(PoisonError::into_inner).values() {
            assert!(are_whole(memory), "a kernel wrote outside {} words", memory.len() - 2 * GUARD);
        }
    }

    /// How often each kernel was launched.
    pub(crate) fn launches(&self) -> HashMap<&'static str, usize> {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn are_whole(memory: &[u32]) -> bool {
    let (front, back) = (&memory[..GUARD], &memory[memory.len() - GUARD..]);
    front.iter().chain(back).all(|&word| word == GUARDED)
}

impl Device for Emulation {
    fn describe(&self) -> String {
        String::from("emulation")
    }

    fn allocate(&self, words: usize) -> Result<u64> {
        let mut memory = vec![FRESH; words + 2 * GUARD];
        memory[..GUARD].fill(GUARDED);
        memory[words + GUARD..].fill(GUARDED);
        let mut memory = memory.into_boxed_slice();
        let address = memory[GUARD..].as_mut_ptr() as u64;
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).insert(address, memory);
        Ok(address)
    }

    fn free(&self, address: u64) {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
        // A second panic would end the process.
        let whole = std::thread::panicking() || memory.is_some_and(|memory| are_whole(&memory));
        assert!(whole, "a kernel wrote outside its memory");
    }

    fn write(&self, address: u64, words: &[u32]) -> Result<()> {
        // SAFETY: views lie within allocations of this device, which live as long as the views are used.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u32, words.len()) }
            .copy_from_slice(words);
        Ok(())
    }

    fn read(&self, address: u64, words: &mut [u32]) -> Result<()> {
        // SAFETY: as for `write`.
        words.copy_from_slice(unsafe {
            std::slice::from_raw_parts(address as *const u32, words.len())
        });
        self.check_guards();
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let kernel = self
            .kernels
            .get(launch.kernel)
            .ok_or_else(|| Error::internal(format!("no kernel `{}`", launch.kernel)))?;
        kernel.signature.check(launch.arguments)?;
        *self
            .launches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(launch.kernel)
            .or_default() += 1;
        let mut words: Vec<u64> = launch
            .arguments
            .iter()
            .map(|argument| match *argument {
                Argument::Pointer(address) => address,
                Argument::Integer(value) => u64::from(value as u32),
                Argument::Float(value) => u64::from(value.to_bits()),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let [x, y] = launch.grid.map(|size| size as c_int);
        // SAFETY: the arguments are of the kinds that the kernel declares (checked above); each is read from the low
        // bytes of its word; what they point at is this device's memory, or not looked at.
        unsafe {
            (kernel.entry)(x, y, super::super::launch::BLOCK as c_int, pointers.as_mut_ptr())
        };
        Ok(())
    }

    fn multiply(&self, product: &ColumnMajor) -> Result<()> {
        let ColumnMajor { m, n, k, leading: [lda, ldb, ldc], .. } = *product;
        for i in 0..product.batch {
            let at =
                |which: usize| product.addresses[which] + 4 * (i * product.strides[which]) as u64;
            let length =
                |columns: usize, rows: usize, leading: usize| (columns - 1) * leading + rows;
            let stored = |which: usize, rows, columns, leading| {
                let (rows, columns) =
                    if product.transposed[which] { (columns, rows) } else { (rows, columns) };
                // SAFETY: the matrix that BLAS would read lies in this device's memory.
                unsafe {
                    std::slice::from_raw_parts(
                        at(which) as *const f32,
                        length(columns, rows, leading),
                    )
                }
            };
            // Element (i, j) of op(X) is at i + j * leading, or, transposed, at j + i * leading.
            let strides = |which: usize, leading: usize| {
                if product.transposed[which] { (leading, 1) } else { (1, leading) }
            };
            let (a, b) = (stored(0, m, k, lda), stored(1, k, n, ldb));
            let ((a_row, a_column), (b_row, b_column)) = (strides(0, lda), strides(1, ldb));
            // SAFETY: as above; products of a batch write to different places.
            let c = unsafe { std::slice::from_raw_parts_mut(at(2) as *mut f32, length(n, m, ldc)) };
            // C' = op(B)' op(A)' is row-major.
            let b = MatrixRef { data: b, row_stride: b_column, column_stride: b_row };
            let a = MatrixRef { data: a, row_stride: a_column, column_stride: a_row };
            gemm(n, m, k, b, a, c, ldc, product.beta != 0.0);
        }
        Ok(())
    }
}
