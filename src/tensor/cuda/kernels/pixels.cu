// Free pixels: from z [images, 3, height, width] in standardised units to a model's input and back, priors, Adam.
//
// Pixel (y, x) of the canonical image is `middle + unit * z` of the pixel that a cyclic shift by (down, right) moves
// there. Output row o of the resize sums rows starts[o].. with weights[ends[o - 1]..ends[o]]; the lists give, for each
// row, the outputs it went to. Columns likewise.

__device__ __forceinline__ int wrapped(int i, int n) {
    i %= n;
    return i < 0 ? i + n : i;
}

extern "C" __global__ void clamp_pixels(float* z, float range, int n) {
    EACH(i, n) z[i] = fminf(fmaxf(z[i], -range), range);
}

// x[image, channel, row, column] = scale * resized(mix of the canonical channels) + offset; `bytes`: rounded to 0..255.
extern "C" __global__ void pixels_forward(const float* z, float* x, int images, int height, int width, int channels,
                                          int rows, int columns, const float* mix, const float* scale,
                                          const float* offset, const int* row_starts, const int* row_ends,
                                          const float* row_weights, const int* column_starts,
                                          const int* column_ends, const float* column_weights, int channel_step,
                                          int pixel_step, float middle, float unit, int down, int right, int bytes) {
    EACH(i, images * channels * rows * columns) {
        int column = i % columns, row = i / columns % rows, c = i / (columns * rows) % channels;
        int image = i / (columns * rows * channels);
        int first = row ? row_ends[row - 1] : 0, left = column ? column_ends[column - 1] : 0;
        float sum = 0.0f;
        for (int from = 0; from < 3; from++) {
            float share = mix[c * 3 + from];
            if (share == 0.0f) continue;
            const float* plane = z + (image * 3 + from) * height * width;
            for (int k = first; k < row_ends[row]; k++) {
                int y = wrapped(row_starts[row] + k - first - down, height);
                float line = 0.0f;
                for (int l = left; l < column_ends[column]; l++) {
                    int v = wrapped(column_starts[column] + l - left - right, width);
                    line += column_weights[l] * (middle + unit * plane[y * width + v]);
                }
                sum += share * row_weights[k] * line;
            }
        }
        float value = scale[c] * sum + offset[c];
        if (bytes) value = fminf(fmaxf(roundf(value), 0.0f), 255.0f);
        x[image * channels * rows * columns + c * channel_step + (row * columns + column) * pixel_step] = value;
    }
}

// The gradient to z; straight through the rounding.
extern "C" __global__ void pixels_backward(const float* dx, float* gradient, int images, int height, int width,
                                           int channels, int rows, int columns, const float* mix,
                                           const float* scale, const int* row_offsets, const int* row_places,
                                           const float* row_weights, const int* column_offsets,
                                           const int* column_places, const float* column_weights,
                                           int channel_step, int pixel_step, float unit, int down, int right) {
    EACH(i, images * 3 * height * width) {
        int v = i % width, h = i / width % height, from = i / (width * height) % 3;
        int image = i / (width * height * 3);
        int y = wrapped(h + down, height), x = wrapped(v + right, width);
        float sum = 0.0f;
        for (int c = 0; c < channels; c++) {
            float share = mix[c * 3 + from] * scale[c];
            if (share == 0.0f) continue;
            const float* plane = dx + image * channels * rows * columns + c * channel_step;
            for (int k = row_offsets[y]; k < row_offsets[y + 1]; k++)
                for (int l = column_offsets[x]; l < column_offsets[x + 1]; l++)
                    sum += share * row_weights[k] * column_weights[l] *
                           plane[(row_places[k] * columns + column_places[l]) * pixel_step];
        }
        gradient[i] = unit * sum;
    }
}

// Sums of squares: differences to the right, down, down right, down left; values. partial [5, blocks].
extern "C" __global__ void prior_sums(const float* z, float* partial, int height, int width, int n) {
    float sums[5] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    EACH(i, n) {
        int x = i % width, y = i / width % height;
        float v = z[i];
        sums[4] += v * v;
        if (x + 1 < width) sums[0] += (v - z[i + 1]) * (v - z[i + 1]);
        if (y + 1 >= height) continue;
        sums[1] += (v - z[i + width]) * (v - z[i + width]);
        if (x + 1 < width) sums[2] += (v - z[i + width + 1]) * (v - z[i + width + 1]);
        if (x > 0) sums[3] += (v - z[i + width - 1]) * (v - z[i + width - 1]);
    }
    for (int k = 0; k < 5; k++) {
        float sum = block_sum(sums[k]);
        if (threadIdx.x == 0) partial[k * gridDim.x + blockIdx.x] = sum;
    }
}

// Adds `variation` times the gradient of the four norms of differences and `size` times that of the norm of z.
extern "C" __global__ void prior_gradient(const float* z, const float* sums, float* gradient, int height, int width,
                                          float variation, float size, int n) {
    float scale[4];
    for (int k = 0; k < 4; k++) scale[k] = sums[k] > 0.0f ? variation / sqrtf(sums[k]) : 0.0f;
    float own = sums[4] > 0.0f ? size / sqrtf(sums[4]) : 0.0f;
    EACH(i, n) {
        int x = i % width, y = i / width % height;
        float v = z[i], g = own * v;
        int right = x + 1 < width, left = x > 0, below = y + 1 < height, above = y > 0;
        if (right) g += scale[0] * (v - z[i + 1]);
        if (left) g += scale[0] * (v - z[i - 1]);
        if (below) g += scale[1] * (v - z[i + width]);
        if (above) g += scale[1] * (v - z[i - width]);
        if (below && right) g += scale[2] * (v - z[i + width + 1]);
        if (above && left) g += scale[2] * (v - z[i - width - 1]);
        if (below && left) g += scale[3] * (v - z[i + width - 1]);
        if (above && right) g += scale[3] * (v - z[i - width + 1]);
        gradient[i] += g;
    }
}

extern "C" __global__ void adam_step(float* p, float* m, float* v, const float* g, float size, float root, float keep1,
                                     float add1, float keep2, float add2, float epsilon, int n) {
    EACH(i, n) {
        m[i] = keep1 * m[i] + add1 * g[i];
        v[i] = keep2 * v[i] + add2 * g[i] * g[i];
        p[i] -= size * m[i] / (sqrtf(v[i]) / root + epsilon);
    }
}
