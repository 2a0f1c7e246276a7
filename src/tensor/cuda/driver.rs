//! A CUDA card: memory and launches through the driver, products through cuBLAS, kernels compiled by NVRTC when the
//! card is opened. Everything runs on one stream, in the order of the calls.
//!
//! All calls to CUDA's C interfaces are here. They are made through the bindings of `cudarc` that candle brings, at
//! the level where each returns its status: the level above panics on a missing library.

#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc;
use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::{CudaContext, CudaStream, result as driver, sys as driver_sys};
use cudarc::nvrtc::result as nvrtc;

use super::source::{self, Signature};
use super::{Argument, ColumnMajor, Device, Launch};
use crate::error::{Error, Result, ResultExt};
use crate::tensor::device::Products;

/// A kernel of the loaded program.
#[derive(Debug)]
struct Kernel {
    signature: Signature,
    function: driver_sys::CUfunction,
}

/// One card.
#[derive(Debug)]
pub struct Card {
    name: String,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: driver_sys::CUmodule,
    kernels: HashMap<String, Kernel>,
    blas: blas_sys::cublasHandle_t,
    products: Products,
    /// cuBLAS handles must not be used by two threads at once.
    multiplying: Mutex<()>,
}

// SAFETY: handles of the driver are valid in every thread that binds the context (each call does); cuBLAS's is used
// under a lock.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

fn failed(what: &str, error: &dyn std::fmt::Debug) -> Error {
    Error::unsupported(format!("CUDA cannot {what}: `{error:?}`"))
}

/// Kernels for compute capability `major.minor`, as PTX.
fn compile(major: i32, minor: i32) -> Result<Vec<c_char>> {
    let hint =
        "CUDA's run-time compiler must be found: libnvrtc of CUDA 12 or 13 in LD_LIBRARY_PATH";
    let text = CString::new(source::program()).map_err(|e| Error::internal(e.to_string()))?;
    let program =
        nvrtc::create_program(&text, None).map_err(|e| failed("compile kernels", &e).hint(hint))?;
    let options = [format!("--gpu-architecture=compute_{major}{minor}"), "--std=c++17".to_owned()];
    // SAFETY: a program that was just created and is destroyed below.
    let compiled = unsafe { nvrtc::compile_program(program, &options) };
    let ptx = match compiled {
        // SAFETY: as above; it is compiled.
        Ok(()) => unsafe { nvrtc::get_ptx(program) }.map_err(|e| failed("give the kernels", &e)),
        Err(error) => {
            // SAFETY: as above; the log is there after a failure.
            let log = unsafe { nvrtc::get_program_log(program) }.unwrap_or_default();
            let log: String =
                log.iter().map(|&c| char::from(c as u8)).take_while(|&c| c != '\0').collect();
            Err(failed("compile its kernels", &error).context(log))
        }
    };
    // SAFETY: the program is not used after this.
    let _ = unsafe { nvrtc::destroy_program(program) };
    ptx
}

/// PTX of all kernels for an H200, for the test that compiles them without a card.
#[cfg(test)]
pub(super) fn compile_for_test() -> Result<usize> {
    compile(9, 0).map(|ptx| ptx.len())
}

impl Card {
    /// Opens card `index`: compiles the kernels for it.
    ///
    /// # Errors
    /// When there is no driver, no such card, or a library of CUDA (NVRTC, cuBLAS) is missing.
    pub fn open(index: usize, products: Products) -> Result<Arc<Self>> {
        // Compiling takes a second: a card once open stays so until the program ends.
        static OPEN: Mutex<BTreeMap<(usize, Products), Arc<Card>>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(card) = open.get(&(index, products)) {
            return Ok(Arc::clone(card));
        }
        let card = Self::new(index, products).context(|| format!("device `cuda:{index}`"))?;
        let card = Arc::new(card);
        open.insert((index, products), Arc::clone(&card));
        Ok(card)
    }

    fn new(index: usize, products: Products) -> Result<Self> {
        let hint = "leave out `--device` to use the processor; `nvidia-smi` shows the cards";
        driver::init().map_err(|e| failed("start", &e).hint(hint))?;
        let count =
            driver::device::get_count().map_err(|e| failed("count the cards", &e).hint(hint))?;
        if index >= usize::try_from(count).unwrap_or(0) {
            return Err(Error::unsupported(format!("there are `{count}` CUDA cards")).hint(hint));
        }
        let context =
            CudaContext::new(index).map_err(|e| failed("open the card", &e).hint(hint))?;
        let stream = context.new_stream().map_err(|e| failed("make a stream", &e))?;
        let name = context.name().map_err(|e| failed("name the card", &e))?;
        let (major, minor) =
            context.compute_capability().map_err(|e| failed("tell its capability", &e))?;
        let ptx = compile(major, minor)?;
        // SAFETY: PTX text, terminated; the driver copies it.
        let module = unsafe { driver::module::load_data(ptx.as_ptr().cast()) }
            .map_err(|e| failed("load its kernels", &e))?;
        let mut kernels = HashMap::new();
        for signature in source::signatures()? {
            let symbol = CString::new(signature.name.as_str())
                .map_err(|e| Error::internal(e.to_string()))?;
            // SAFETY: the module was just loaded and lives as long as the card.
            let function = unsafe { driver::module::get_function(module, symbol) }
                .map_err(|e| failed(&format!("find kernel {}", signature.name), &e))?;
            kernels.insert(signature.name.clone(), Kernel { signature, function });
        }
        let blas = blas::create_handle().map_err(|e| {
            let hint = "cuBLAS must be found: libcublas of CUDA 12 or 13 in LD_LIBRARY_PATH";
            failed("start cuBLAS", &e).hint(hint)
        })?;
        // SAFETY: both handles were just created.
        unsafe { blas::set_stream(blas, stream.cu_stream().cast()) }
            .map_err(|e| failed("give cuBLAS a stream", &e))?;
        let multiplying = Mutex::new(());
        Ok(Self { name, context, stream, module, kernels, blas, products, multiplying })
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| failed("be used by this thread", &e))
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: nothing uses the handles any more; errors at the end change nothing.
            unsafe {
                let _ = blas::destroy_handle(self.blas);
                let _ = driver::module::unload(self.module);
            }
        }
    }
}

impl Device for Card {
    fn describe(&self) -> String {
        self.name.clone()
    }

    fn allocate(&self, words: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: the context is bound; the size is not 0 (the trait asks for that).
        unsafe { driver::malloc_sync(4 * words) }.map_err(|e| {
            failed(&format!("give {} MiB of memory", (4 * words) >> 20), &e)
                .hint("make the batch smaller (`recover.batch`), or leave out `--device`")
        })
    }

    fn free(&self, address: u64) {
        if self.bind().is_ok() {
            // SAFETY: the address came from `allocate`; freeing waits for the work that uses it.
            let _ = unsafe { driver::free_sync(address) };
        }
    }

    fn write(&self, address: u64, words: &[u32]) -> Result<()> {
        if words.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the view lies in memory of this card; pageable host memory is staged before the call returns.
        unsafe { driver::memcpy_htod_async(address, words, self.stream.cu_stream()) }
            .map_err(|e| failed("copy to the card", &e))
    }

    fn read(&self, address: u64, words: &mut [u32]) -> Result<()> {
        if words.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the view lies in memory of this card; the copy is waited for before `words` is used.
        unsafe { driver::memcpy_dtoh_async(words, address, self.stream.cu_stream()) }
            .map_err(|e| failed("copy from the card", &e))?;
        self.stream.synchronize().map_err(|e| failed("finish its work", &e))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let kernel = self
            .kernels
            .get(launch.kernel)
            .ok_or_else(|| Error::internal(format!("no kernel `{}`", launch.kernel)))?;
        kernel.signature.check(launch.arguments)?;
        self.bind()?;
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
        let size =
            |n: usize| u32::try_from(n).map_err(|_| Error::internal(format!("grid of `{n}`")));
        let grid = (size(launch.grid[0])?, size(launch.grid[1])?, 1);
        let block = (super::launch::BLOCK as u32, 1, 1);
        // SAFETY: the arguments are of the kinds that the kernel declares (checked above), each read from the low
        // bytes of its word (little endian) before the call returns; their lengths are the callers' duty, held by
        // the tests that run every kernel between guards (`emulation`).
        unsafe {
            let stream = self.stream.cu_stream();
            driver::launch_kernel(kernel.function, grid, block, 0, stream, &mut pointers)
        }
        .map_err(|e| failed(&format!("launch kernel {}", launch.kernel), &e))
    }

    fn multiply(&self, product: &ColumnMajor) -> Result<()> {
        use blas_sys::cublasComputeType_t as Compute;
        use blas_sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        const SINGLE: blas_sys::cudaDataType = blas_sys::cudaDataType::CUDA_R_32F;
        self.bind()?;
        let size = |n: usize| {
            c_int::try_from(n).map_err(|_| Error::internal(format!("a matrix of `{n}`")))
        };
        let [op_a, op_b] = product.transposed.map(|t| if t { CUBLAS_OP_T } else { CUBLAS_OP_N });
        let [a, b, c] = product.addresses;
        let [lda, ldb, ldc] = product.leading;
        let [stride_a, stride_b, stride_c] = product.strides.map(|stride| stride as i64);
        let (alpha, beta) = (1.0_f32, product.beta);
        let (alpha, beta) = (std::ptr::from_ref(&alpha), std::ptr::from_ref(&beta));
        let compute = match self.products {
            Products::Single => Compute::CUBLAS_COMPUTE_32F,
            Products::TensorFloat32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
        };
        let _one = self.multiplying.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the matrices lie in memory of this card (`Product::run` asserts it); alpha and beta are read
        // before the call returns, since the handle's pointers are the host's.
        unsafe {
            blas::gemm_strided_batched_ex(
                self.blas,
                op_a,
                op_b,
                size(product.m)?,
                size(product.n)?,
                size(product.k)?,
                alpha.cast(),
                a as *const c_void,
                SINGLE,
                size(lda)?,
                stride_a,
                b as *const c_void,
                SINGLE,
                size(ldb)?,
                stride_b,
                beta.cast(),
                c as *mut c_void,
                SINGLE,
                size(ldc)?,
                stride_c,
                size(product.batch)?,
                compute,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|e| failed("multiply", &e))
    }
}
