#include "prelude.cuh"
// Windows of images: unfolding into rows for convolutions, folding back, pooling. Arrays are contiguous [n, channels, H, W]; sequences have
// height 1. Grid ceil(elements of the result / 256), block 256, one element per thread; all sizes > 0.
//
//   unfold_{b2,b4,b8} (const T* x, T* y, i64 n, i64 channels, Window w)           y [n, positions, channels·kh·kw]
//   fold_{f32,f64,bf16,f16} (const T* rows, T* x, i64 n, i64 channels, Window w)  x [n, channels, H, W], written, not added to
//       Each element of x gathers from the windows that contain it, in the CPU's order: no atomics. 16-bit rows are summed in f32.
//   avg_pool_{f32,f64,bf16,f16}      (const T* x, T* y, i64 planes, Pool p)       planes = n·channels, y [planes, out]
//   avg_pool_grad_{..}               (const T* g, T* dx, i64 planes, Pool p)
//   max_pool_{..}                    (const T* x, T* y, u32* index, i64 planes, Pool p)   index within the plane
//   max_pool_grad_{..}               (const T* g, const u32* index, T* dx, i64 planes, Pool p)
//       The first of equal values, NaN counts as largest, padding is never chosen; each input element sums over the windows that chose it.
// Window: i64 size[2], out[2], kernel[2], stride[2], padding[2], dilation[2] (height, width).
// Pool:   i64 size[2], out[2], kernel[2], stride[2], padding[2]; stride 0 in both: adaptive windows, where window o of a size s spans
//         ⌊o·s/out⌋ to ⌈(o + 1)·s/out⌉ (averages divide by this window's size, otherwise by kh·kw). Sliding windows are clipped at
//         the borders; padding is at most half the kernel.
// The layout change of a convolution's gradient, [n, r, c] to [n, c, r], is transpose (move.cu).

struct Window {
    i64 size[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
};
struct Pool {
    i64 size[2], out[2], kernel[2], stride[2], padding[2];
};
// Quotient; i becomes the remainder. The division is 32-bit if the numbers allow it.
DEV i64 split(i64& i, i64 by) {
    i64 q = ((u64)i | (u64)by) >> 32 == 0 ? (i64)((u32)i / (u32)by) : i / by;
    i -= q * by;
    return q;
}
DEV i64 max64(i64 a, i64 b) { return a > b ? a : b; }

template <class T> DEV void unfold_body(const T* x, T* y, i64 n, i64 channels, const Window& w) {
    i64 at = (i64)blockIdx.x * 256 + threadIdx.x, area = w.kernel[0] * w.kernel[1], row = channels * area;
    if (at >= n * w.out[0] * w.out[1] * row) return;
    i64 k = at, place = split(k, row), c = split(k, area), ki = split(k, w.kernel[1]);
    i64 oj = place, line = split(oj, w.out[1]), oi = line, b = split(oi, w.out[0]);
    i64 i = oi * w.stride[0] + ki * w.dilation[0] - w.padding[0], j = oj * w.stride[1] + k * w.dilation[1] - w.padding[1];
    bool in = i >= 0 && i < w.size[0] && j >= 0 && j < w.size[1];
    y[at] = in ? x[((b * channels + c) * w.size[0] + i) * w.size[1] + j] : (T)0;
}
// Windows o whose element k = (i + padding − o·stride) / dilation is at input i: the first and the last o to test.
DEV void reach(const Window& w, int axis, i64 i, i64& lo, i64& hi) {
    i64 p = i + w.padding[axis], span = (w.kernel[axis] - 1) * w.dilation[axis];
    lo = p > span ? (p - span + w.stride[axis] - 1) / w.stride[axis] : 0;
    hi = min64(p / w.stride[axis], w.out[axis] - 1);
}
template <class T> DEV void fold_body(const T* rows, T* x, i64 n, i64 channels, const Window& w) {
    i64 at = (i64)blockIdx.x * 256 + threadIdx.x, area = w.kernel[0] * w.kernel[1];
    if (at >= n * channels * w.size[0] * w.size[1]) return;
    i64 j = at, line = split(j, w.size[1]), i = line, plane = split(i, w.size[0]), c = plane, b = split(c, channels);
    i64 i0, i1, j0, j1;
    reach(w, 0, i, i0, i1);
    reach(w, 1, j, j0, j1);
    acc_t<T> s = 0;
    for (i64 oi = i0; oi <= i1; oi++) {
        i64 ki = i + w.padding[0] - oi * w.stride[0];
        if (ki % w.dilation[0]) continue;
        ki /= w.dilation[0];
        for (i64 oj = j0; oj <= j1; oj++) {
            i64 kj = j + w.padding[1] - oj * w.stride[1];
            if (kj % w.dilation[1]) continue;
            kj /= w.dilation[1];
            i64 place = (b * w.out[0] + oi) * w.out[1] + oj;
            s += to_acc(rows[(place * channels + c) * area + ki * w.kernel[1] + kj]);
        }
    }
    x[at] = from_acc<T>(s);
}
#define UNFOLD(T, S) \
    KERNEL unfold_##S(const T* x, T* y, i64 n, i64 channels, const __grid_constant__ Window w) { unfold_body(x, y, n, channels, w); }
UNFOLD(u16, b2)
UNFOLD(u32, b4)
UNFOLD(u64, b8)
#define FOLD(T, S) \
    KERNEL fold_##S(const T* rows, T* x, i64 n, i64 channels, const __grid_constant__ Window w) { fold_body(rows, x, n, channels, w); }
FOR_FLOATS(FOLD)

// ---------------------------------------------------------------- pooling
// Input lines lo .. hi of window o.
DEV void cut(const Pool& p, int axis, i64 o, i64& lo, i64& hi) {
    if (p.stride[axis] == 0) {
        lo = o * p.size[axis] / p.out[axis];
        hi = cdiv((o + 1) * p.size[axis], p.out[axis]);
    } else {
        i64 start = o * p.stride[axis];
        lo = max64(start - p.padding[axis], 0);
        hi = min64(start + p.kernel[axis] - p.padding[axis], p.size[axis]);
    }
}
// Windows lo ..= hi that contain input line i.
DEV void holders(const Pool& p, int axis, i64 i, i64& lo, i64& hi) {
    if (p.stride[axis] == 0) {
        lo = i * p.out[axis] / p.size[axis];
        hi = ((i + 1) * p.out[axis] - 1) / p.size[axis];
    } else {
        i64 at = i + p.padding[axis];
        lo = at >= p.kernel[axis] ? (at - p.kernel[axis]) / p.stride[axis] + 1 : 0;
        hi = min64(at / p.stride[axis], p.out[axis] - 1);
    }
}
template <class A> DEV A pool_scale(const Pool& p, i64 i0, i64 i1, i64 j0, i64 j1) {
    return A(1) / (A)(p.stride[0] == 0 ? (i1 - i0) * (j1 - j0) : p.kernel[0] * p.kernel[1]);
}
struct Place {
    i64 plane, i, j;
    bool in;
};
DEV Place place_of(i64 planes, const i64* size) {
    i64 at = (i64)blockIdx.x * 256 + threadIdx.x;
    Place q;
    q.in = at < planes * size[0] * size[1];
    q.j = at;
    q.i = split(q.j, size[1]);
    q.plane = split(q.i, size[0]);
    return q;
}
template <class T> DEV void avg_pool_body(const T* x, T* y, i64 planes, const Pool& p) {
    typedef acc_t<T> A;
    Place q = place_of(planes, p.out);
    if (!q.in) return;
    i64 i0, i1, j0, j1;
    cut(p, 0, q.i, i0, i1);
    cut(p, 1, q.j, j0, j1);
    x += q.plane * p.size[0] * p.size[1];
    A s = 0;
    for (i64 i = i0; i < i1; i++) {
        A line = 0;
        for (i64 j = j0; j < j1; j++) line += to_acc(x[i * p.size[1] + j]);
        s += line;
    }
    y[(q.plane * p.out[0] + q.i) * p.out[1] + q.j] = from_acc<T>(s * pool_scale<A>(p, i0, i1, j0, j1));
}
template <class T> DEV void avg_pool_grad_body(const T* g, T* dx, i64 planes, const Pool& p) {
    typedef acc_t<T> A;
    Place q = place_of(planes, p.size);
    if (!q.in) return;
    i64 o0, o1, r0, r1;
    holders(p, 0, q.i, o0, o1);
    holders(p, 1, q.j, r0, r1);
    g += q.plane * p.out[0] * p.out[1];
    A s = 0;
    for (i64 o = o0; o <= o1; o++)
        for (i64 r = r0; r <= r1; r++) {
            i64 i0, i1, j0, j1;
            cut(p, 0, o, i0, i1);
            cut(p, 1, r, j0, j1);
            s += to_acc(g[o * p.out[1] + r]) * pool_scale<A>(p, i0, i1, j0, j1);
        }
    dx[(q.plane * p.size[0] + q.i) * p.size[1] + q.j] = from_acc<T>(s);
}
template <class T> DEV void max_pool_body(const T* x, T* y, u32* index, i64 planes, const Pool& p) {
    typedef acc_t<T> A;
    Place q = place_of(planes, p.out);
    if (!q.in) return;
    i64 i0, i1, j0, j1;
    cut(p, 0, q.i, i0, i1);
    cut(p, 1, q.j, j0, j1);
    x += q.plane * p.size[0] * p.size[1];
    i64 at = i0 * p.size[1] + j0;
    A best = to_acc(x[at]);
    for (i64 i = i0; i < i1; i++)
        for (i64 j = j0; j < j1; j++) {
            A v = to_acc(x[i * p.size[1] + j]);
            if (v > best || (is_nan(v) && !is_nan(best))) {
                best = v;
                at = i * p.size[1] + j;
            }
        }
    i64 o = (q.plane * p.out[0] + q.i) * p.out[1] + q.j;
    y[o] = from_acc<T>(best);
    index[o] = (u32)at;
}
template <class T> DEV void max_pool_grad_body(const T* g, const u32* index, T* dx, i64 planes, const Pool& p) {
    Place q = place_of(planes, p.size);
    if (!q.in) return;
    i64 o0, o1, r0, r1;
    holders(p, 0, q.i, o0, o1);
    holders(p, 1, q.j, r0, r1);
    g += q.plane * p.out[0] * p.out[1];
    index += q.plane * p.out[0] * p.out[1];
    u32 me = (u32)(q.i * p.size[1] + q.j);
    acc_t<T> s = 0;
    for (i64 o = o0; o <= o1; o++)
        for (i64 r = r0; r <= r1; r++)
            if (index[o * p.out[1] + r] == me) s += to_acc(g[o * p.out[1] + r]);
    dx[(q.plane * p.size[0]) * p.size[1] + me] = from_acc<T>(s);
}
#define POOLS(T, S)                                                                                            \
    KERNEL avg_pool_##S(const T* x, T* y, i64 planes, const __grid_constant__ Pool p) {                        \
        avg_pool_body(x, y, planes, p);                                                                        \
    }                                                                                                          \
    KERNEL avg_pool_grad_##S(const T* g, T* dx, i64 planes, const __grid_constant__ Pool p) {                  \
        avg_pool_grad_body(g, dx, planes, p);                                                                  \
    }                                                                                                          \
    KERNEL max_pool_##S(const T* x, T* y, u32* index, i64 planes, const __grid_constant__ Pool p) {            \
        max_pool_body(x, y, index, planes, p);                                                                 \
    }                                                                                                          \
    KERNEL max_pool_grad_##S(const T* g, const u32* index, T* dx, i64 planes, const __grid_constant__ Pool p) { \
        max_pool_grad_body(g, index, dx, planes, p);                                                           \
    }
FOR_FLOATS(POOLS)
