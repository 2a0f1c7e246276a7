// Functions of one and of two numbers; the numbers of the functions are those of `elementwise.rs` and
// `binary.rs`. The choice is the same for a whole launch, so the branch costs nothing beside the memory.

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

#define GELU_C 0.7978845608028654f
#define GELU_K 0.044715f
#define SQRT_HALF 0.7071067811865476f

__device__ float function_value(int f, float x, float a, float b) {
    switch (f) {
        case 0: return fmaxf(x, 0.0f);
        case 1: return x > 0.0f ? x : a * x;
        case 2: return x > a ? x : 0.0f;
        case 3: return x > 0.0f ? x : a * (expf(x) - 1.0f);
        case 4: return fmaxf(x, 0.0f) + fminf(a * (expf(x / a) - 1.0f), 0.0f);
        case 5: return x > 0.0f ? b * x : b * a * (expf(x) - 1.0f);
        case 6: return sigmoid(x);
        case 7: return fminf(fmaxf(a * x + b, 0.0f), 1.0f);
        case 8: return x * fminf(fmaxf(a * x + b, 0.0f), 1.0f);
        case 9: return x * sigmoid(a * x);
        case 10: return x * tanhf(softplus(x));
        case 11: return 0.5f * x * (1.0f + erff(x * SQRT_HALF));
        case 12: return x * sigmoid(2.0f * GELU_C * (x + GELU_K * x * x * x));
        case 13: return softplus(x);
        case 14: return x / (1.0f + fabsf(x));
        case 15: return tanhf(x);
        case 16: return erff(x);
        case 17: return expf(x);
        case 18: return logf(x);
        case 19: return sqrtf(x);
        case 20: return 1.0f / x;
        case 21: return -x;
        case 22: return fabsf(x);
        case 23: return fminf(fmaxf(x, a), b);
        case 24: return sinf(x);
        case 25: return cosf(x);
        case 26: return x * x;
        case 27: return a * x + b;
        case 28: return x == 0.0f ? 0.0f : powf(x, a);
        case 29: return tanf(x);
        case 30: return asinf(x);
        case 31: return acosf(x);
        case 32: return atanf(x);
        case 33: return sinhf(x);
        case 34: return coshf(x);
        case 35: return asinhf(x);
        case 36: return acoshf(x);
        case 37: return atanhf(x);
        case 38: return x < -a ? x + b : (x > a ? x - b : 0.0f);
        case 39: return floorf(x);
        case 40: return ceilf(x);
        case 41: return rintf(x);
        case 42: return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f);
        case 43: return truncf(x);
        case 44: return x == 0.0f ? 1.0f : 0.0f;
        case 45: return x != 0.0f ? 1.0f : 0.0f;
        case 46: return x != x ? 1.0f : 0.0f;
        default: return (x == INF && a != 0.0f) || (x == -INF && b != 0.0f) ? 1.0f : 0.0f;
    }
}

// Derivative at input x with output y.
__device__ float function_slope(int f, float x, float y, float a, float b) {
    switch (f) {
        case 0: return y > 0.0f ? 1.0f : 0.0f;
        case 1: return x > 0.0f ? 1.0f : a;
        case 2: return x > a ? 1.0f : 0.0f;
        case 3: return x > 0.0f ? 1.0f : y + a;
        case 4: return x > 0.0f ? 1.0f : expf(x / a);
        case 5: return x > 0.0f ? b : y + a * b;
        case 6: return y * (1.0f - y);
        case 7: return y > 0.0f && y < 1.0f ? a : 0.0f;
        case 8: {
            float gate = a * x + b;
            return gate <= 0.0f ? 0.0f : (gate >= 1.0f ? 1.0f : gate + a * x);
        }
        case 9: {
            float s = sigmoid(a * x);
            return s + a * x * s * (1.0f - s);
        }
        case 10: {
            float t = tanhf(softplus(x));
            return t + x * (1.0f - t * t) * sigmoid(x);
        }
        case 11: return 0.5f * (1.0f + erff(x * SQRT_HALF)) + x * 0.3989422804014327f * expf(-0.5f * x * x);
        case 12: {
            float s = sigmoid(2.0f * GELU_C * (x + GELU_K * x * x * x));
            return s + 2.0f * x * s * (1.0f - s) * GELU_C * (1.0f + 3.0f * GELU_K * x * x);
        }
        case 13: return sigmoid(x);
        case 14: {
            float d = 1.0f + fabsf(x);
            return 1.0f / (d * d);
        }
        case 15: return 1.0f - y * y;
        case 16: return 1.1283791670955126f * expf(-(x * x));
        case 17: return y;
        case 18: return 1.0f / x;
        case 19: return 0.5f / y;
        case 20: return -(y * y);
        case 21: return -1.0f;
        case 22: return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f);
        case 23: return x >= a && x <= b ? 1.0f : 0.0f;
        case 24: return cosf(x);
        case 25: return -sinf(x);
        case 26: return x + x;
        case 27: return a;
        case 28: return x == 0.0f ? 0.0f : a * y / x;
        case 29: return 1.0f + y * y;
        case 30: return 1.0f / sqrtf(1.0f - x * x);
        case 31: return -1.0f / sqrtf(1.0f - x * x);
        case 32: return 1.0f / (1.0f + x * x);
        case 33: return coshf(x);
        case 34: return sinhf(x);
        case 35: return 1.0f / sqrtf(x * x + 1.0f);
        case 36: return 1.0f / sqrtf(x * x - 1.0f);
        case 37: return 1.0f / (1.0f - x * x);
        case 38: return x < -a || x > a ? 1.0f : 0.0f;
        default: return 0.0f;
    }
}

extern "C" __global__ void unary_forward(int f, float a, float b, const float* x, float* y, int n) {
    EACH(i, n) y[i] = function_value(f, x[i], a, b);
}

extern "C" __global__ void unary_backward(int f, float a, float b, const float* x, const float* y, const float* dy,
                                          float* dx, int n, int add) {
    EACH(i, n) put(&dx[i], dy[i] * function_slope(f, x[i], y[i], a, b), add);
}

__device__ float power(float a, float b) {
    if (b == 2.0f) return a * a;
    if (b == 1.0f) return a;
    if (b == 0.5f) return sqrtf(a);
    if (b == 3.0f) return a * a * a;
    return powf(a, b);
}

__device__ float pair_value(int f, float a, float b) {
    switch (f) {
        case 0: return a + b;
        case 1: return a - b;
        case 2: return a * b;
        case 3: return a / b;
        case 4: return power(a, b);
        case 5: return fminf(a, b);
        case 6: return fmaxf(a, b);
        case 7: return a > 0.0f ? a : a * b;
        case 8: return truncf(a / b);
        case 9: return a - floorf(a / b) * b;
        case 10: return fmodf(a, b);
        case 11: return a == b ? 1.0f : 0.0f;
        case 12: return a > b ? 1.0f : 0.0f;
        case 13: return a >= b ? 1.0f : 0.0f;
        case 14: return a < b ? 1.0f : 0.0f;
        case 15: return a <= b ? 1.0f : 0.0f;
        case 16: return a != 0.0f && b != 0.0f ? 1.0f : 0.0f;
        case 17: return a != 0.0f || b != 0.0f ? 1.0f : 0.0f;
        default: return (a != 0.0f) != (b != 0.0f) ? 1.0f : 0.0f;
    }
}

// The partial derivative to operand `which`; ties of Min and Max are shared in halves.
__device__ float pair_slope(int f, int which, float a, float b) {
    switch (f) {
        case 0: return 1.0f;
        case 1: return which ? -1.0f : 1.0f;
        case 2: return which ? a : b;
        case 3: return which ? -(a / (b * b)) : 1.0f / b;
        case 4:
            if (which) return a > 0.0f ? power(a, b) * logf(a) : 0.0f;
            return b == 0.0f ? 0.0f : b * power(a, b - 1.0f);
        case 5: return a == b ? 0.5f : ((a < b) != (which != 0) ? 1.0f : 0.0f);
        case 6: return a == b ? 0.5f : ((a > b) != (which != 0) ? 1.0f : 0.0f);
        case 7:
            if (a > 0.0f) return which ? 0.0f : 1.0f;
            return which ? a : b;
        case 9: return which ? -floorf(a / b) : 1.0f;
        case 10: return which ? -truncf(a / b) : 1.0f;
        default: return 0.0f;
    }
}

// Where an operand is read for output i: kind 0 there, 1 at `i / inner % count`, 2 at `map[i]`.
__device__ __forceinline__ int spread_at(int kind, int inner, int count, const int* map, int i) {
    return kind == 0 ? i : (kind == 1 ? i / inner % count : map[i]);
}

extern "C" __global__ void binary_forward(int f, const float* a, int kind_a, int inner_a, int count_a, const int* map_a,
                                          const float* b, int kind_b, int inner_b, int count_b, const int* map_b,
                                          float* y, int n) {
    EACH(i, n) {
        float u = a[spread_at(kind_a, inner_a, count_a, map_a, i)];
        float v = b[spread_at(kind_b, inner_b, count_b, map_b, i)];
        y[i] = pair_value(f, u, v);
    }
}

// The gradient to operand `which` before it is summed over a broadcast, one term an output.
extern "C" __global__ void binary_terms(int f, int which, const float* a, int kind_a, int inner_a, int count_a,
                                        const int* map_a, const float* b, int kind_b, int inner_b, int count_b,
                                        const int* map_b, const float* dy, float* d, int n, int add) {
    EACH(i, n) {
        float u = a[spread_at(kind_a, inner_a, count_a, map_a, i)];
        float v = b[spread_at(kind_b, inner_b, count_b, map_b, i)];
        put(&d[i], dy[i] * pair_slope(f, which, u, v), add);
    }
}

// Sums of [outer, count, inner] over all but the middle: block (c, s) writes part s of c's sum.
extern "C" __global__ void channel_sums(const float* terms, float* partial, int outer, int count, int inner) {
    int c = blockIdx.x;
    float sum = 0.0f;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < outer * inner; i += gridDim.y * blockDim.x) {
        int o = i / inner;
        sum += terms[(o * count + c) * inner + (i - o * inner)];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[c * gridDim.y + blockIdx.y] = sum;
}

// y[i] = the sum of row i of [n, parts].
extern "C" __global__ void sum_parts(const float* partial, float* y, int n, int parts, int add) {
    EACH(i, n) {
        float sum = 0.0f;
        for (int p = 0; p < parts; p++) sum += partial[i * parts + p];
        put(&y[i], sum, add);
    }
}

extern "C" __global__ void choose_forward(const float* condition, const float* yes, const float* no, float* y, int n) {
    EACH(i, n) y[i] = condition[i] != 0.0f ? yes[i] : no[i];
}

extern "C" __global__ void choose_backward(const float* condition, const float* dy, float* d, int wanted, int n,
                                           int add) {
    EACH(i, n) put(&d[i], (condition[i] != 0.0f) == (wanted != 0) ? dy[i] : 0.0f, add);
}
