// Convolutions: patch matrices for cuBLAS and back, the bias, depthwise layers.
//
// x is [images, channels, height, width], outputs are [rows, columns] a channel. Row k = (channel, ky, kx) of the
// patch matrix of image n begins at n * image_stride + k * row_stride.

extern "C" __global__ void im2col(const float* x, float* col, int images, int channels, int height, int width, int rows,
                                  int columns, int kernel_h, int kernel_w, int stride_h, int stride_w, int dilation_h,
                                  int dilation_w, int pad_h, int pad_w, int image_stride, int row_stride) {
    int plane = rows * columns, taps = kernel_h * kernel_w, patch = channels * taps;
    EACH(i, images * plane) {
        int n = i / plane, p = i - n * plane;
        int top = p / columns * stride_h - pad_h, left = p % columns * stride_w - pad_w;
        const float* image = x + n * channels * height * width;
        float* to = col + n * image_stride + p;
        for (int k = blockIdx.y; k < patch; k += gridDim.y) {
            int c = k / taps, tap = k - c * taps;
            int h = top + tap / kernel_w * dilation_h, w = left + tap % kernel_w * dilation_w;
            int inside = h >= 0 && h < height && w >= 0 && w < width;
            to[k * row_stride] = inside ? image[(c * height + h) * width + w] : 0.0f;
        }
    }
}

// The transpose of im2col: each pixel sums the places it was copied to.
extern "C" __global__ void col2im(const float* col, float* dx, int images, int channels, int height, int width, int rows,
                                  int columns, int kernel_h, int kernel_w, int stride_h, int stride_w, int dilation_h,
                                  int dilation_w, int pad_h, int pad_w, int image_stride, int row_stride, int add) {
    EACH(i, images * channels * height * width) {
        int w = i % width, h = i / width % height, c = i / (width * height) % channels;
        int n = i / (width * height * channels);
        const float* from = col + n * image_stride;
        float sum = 0.0f;
        for (int ky = 0; ky < kernel_h; ky++) {
            int y = h + pad_h - ky * dilation_h;
            if (y < 0 || y % stride_h != 0 || y / stride_h >= rows) continue;
            for (int kx = 0; kx < kernel_w; kx++) {
                int z = w + pad_w - kx * dilation_w;
                if (z < 0 || z % stride_w != 0 || z / stride_w >= columns) continue;
                int k = (c * kernel_h + ky) * kernel_w + kx;
                sum += from[k * row_stride + y / stride_h * columns + z / stride_w];
            }
        }
        put(&dx[i], sum, add);
    }
}

extern "C" __global__ void add_bias(float* y, const float* bias, int channels, int plane, int n) {
    EACH(i, n) y[i] += bias[i / plane % channels];
}

// `times` outputs from each channel alone; weights [channels * times, kernel_h, kernel_w].
extern "C" __global__ void depthwise_forward(const float* x, const float* weight, const float* bias, float* y,
                                             int images, int channels, int times, int height, int width, int rows,
                                             int columns, int kernel_h, int kernel_w, int stride_h, int stride_w,
                                             int dilation_h, int dilation_w, int pad_h, int pad_w, int biased) {
    int outputs = channels * times;
    EACH(i, images * outputs * rows * columns) {
        int column = i % columns, row = i / columns % rows, o = i / (columns * rows) % outputs;
        int n = i / (columns * rows * outputs);
        const float* plane = x + (n * channels + o / times) * height * width;
        const float* w = weight + o * kernel_h * kernel_w;
        int top = row * stride_h - pad_h, left = column * stride_w - pad_w;
        float sum = biased ? bias[o] : 0.0f;
        for (int ky = 0; ky < kernel_h; ky++) {
            int h = top + ky * dilation_h;
            if (h < 0 || h >= height) continue;
            for (int kx = 0; kx < kernel_w; kx++) {
                int v = left + kx * dilation_w;
                if (v >= 0 && v < width) sum += w[ky * kernel_w + kx] * plane[h * width + v];
            }
        }
        y[i] = sum;
    }
}

extern "C" __global__ void depthwise_backward(const float* dy, const float* weight, float* dx, int images, int channels,
                                              int times, int height, int width, int rows, int columns, int kernel_h,
                                              int kernel_w, int stride_h, int stride_w, int dilation_h,
                                              int dilation_w, int pad_h, int pad_w, int add) {
    int outputs = channels * times;
    EACH(i, images * channels * height * width) {
        int v = i % width, h = i / width % height, c = i / (width * height) % channels;
        int n = i / (width * height * channels);
        float sum = 0.0f;
        for (int ky = 0; ky < kernel_h; ky++) {
            int y = h + pad_h - ky * dilation_h;
            if (y < 0 || y % stride_h != 0 || y / stride_h >= rows) continue;
            for (int kx = 0; kx < kernel_w; kx++) {
                int z = v + pad_w - kx * dilation_w;
                if (z < 0 || z % stride_w != 0 || z / stride_w >= columns) continue;
                for (int o = c * times; o < (c + 1) * times; o++)
                    sum += weight[(o * kernel_h + ky) * kernel_w + kx] *
                           dy[((n * outputs + o) * rows + y / stride_h) * columns + z / stride_w];
            }
        }
        put(&dx[i], sum, add);
    }
}
