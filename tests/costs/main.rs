//! What things cost, counted: FLOPs and memory. Both counters are those of the whole process, so one test runs at a time.

#[path = "../common"]
mod common {
    pub mod privacy;
}

mod plan;
mod spans;

/// Held by each test while it counts.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock().unwrap_or_else(|e| e.into_inner())
}
