// A frozen BatchNormalization and what follows it in one pass each way: scale and shift per channel, a residual,
// bounds, 2x2 maxima, and the sums that the statistics of its input need.
//
// x is [images, channels, plane]; block (c, s) takes part s of channel c. `mode`: 1 residual, 2 bounded,
// 4 halved (planes `width` wide).

#define RESIDUAL 1
#define BOUNDED 2
#define HALVED 4

__device__ __forceinline__ float bounded(float v, float low, float high, int mode) {
    if (!(mode & BOUNDED)) return v;
    v = v > low ? v : low;
    return v < high ? v : high;
}

extern "C" __global__ void channel_forward(const float* x, const float* residual, float* y, float* partial,
                                           const float* a, const float* b, const float* shift, int images,
                                           int channels, int plane, int width, float low, float high, int mode) {
    int c = blockIdx.x;
    float factor = a[c], offset = b[c], middle = shift[c];
    float sum = 0.0f, square = 0.0f;
    int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    if (mode & HALVED) {
        int height = plane / width, rows = height / 2, columns = width / 2;
        int across = (width + 1) / 2, cells = (height + 1) / 2 * across;
        for (int i = first; i < images * cells; i += step) {
            int n = i / cells, cell = i - n * cells;
            int row = cell / across, column = cell - row * across;
            const float* from = x + (n * channels + c) * plane;
            float best = -INF;
            for (int corner = 0; corner < 4; corner++) {
                int h = 2 * row + corner / 2, w = 2 * column + corner % 2;
                if (h >= height || w >= width) continue;
                float v = from[h * width + w], d = v - middle;
                sum += d;
                square += d * d;
                v = factor * v + offset;
                best = best > v ? best : v;
            }
            if (row < rows && column < columns)
                y[(n * channels + c) * rows * columns + row * columns + column] = bounded(best, low, high, mode);
        }
    } else {
        for (int i = first; i < images * plane; i += step) {
            int n = i / plane, at = (n * channels + c) * plane + (i - n * plane);
            float v = x[at], d = v - middle;
            sum += d;
            square += d * d;
            v = factor * v + offset;
            if (mode & RESIDUAL) v += residual[at];
            y[at] = bounded(v, low, high, mode);
        }
    }
    sum = block_sum(sum);
    square = block_sum(square);
    if (threadIdx.x == 0) {
        partial[2 * (c * gridDim.y + blockIdx.y)] = sum;
        partial[2 * (c * gridDim.y + blockIdx.y) + 1] = square;
    }
}

// The same where channels lie side by side, x [rows, channels]: blocks of 32 channels by 8 rows.
extern "C" __global__ void channel_rows_forward(const float* x, const float* residual, float* y, float* partial,
                                                const float* a, const float* b, const float* shift, int rows,
                                                int channels, float low, float high, int mode) {
    __shared__ float sums[BLOCK], squares[BLOCK];
    int c = blockIdx.x * 32 + threadIdx.x % 32, lane = threadIdx.x / 32;
    float sum = 0.0f, square = 0.0f;
    if (c < channels) {
        for (int row = blockIdx.y * 8 + lane; row < rows; row += gridDim.y * 8) {
            float v = x[row * channels + c], d = v - shift[c];
            sum += d;
            square += d * d;
            v = a[c] * v + b[c];
            if (mode & RESIDUAL) v += residual[row * channels + c];
            y[row * channels + c] = bounded(v, low, high, mode);
        }
    }
    sums[threadIdx.x] = sum;
    squares[threadIdx.x] = square;
    __syncthreads();
    if (lane == 0 && c < channels) {
        for (int l = 1; l < 8; l++) {
            sum += sums[threadIdx.x + 32 * l];
            square += squares[threadIdx.x + 32 * l];
        }
        partial[2 * (c * gridDim.y + blockIdx.y)] = sum;
        partial[2 * (c * gridDim.y + blockIdx.y) + 1] = square;
    }
}

// Mean and biased variance of `count` values a channel from `parts` sums around `shift`.
extern "C" __global__ void channel_merge(const float* partial, const float* shift, float* mean, float* var,
                                         int channels, int parts, int count) {
    EACH(c, channels) {
        double first = 0.0, second = 0.0;
        for (int p = 0; p < parts; p++) {
            first += partial[2 * (c * parts + p)];
            second += partial[2 * (c * parts + p) + 1];
        }
        first /= count;
        second = second / count - first * first;
        mean[c] = (float)(shift[c] + first);
        var[c] = (float)(second > 0.0 ? second : 0.0);
    }
}

// The gradient to x: `a dy` where the activation passes, plus that through the statistics (where `tapped`).
extern "C" __global__ void channel_backward(const float* x, const float* y, const float* dy, float* dx, const float* a,
                                            const float* b, const float* mean, const float* d_mean,
                                            const float* d_var, int tapped, int images, int channels, int plane,
                                            int width, float open, float high, int mode, int add) {
    int c = blockIdx.x;
    float factor = a[c], offset = b[c], base = 0.0f, slope = 0.0f;
    if (tapped) {
        float count = (float)(images * plane);
        slope = 2.0f * d_var[c] / count;
        base = d_mean[c] / count - slope * mean[c];
    }
    int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    if (mode & HALVED) {
        int height = plane / width, rows = height / 2, columns = width / 2;
        int across = (width + 1) / 2, cells = (height + 1) / 2 * across;
        for (int i = first; i < images * cells; i += step) {
            int n = i / cells, cell = i - n * cells;
            int row = cell / across, column = cell - row * across;
            const float* from = x + (n * channels + c) * plane;
            float* to = dx + (n * channels + c) * plane;
            float best = -INF;
            int place = -1;
            for (int corner = 0; corner < 4; corner++) {
                int h = 2 * row + corner / 2, w = 2 * column + corner % 2;
                if (h >= height || w >= width) continue;
                float v = factor * from[h * width + w] + offset;
                if (v > best) {
                    best = v;
                    place = corner;
                }
            }
            float g = 0.0f;
            if (row < rows && column < columns) {
                int passes = !(mode & BOUNDED) || (best >= open && best <= high);
                if (passes) g = factor * dy[(n * channels + c) * rows * columns + row * columns + column];
            }
            for (int corner = 0; corner < 4; corner++) {
                int h = 2 * row + corner / 2, w = 2 * column + corner % 2;
                if (h >= height || w >= width) continue;
                float d = base + slope * from[h * width + w];
                put(&to[h * width + w], corner == place ? g + d : d, add);
            }
        }
    } else {
        for (int i = first; i < images * plane; i += step) {
            int n = i / plane, at = (n * channels + c) * plane + (i - n * plane);
            float g = dy[at];
            if (mode & BOUNDED) {
                float v = mode & RESIDUAL ? y[at] : factor * x[at] + offset;
                if (!(v >= open && v <= high)) g = 0.0f;
            }
            put(&dx[at], factor * g + (base + slope * x[at]), add);
        }
    }
}

// The same, channels side by side.
extern "C" __global__ void channel_rows_backward(const float* x, const float* y, const float* dy, float* dx,
                                                 const float* a, const float* b, const float* mean,
                                                 const float* d_mean, const float* d_var, int tapped, int rows,
                                                 int channels, float open, float high, int mode, int add) {
    EACH(i, rows * channels) {
        int c = i % channels;
        float g = dy[i], base = 0.0f, slope = 0.0f;
        if (tapped) {
            slope = 2.0f * d_var[c] / (float)rows;
            base = d_mean[c] / (float)rows - slope * mean[c];
        }
        if (mode & BOUNDED) {
            float v = mode & RESIDUAL ? y[i] : a[c] * x[i] + b[c];
            if (!(v >= open && v <= high)) g = 0.0f;
        }
        put(&dx[i], a[c] * g + (base + slope * x[i]), add);
    }
}

// The gradient to the residual.
extern "C" __global__ void residual_backward(const float* y, const float* dy, float* d, float open, float high,
                                             int mode, int n, int add) {
    EACH(i, n) {
        int passes = !(mode & BOUNDED) || (y[i] >= open && y[i] <= high);
        put(&d[i], passes ? dy[i] : 0.0f, add);
    }
}
