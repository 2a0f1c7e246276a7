// What all kernels share. The text of these files, one after the other, is one program: NVRTC compiles it for
// the card at run time, and the tests compile it with a C++ compiler (tests/shim.h).
//
// Tensors are row-major floats; lengths fit an `int` (the executor refuses larger ones). A gradient is
// written, or added where `add` is set.

#define EACH(i, n) for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += gridDim.x * blockDim.x)

#define INF __int_as_float(0x7f800000)

// Threads of the blocks that reduce: a power of two.
#define BLOCK 256

__device__ __forceinline__ void put(float* to, float value, int add) {
    *to = add ? *to + value : value;
}

// The sum of `v` over the block, in a fixed order, for every thread.
__device__ float block_sum(float v) {
    __shared__ float sums[BLOCK];
    int t = threadIdx.x;
    __syncthreads();
    sums[t] = v;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
        __syncthreads();
    }
    return sums[0];
}

// The largest `v` of the block, for every thread.
__device__ float block_max(float v) {
    __shared__ float best[BLOCK];
    int t = threadIdx.x;
    __syncthreads();
    best[t] = v;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half) best[t] = fmaxf(best[t], best[t + half]);
        __syncthreads();
    }
    return best[0];
}

extern "C" __global__ void fill(float* y, float value, int n) {
    EACH(i, n) y[i] = value;
}

extern "C" __global__ void accumulate(const float* x, float* y, int n) {
    EACH(i, n) y[i] += x[i];
}
