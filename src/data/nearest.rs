//! Classification of queries by distance to the support set, in any feature space.
//!
//! On pixels these are the two baselines that need no learning; on embeddings the second is
//! ProtoNet's rule (squared Euclidean distance to class means).

/// Label of each query: that of its nearest support vector. `support` is label-major
/// `[way * shot, dim]`, `queries` `[n, dim]`, both row-major; ties go to the lower label.
pub fn nearest_neighbour(support: &[f32], queries: &[f32], dim: usize, way: usize) -> Vec<usize> {
    let shot = support.len() / (dim * way).max(1);
    classify(queries, dim, support, |row| row / shot.max(1))
}

/// Label of each query: that of the nearest class mean. Arguments as [`nearest_neighbour`].
pub fn nearest_prototype(support: &[f32], queries: &[f32], dim: usize, way: usize) -> Vec<usize> {
    classify(queries, dim, &prototypes(support, dim, way), |row| row)
}

/// The class means `[way, dim]` of a label-major support set.
pub fn prototypes(support: &[f32], dim: usize, way: usize) -> Vec<f32> {
    let shot = support.len() / (dim * way).max(1);
    let mut means = vec![0.0; way * dim];
    for (mean, class) in
        means.chunks_exact_mut(dim.max(1)).zip(support.chunks_exact((dim * shot).max(1)))
    {
        for row in class.chunks_exact(dim) {
            for (sum, value) in mean.iter_mut().zip(row) {
                *sum += value;
            }
        }
        for sum in mean {
            *sum /= shot as f32;
        }
    }
    means
}

fn classify(
    queries: &[f32],
    dim: usize,
    references: &[f32],
    label: impl Fn(usize) -> usize,
) -> Vec<usize> {
    let nearest = |query: &[f32]| {
        let mut best = (f32::INFINITY, 0);
        for (row, reference) in references.chunks_exact(dim.max(1)).enumerate() {
            let distance = squared_distance(query, reference);
            if distance < best.0 {
                best = (distance, row);
            }
        }
        label(best.1)
    };
    queries.chunks_exact(dim.max(1)).map(nearest).collect()
}

/// Squared Euclidean distance. Sixteen running sums in a fixed order: fast, and the same everywhere.
fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            let difference = x[lane] - y[lane];
            sums[lane] += difference * difference;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| (x - y) * (x - y)).sum();
    sums.iter().sum::<f32>() + rest
}
