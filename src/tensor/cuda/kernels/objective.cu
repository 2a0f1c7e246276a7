// What an inversion step needs beside the network: its losses with their gradients, the way from free pixels to
// the model's input and back, priors on the pixels, Adam.

// Cross-entropy of `images` rows of logits: losses[i], and `scale` times the gradient. Rows from `used` on are filling:
// their loss and gradient are 0.
extern "C" __global__ void cross_entropy(const float* logits, const int* labels, float* d_logits, float* losses,
                                         int classes, int used, float scale) {
    const float* row = logits + blockIdx.x * classes;
    float* d = d_logits + blockIdx.x * classes;
    float top = -INF, sum = 0.0f;
    for (int i = threadIdx.x; i < classes; i += blockDim.x) top = fmaxf(top, row[i]);
    top = block_max(top);
    for (int i = threadIdx.x; i < classes; i += blockDim.x) sum += expf(row[i] - top);
    float log = logf(block_sum(sum));
    int image = blockIdx.x, counts = image < used;
    int label = counts ? labels[image] : 0;
    for (int i = threadIdx.x; i < classes; i += blockDim.x) {
        float p = expf(row[i] - top - log);
        d[i] = counts ? scale * (p - (i == label ? 1.0f : 0.0f)) : 0.0f;
    }
    if (threadIdx.x == 0) losses[image] = counts ? top + log - row[label] : 0.0f;
}

// For tap x and side y (0 mean, 1 variance): the norm of (seen - wanted) * unit, and `weight` times its gradient. `seen`,
// `wanted` and `d` are [2, total]; tap t has channels offsets[t]..offsets[t + 1]. A variance counts in the square of a
// mean's unit.
extern "C" __global__ void match_statistics(const float* seen, const float* wanted, const float* unit,
                                            const int* offsets, float* d, float* norms, int total, float weight) {
    int side = blockIdx.y * total;
    float sum = 0.0f;
    for (int c = offsets[blockIdx.x] + threadIdx.x; c < offsets[blockIdx.x + 1]; c += blockDim.x) {
        float u = blockIdx.y ? unit[c] * unit[c] : unit[c];
        float v = (seen[side + c] - wanted[side + c]) * u;
        sum += v * v;
    }
    float norm = sqrtf(block_sum(sum));
    float scale = norm > 0.0f ? weight / norm : 0.0f;
    for (int c = offsets[blockIdx.x] + threadIdx.x; c < offsets[blockIdx.x + 1]; c += blockDim.x) {
        float u = blockIdx.y ? unit[c] * unit[c] : unit[c];
        d[side + c] = (seen[side + c] - wanted[side + c]) * u * u * scale;
    }
    if (threadIdx.x == 0) norms[2 * blockIdx.x + blockIdx.y] = norm;
}
