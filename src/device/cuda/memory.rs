//! Device memory in use, in bytes by tag: current and peak.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The purpose of a block; set by [`TagScope`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tag {
    /// Weights.
    Parameter,
    /// Gradients and their factors.
    Gradient,
    /// Moments and master weights.
    Optimizer,
    /// Results kept for the backward pass, and everything without another tag.
    #[default]
    Activation,
    /// Scratch of one operation.
    Workspace,
}

impl Tag {
    /// All tags.
    pub const ALL: [Tag; 5] = [Tag::Parameter, Tag::Gradient, Tag::Optimizer, Tag::Activation, Tag::Workspace];

    /// The tag that this thread's allocations carry now.
    pub fn current() -> Tag {
        CURRENT.get()
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tag::Parameter => "parameters",
            Tag::Gradient => "gradients",
            Tag::Optimizer => "optimizer",
            Tag::Activation => "activations",
            Tag::Workspace => "workspace",
        })
    }
}

thread_local! {
    static CURRENT: Cell<Tag> = const { Cell::new(Tag::Activation) };
}

/// Until it is dropped, blocks that this thread allocates carry its tag. Scopes can be nested.
#[must_use = "the tag holds only until the scope is dropped"]
pub struct TagScope {
    before: Tag,
    /// Keeps the scope on its thread.
    _here: PhantomData<*const ()>,
}

impl TagScope {
    /// Starts a scope.
    pub fn new(tag: Tag) -> Self {
        TagScope { before: CURRENT.replace(tag), _here: PhantomData }
    }
}

impl Drop for TagScope {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

/// Current and peak use in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Now.
    pub current: usize,
    /// Peak, since the start or the last [`super::Gpu::reset_peak_memory`].
    pub peak: usize,
}

#[derive(Default)]
struct Meter {
    current: AtomicUsize,
    peak: AtomicUsize,
    /// Peak since the last call of [`Meter::watermark`].
    window: AtomicUsize,
}

impl Meter {
    fn add(&self, bytes: usize) {
        let now = self.current.fetch_add(bytes, Relaxed) + bytes;
        self.peak.fetch_max(now, Relaxed);
        self.window.fetch_max(now, Relaxed);
    }
    fn watermark(&self) -> (usize, usize) {
        let now = self.current.load(Relaxed);
        (now, self.window.swap(now, Relaxed).max(now))
    }
    fn read(&self) -> Usage {
        let current = self.current.load(Relaxed);
        Usage { current, peak: self.peak.load(Relaxed).max(current) }
    }
}

/// The meters of one device.
#[derive(Default)]
pub(super) struct Meters {
    tags: [Meter; 5],
    total: Meter,
}

impl Meters {
    pub(super) fn add(&self, tag: Tag, bytes: usize) {
        self.tags[tag as usize].add(bytes);
        self.total.add(bytes);
    }
    pub(super) fn remove(&self, tag: Tag, bytes: usize) {
        self.tags[tag as usize].current.fetch_sub(bytes, Relaxed);
        self.total.current.fetch_sub(bytes, Relaxed);
    }
    /// Bytes in use now, and the most that were in use since the last call.
    pub(super) fn watermark(&self) -> (usize, usize) {
        self.total.watermark()
    }
    pub(super) fn reset_peaks(&self) {
        for m in self.tags.iter().chain([&self.total]) {
            m.peak.store(m.current.load(Relaxed), Relaxed);
        }
    }
    pub(super) fn report(&self, reserved: usize, idle: usize) -> MemoryReport {
        MemoryReport {
            by_tag: std::array::from_fn(|i| (Tag::ALL[i], self.tags[i].read())),
            total: self.total.read(),
            reserved,
            idle,
        }
    }
}

/// The memory use of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryReport {
    /// Requested bytes, by tag.
    pub by_tag: [(Tag, Usage); 5],
    /// Requested bytes, over all tags.
    pub total: Usage,
    /// Bytes allocated from the driver.
    pub reserved: usize,
    /// Of these, bytes that are idle and kept for later blocks.
    pub idle: usize,
}

impl MemoryReport {
    /// The usage under one tag.
    pub fn tag(&self, tag: Tag) -> Usage {
        self.by_tag[tag as usize].1
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (tag, usage) in &self.by_tag {
            write!(f, "{tag} {} (peak {}), ", human(usage.current), human(usage.peak))?;
        }
        write!(
            f,
            "in all {} (peak {}); {} held from the driver, {} of it idle",
            human(self.total.current),
            human(self.total.peak),
            human(self.reserved),
            human(self.idle)
        )
    }
}

/// Bytes as text, such as "1.5 GiB".
pub(super) fn human(bytes: usize) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut v = bytes as f64 / 1024.0;
    let mut unit = 0;
    while v >= 1023.95 && unit + 1 < units.len() {
        v /= 1024.0;
        unit += 1;
    }
    format!("{v:.1} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_nest_and_end() {
        assert_eq!(Tag::current(), Tag::Activation);
        {
            let _outer = TagScope::new(Tag::Gradient);
            {
                let _inner = TagScope::new(Tag::Workspace);
                assert_eq!(Tag::current(), Tag::Workspace);
                assert_eq!(std::thread::spawn(Tag::current).join().unwrap(), Tag::Activation);
            }
            assert_eq!(Tag::current(), Tag::Gradient);
        }
        assert_eq!(Tag::current(), Tag::Activation);
    }

    #[test]
    fn meters_keep_peaks_by_tag() {
        let m = Meters::default();
        m.add(Tag::Parameter, 1000);
        m.add(Tag::Workspace, 500);
        m.remove(Tag::Workspace, 500);
        let r = m.report(4096, 2596);
        assert_eq!(r.tag(Tag::Parameter), Usage { current: 1000, peak: 1000 });
        assert_eq!(r.tag(Tag::Workspace), Usage { current: 0, peak: 500 });
        assert_eq!(r.total, Usage { current: 1000, peak: 1500 });
        m.reset_peaks();
        assert_eq!(m.report(0, 0).total.peak, 1000);
        assert!(r.to_string().contains("workspace 0 B (peak 500 B)"), "{r}");
    }

    #[test]
    fn sizes_in_words() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(80 << 30), "80.0 GiB");
        assert_eq!(human((1 << 20) - 1), "1.0 MiB");
    }
}
