#include "prelude.cuh"
// Rotary position embedding of x [B, T, H, D] (unit stride along D, other strides free: a slice of a fused projection is read in place)
// into a contiguous y. The gradient of a rotation is the inverse rotation.
//
//   rotary_{f32,f64,bf16,f16} (const T* x, const acc_t<T>* cos, const acc_t<T>* sin, T* y, Rotary r)
//       grid ceil(B·T·H·D/2 / 256), block 256, one pair per thread. cos, sin [positions, D/2].
//       Rotary, i64 each: batch, time, heads, turned (the first `turned` heads are rotated, the others copied), half = D/2, step_b,
//       step_t, step_h (elements), offset (position of row 0);
//       then i32 interleaved (pairs 2i, 2i + 1 instead of i, i + D/2), i32 inverse.
//
// Bytes: x is read once, y is written once, and the table is read from the cache (H pairs share an entry).

struct Rotary {
    i64 batch, time, heads, turned, half, step_b, step_t, step_h, offset;
    i32 interleaved, inverse;
};
template <class T>
DEV void rotary_body(const T* x, const acc_t<T>* cos, const acc_t<T>* sin, T* y, const Rotary& r) {
    typedef acc_t<T> A;
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= r.batch * r.time * r.heads * r.half) return;
    i64 row = i / r.half, pair = i - row * r.half, bt = row / r.heads, h = row - bt * r.heads, b = bt / r.time;
    i64 t = bt - b * r.time, entry = (r.offset + t) * r.half + pair;
    A c = cos[entry], s = r.inverse ? -sin[entry] : sin[entry];
    i64 first = r.interleaved ? 2 * pair : pair, second = r.interleaved ? first + 1 : pair + r.half;
    x += b * r.step_b + t * r.step_t + h * r.step_h;
    y += row * 2 * r.half;
    if (h >= r.turned) {
        y[first] = x[first];
        y[second] = x[second];
        return;
    }
    A u = to_acc(x[first]), v = to_acc(x[second]);
    y[first] = from_acc<T>(u * c - v * s);
    y[second] = from_acc<T>(v * c + u * s);
}
#define INSTANCES(T, S)                                                                                        \
    KERNEL rotary_##S(const T* x, const acc_t<T>* cos, const acc_t<T>* sin, T* y,                              \
                      const __grid_constant__ Rotary r) {                                                      \
        rotary_body(x, cos, sin, y, r);                                                                        \
    }
FOR_FLOATS(INSTANCES)
