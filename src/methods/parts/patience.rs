//! How long a method goes on with what it has: until accuracy has had no new best for a while.

use crate::error::Result;
use crate::tensor::TensorStore;

/// Best accuracy and updates since, while it lasts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Patience {
    /// Updates without a new best that end it.
    limit: u64,
    running: Option<(f64, u64)>,
}

impl Patience {
    /// One of `limit` updates, at least one, that has not begun.
    pub fn new(limit: u64) -> Self {
        Self { limit: limit.max(1), running: None }
    }

    /// Begins anew.
    pub fn begin(&mut self) {
        self.running = Some((f64::NEG_INFINITY, 0));
    }

    /// Ends at once.
    pub fn end(&mut self) {
        self.running = None;
    }

    /// It has begun and is not over.
    pub fn lasts(&self) -> bool {
        self.running.is_some()
    }

    /// After an update of this accuracy; `endless` patience never ends.
    pub fn tell(&mut self, accuracy: f64, endless: bool) {
        let Some((best, since)) = self.running else { return };
        let since = if accuracy > best { 0 } else { since + 1 };
        let over = since >= self.limit && !endless;
        self.running = (!over).then_some((best.max(accuracy), since));
    }

    /// Writes it into a checkpoint under `name`.
    pub fn write_to(&self, name: &str, store: &mut TensorStore) {
        if let Some((best, since)) = self.running {
            store.words.insert(format!("{name}.best"), format!("{best:?}"));
            store.words.insert(format!("{name}.since"), since.to_string());
        }
    }

    /// Goes on where a checkpoint was made.
    ///
    /// # Errors
    /// When its words are no numbers.
    pub fn restore(&mut self, name: &str, store: &TensorStore) -> Result<()> {
        let since = format!("{name}.since");
        self.running = match store.words.contains_key(&since) {
            true => Some((store.number(&format!("{name}.best"))?, store.number(&since)?)),
            false => None,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_after_so_many_updates_without_a_new_best_and_outlives_a_checkpoint() {
        let mut patience = Patience::new(2);
        assert!(!patience.lasts());
        patience.begin();
        for (accuracy, lasts) in [(0.5, true), (0.4, true), (0.6, true), (0.6, true)] {
            patience.tell(accuracy, false);
            assert_eq!(patience.lasts(), lasts);
        }
        let mut store = TensorStore::default();
        patience.write_to("x", &mut store);
        let mut other = Patience::new(2);
        other.restore("x", &store).unwrap();
        assert_eq!(other, patience);
        let mut endless = patience;
        endless.tell(0.1, true);
        patience.tell(0.1, false);
        assert!(endless.lasts() && !patience.lasts());
        patience.tell(0.9, false);
        assert!(!patience.lasts());
        other.restore("y", &store).unwrap();
        assert!(!other.lasts());
    }
}
