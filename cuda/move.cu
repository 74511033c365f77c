#include "prelude.cuh"
// Moving and converting: strided copies, transposes, casts, fills, arange, one-hot rows, checked indices. Widths b1 b2 b4 b8: bytes per
// element, for any dtype of that size. n > 0 throughout.
//
//   copy_{b1,b2,b4,b8} (const T* src, T* dst, i64 n, Strided2 s)       grid ceil(n / 1024), block 256
//       strides [0] for src, [1] for dst: copies from a view, or into one (concat, pad, slice assignment). No overlap.
//   transpose_{b1,b2,b4,b8} (const T* x, T* y, i64 n, i64 r, i64 c)        [n, r, c] to [n, c, r]
//       grid n·ceil(r / 32)·ceil(c / 32), block 256. For views whose unit-stride dimension is not the last: whole memory lines are
//       read and written, where copy would read one line per element.
//   cast_<S>_<D> for S ≠ D of f32 f64 bf16 f16 u32 i64 u8 (const S* x, D* y, i64 n, Strided1 sx)     grid ceil(n / 1024), block 256
//       To floats: to nearest, ties to even; to integers: truncated and saturated, NaN gives 0; i64 converts through f64.
//   fill_{b1,b2,b4,b8} (T* y, i64 n, u64 bits)                             grid ceil(n / 1024), block 256
//   arange_{f32,f64,u32,i64} (T* y, i64 n)                                 grid ceil(n / 1024), block 256
//   one_hot_{b1,b2,b4,b8} (const u32* ids, T* y, i64 rows, i64 n, u64 one) grid ceil(rows·n / 1024), block 256; one: bits of 1
//   ids_{u32,i64} (const T* ids, u32* out, i64 count, i64 below, u64* bad) grid ceil(count / 1024), block 256
//       Indices as u32; an index outside 0..below becomes 0, so that nothing reads out of bounds, and *bad (~0 before) becomes the
//       first position of one. The host reads it when it next waits anyway.


template <class T> DEV void copy_body(const T* src, T* dst, i64 n, const Strided2& s) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided2, 2> at;
    locate<2>(s, i, count, at);
    T v[4];
    load4(src, s, at, 0, count, v);
    if (at.run && s.step[1][s.rank - 1] == 1) return store4(dst, at.at[1][0], count, v);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) dst[at.at[1][k]] = v[k];
}
#define COPY(T, S) \
    KERNEL copy_##S(const T* src, T* dst, i64 n, STRIDED(2) s) { copy_body(src, dst, n, s); }
COPY(u8, b1)
COPY(u16, b2)
COPY(u32, b4)
COPY(u64, b8)

// A 32 × 32 tile in shared memory with 33 elements per row: the elements of a column are in different banks.
#define TRANSPOSE(T, S)                                                                                        \
    KERNEL transpose_##S(const T* x, T* y, i64 n, i64 r, i64 c) {                                              \
        SHARED(T, tile, [32][33]);                                                                             \
        i64 across = cdiv(c, 32), down = cdiv(r, 32), m = (i64)blockIdx.x / (across * down);                   \
        i64 t = (i64)blockIdx.x - m * across * down, r0 = t / across * 32, c0 = t % across * 32;               \
        int lane = threadIdx.x % 32, w = threadIdx.x / 32;                                                     \
        x += m * r * c;                                                                                        \
        y += m * r * c;                                                                                        \
        for (int k = w; k < 32; k += 8)                                                                        \
            if (r0 + k < r && c0 + lane < c) tile[k][lane] = x[(r0 + k) * c + c0 + lane];                      \
        __syncthreads();                                                                                       \
        for (int k = w; k < 32; k += 8)                                                                        \
            if (c0 + k < c && r0 + lane < r) y[(c0 + k) * r + r0 + lane] = tile[lane][k];                      \
    }
TRANSPOSE(u8, b1)
TRANSPOSE(u16, b2)
TRANSPOSE(u32, b4)
TRANSPOSE(u64, b8)

// ---------------------------------------------------------------- casts
// Between f32 and 16-bit floats the conversion goes through f32; everything else through f64, which represents every value except large
// i64.
template <class S, class D> struct Cast {
    static DEVM D f(S v) { return from_f64<D>((double)v); }
};
#define CAST_BY_F32(S, D) \
    template <> struct Cast<S, D> { static DEVM D f(S v) { return from_f32<D>(to_f32(v)); } };
CAST_BY_F32(float, bf16) CAST_BY_F32(float, f16) CAST_BY_F32(bf16, float) CAST_BY_F32(f16, float)
CAST_BY_F32(bf16, f16) CAST_BY_F32(f16, bf16)
template <class D> struct Cast<bf16, D> { static DEVM D f(bf16 v) { return from_f64<D>((double)to_f32(v)); } };
template <class D> struct Cast<f16, D> { static DEVM D f(f16 v) { return from_f64<D>((double)to_f32(v)); } };

template <class S, class D> DEV void cast_body(const S* x, D* y, i64 n, const Strided1& s) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided1, 1> at;
    locate<1>(s, i, count, at);
    S v[4];
    D r[4];
    load4(x, s, at, 0, count, v);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) r[k] = Cast<S, D>::f(v[k]);
    store4(y, i, count, r);
}
#define CAST(S, SN, D, DN) \
    KERNEL cast_##SN##_##DN(const S* x, D* y, i64 n, STRIDED(1) sx) { cast_body(x, y, n, sx); }
CAST(float, f32, double, f64) CAST(float, f32, bf16, bf16) CAST(float, f32, f16, f16)
CAST(float, f32, u32, u32) CAST(float, f32, i64, i64) CAST(float, f32, u8, u8)
CAST(double, f64, float, f32) CAST(double, f64, bf16, bf16) CAST(double, f64, f16, f16)
CAST(double, f64, u32, u32) CAST(double, f64, i64, i64) CAST(double, f64, u8, u8)
CAST(bf16, bf16, float, f32) CAST(bf16, bf16, double, f64) CAST(bf16, bf16, f16, f16)
CAST(bf16, bf16, u32, u32) CAST(bf16, bf16, i64, i64) CAST(bf16, bf16, u8, u8)
CAST(f16, f16, float, f32) CAST(f16, f16, double, f64) CAST(f16, f16, bf16, bf16)
CAST(f16, f16, u32, u32) CAST(f16, f16, i64, i64) CAST(f16, f16, u8, u8)
CAST(u32, u32, float, f32) CAST(u32, u32, double, f64) CAST(u32, u32, bf16, bf16)
CAST(u32, u32, f16, f16) CAST(u32, u32, i64, i64) CAST(u32, u32, u8, u8)
CAST(i64, i64, float, f32) CAST(i64, i64, double, f64) CAST(i64, i64, bf16, bf16)
CAST(i64, i64, f16, f16) CAST(i64, i64, u32, u32) CAST(i64, i64, u8, u8)
CAST(u8, u8, float, f32) CAST(u8, u8, double, f64) CAST(u8, u8, bf16, bf16)
CAST(u8, u8, f16, f16) CAST(u8, u8, u32, u32) CAST(u8, u8, i64, i64)

// ---------------------------------------------------------------- generated arrays
template <class T, class F> DEV void make_body(T* y, i64 n, F f) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    T v[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) v[k] = f(i + k);
    store4(y, i, count, v);
}
#define MAKE(T, S)                                                                                             \
    KERNEL fill_##S(T* y, i64 n, u64 bits) { make_body(y, n, [bits](i64) { return (T)bits; }); }               \
    KERNEL one_hot_##S(const u32* ids, T* y, i64 rows, i64 n, u64 one) {                                       \
        make_body(y, rows * n, [=](i64 i) { return (T)(ids[i / n] == i % n ? one : 0); });                     \
    }
MAKE(u8, b1)
MAKE(u16, b2)
MAKE(u32, b4)
MAKE(u64, b8)
#define ARANGE(T, S) \
    KERNEL arange_##S(T* y, i64 n) { make_body(y, n, [](i64 i) { return (T)(double)i; }); }
ARANGE(float, f32)
ARANGE(double, f64)
ARANGE(u32, u32)
ARANGE(i64, i64)

// The minimum of integers does not depend on the order of the atomics, and none are executed if all indices are valid.
#define IDS(T, S)                                                                                              \
    KERNEL ids_##S(const T* ids, u32* out, i64 count, i64 below, u64* bad) {                                   \
        i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;                                                          \
        for (int k = 0; k < 4; k++, i += 256) {                                                                \
            if (i >= count) return;                                                                            \
            i64 id = (i64)ids[i];                                                                              \
            bool ok = id >= 0 && id < below;                                                                   \
            out[i] = ok ? (u32)id : 0u;                                                                        \
            if (!ok) atomic_min(bad, (u64)i);                                                                  \
        }                                                                                                      \
    }
IDS(u32, u32)
IDS(i64, i64)
