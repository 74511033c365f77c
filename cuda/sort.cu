#include "prelude.cuh"
// Sorting: rows by value, and ids with their original positions. Block 256, sizes > 0, stable, no float atomics.
//
// ROWS (sort, topk): tiles are sorted in shared memory, then sorted runs are merged pairwise, then the first k of each row are taken. NaN
// is last in both directions; equal values keep their order.
//   sort_tile_{f32,f64,bf16,f16} (const T* x, u64* keys, u32* index, i64 rows, i64 cols, i32 descending)
//       grid rows·ceil(cols / 2048)
//   sort_merge (const u64* keys, const u32* index, u64* keys2, u32* index2, i64 rows, i64 cols, i64 run)
//       grid ceil(rows·cols / 256); for run = 2048, 4096, … while run < cols, buffers exchanged each time
//   sort_pick_{b2,b4,b8} (const T* x, const u32* sorted, T* values, u32* index, i64 rows, i64 cols, i64 k)
//       grid ceil(rows·k / 256)
// IDS (embedding backward, grouping rows by owner): a radix sort, 8 bits per pass, with ceil(bits of the largest id / 8) passes.
// Per pass, with blocks = ceil(n / 1024) and counts u32 [256·blocks] (n < 2^32):
//   radix_count (const u32* ids, u32* counts, i64 n, i32 shift)                               grid blocks; shift 0, 8, 16, 24
//   scan_u32    (u32* counts, i64 n)                                                          grid 1; exclusive sum in place
//   radix_move  (const u32* ids, const u32* order, u32* ids2, u32* order2, const u32* counts, i64 n, i32 shift)  grid blocks
//       order null (first pass): positions 0 … n − 1. After the last pass ids2 is ascending and order2 holds the positions, ascending
//       among equal ids.
//   run_starts  (const u32* ids, i64* starts, i64 n, i64 keys)                                grid ceil((keys + 1) / 256)
//       of sorted ids: starts[v] is the first position with id ≥ v, for v in 0 ..= keys: offsets of the ids' runs.

// ---------------------------------------------------------------- rows
// Keys as unsigned integers in the requested order: −0 equals 0, and NaN is the largest.
DEV u64 key_of(float v, bool descending) {
    if (is_nan(v)) return 0xffffffffu;
    u32 u = bits_of(v == 0.f ? 0.f : v);
    u = u >> 31 ? ~u : u | 0x80000000u;
    return descending ? (u32)~u : u;
}
DEV u64 key_of(double v, bool descending) {
    if (is_nan(v)) return ~0ull;
    u64 u = bits_of(v == 0. ? 0. : v);
    u = u >> 63 ? ~u : u | 0x8000000000000000ull;
    return descending ? ~u : u;
}
// Bitonic network over 2048 (key, index) pairs, which are all different, so that the result is stable. Padding sorts last: its index is
// larger than any other. 24 KiB, 66 steps.
template <class T> DEV void sort_tile_body(const T* x, u64* keys, u32* index, i64 rows, i64 cols, int descending) {
    SHARED(u64, k, [2048]);
    SHARED(u32, at, [2048]);
    i64 tiles = cdiv(cols, 2048), row = blockIdx.x / tiles, c0 = (blockIdx.x - row * tiles) * 2048;
    int n = (int)min64(cols - c0, 2048), size = 2;
    while (size < n) size *= 2;
    x += row * cols + c0;
    for (int i = threadIdx.x; i < size; i += 256) {
        k[i] = i < n ? key_of(to_acc(x[i]), descending) : ~0ull;
        at[i] = i < n ? (u32)(c0 + i) : 0xffffffffu;
    }
    for (int span = 2; span <= size; span *= 2)
        for (int step = span / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int p = threadIdx.x; p < size / 2; p += 256) {
                int i = (p / step) * 2 * step + p % step, j = i + step;
                bool up = (i & span) == 0;
                bool after = k[i] > k[j] || (k[i] == k[j] && at[i] > at[j]);
                if (after == up) {
                    u64 tk = k[i];
                    u32 ta = at[i];
                    k[i] = k[j];
                    at[i] = at[j];
                    k[j] = tk;
                    at[j] = ta;
                }
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += 256) {
        keys[row * cols + c0 + i] = k[i];
        index[row * cols + c0 + i] = at[i];
    }
}
#define TILE(T, S)                                                                                             \
    KERNEL sort_tile_##S(const T* x, u64* keys, u32* index, i64 rows, i64 cols, i32 descending) {              \
        sort_tile_body(x, keys, index, rows, cols, descending);                                                \
    }
FOR_FLOATS(TILE)

// Each element finds its position by counting the elements of the neighbouring run that come before it: log(run) reads, and no element
// waits for another. Among equal keys those of the left run come first.
KERNEL sort_merge(const u64* keys, const u32* index, u64* keys2, u32* index2, i64 rows, i64 cols, i64 run) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= rows * cols) return;
    i64 row = i / cols, c = i - row * cols, mine = c / run, pair = mine / 2 * 2 * run;
    bool left = mine % 2 == 0;
    i64 lo = left ? pair + run : pair, hi = min64(lo + run, cols);
    const u64* k = keys + row * cols;
    u64 key = k[c];
    i64 a = min64(lo, cols), b = hi;
    while (a < b) {
        i64 m = (a + b) / 2;
        if (left ? k[m] < key : k[m] <= key) a = m + 1;
        else b = m;
    }
    i64 place = pair + (c - mine * run) + (a - min64(lo, cols));
    keys2[row * cols + place] = key;
    index2[row * cols + place] = index[i];
}
#define PICK(T, S)                                                                                             \
    KERNEL sort_pick_##S(const T* x, const u32* sorted, T* values, u32* index, i64 rows, i64 cols, i64 k) {    \
        i64 i = (i64)blockIdx.x * 256 + threadIdx.x;                                                           \
        if (i >= rows * k) return;                                                                             \
        i64 row = i / k;                                                                                       \
        u32 at = sorted[row * cols + i - row * k];                                                             \
        values[i] = x[row * cols + at];                                                                        \
        index[i] = at;                                                                                         \
    }
PICK(u16, b2)
PICK(u32, b4)
PICK(u64, b8)

// ---------------------------------------------------------------- ids
// A warp processes 128 consecutive ids of a block's 1024, in 4 rounds of 32: positions of a digit are ascending with (warp, round, lane).
// It only counts integers, so that atomics on shared counters do not change the result.
KERNEL radix_count(const u32* ids, u32* counts, i64 n, i32 shift) {
    SHARED(u32, c, [256]);
    c[threadIdx.x] = 0;
    __syncthreads();
    i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;
    for (int k = 0; k < 4; k++, i += 256)
        if (i < n) atomicAdd(&c[ids[i] >> shift & 255], 1u);
    __syncthreads();
    counts[(i64)threadIdx.x * gridDim.x + blockIdx.x] = c[threadIdx.x];
}
// One block scans 256·blocks counters, 2048 per round.
KERNEL scan_u32(u32* x, i64 n) {
    SHARED(u32, sums, [8]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 carry = 0;
    for (i64 i0 = 0; i0 < n; i0 += 2048) {
        i64 i = i0 + threadIdx.x * 8;
        u32 v[8], s = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            v[k] = i + k < n ? x[i + k] : 0u;
            s += v[k];
        }
        u32 up = s;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            u32 t = __shfl_up_sync(FULL_MASK, up, o);
            if (lane >= o) up += t;
        }
        __syncthreads();
        if (lane == 31) sums[warp] = up;
        __syncthreads();
        u32 at = carry + up - s;
        for (int w = 0; w < 8; w++) {
            if (w < warp) at += sums[w];
            carry += sums[w];
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (i + k < n) x[i + k] = at;
            at += v[k];
        }
    }
}
KERNEL radix_move(const u32* ids, const u32* order, u32* ids2, u32* order2, const u32* counts, i64 n, i32 shift) {
    SHARED(u32, seen, [8][256]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int w = 0; w < 8; w++) seen[w][threadIdx.x] = 0;
    __syncthreads();
    u32 id[4], rank[4];
    i64 first = (i64)blockIdx.x * 1024 + warp * 128 + lane;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        i64 i = first + k * 32;
        id[k] = i < n ? ids[i] : 0u;
        // Lanes past the end form a group of their own, which is not counted.
        u32 digit = i < n ? id[k] >> shift & 255 : 256u, same = __match_any_sync(FULL_MASK, digit);
        u32 ahead = __popc(same & ((1u << lane) - 1));
        rank[k] = i < n ? seen[warp][digit] + ahead : 0u;
        __syncwarp();
        if (i < n && ahead == 0) seen[warp][digit] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    // Start of each warp's ids of a digit: after those of the earlier warps, which follow those of the earlier blocks.
    u32 at = counts[(i64)threadIdx.x * gridDim.x + blockIdx.x];
    for (int w = 0; w < 8; w++) {
        u32 c = seen[w][threadIdx.x];
        seen[w][threadIdx.x] = at;
        at += c;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        i64 i = first + k * 32;
        if (i >= n) continue;
        u32 to = seen[warp][id[k] >> shift & 255] + rank[k];
        ids2[to] = id[k];
        order2[to] = order ? order[i] : (u32)i;
    }
}
KERNEL run_starts(const u32* ids, i64* starts, i64 n, i64 keys) {
    i64 v = (i64)blockIdx.x * 256 + threadIdx.x;
    if (v > keys) return;
    i64 a = 0, b = n;
    while (a < b) {
        i64 m = (a + b) / 2;
        if ((i64)ids[m] < v) a = m + 1;
        else b = m;
    }
    starts[v] = a;
}
