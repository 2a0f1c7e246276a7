// Steps that only move values: transpositions, and copies by a table of positions.

// [outer, rows, columns] to [outer, columns, rows], by tiles of 32 x 32; blocks of 32 x 8 threads.
extern "C" __global__ void transpose(const float* x, float* y, int outer, int rows, int columns, int add) {
    __shared__ float tile[32][33];
    int across = (columns + 31) / 32, down = (rows + 31) / 32;
    int t = threadIdx.x % 32, lane = threadIdx.x / 32;
    for (int block = blockIdx.x; block < outer * across * down; block += gridDim.x) {
        int o = block / (across * down), rest = block % (across * down);
        int row = rest / across * 32, column = rest % across * 32;
        __syncthreads();
        for (int l = lane; l < 32; l += 8)
            if (row + l < rows && column + t < columns) tile[l][t] = x[(o * rows + row + l) * columns + column + t];
        __syncthreads();
        for (int l = lane; l < 32; l += 8)
            if (column + l < columns && row + t < rows)
                put(&y[(o * columns + column + l) * rows + row + t], tile[t][l], add);
    }
}

// [outer, rows, columns, piece] to [outer, columns, rows, piece].
extern "C" __global__ void swap_pieces(const float* x, float* y, int rows, int columns, int piece, int n, int add) {
    EACH(i, n) {
        int p = i % piece, row = i / piece % rows, column = i / (piece * rows) % columns;
        int o = i / (piece * rows * columns);
        put(&y[i], x[((o * rows + row) * columns + column) * piece + p], add);
    }
}

// y[to[i]] = x[from[i]].
extern "C" __global__ void copy_listed(const float* x, float* y, const int* from, const int* to, int n) {
    EACH(i, n) y[to[i]] = x[from[i]];
}

// dx[i] = the sum of dy at places[offsets[i]..offsets[i + 1]].
extern "C" __global__ void sum_listed(const float* dy, float* dx, const int* offsets, const int* places, int n, int add) {
    EACH(i, n) {
        float sum = 0.0f;
        for (int k = offsets[i]; k < offsets[i + 1]; k++) sum += dy[places[k]];
        put(&dx[i], sum, add);
    }
}
