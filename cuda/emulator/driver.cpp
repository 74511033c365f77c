// The part of libcuda that the crate uses, on top of the emulator. Built into a shared object with the SONAME libcuda.so:
// a program that opens it by path first gets it for every later dlopen("libcuda.so").
//
// Streams are queues. Seed 0 runs each operation as it is queued, in program order. Any other seed runs a queue only
// when somebody waits for it: an operation that should have waited for an event of another stream then runs before that
// event (odd seeds: only what is waited for runs; even seeds: the other queues run first, as far as they can). What the
// program promises, such as pinned memory that stays as it is until a copy has run, is taken at its word.
#include "cuemu_api.h"
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int
typedef uint64_t Ptr;
typedef std::chrono::steady_clock Clock;
// As in cuemu.h; the runtime hands out pointers to these.
struct cuemu_Kernel { const char* name; const void* call; int nargs; const uint16_t* arg_size; const char* sig; const char* file; int max_threads; };

namespace {
enum { OK = 0, INVALID = 1, NOMEM = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };

// One recording of an event: waiting for it means this one, whatever is recorded later.
struct Mark { bool done = false; Clock::time_point at; struct Stream* stream = nullptr; std::vector<uint64_t> clock; };
struct Event { std::shared_ptr<Mark> mark; };
// Vector clocks over streams: of each stream, how many of its operations are over for whoever has the clock. Operations
// get theirs as they are queued: after what their stream did, what it waited for and what the host has waited for.
typedef std::vector<uint64_t> Time;
struct When { int stream = 0; Time time; std::string what; };
struct Op { std::function<int(const When&)> run; std::shared_ptr<Mark> wait; When when; };
struct Stream { int number = 0; Time time; std::deque<Op> queue; bool running = false; };
// A range of a buffer that an operation has read or written.
struct Past { uint64_t lo, hi; bool write; int stream; uint64_t tick; std::string what; };
struct History { uint64_t id; std::vector<Past> past; };
struct Task { std::function<int(const When&)> run; std::string what; const char* stat; };
struct Graph { std::vector<Task> ops; };
struct Func { const cuemu_Kernel* kernel; int most_dynamic; };

std::recursive_mutex g_mu; // the driver is one lock: it is for tests
struct Module { const cuemu_Kernel* table; }; // null: the kernels that were compiled in
std::map<const cuemu_Kernel*, Func> g_funcs;
std::map<char*, size_t> g_pinned;
std::vector<Stream*> g_streams;
Stream g_default;
Graph* g_capture = nullptr;
Stream* g_capture_stream = nullptr;
Time g_host; // what the host has waited for
std::map<uint64_t, History> g_history; // by start of the buffer
int g_sticky = 0; // as on a device, a faulted context stays unusable until it is reset
std::string g_report;
std::map<std::string, uint64_t> g_stats;
int g_context_object;
Module g_built_in = {nullptr};
thread_local void* t_context = nullptr;

typedef std::lock_guard<std::recursive_mutex> Lock;
Stream* stream(void* s) { return s ? (Stream*)s : &g_default; }

int fail(int code, const std::string& text) {
    g_report = text;
    fprintf(stderr, "emulator: %s\n", text.c_str());
    if (code == 700 || code == 719) g_sticky = code;
    return code;
}

// ---- missing waits
uint64_t tick(const Time& t, int stream) { return stream < (int)t.size() ? t[stream] : 0; }
void join(Time& a, const Time& b) {
    if (a.size() < b.size()) a.resize(b.size());
    for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}
// The next moment of a stream.
Time advance(Stream* s) {
    join(s->time, g_host);
    if ((int)s->time.size() <= s->number) s->time.resize(s->number + 1);
    s->time[s->number]++;
    return s->time;
}

// Operations run in an order that keeps to every wait, so that an earlier access is either known to the later one's
// clock or not ordered with it at all.
int touch(const When& w, uint64_t p, uint64_t lo, uint64_t hi, bool write) {
    if (lo >= hi || cuemu_get_config("check") < 2) return OK;
    char text[300];
    uint64_t id, start = cuemu_buffer_of((void*)p, &id, text, sizeof text);
    if (!start) return OK;
    History& h = g_history[start];
    if (h.id != id) h = {id, {}};
    bool idle = g_default.queue.empty(); // else what was queued before the host waited may still come
    for (Stream* s : g_streams) idle = idle && s->queue.empty();
    std::vector<Past> keep;
    for (auto& e : h.past) {
        bool before = e.stream == w.stream || e.tick <= tick(w.time, e.stream), apart = e.hi <= lo || hi <= e.lo;
        if (!apart && !before && (write || e.write)) {
            char part[200];
            snprintf(part, sizeof part, "bytes %llu to %llu", (unsigned long long)(std::max(lo, e.lo) - start), (unsigned long long)(std::min(hi, e.hi) - start));
            return fail(719, "missing event wait: " + w.what + " on stream " + std::to_string(w.stream) + (write ? " writes " : " reads ") + part + " of " + text + ", which " + e.what +
                                 " on stream " + std::to_string(e.stream) + (e.write ? " writes" : " reads") + ", and no event or synchronisation orders the two");
        }
        if (idle && before && e.tick <= tick(g_host, e.stream)) continue; // everything to come is after it
        if (!apart && (write || (e.stream == w.stream && !e.write))) { // what this access stands for from now on
            if (e.lo < lo) { keep.push_back(e); keep.back().hi = lo; }
            if (e.hi > hi) { keep.push_back(e); keep.back().lo = hi; }
            continue;
        }
        keep.push_back(std::move(e));
    }
    keep.push_back({lo, hi, write, w.stream, tick(w.time, w.stream), w.what});
    h.past = std::move(keep);
    return OK;
}
int reads(const When& w, uint64_t p, size_t n) { return touch(w, p, p, p + n, false); }
int writes(const When& w, uint64_t p, size_t n) { return touch(w, p, p, p + n, true); }

// Runs a queue until it is empty or its `until` is done; what it waits for runs first.
int drain(Stream* s, const Mark* until = nullptr) {
    if (s->running) return OK; // a cycle of waits: the one below goes on
    s->running = true;
    int r = OK;
    while (!s->queue.empty() && !(until && until->done)) {
        Op op = std::move(s->queue.front());
        s->queue.pop_front();
        if (op.wait && !op.wait->done && op.wait->stream && op.wait->stream != s) {
            s->running = false;
            int w = drain(op.wait->stream, op.wait.get());
            s->running = true;
            if (w && !r) r = w;
        }
        if (op.run) {
            int e = g_sticky ? g_sticky : op.run(op.when);
            if (e && !r) r = e;
        }
    }
    s->running = false;
    return r;
}

// Somebody waits for `s`.
int reach(Stream* s, const Mark* until = nullptr) {
    int64_t seed = cuemu_get_config("seed");
    if (seed && seed % 2 == 0)
        for (Stream* other : g_streams)
            if (other != s) drain(other);
    int r = drain(s, until);
    return g_sticky ? g_sticky : r;
}

int reach_all() {
    int r = drain(&g_default);
    for (size_t i = 0; i < g_streams.size(); i++) if (int e = drain(g_streams[i])) r = r ? r : e;
    return g_sticky ? g_sticky : r;
}

// The host has waited for all of a stream.
int reached(Stream* s, int r) {
    if (!r) join(g_host, s->time);
    return r;
}
int everything_reached(int r) {
    if (r) return r;
    join(g_host, g_default.time);
    for (Stream* s : g_streams) join(g_host, s->time);
    return r;
}

int put(Stream* s, Task task) {
    if (g_sticky) return g_sticky;
    if (g_capture && s == g_capture_stream) { g_capture->ops.push_back(std::move(task)); return OK; }
    if (task.stat) g_stats[task.stat]++;
    s->queue.push_back({std::move(task.run), nullptr, {s->number, advance(s), std::move(task.what)}});
    return cuemu_get_config("seed") == 0 ? drain(s) : OK;
}

int inside(const char* what, Ptr p, size_t n) {
    if (n == 0 || cuemu_in_alloc((void*)p, n)) return OK;
    char text[200];
    snprintf(text, sizeof text, "%s of %zu bytes at %#llx is not inside one live device buffer", what, n, (unsigned long long)p);
    return fail(700, text);
}

bool pinned(const void* p, size_t n) {
    auto it = g_pinned.upper_bound((char*)p);
    if (it == g_pinned.begin()) return false;
    --it;
    return (char*)p + n <= it->first + it->second;
}
} // namespace

// Work of a stand-in library on a stream, in order with everything else, with what it reads and writes.
int prismgrad_emu_queue(void* s, const char* what, std::function<int()> run, const std::vector<std::pair<uint64_t, size_t>>& in, std::pair<uint64_t, size_t> out) {
    Lock l(g_mu);
    auto ranges = in;
    ranges.push_back(out);
    for (auto& r : ranges) if (int e = inside(what, r.first, r.second)) return e;
    auto task = [=](const When& w) {
        for (auto& r : in) if (int e = reads(w, r.first, r.second)) return e;
        if (int e = writes(w, out.first, out.second)) return e;
        return run();
    };
    return put(stream(s), {task, what, "launches"});
}

// ---- for tests
extern "C" __attribute__((visibility("default"))) const char* prismgrad_emu_report() { return g_report.c_str(); }
extern "C" __attribute__((visibility("default"))) uint64_t prismgrad_emu_stat(const char* key) { Lock l(g_mu); return g_stats[key]; }
static int64_t g_allocations_left = -1; // as many allocations succeed; all do where it is negative
extern "C" __attribute__((visibility("default"))) int prismgrad_emu_config(const char* key, int64_t value) {
    Lock l(g_mu);
    if (std::string(key) == "allocations_left") { g_allocations_left = value; return OK; }
    reach_all(); // an order of execution holds from here on
    return cuemu_config(key, value);
}

// ---- start
API cuInit(unsigned) {
    for (auto [name, key] : {std::pair{"PRISMGRAD_EMU_SEED", "seed"}, {"PRISMGRAD_EMU_CHECK", "check"}, {"PRISMGRAD_EMU_PREEMPT", "preempt"}})
        if (const char* s = getenv(name)) cuemu_config(key, atoll(s));
    return OK;
}
API cuDriverGetVersion(int* v) { *v = 13000; return OK; }
API cuDeviceGetCount(int* n) { *n = 1; return OK; }
API cuDeviceGet(int* d, int i) { if (i) return INVALID_DEVICE; *d = 0; return OK; }
API cuDeviceGetName(char* b, int n, int) { snprintf(b, n, "Prismgrad emulated CUDA device"); return OK; }
API cuDeviceTotalMem_v2(size_t* b, int) { *b = size_t(8) << 30; return OK; }
API cuDeviceGetAttribute(int* v, int a, int) {
    switch (a) {
        case 1: case 2: *v = 1024; break;    // threads a block; block x
        case 3: *v = 1024; break;            // block y
        case 4: *v = 64; break;              // block z
        case 5: *v = 0x7fffffff; break;      // grid x
        case 6: case 7: *v = 65535; break;   // grid y, z
        case 8: *v = 48 * 1024; break;       // shared memory a block
        case 10: *v = 32; break;             // warp size
        case 12: *v = 65536; break;          // registers a block
        case 13: *v = 1000000; break;        // clock kHz
        case 16: *v = 4; break;              // multiprocessors
        case 39: *v = 2048; break;           // threads a multiprocessor
        case 75: *v = 9; break;              // compute capability
        case 76: *v = 0; break;
        case 81: *v = 228 * 1024; break;     // shared memory a multiprocessor
        case 95: *v = 1; break;              // cooperative launch
        case 97: *v = 227 * 1024; break;     // shared memory a block may ask for
        case 115: *v = 1; break;             // memory pools
        default: *v = 0;
    }
    return OK;
}
API cuDevicePrimaryCtxRetain(void** c, int) { *c = &g_context_object; return OK; }
API cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API cuDevicePrimaryCtxReset_v2(int) {
    Lock l(g_mu);
    for (Stream* s : g_streams) s->queue.clear();
    g_default.queue.clear();
    g_sticky = 0;
    g_history.clear();
    return OK;
}
API cuCtxGetCurrent(void** c) { *c = t_context; return OK; }
API cuCtxSetCurrent(void* c) { t_context = c; return OK; }
API cuCtxSynchronize() { Lock l(g_mu); g_stats["synchronisations"]++; return everything_reached(reach_all()); }
API cuMemGetInfo_v2(size_t* f, size_t* t) { *f = size_t(7) << 30; *t = size_t(8) << 30; return OK; }

// ---- streams and events
API cuStreamCreateWithPriority(void** s, unsigned, int) { Lock l(g_mu); auto* n = new Stream; g_streams.push_back(n); n->number = (int)g_streams.size(); *s = n; return OK; }
API cuStreamCreate(void** s, unsigned f) { return cuStreamCreateWithPriority(s, f, 0); }
API cuStreamDestroy_v2(void* s) { Lock l(g_mu); return drain(stream(s)); } // kept: marks point at it
API cuStreamSynchronize(void* s) {
    Lock l(g_mu);
    if (g_capture && stream(s) == g_capture_stream) return CAPTURE_UNSUPPORTED;
    g_stats["synchronisations"]++;
    return reached(stream(s), reach(stream(s)));
}
// Asking often enough makes it happen, as time would.
static bool asked_often() { static int asked = 0; return ++asked % 8 == 0; }
API cuStreamQuery(void* s) {
    Lock l(g_mu);
    if (!stream(s)->queue.empty() && asked_often()) reach(stream(s));
    return g_sticky ? g_sticky : stream(s)->queue.empty() ? reached(stream(s), OK) : NOT_READY;
}
API cuStreamWaitEvent(void* s, void* e, unsigned) {
    Lock l(g_mu);
    auto mark = ((Event*)e)->mark;
    if (!mark || (g_capture && stream(s) == g_capture_stream)) return OK;
    join(stream(s)->time, mark->clock);
    if (mark->done) return OK;
    stream(s)->queue.push_back({nullptr, mark, {}});
    return OK;
}
API cuStreamIsCapturing(void* s, int* st) { *st = g_capture && stream(s) == g_capture_stream; return OK; }
API cuEventCreate(void** e, unsigned) { *e = new Event(); return OK; }
API cuEventDestroy_v2(void* e) { Lock l(g_mu); delete (Event*)e; return OK; }
API cuEventRecord(void* e, void* s) {
    Lock l(g_mu);
    auto mark = std::make_shared<Mark>();
    mark->stream = stream(s);
    ((Event*)e)->mark = mark;
    mark->clock = stream(s)->time;
    join(mark->clock, g_host);
    return put(stream(s), {[mark](const When&) { mark->done = true; mark->at = Clock::now(); return OK; }, "event", nullptr});
}
API cuEventSynchronize(void* e) {
    Lock l(g_mu);
    auto mark = ((Event*)e)->mark;
    g_stats["synchronisations"]++;
    int r = !mark || mark->done ? g_sticky : reach(mark->stream, mark.get());
    if (mark && !r) join(g_host, mark->clock);
    return r;
}
API cuEventQuery(void* e) {
    Lock l(g_mu);
    auto mark = ((Event*)e)->mark;
    if (mark && !mark->done && asked_often()) reach(mark->stream, mark.get());
    if (mark && mark->done) join(g_host, mark->clock);
    return g_sticky ? g_sticky : !mark || mark->done ? OK : NOT_READY;
}
API cuEventElapsedTime_v2(float* ms, void* a, void* b) {
    Lock l(g_mu);
    auto x = ((Event*)a)->mark, y = ((Event*)b)->mark;
    if (!x || !y) return INVALID;
    if (!x->done || !y->done) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(y->at - x->at).count();
    return OK;
}
API cuEventElapsedTime(float* ms, void* a, void* b) { return cuEventElapsedTime_v2(ms, a, b); }

// ---- graphs: what was put on the capturing stream, to be put again
API cuStreamBeginCapture_v2(void* s, int) { Lock l(g_mu); if (g_capture) return CAPTURE_UNSUPPORTED; g_capture = new Graph; g_capture_stream = stream(s); return OK; }
API cuStreamEndCapture(void*, void** g) { Lock l(g_mu); if (!g_capture) return CAPTURE_INVALIDATED; *g = g_capture; g_capture = nullptr; g_capture_stream = nullptr; return OK; }
API cuGraphInstantiateWithFlags(void** e, void* g, unsigned long long) { *e = new Graph(*(Graph*)g); return OK; }
API cuGraphDestroy(void* g) { delete (Graph*)g; return OK; }
API cuGraphExecDestroy(void* g) { Lock l(g_mu); g_stats["synchronisations"]++; everything_reached(reach_all()); delete (Graph*)g; return OK; }
API cuGraphLaunch(void* g, void* s) {
    Lock l(g_mu);
    for (auto& op : ((Graph*)g)->ops) if (int r = put(stream(s), op)) return r;
    return OK;
}

// ---- memory
static int allocate(Ptr* p, size_t n) {
    Lock l(g_mu);
    if (g_capture) return CAPTURE_UNSUPPORTED;
    if (g_sticky) return g_sticky;
    if (g_allocations_left == 0) return NOMEM;
    if (g_allocations_left > 0) g_allocations_left--;
    g_stats["allocations"]++;
    void* q;
    int r = cuemu_malloc(n, &q);
    *p = (Ptr)q;
    return r;
}
static int release(Ptr p) {
    g_history.erase(p);
    int r = cuemu_free((void*)p);
    return r ? fail(r, cuemu_last_error()) : OK;
}
API cuMemAlloc_v2(Ptr* p, size_t n) { return allocate(p, n); }
API cuMemAllocAsync(Ptr* p, size_t n, void*) { return allocate(p, n); }
API cuMemFree_v2(Ptr p) { Lock l(g_mu); g_stats["synchronisations"]++; everything_reached(reach_all()); return release(p); } // the driver waits for the device here
API cuMemFreeAsync(Ptr p, void* s) {
    Lock l(g_mu);
    return put(stream(s), {[p](const When& w) { int r = touch(w, p, p, ~0ull, true); return r ? r : release(p); }, "free", nullptr});
}
API cuMemHostAlloc(void** p, size_t n, unsigned) { Lock l(g_mu); *p = malloc(n ? n : 1); g_pinned[(char*)*p] = n; return *p ? OK : NOMEM; }
API cuMemAllocHost_v2(void** p, size_t n) { return cuMemHostAlloc(p, n, 0); }
API cuMemFreeHost(void* p) { Lock l(g_mu); g_stats["synchronisations"]++; everything_reached(reach_all()); g_pinned.erase((char*)p); free(p); return OK; }
static std::string of(const char* what, size_t n) { return std::string(what) + " of " + std::to_string(n) + " bytes"; }
API cuMemcpyHtoDAsync_v2(Ptr d, const void* s, size_t n, void* st) {
    Lock l(g_mu);
    std::shared_ptr<std::vector<char>> staged;
    if (!pinned(s, n)) staged = std::make_shared<std::vector<char>>((const char*)s, (const char*)s + n);
    return put(stream(st), {[=](const When& w) {
        if (int r = inside("copy to the device", d, n)) return r;
        if (int r = writes(w, d, n)) return r;
        memcpy((void*)d, staged ? staged->data() : s, n);
        return (int)OK;
    }, of("copy to the device", n), "uploads"});
}
API cuMemcpyDtoHAsync_v2(void* d, Ptr s, size_t n, void* st) {
    Lock l(g_mu);
    if (g_capture && stream(st) == g_capture_stream && !pinned(d, n)) return CAPTURE_UNSUPPORTED;
    int r = put(stream(st), {[=](const When& w) {
        if (int r = inside("copy from the device", s, n)) return r;
        if (int r = reads(w, s, n)) return r;
        memcpy(d, (void*)s, n);
        return (int)OK;
    }, of("copy from the device", n), "downloads"});
    if (r || pinned(d, n)) return r;
    g_stats["synchronisations"]++;
    return reached(stream(st), reach(stream(st)));
}
API cuMemcpyDtoDAsync_v2(Ptr d, Ptr s, size_t n, void* st) {
    Lock l(g_mu);
    return put(stream(st), {[=](const When& w) {
        for (Ptr p : {d, s}) if (int r = inside("copy", p, n)) return r;
        if (int r = reads(w, s, n)) return r;
        if (int r = writes(w, d, n)) return r;
        memmove((void*)d, (void*)s, n);
        return (int)OK;
    }, of("copy", n), nullptr});
}
API cuMemsetD8Async(Ptr d, unsigned char v, size_t n, void* st) {
    Lock l(g_mu);
    return put(stream(st), {[=](const When& w) {
        if (int r = inside("memset", d, n)) return r;
        if (int r = writes(w, d, n)) return r;
        memset((void*)d, v, n);
        return (int)OK;
    }, of("memset", n), nullptr});
}
API cuMemsetD8_v2(Ptr d, unsigned char v, size_t n) { return cuMemsetD8Async(d, v, n, nullptr); }

// ---- modules: kernels come from the registry that was compiled in, whatever the image; but an image "cuemu:PATH" is a shared object
// with the kernels of one text, compiled at run time
API cuModuleLoadData(void** m, const void* image) {
    Lock l(g_mu);
    *m = &g_built_in;
    if (strncmp((const char*)image, "cuemu:", 6)) return OK;
    void* library = dlopen((const char*)image + 6, RTLD_NOW | RTLD_LOCAL);
    if (!library) return fail(INVALID, dlerror());
    auto* table = (const cuemu_Kernel*)dlsym(library, "cuemu_tab_custom");
    if (!table) return fail(INVALID, dlerror());
    *m = new Module{table};
    cuemu_images_changed();
    return OK;
}
API cuModuleUnload(void*) { return OK; }
API cuModuleGetFunction(void** f, void* m, const char* name) {
    Lock l(g_mu);
    auto* k = ((Module*)m)->table;
    if (!k) k = cuemu_find(name);
    else while (k->name && strcmp(k->name, name)) k++;
    if (!k || !k->name) return NOT_FOUND;
    auto& e = g_funcs[k];
    if (!e.kernel) e = {k, 48 * 1024};
    *f = &e;
    return OK;
}
API cuFuncGetParamInfo(void* f, size_t i, size_t* offset, size_t* size) {
    auto* k = ((Func*)f)->kernel;
    if (i >= (size_t)k->nargs) return INVALID;
    *size = k->arg_size[i];
    if (offset) *offset = 0;
    return OK;
}
API cuFuncSetAttribute(void* f, int a, int v) { if (a == 8) ((Func*)f)->most_dynamic = v; return OK; }
API cuFuncGetAttribute(int* v, int a, void*) { *v = a == 0 ? 1024 : 0; return OK; }
static int launch(void* f, std::vector<uint32_t> dims, unsigned dynamic, void* st, void** args, int flags) {
    Lock l(g_mu);
    auto* func = (Func*)f;
    auto* k = func->kernel;
    if ((int)dynamic > func->most_dynamic)
        return fail(INVALID, std::string(k->name) + ": " + std::to_string(dynamic) + " bytes of dynamic shared memory without MAX_DYNAMIC_SHARED_SIZE_BYTES set");
    auto values = std::make_shared<std::vector<std::vector<char>>>();
    for (int i = 0; i < k->nargs; i++) values->emplace_back((char*)args[i], (char*)args[i] + k->arg_size[i]);
    return put(stream(st), {[=](const When& w) {
        std::vector<void*> a;
        for (auto& v : *values) a.push_back(v.data());
        int r = cuemu_launch(k, dims.data(), dims.data() + 3, dynamic, a.data(), flags);
        if (r) return fail(r, cuemu_last_error());
        cuemu_Touch t;
        for (int i = 0; cuemu_touched(i, &t); i++) {
            if (int r = touch(w, (Ptr)t.buffer, t.read_lo, t.read_hi, false)) return r;
            if (int r = touch(w, (Ptr)t.buffer, t.write_lo, t.write_hi, true)) return r;
        }
        return (int)OK;
    }, std::string("kernel ") + k->name, "launches"});
}
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned dynamic, void* st, void** args, void**) {
    return launch(f, {gx, gy, gz, bx, by, bz}, dynamic, st, args, 0);
}
API cuLaunchCooperativeKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned dynamic, void* st, void** args) {
    return launch(f, {gx, gy, gz, bx, by, bz}, dynamic, st, args, CUEMU_COOPERATIVE);
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int, size_t) { *n = 2; return OK; }
API cuGetErrorName(int e, const char** s) {
    *s = e == 1 ? "CUDA_ERROR_INVALID_VALUE" : e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : e == 101 ? "CUDA_ERROR_INVALID_DEVICE" : e == 500 ? "CUDA_ERROR_NOT_FOUND" : e == 600 ? "CUDA_ERROR_NOT_READY" : e == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : e == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : e == 900 ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : "CUDA_ERROR";
    return OK;
}
API cuGetErrorString(int e, const char** s) {
    if (e == 700 || e == 719) { *s = g_report.c_str(); return OK; }
    return cuGetErrorName(e, s);
}
