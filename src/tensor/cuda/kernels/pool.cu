// Pooling over two axes of planes [height, width] to [rows, columns]; the gradient is gathered per input pixel,
// so that no two threads write one place.

#define AVERAGE_OF_INSIDE 1
#define AVERAGE_OF_WINDOW 2
#define SUM 3

extern "C" __global__ void max_pool_forward(const float* x, float* y, int* places, int planes, int height, int width,
                                            int rows, int columns, int kernel_h, int kernel_w, int stride_h,
                                            int stride_w, int dilation_h, int dilation_w, int pad_h, int pad_w) {
    EACH(i, planes * rows * columns) {
        int column = i % columns, row = i / columns % rows;
        const float* plane = x + i / (rows * columns) * height * width;
        int place = -1;
        float best = 0.0f;
        for (int ky = 0; ky < kernel_h; ky++) {
            int h = row * stride_h - pad_h + ky * dilation_h;
            if (h < 0 || h >= height) continue;
            for (int kx = 0; kx < kernel_w; kx++) {
                int w = column * stride_w - pad_w + kx * dilation_w;
                if (w < 0 || w >= width) continue;
                float v = plane[h * width + w];
                if (place < 0 || v > best) {
                    best = v;
                    place = h * width + w;
                }
            }
        }
        y[i] = best;
        places[i] = place;
    }
}

extern "C" __global__ void max_pool_backward(const float* dy, const int* places, float* dx, int planes, int height,
                                             int width, int rows, int columns, int kernel_h, int kernel_w,
                                             int stride_h, int stride_w, int dilation_h, int dilation_w, int pad_h,
                                             int pad_w, int add) {
    EACH(i, planes * height * width) {
        int pixel = i % (height * width), w = pixel % width, h = pixel / width;
        int first = i / (height * width) * rows * columns;
        float sum = 0.0f;
        for (int ky = 0; ky < kernel_h; ky++) {
            int y = h + pad_h - ky * dilation_h;
            if (y < 0 || y % stride_h != 0 || y / stride_h >= rows) continue;
            for (int kx = 0; kx < kernel_w; kx++) {
                int z = w + pad_w - kx * dilation_w;
                if (z < 0 || z % stride_w != 0 || z / stride_w >= columns) continue;
                int o = first + y / stride_h * columns + z / stride_w;
                if (places[o] == pixel) sum += dy[o];
            }
        }
        put(&dx[i], sum, add);
    }
}

// Positions of a window along one axis that lie inside the input, or (`padded`) inside input and pads.
__device__ int window_count(int o, int size, int kernel, int stride, int dilation, int pad, int pad_end, int padded) {
    int count = 0;
    for (int k = 0; k < kernel; k++) {
        int at = o * stride - pad + k * dilation;
        count += padded ? at < size + pad_end : at >= 0 && at < size;
    }
    return count;
}

__device__ float window_share(int kind, int row, int column, int height, int width, int kernel_h, int kernel_w,
                              int stride_h, int stride_w, int dilation_h, int dilation_w, int pad_h, int pad_w,
                              int pad_bottom, int pad_right) {
    if (kind == SUM) return 1.0f;
    int padded = kind == AVERAGE_OF_WINDOW;
    int count = window_count(row, height, kernel_h, stride_h, dilation_h, pad_h, pad_bottom, padded) *
                window_count(column, width, kernel_w, stride_w, dilation_w, pad_w, pad_right, padded);
    return 1.0f / (float)(count > 0 ? count : 1);
}

extern "C" __global__ void mean_pool_forward(const float* x, float* y, int kind, int planes, int height, int width,
                                             int rows, int columns, int kernel_h, int kernel_w, int stride_h,
                                             int stride_w, int dilation_h, int dilation_w, int pad_h, int pad_w,
                                             int pad_bottom, int pad_right) {
    EACH(i, planes * rows * columns) {
        int column = i % columns, row = i / columns % rows;
        const float* plane = x + i / (rows * columns) * height * width;
        float sum = 0.0f;
        for (int ky = 0; ky < kernel_h; ky++) {
            int h = row * stride_h - pad_h + ky * dilation_h;
            if (h < 0 || h >= height) continue;
            for (int kx = 0; kx < kernel_w; kx++) {
                int w = column * stride_w - pad_w + kx * dilation_w;
                if (w >= 0 && w < width) sum += plane[h * width + w];
            }
        }
        y[i] = sum * window_share(kind, row, column, height, width, kernel_h, kernel_w, stride_h, stride_w, dilation_h,
                                  dilation_w, pad_h, pad_w, pad_bottom, pad_right);
    }
}

extern "C" __global__ void mean_pool_backward(const float* dy, float* dx, int kind, int planes, int height, int width,
                                              int rows, int columns, int kernel_h, int kernel_w, int stride_h,
                                              int stride_w, int dilation_h, int dilation_w, int pad_h, int pad_w,
                                              int pad_bottom, int pad_right, int add) {
    EACH(i, planes * height * width) {
        int w = i % width, h = i / width % height;
        int first = i / (height * width) * rows * columns;
        float sum = 0.0f;
        for (int ky = 0; ky < kernel_h; ky++) {
            int y = h + pad_h - ky * dilation_h;
            if (y < 0 || y % stride_h != 0 || y / stride_h >= rows) continue;
            for (int kx = 0; kx < kernel_w; kx++) {
                int z = w + pad_w - kx * dilation_w;
                if (z < 0 || z % stride_w != 0 || z / stride_w >= columns) continue;
                int row = y / stride_h, column = z / stride_w;
                sum += dy[first + row * columns + column] *
                       window_share(kind, row, column, height, width, kernel_h, kernel_w, stride_h, stride_w,
                                    dilation_h, dilation_w, pad_h, pad_w, pad_bottom, pad_right);
            }
        }
        put(&dx[i], sum, add);
    }
}
