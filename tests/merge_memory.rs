//! The memory that a merge of large files takes: counted at the allocator, in a process of its own.

mod common {
    pub mod scratch;
}

use common::scratch::Scratch;
use prismgrad::io::SafeTensors;
use prismgrad::systems::editing::{Method, Model, Recipe, merge_files};
use serde_json::json;
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, counting.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(now, Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Elements of the large tensor: 192 MiB in f32, 201 MB.
const LARGE: usize = 48 << 20;

/// A file with one large tensor and a small one, whose elements are 0 but for `some`, every 2²⁰th; the disk holds no more than these.
fn write(path: &Path, some: f32) {
    let bytes = 4 * LARGE;
    let header = json!({
        "large": {"dtype": "F32", "shape": [LARGE / 1024, 1024], "data_offsets": [0, bytes]},
        "small": {"dtype": "F32", "shape": [4], "data_offsets": [bytes, bytes + 16]},
    });
    let header = header.to_string();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + bytes + 16) as u64).unwrap();
    for e in (0..LARGE).step_by(1 << 20) {
        file.seek(SeekFrom::Start((8 + header.len() + 4 * e) as u64)).unwrap();
        file.write_all(&some.to_le_bytes()).unwrap();
    }
}

#[test]
fn a_merge_holds_pieces_of_tensors_only() {
    let scratch = Scratch::new("merge-memory");
    let path = |name: &str| scratch.join(format!("{name}.safetensors"));
    ["base", "a", "b"].iter().zip([1.0, 2.0, 4.0]).for_each(|(n, v)| write(&path(n), v));
    let model = |name: &str| Model { path: path(name), weight: 0.5, density: 1e-6 };
    let recipe = Recipe::new(Method::Ties, Some(path("base")), vec![model("a"), model("b")]);
    let out = scratch.join("out");
    // Threads and their buffers are there before counting begins.
    rayon::broadcast(|_| ());
    let before = NOW.load(Relaxed);
    MOST.store(before, Relaxed);
    let done = merge_files(&recipe, &out, false, |_, _| {}).unwrap();
    let took = MOST.load(Relaxed) - before;
    assert_eq!((done.tensors, done.elements as usize), (2, LARGE + 4));
    // The base's tensor and the vectors' would be 576 MiB; pieces of 2¹⁸ elements of each, and their bytes, take a few.
    assert!(took < 16 << 20, "{took} bytes at most, for tensors of {}", 4 * LARGE);
    // 1e-6 of the elements are 50, and 48 of them differ from the base: 1 + (½·1 + ½·3)/(½ + ½).
    let file = SafeTensors::open(out.join("model.safetensors")).unwrap();
    let mut four = [0; 4];
    for e in [0, 1 << 20, 47 << 20] {
        file.read_part("large", 4 * e, &mut four).unwrap();
        assert_eq!(f32::from_le_bytes(four), 3.0);
        file.read_part("large", 4 * e + 4, &mut four).unwrap();
        assert_eq!(f32::from_le_bytes(four), 0.0);
    }
}
