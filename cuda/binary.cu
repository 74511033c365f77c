#include "prelude.cuh"
// Two broadcast operands: arithmetic, comparison, selection, masks; and in-place sums.
//
// Grid ceil(n / 1024), block 256, 4 elements per thread, no shared memory, n > 0, contiguous results, in all kernels here.
// Broadcasting uses strides of 0: `x + bias` is rank 2, sizes [rows, cols], strides [cols, 1] and [0, 1].
//
//   {add,sub,mul,div,maximum,minimum}_{f32,f64,bf16,f16} (const T* a, const T* b, T* y, i64 n, Strided2 sab)
//   {mul,div,maximum,minimum}_grad_{f32,f64,bf16,f16} (const T* a, const T* b, const T* g, T* d, i64 n, Strided3 sabg, i32 side)
//       d = g·∂y/∂a (side 0) or g·∂y/∂b (side 1), in the broadcast shape; it is then summed to the operand's shape (reduce.cu).
//       If a = b, the gradient of maximum and minimum goes to a. For add and sub the gradient is g itself, and −g (neg).
//   compare_{f32,f64,bf16,f16,u32,i64,u8} (const T* a, const T* b, u8* y, i64 n, Strided2 sab, i32 op)
//       op 0 a = b, 1 a ≠ b, 2 a < b, 3 a ≤ b, 4 a > b, 5 a ≥ b
//   where_{b1,b2,b4,b8} (const u8* mask, const T* a, const T* b, T* y, i64 n, Strided3 smab)   a where mask ≠ 0, b elsewhere
//   mask_{b2,b4,b8}  (const T* g, const u8* mask, T* y, i64 n, Strided2 sgm, i32 keep)      g where (mask ≠ 0) = keep, 0 elsewhere
//       b1 … b8: bytes per element, for any dtype of that width.
//   add_assign_{f32,f64,bf16,f16} (T* y, const T* x, i64 n, Strided1 sx)               y += x

struct add_op { template <class A> static DEVM A f(A x, A y) { return x + y; } };
struct sub_op { template <class A> static DEVM A f(A x, A y) { return x - y; } };
struct mul_op { template <class A> static DEVM A f(A x, A y) { return x * y; } };
struct div_op { template <class A> static DEVM A f(A x, A y) { return x / y; } };
// NaN if either is NaN; fmax would hide it.
struct maximum_op { template <class A> static DEVM A f(A x, A y) { return is_nan(x) ? x : x > y ? x : y; } };
struct minimum_op { template <class A> static DEVM A f(A x, A y) { return is_nan(x) ? x : x < y ? x : y; } };

// The factor of the gradient. It is multiplied, not selected, so that an infinite gradient gives NaN, as on the CPU.
struct mul_der { template <class A> static DEVM A f(A x, A y, int side) { return side ? x : y; } };
struct div_der { template <class A> static DEVM A f(A x, A y, int side) { return side ? -x / (y * y) : A(1) / y; } };
struct maximum_der { template <class A> static DEVM A f(A x, A y, int side) { return (x >= y) == (side == 0) ? A(1) : A(0); } };
struct minimum_der { template <class A> static DEVM A f(A x, A y, int side) { return (x <= y) == (side == 0) ? A(1) : A(0); } };

template <class Op, class T> DEV void binary_body(const T* a, const T* b, T* y, i64 n, const Strided2& s) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided2, 2> at;
    locate<2>(s, i, count, at);
    T v[4], w[4];
    load4(a, s, at, 0, count, v);
    load4(b, s, at, 1, count, w);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) v[k] = from_acc<T>(Op::f(to_acc(v[k]), to_acc(w[k])));
    store4(y, i, count, v);
}
template <class Op, class T>
DEV void binary_grad_body(const T* a, const T* b, const T* g, T* d, i64 n, const Strided3& s, int side) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided3, 3> at;
    locate<3>(s, i, count, at);
    T v[4], w[4], r[4];
    load4(a, s, at, 0, count, v);
    load4(b, s, at, 1, count, w);
    load4(g, s, at, 2, count, r);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) r[k] = from_acc<T>(Op::f(to_acc(v[k]), to_acc(w[k]), side) * to_acc(r[k]));
    store4(d, i, count, r);
}
#define INST_F(NAME, T, S)                                                                                     \
    KERNEL NAME##_##S(const T* a, const T* b, T* y, i64 n, STRIDED(2) sab) {                               \
        binary_body<NAME##_op>(a, b, y, n, sab);                                                               \
    }
#define INST_D(NAME, T, S)                                                                                     \
    KERNEL NAME##_grad_##S(const T* a, const T* b, const T* g, T* d, i64 n, STRIDED(3) sabg, i32 side) {   \
        binary_grad_body<NAME##_der>(a, b, g, d, n, sabg, side);                                               \
    }
#define ARITHMETIC(T, S)                                                                                       \
    INST_F(add, T, S) INST_F(sub, T, S) INST_F(mul, T, S) INST_F(div, T, S)                                    \
    INST_F(maximum, T, S) INST_F(minimum, T, S)                                                                \
    INST_D(mul, T, S) INST_D(div, T, S) INST_D(maximum, T, S) INST_D(minimum, T, S)
FOR_FLOATS(ARITHMETIC)

// ---------------------------------------------------------------- comparison
DEV u32 to_acc(u32 v) { return v; }
DEV i64 to_acc(i64 v) { return v; }
DEV u32 to_acc(u8 v) { return v; }

enum { COMPARE_EQ, COMPARE_NE, COMPARE_LT, COMPARE_LE, COMPARE_GT, COMPARE_GE };
template <class T> DEV void compare_body(const T* a, const T* b, u8* y, i64 n, const Strided2& s, int op) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided2, 2> at;
    locate<2>(s, i, count, at);
    T v[4], w[4];
    u8 r[4];
    load4(a, s, at, 0, count, v);
    load4(b, s, at, 1, count, w);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) {
            auto p = to_acc(v[k]);
            auto q = to_acc(w[k]);
            r[k] = op == COMPARE_EQ   ? p == q
                   : op == COMPARE_NE ? p != q
                   : op == COMPARE_LT ? p < q
                   : op == COMPARE_LE ? p <= q
                   : op == COMPARE_GT ? p > q
                                      : p >= q;
        }
    store4(y, i, count, r);
}
#define COMPARE(T, S)                                                                                          \
    KERNEL compare_##S(const T* a, const T* b, u8* y, i64 n, STRIDED(2) sab, i32 op) {                     \
        compare_body(a, b, y, n, sab, op);                                                                     \
    }
FOR_FLOATS(COMPARE)
COMPARE(u32, u32)
COMPARE(i64, i64)
COMPARE(u8, u8)

// ---------------------------------------------------------------- selection, by width
template <class T> DEV void where_body(const u8* mask, const T* a, const T* b, T* y, i64 n, const Strided3& s) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided3, 3> at;
    locate<3>(s, i, count, at);
    u8 m[4];
    T v[4], w[4];
    load4(mask, s, at, 0, count, m);
    load4(a, s, at, 1, count, v);
    load4(b, s, at, 2, count, w);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count && !m[k]) v[k] = w[k];
    store4(y, i, count, v);
}
template <class T> DEV void mask_body(const T* g, const u8* mask, T* y, i64 n, const Strided2& s, int keep) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided2, 2> at;
    locate<2>(s, i, count, at);
    T v[4];
    u8 m[4];
    load4(g, s, at, 0, count, v);
    load4(mask, s, at, 1, count, m);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count && (m[k] != 0) != (keep != 0)) v[k] = T(0);
    store4(y, i, count, v);
}
#define WHERE(T, S)                                                                                            \
    KERNEL where_##S(const u8* mask, const T* a, const T* b, T* y, i64 n, STRIDED(3) smab) {               \
        where_body(mask, a, b, y, n, smab);                                                                    \
    }
WHERE(u8, b1)
WHERE(u16, b2)
WHERE(u32, b4)
WHERE(u64, b8)
#define MASK(T, S)                                                                                            \
    KERNEL mask_##S(const T* g, const u8* mask, T* y, i64 n, STRIDED(2) sgm, i32 keep) {                   \
        mask_body(g, mask, y, n, sgm, keep);                                                                   \
    }
MASK(u16, b2)
MASK(u32, b4)
MASK(u64, b8)

// ---------------------------------------------------------------- sums in place
template <class D, class S, class F> DEV void update_body(D* y, const S* x, i64 n, const Strided1& s, F f) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided1, 1> at;
    locate<1>(s, i, count, at);
    S v[4];
    D r[4];
    load4(x, s, at, 0, count, v);
    load4(y, i, count, r);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) r[k] = f(r[k], v[k]);
    store4(y, i, count, r);
}
#define UPDATE(T, S)                                                                                           \
    KERNEL add_assign_##S(T* y, const T* x, i64 n, STRIDED(1) sx) {                                        \
        update_body(y, x, n, sx, [](T a, T b) { return from_acc<T>(to_acc(a) + to_acc(b)); });                 \
    }
FOR_FLOATS(UPDATE)
