// Normalisations along rows: layer, RMS, instance and group normalisation, softmax. One block a row.

#define ROW(i, row) for (int i = threadIdx.x; i < (row); i += blockDim.x)

// `affine`: element-wise scale and shift of a row.
extern "C" __global__ void standardize_forward(const float* x, float* y, float* mean, float* inverse, int row,
                                               float epsilon, int centre, const float* scale, const float* shift,
                                               int affine) {
    const float* from = x + blockIdx.x * row;
    float* to = y + blockIdx.x * row;
    float middle = 0.0f;
    if (centre) {
        float sum = 0.0f;
        ROW(i, row) sum += from[i];
        middle = block_sum(sum) / (float)row;
    }
    float square = 0.0f;
    ROW(i, row) square += (from[i] - middle) * (from[i] - middle);
    float factor = 1.0f / sqrtf(block_sum(square) / (float)row + epsilon);
    ROW(i, row) {
        float v = (from[i] - middle) * factor;
        to[i] = affine ? v * scale[i] + shift[i] : v;
    }
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = middle;
        inverse[blockIdx.x] = factor;
    }
}

extern "C" __global__ void standardize_backward(const float* x, const float* dy, float* dx, const float* mean,
                                                const float* inverse, int row, int centre, const float* scale,
                                                int affine, int add) {
    const float* from = x + blockIdx.x * row;
    const float* g = dy + blockIdx.x * row;
    float* to = dx + blockIdx.x * row;
    float middle = mean[blockIdx.x], factor = inverse[blockIdx.x], along = 0.0f, level = 0.0f;
    ROW(i, row) {
        float d = affine ? g[i] * scale[i] : g[i];
        along += d * (from[i] - middle) * factor;
        level += d;
    }
    along = block_sum(along) / (float)row;
    level = centre ? block_sum(level) / (float)row : 0.0f;
    ROW(i, row) {
        float d = affine ? g[i] * scale[i] : g[i];
        put(&to[i], factor * (d - level - (from[i] - middle) * factor * along), add);
    }
}

#define SOFTMAX 0
#define LOG_SOFTMAX 1
#define MASKED 2

extern "C" __global__ void softmax_forward(const float* x, float* y, int row, int kind) {
    const float* from = x + blockIdx.x * row;
    float* to = y + blockIdx.x * row;
    float top = -INF;
    ROW(i, row) top = fmaxf(top, from[i]);
    top = block_max(top);
    if (kind == MASKED && top == -INF) {
        ROW(i, row) to[i] = 0.0f;
        return;
    }
    float sum = 0.0f;
    ROW(i, row) sum += expf(from[i] - top);
    sum = block_sum(sum);
    if (kind == LOG_SOFTMAX) {
        float log = top + logf(sum);
        ROW(i, row) to[i] = from[i] - log;
    } else {
        float factor = 1.0f / sum;
        ROW(i, row) to[i] = expf(from[i] - top) * factor;
    }
}

extern "C" __global__ void softmax_backward(const float* y, const float* dy, float* dx, int row, int kind, int add) {
    const float* from = y + blockIdx.x * row;
    const float* g = dy + blockIdx.x * row;
    float* to = dx + blockIdx.x * row;
    float sum = 0.0f;
    ROW(i, row) sum += kind == LOG_SOFTMAX ? g[i] : g[i] * from[i];
    sum = block_sum(sum);
    ROW(i, row) {
        float d = kind == LOG_SOFTMAX ? g[i] - expf(from[i]) * sum : from[i] * (g[i] - sum);
        put(&to[i], d, add);
    }
}
