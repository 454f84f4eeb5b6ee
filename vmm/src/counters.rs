//! Named counters that any thread may move and the control socket reports.
//!
//! Contract: registering takes a lock, moving one does not. Names are `<device>.<what>` or `exits.<kind>`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One counter. Cheap to clone; clones share the value.
#[derive(Debug, Clone, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Adds `n`; wraps after 2^64.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of one VM.
#[derive(Debug, Clone, Default)]
pub struct Counters(Arc<Mutex<BTreeMap<String, Counter>>>);

impl Counters {
    /// The counter of that name, made if it is new. Two callers of one name share it.
    pub fn register(&self, name: impl Into<String>) -> Counter {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(name.into())
            .or_default()
            .clone()
    }

    /// Every counter with its value, sorted by name.
    pub fn values(&self) -> Vec<(String, u64)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter()
            .map(|(name, counter)| (name.clone(), counter.value()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_shared_by_name_and_reported_sorted() {
        let counters = Counters::default();
        counters.register("b.two").add(2);
        counters.register("a.one").add(1);
        counters.register("b.two").add(40);
        assert_eq!(
            counters.values(),
            [("a.one".into(), 1), ("b.two".into(), 42)]
        );
    }
}
