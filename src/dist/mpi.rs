//! Ranks as processes that `mpirun` or Slurm starts. They communicate through Open MPI, whose library is loaded when the program runs.
//!
//! Only messages between two ranks are used, and sums are taken here, in the order of the ranks, so that results have the bits that
//! [`Local`](super::Local) gives. Before each collective, every rank sends every other a line that names the collective. A rank that calls
//! something else, or nothing, can therefore be named.

use super::{Communicator, Counter, Traffic, equal_parts, expect_part, expect_rows, join, sum};
use crate::array::Array;
use crate::base::{DType, Error, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{c_char, c_int, c_void};
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

type Handle = *mut c_void;
type Send_ = unsafe extern "C" fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;
type Recv = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;

/// The functions of the library that are used.
struct Functions {
    finalize: unsafe extern "C" fn() -> c_int,
    comm_rank: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    comm_size: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    comm_split: unsafe extern "C" fn(Handle, c_int, c_int, *mut Handle) -> c_int,
    isend: Send_,
    irecv: Recv,
    test: unsafe extern "C" fn(*mut Handle, *mut c_int, *mut c_void) -> c_int,
    world: Handle,
    byte: Handle,
    // The functions are valid as long as the library is loaded.
    _library: Library,
}

// SAFETY: the handles are addresses of objects of the library, which is never unloaded; calls are made one at a time (`Engine::lock`).
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

/// The library of this process, initialised once because MPI cannot be started a second time.
struct Engine {
    functions: Functions,
    /// Held during each call: calls come from any thread, one at a time.
    turn: Mutex<()>,
}

static ENGINE: OnceLock<std::result::Result<Arc<Engine>, String>> = OnceLock::new();

impl Engine {
    fn start() -> std::result::Result<Arc<Engine>, String> {
        let names = ["libmpi.so.40", "libmpi.so"];
        let mut said = String::new();
        // SAFETY: the initialisers of Open MPI's library are run, as in any program linked with it.
        let library = names.into_iter().find_map(|n| match unsafe { Library::open(Some(n), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => Some(library),
            Err(e) => {
                said = e.to_string();
                None
            }
        });
        let Some(library) = library else {
            return Err(format!(
                "no Open MPI on this machine ({said}): install it, on Debian `apt-get install openmpi-bin libopenmpi-dev`"
            ));
        };
        let missing =
            |e: libloading::Error| format!("this libmpi is not Open MPI, which is the one supported here: {e}");
        // SAFETY: the signatures are those of the MPI standard with Open MPI's handles, which are pointers; the two objects are its
        // MPI_COMM_WORLD and MPI_BYTE, of which the addresses are the handles.
        unsafe {
            macro_rules! get {
                ($name:literal) => {
                    *library.get($name).map_err(missing)?
                };
            }
            let world = library.get::<Handle>(b"ompi_mpi_comm_world\0").map_err(missing)?.as_raw_ptr();
            let byte = library.get::<Handle>(b"ompi_mpi_byte\0").map_err(missing)?.as_raw_ptr();
            let init: unsafe extern "C" fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int) -> c_int =
                get!(b"MPI_Init_thread\0");
            let functions = Functions {
                finalize: get!(b"MPI_Finalize\0"),
                comm_rank: get!(b"MPI_Comm_rank\0"),
                comm_size: get!(b"MPI_Comm_size\0"),
                comm_split: get!(b"MPI_Comm_split\0"),
                isend: get!(b"MPI_Isend\0"),
                irecv: get!(b"MPI_Irecv\0"),
                test: get!(b"MPI_Test\0"),
                world,
                byte,
                _library: library,
            };
            // 2 is MPI_THREAD_SERIALIZED: calls come from any thread, one at a time.
            let mut given = 0;
            if init(null_mut(), null_mut(), 2, &mut given) != 0 || given < 2 {
                return Err(format!("Open MPI did not start with threads (level {given}, 2 is needed)"));
            }
            Ok(Arc::new(Engine { functions, turn: Mutex::new(()) }))
        }
    }
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Bytes of the line that ranks exchange before a collective.
const LINE: usize = 256;
/// The most bytes of one message: MPI counts them in a C int.
const MESSAGE: usize = 1 << 30;
/// Tags of lines and of data.
const LINES: c_int = 1;
const DATA: c_int = 2;

/// One rank of a group whose ranks are processes, started by `mpirun` or `srun`.
///
/// ```text
/// mpirun -n 4 target/release/examples/dp_zero
/// ```
pub struct Mpi {
    engine: Arc<Engine>,
    comm: Handle,
    rank: usize,
    size: usize,
    patience: Duration,
    counter: Counter,
    /// Why this rank takes no further part, if so.
    broken: Mutex<Option<String>>,
    /// Whether dropping this communicator ends MPI.
    first: bool,
}

// SAFETY: the handle is an address in the library; calls are made one at a time.
unsafe impl Send for Mpi {}

/// A message in progress, with its bytes.
struct Message {
    request: Handle,
    with: usize,
    bytes: Vec<u8>,
    receives: bool,
}

impl Mpi {
    /// All ranks that were started together. A rank that waits for the others longer than `patience` stops with an error that names them.
    /// It can be called once in a process. Without `mpirun` there is one rank.
    pub fn world(patience: Duration) -> Result<Mpi> {
        let fail = |e: &String| Error::device("Mpi::world", e);
        let again = ENGINE.get().is_some();
        let engine = ENGINE.get_or_init(Engine::start).as_ref().map_err(fail)?.clone();
        if again {
            return Err(fail(&"MPI is started once in a process; use Communicator::split or Shared".into()));
        }
        let comm = engine.functions.world;
        let (rank, size) = Mpi::place(&engine, comm)?;
        let (counter, broken) = (Counter::default(), Mutex::new(None));
        Ok(Mpi { engine, comm, rank, size, patience, counter, broken, first: true })
    }
    /// Whether this process was started by `mpirun` or by Slurm's `srun --mpi`, as one of several ranks or alone.
    pub fn started() -> bool {
        ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK"].iter().any(|v| std::env::var_os(v).is_some())
    }
    fn place(engine: &Engine, comm: Handle) -> Result<(usize, usize)> {
        let (mut rank, mut size) = (0, 0);
        let _turn = engine.lock();
        // SAFETY: MPI has been started, and both take the address of an int.
        let said =
            unsafe { (engine.functions.comm_rank)(comm, &mut rank) | (engine.functions.comm_size)(comm, &mut size) };
        match said {
            0 => Ok((rank as usize, size as usize)),
            code => Err(Error::device("Mpi::world", format!("MPI_Comm_rank or MPI_Comm_size gave {code}"))),
        }
    }
    /// Ends this rank's participation, and returns the error that says why.
    fn fail(&self, call: &str, why: impl Into<String>) -> Error {
        let why = why.into();
        self.abort(&why);
        Error::invalid("collective", format!("rank {} at {call}: {why}", self.rank))
    }
    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.size).filter(|r| *r != self.rank)
    }
    /// Starts sending or receiving a message. Its data are in a vector, whose place in memory stays the same when the message is moved.
    fn post(&self, with: usize, mut bytes: Vec<u8>, tag: c_int, receives: bool) -> Result<Message> {
        let f = &self.engine.functions;
        let (count, mut request) = (bytes.len() as c_int, null_mut());
        let _turn = self.engine.lock();
        // SAFETY: `bytes` stays in memory until the message is complete: `wait` keeps it, or leaks it.
        let said = unsafe {
            match receives {
                true => {
                    (f.irecv)(bytes.as_mut_ptr().cast(), count, f.byte, with as c_int, tag, self.comm, &mut request)
                }
                false => (f.isend)(bytes.as_ptr().cast(), count, f.byte, with as c_int, tag, self.comm, &mut request),
            }
        };
        match said {
            0 => Ok(Message { request, with, bytes, receives }),
            code => Err(Error::device("collective", format!("MPI gave error {code} for a message with rank {with}"))),
        }
    }
    /// Waits until the messages are complete. At the deadline their memory is leaked, since MPI may still write to it, and the ranks that
    /// have not answered are returned.
    fn wait(&self, mut messages: Vec<Message>) -> std::result::Result<Vec<Message>, Vec<usize>> {
        let until = Instant::now() + self.patience;
        let mut rounds = 0u32;
        loop {
            let mut open = false;
            for m in &mut messages {
                if m.request.is_null() {
                    continue;
                }
                let (mut over, _turn) = (0, self.engine.lock());
                // SAFETY: the request is one of `post`; a null status is Open MPI's MPI_STATUS_IGNORE.
                let said = unsafe { (self.engine.functions.test)(&mut m.request, &mut over, null_mut()) };
                if said == 0 && over != 0 {
                    m.request = null_mut();
                } else {
                    open = true;
                }
            }
            if !open {
                return Ok(messages);
            }
            if Instant::now() >= until {
                let mut late: Vec<usize> = messages.iter().filter(|m| !m.request.is_null()).map(|m| m.with).collect();
                late.sort_unstable();
                late.dedup();
                std::mem::forget(messages);
                return Err(late);
            }
            rounds += 1;
            // Short waits spin or yield and longer ones sleep, so that the processor is free for ranks on the same machine.
            match rounds {
                0..200 => std::hint::spin_loop(),
                200..2000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }
    /// Sends every other rank the name of this rank's next collective, and checks that all ranks have the same one.
    fn agree(&self, call: &str) -> Result<()> {
        if let Some(why) = &*self.broken.lock().unwrap_or_else(|e| e.into_inner()) {
            return Err(Error::invalid("collective", format!("rank {} at {call}: it has failed: {why}", self.rank)));
        }
        let own = line(b'c', call);
        let mut messages = Vec::new();
        for r in self.others() {
            messages.push(self.post(r, own.clone(), LINES, false)?);
            messages.push(self.post(r, vec![0; LINE], LINES, true)?);
        }
        let messages = self.wait(messages).map_err(|late| {
            let why = format!("after {:?} nothing of ranks {late:?}; they stall, or took another path", self.patience);
            self.fail(call, why)
        })?;
        let Some(m) = messages.iter().find(|m| m.receives && m.bytes != own) else { return Ok(()) };
        let said = String::from_utf8_lossy(&m.bytes[1..]).trim_end_matches('\0').to_string();
        Err(match m.bytes[0] {
            b'c' => self.fail(call, format!("rank {} is at {said}: the ranks have taken different paths", m.with)),
            _ => self.fail(call, format!("rank {} is gone: {said}", m.with)),
        })
    }
    /// Sends `send[r]` to each rank r, and returns the `receive[r]` bytes that each sent here. The bytes for this rank itself are not sent.
    fn swap(&self, call: &str, mut send: Vec<Vec<u8>>, receive: &[usize]) -> Result<Vec<Vec<u8>>> {
        let mut all: Vec<Vec<u8>> = vec![Vec::new(); self.size];
        all[self.rank] = std::mem::take(&mut send[self.rank]);
        let mut messages = Vec::new();
        for r in self.others() {
            let pieces = |n: usize| (0..n).step_by(MESSAGE).map(move |at| at..n.min(at + MESSAGE));
            for piece in pieces(receive[r]) {
                messages.push(self.post(r, vec![0; piece.len()], DATA, true)?);
            }
            let bytes = std::mem::take(&mut send[r]);
            if bytes.len() <= MESSAGE {
                if !bytes.is_empty() {
                    messages.push(self.post(r, bytes, DATA, false)?);
                }
            } else {
                for piece in pieces(bytes.len()) {
                    messages.push(self.post(r, bytes[piece].to_vec(), DATA, false)?);
                }
            }
        }
        let messages = self.wait(messages).map_err(|late| {
            let why = format!("after {:?} the data of ranks {late:?} is not here", self.patience);
            self.fail(call, why)
        })?;
        for m in messages.into_iter().filter(|m| m.receives) {
            match all[m.with].is_empty() {
                true => all[m.with] = m.bytes,
                false => all[m.with].extend_from_slice(&m.bytes),
            }
        }
        Ok(all)
    }
    /// [`Mpi::swap`] for arrays of one dtype: `send[r]` goes to rank r, and `receive[r]` elements come from it.
    fn swap_arrays(&self, call: &str, send: &[Array], receive: &[usize], dtype: DType) -> Result<Vec<Array>> {
        if let Some(x) = send.iter().find(|x| x.device().is_cuda()) {
            return Err(self.fail(call, format!("ranks exchange arrays of the CPU, not of {}", x.device())));
        }
        let bytes = send.iter().map(|x| x.contiguous().to_bytes()).collect();
        let sizes: Vec<usize> = receive.iter().map(|n| n * dtype.size()).collect();
        let got = self.swap(call, bytes, &sizes)?;
        got.iter().zip(receive).map(|(b, n)| Array::from_bytes(b, &[*n], dtype)).collect()
    }
    /// This rank's part of the sum over ranks, and the lengths of the parts into which `x` is cut, which differ by at most one element.
    fn scattered(&self, call: &str, x: &Array) -> Result<(Array, Vec<usize>)> {
        let (n, flat) = (x.numel(), x.reshape(&[x.numel()])?);
        let cuts: Vec<usize> = (0..=self.size).map(|r| n * r / self.size).collect();
        let parts: Vec<usize> = cuts.windows(2).map(|c| c[1] - c[0]).collect();
        let send = cuts.windows(2).map(|c| flat.slice(0, c[0]..c[1])).collect::<Result<Vec<_>>>()?;
        let got = self.swap_arrays(call, &send, &vec![parts[self.rank]; self.size], x.dtype())?;
        Ok((sum(got.into_iter().map(Ok))?, parts))
    }
    /// The parts of all ranks, joined in order.
    fn gathered(&self, call: &str, own: &Array, parts: &[usize]) -> Result<Array> {
        join(&self.swap_arrays(call, &vec![own.clone(); self.size], parts, own.dtype())?, own.dtype())
    }
    /// Counts a collective in which a rank sends the share `share` of a buffer to each other rank.
    fn count(&self, x: &Array, share: f64) {
        self.counter.count((x.numel() * x.dtype().size()) as f64 * share * (self.size as f64 - 1.0));
    }
    fn one_nth(&self) -> f64 {
        1.0 / self.size as f64
    }
}

/// A line with its kind and as much of the text as fits.
fn line(kind: u8, text: &str) -> Vec<u8> {
    let mut line = vec![0; LINE];
    line[0] = kind;
    let n = text.len().min(LINE - 1);
    line[1..=n].copy_from_slice(&text.as_bytes()[..n]);
    // A text that does not fit is replaced at its end by a checksum of the whole.
    if text.len() > n {
        let rest = crc32fast::hash(text.as_bytes());
        line[LINE - 8..].copy_from_slice(format!("{rest:08x}").as_bytes());
    }
    line
}

fn named(kind: &str, what: &str, x: &Array) -> String {
    format!("{kind} of {what} {:?} {}", x.shape(), x.dtype())
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array> {
        let call = named("all_reduce", what, x);
        self.agree(&call)?;
        let (own, parts) = self.scattered(&call, x)?;
        self.count(x, 2.0 * self.one_nth());
        self.gathered(&call, &own, &parts)?.reshape(x.shape())
    }
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array> {
        equal_parts("reduce_scatter", x, self.size)?;
        let call = named("reduce_scatter", what, x);
        self.agree(&call)?;
        self.count(x, self.one_nth());
        Ok(self.scattered(&call, x)?.0)
    }
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array> {
        let [n] = part.shape() else {
            return Err(Error::shape("all_gather", format!("{:?} of {what}: a part is [n]", part.shape())));
        };
        let call = named("all_gather", what, part);
        self.agree(&call)?;
        self.count(part, 1.0);
        self.gathered(&call, part, &vec![*n; self.size])
    }
    fn all_gather_parts(&self, what: &str, own: &Array, parts: &[usize]) -> Result<Array> {
        expect_part(own, parts, (self.rank, self.size))?;
        let call = format!("all_gather of {what} in parts {parts:?} {}", own.dtype());
        self.agree(&call)?;
        self.count(own, 1.0);
        self.gathered(&call, own, parts)
    }
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array> {
        if root >= self.size {
            return Err(Error::invalid("broadcast", format!("no rank {root} among {}", self.size)));
        }
        let call = named(&format!("broadcast from {root}"), what, x);
        self.agree(&call)?;
        self.count(x, self.one_nth());
        // The root sends a part to each rank, and each rank sends its part to all others.
        let (n, flat) = (x.numel(), x.reshape(&[x.numel()])?);
        let cut = |r: usize| -> Range<usize> { n * r / self.size..n * (r + 1) / self.size };
        let part = |r: usize| if self.rank == root { cut(r) } else { 0..0 };
        let send = (0..self.size).map(|r| flat.slice(0, part(r))).collect::<Result<Vec<_>>>()?;
        let mut receive = vec![0; self.size];
        receive[root] = cut(self.rank).len();
        let own = self.swap_arrays(&call, &send, &receive, x.dtype())?.swap_remove(root);
        let parts: Vec<usize> = (0..self.size).map(|r| cut(r).len()).collect();
        self.gathered(&call, &own, &parts)?.reshape(x.shape())
    }
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array> {
        let n = equal_parts("all_to_all", x, self.size)?;
        let call = named("all_to_all", what, x);
        self.agree(&call)?;
        self.count(x, self.one_nth());
        let send = (0..self.size).map(|r| x.slice(0, r * n..(r + 1) * n)).collect::<Result<Vec<_>>>()?;
        join(&self.swap_arrays(&call, &send, &vec![n; self.size], x.dtype())?, x.dtype())
    }
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)> {
        expect_rows(x, rows, self.size)?;
        let call = format!("all_to_all_rows of {what} rows of {:?} {}", &x.shape()[1..], x.dtype());
        self.agree(&call)?;
        let counts = rows.iter().map(|&n| Array::from_slice(&[n as i64], &[1])).collect::<Result<Vec<_>>>()?;
        let counts = self.swap_arrays(&call, &counts, &vec![1; self.size], DType::I64)?;
        let counts = counts.iter().map(|c| Ok(c.as_slice::<i64>()?[0] as usize)).collect::<Result<Vec<usize>>>()?;
        let row = x.shape()[1..].iter().product::<usize>();
        let mut at = 0;
        let mut send = Vec::new();
        for n in rows {
            send.push(x.slice(0, at..at + n)?);
            at += n;
        }
        let receive: Vec<usize> = counts.iter().map(|n| n * row).collect();
        let got = self.swap_arrays(&call, &send, &receive, x.dtype())?;
        let mut shape = x.shape().to_vec();
        shape[0] = counts.iter().sum();
        let away = x.shape()[0] - rows[self.rank];
        self.counter.count((away * row * x.dtype().size() + 8 * (self.size - 1)) as f64);
        Ok((join(&got, x.dtype())?.reshape(&shape)?, counts))
    }
    fn barrier(&self) -> Result<()> {
        self.counter.count(0.0);
        self.agree("barrier of all")
    }
    fn split(&self, colour: usize) -> Result<Box<dyn Communicator>> {
        self.agree("split")?;
        let mut comm = null_mut();
        {
            let _turn = self.engine.lock();
            let f = &self.engine.functions;
            // SAFETY: all ranks are in this call, and each gives its colour and its number in the new group.
            let said = unsafe { (f.comm_split)(self.comm, colour as c_int, self.rank as c_int, &mut comm) };
            if said != 0 {
                return Err(Error::device("split", format!("MPI_Comm_split gave {said}")));
            }
        }
        let (rank, size) = Mpi::place(&self.engine, comm)?;
        self.counter.count(8.0 * (self.size as f64 - 1.0));
        let (counter, broken) = (Counter::default(), Mutex::new(None));
        let (engine, patience) = (self.engine.clone(), self.patience);
        Ok(Box::new(Mpi { engine, comm, rank, size, patience, counter, broken, first: false }))
    }
    fn abort(&self, why: &str) {
        let mut broken = self.broken.lock().unwrap_or_else(|e| e.into_inner());
        if broken.is_some() {
            return;
        }
        *broken = Some(why.to_string());
        // A rank at its next collective receives this line; nothing waits until it is received.
        for r in self.others() {
            if let Ok(message) = self.post(r, line(b'x', why), LINES, false) {
                std::mem::forget(message);
            }
        }
    }
    fn traffic(&self) -> Traffic {
        self.counter.traffic()
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if !self.first {
            return;
        }
        let broken = self.broken.lock().unwrap_or_else(|e| e.into_inner()).is_some();
        if broken || std::thread::panicking() {
            // The other ranks may have ended, and MPI would wait for them. The process ends without finalising MPI, which `mpirun` notices.
            return;
        }
        let _turn = self.engine.lock();
        // SAFETY: no message is in progress, and this is the communicator that started MPI.
        unsafe { (self.engine.functions.finalize)() };
    }
}
