//! Random streams: every draw in the crate comes from here, so the same seed gives the same bytes.
//!
//! A stream is keyed by (seed, stage, key, index), not by order of use: work may be split over any
//! number of threads or machines without changing a draw (design.md 3, "Determinism").

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// A reproducible random stream (ChaCha20).
#[derive(Debug, Clone)]
pub struct RngStream {
    rng: ChaCha20Rng,
    spare_normal: Option<f32>,
}

impl RngStream {
    /// The stream of (`seed`, `stage`, `key`, `index`): a stage is a step of a run ("invert"), the
    /// key what it works on (a model's SHA-256), the index an item of it (an episode, a step).
    pub fn new(seed: u64, stage: &str, key: &str, index: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update((stage.len() as u64).to_le_bytes());
        hash.update(stage.as_bytes());
        hash.update((key.len() as u64).to_le_bytes());
        hash.update(key.as_bytes());
        hash.update(index.to_le_bytes());
        Self { rng: ChaCha20Rng::from_seed(hash.finalize().into()), spare_normal: None }
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.rng.next_u64()
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f32 {
        (self.rng.next_u32() >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in `[low, high)`.
    pub fn uniform_in(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        if let Some(value) = self.spare_normal.take() {
            return value;
        }
        let radius = (-2.0 * (1.0 - f64::from(self.uniform())).ln()).sqrt();
        let angle = std::f64::consts::TAU * f64::from(self.uniform());
        self.spare_normal = Some((radius * angle.sin()) as f32);
        (radius * angle.cos()) as f32
    }

    /// `n` standard normal values.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Beta(`a`, `a`), by Joehnk's method (1964): exact, but slow for an `a` of more than a few units.
    pub fn beta(&mut self, a: f64) -> f64 {
        loop {
            let (x, y) =
                (f64::from(self.uniform()).powf(1.0 / a), f64::from(self.uniform()).powf(1.0 / a));
            if x + y > 0.0 && x + y <= 1.0 {
                return x / (x + y);
            }
        }
    }

    /// Uniform integer in `0..n` (`n` > 0), without modulo bias.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n.max(1) as u64;
        let zone = u64::MAX - u64::MAX % n;
        loop {
            let draw = self.rng.next_u64();
            if draw < zone {
                return (draw % n) as usize;
            }
        }
    }

    /// Uniform integer in `low..=high`.
    pub fn integer_in(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1).max(1) as usize) as i64
    }

    /// Shuffles in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i + 1);
            items.swap(i, j);
        }
    }

    /// `k` distinct indices of `0..n` in random order (all of them when `k >= n`).
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut indices: Vec<usize> = (0..n).collect();
        let k = k.min(n);
        for i in 0..k {
            let j = i + self.below(n - i);
            indices.swap(i, j);
        }
        indices.truncate(k);
        indices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean 1/2, variance 1 / (4 (2 a + 1)).
    #[test]
    fn shares_have_the_moments_of_their_distribution() {
        for a in [0.5, 1.0, 2.0] {
            let mut rng = RngStream::new(1, "test", "beta", 0);
            let drawn: Vec<f64> = (0..20_000).map(|_| rng.beta(a)).collect();
            let mean = drawn.iter().sum::<f64>() / 20_000.0;
            let variance = drawn.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 20_000.0;
            let expected = 1.0 / (4.0 * (2.0 * a + 1.0));
            assert!((mean - 0.5).abs() < 0.01, "{a}: {mean}");
            assert!((variance - expected).abs() < 0.03 * expected, "{a}: {variance} {expected}");
        }
    }
}
