// Reductions of the middle of [outer, group, inner]. Long groups are cut into chunks, one output a chunk, that a second
// launch reduces: no reduction is left to one block.

#define REDUCE_SUM 0
#define REDUCE_MEAN 1
#define REDUCE_MAX 2
#define REDUCE_MIN 3
#define REDUCE_PRODUCT 4
#define REDUCE_LOG_SUM_EXP 5

__device__ __forceinline__ float reduce_start(int kind) {
    return kind == REDUCE_MAX ? -INF : (kind == REDUCE_MIN ? INF : (kind == REDUCE_PRODUCT ? 1.0f : 0.0f));
}

__device__ __forceinline__ float reduce_pair(int kind, float a, float b) {
    switch (kind) {
        case REDUCE_MAX: return fmaxf(a, b);
        case REDUCE_MIN: return fminf(a, b);
        case REDUCE_PRODUCT: return a * b;
        default: return a + b;
    }
}

// One thread an output: y[outer, chunk, inner]; for log-sum-exp the group is one chunk. `scale` is multiplied in.
extern "C" __global__ void reduce_threads(const float* x, float* y, int kind, int group, int inner, int chunk,
                                          int chunks, float scale, int n) {
    EACH(i, n) {
        int o = i / (inner * chunks), part = i / inner % chunks;
        const float* from = x + o * group * inner + i % inner;
        int end = (part + 1) * chunk < group ? (part + 1) * chunk : group;
        if (kind == REDUCE_LOG_SUM_EXP) {
            float top = -INF, sum = 0.0f;
            for (int g = 0; g < group; g++) top = fmaxf(top, from[g * inner]);
            for (int g = 0; g < group; g++) sum += expf(from[g * inner] - top);
            y[i] = top + logf(sum);
            continue;
        }
        float result = reduce_start(kind);
        for (int g = part * chunk; g < end; g++) result = reduce_pair(kind, result, from[g * inner]);
        y[i] = result * scale;
    }
}

// One block an output, for groups that lie together (inner = 1): y[outer, chunk].
extern "C" __global__ void reduce_blocks(const float* x, float* y, int kind, int group, int chunk, int chunks,
                                         float scale) {
    __shared__ float parts[BLOCK];
    int o = blockIdx.x / chunks, part = blockIdx.x % chunks;
    const float* from = x + o * group;
    int end = (part + 1) * chunk < group ? (part + 1) * chunk : group;
    float result = reduce_start(kind);
    for (int g = part * chunk + threadIdx.x; g < end; g += blockDim.x) result = reduce_pair(kind, result, from[g]);
    parts[threadIdx.x] = result;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] = reduce_pair(kind, parts[threadIdx.x], parts[threadIdx.x + half]);
        __syncthreads();
    }
    if (threadIdx.x == 0) y[blockIdx.x] = parts[0] * scale;
}

// How many elements of each group equal its result.
extern "C" __global__ void reduce_ties(const float* x, const float* y, float* ties, int group, int inner, int n) {
    EACH(i, n) {
        const float* from = x + i / inner * group * inner + i % inner;
        int count = 0;
        for (int g = 0; g < group; g++) count += from[g * inner] == y[i];
        ties[i] = (float)(count > 0 ? count : 1);
    }
}

// One thread an input. `scale`: 1, or 1 / group for means; `ties` for maxima and minima.
extern "C" __global__ void reduce_backward(const float* x, const float* y, const float* dy, const float* ties, float* dx,
                                           int kind, int group, int inner, float scale, int n, int add) {
    EACH(i, n) {
        int o = i / (group * inner) * inner + i % inner;
        float g = dy[o] * scale;
        if (kind == REDUCE_MAX || kind == REDUCE_MIN) {
            g = x[i] == y[o] ? g / ties[o] : 0.0f;
        } else if (kind == REDUCE_LOG_SUM_EXP) {
            g *= expf(x[i] - y[o]);
        } else if (kind == REDUCE_PRODUCT) {
            // Of the others: right also with zeros.
            int first = i / (group * inner) * group * inner + i % inner;
            for (int k = 0; k < group; k++)
                if (first + k * inner != i) g *= x[first + k * inner];
        }
        put(&dx[i], g, add);
    }
}
