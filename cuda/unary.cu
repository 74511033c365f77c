#include "prelude.cuh"
// One operand, element by element: activations and elementary functions, forward and backward.
//
//   <op>_{f32,f64,bf16,f16}      (const T* x, T* y, i64 n, Strided1 sx, f64 p, f64 q)               y = f(x)
//   <op>_grad_{f32,f64,bf16,f16} (const T* g, const T* s, T* dx, i64 n, Strided2 sgs, f64 p, f64 q)  dx = g·f′, s what is saved
//   is_finite_{f32,f64,bf16,f16} (const T* x, u8* y, i64 n, Strided1 sx)
//   All: grid ceil(n / 1024), block 256, 4 elements per thread, no shared memory. n > 0. The result is contiguous and may
//   be the operand itself if that is contiguous (y = x; dx = g or dx = s).
//
//   s is the input  for log square abs sin cos erf gelu gelu_tanh silu softplus leaky_relu powf clamp,
//        the output for exp sqrt recip tanh sigmoid relu.
//   p, q: leaky_relu (slope, -), powf (exponent, -), clamp (low, high), add_scalar (c, -), mul_scalar (c, -); 0 elsewhere.
//   neg, add_scalar and mul_scalar save nothing: their gradients are neg of g, g itself, and mul_scalar of g.
//
// Bytes: each operand once. f32 exp, tanh and erf are the CUDA library's (2 ulp); 16-bit operands are computed in f32.

template <class A> DEV A sigmoid_of(A x) { return A(1) / (A(1) + exp_of(-x)); }
// GELU's tanh form as x·sigmoid(2u), which stays accurate where 1 + tanh u would cancel.
template <class A> DEV A gelu_gate(A x) {
    return sigmoid_of(A(2 * 0.797884560802865356) * (x + A(0.044715) * x * x * x));
}

// f(x, p, q), and the derivative of the saved value.
#define UNARY(NAME, F)                                                                                         \
    struct NAME##_op {                                                                                         \
        template <class A> static DEVM A f(A x, A p, A q) { return F; }                                        \
    };
#define DERIVATIVE(NAME, D)                                                                                    \
    struct NAME##_der {                                                                                        \
        template <class A> static DEVM A f(A s, A p, A q) { return D; }                                        \
    };
UNARY(neg, -x)
UNARY(exp, exp_of(x)) DERIVATIVE(exp, s)
UNARY(log, log_of(x)) DERIVATIVE(log, A(1) / s)
UNARY(sqrt, sqrt_of(x)) DERIVATIVE(sqrt, A(0.5) / s)
UNARY(square, x * x) DERIVATIVE(square, s + s)
UNARY(abs, abs_of(x)) DERIVATIVE(abs, s > A(0) ? A(1) : s < A(0) ? A(-1) : A(0))
UNARY(recip, A(1) / x) DERIVATIVE(recip, -s * s)
UNARY(sin, sin_of(x)) DERIVATIVE(sin, cos_of(s))
UNARY(cos, cos_of(x)) DERIVATIVE(cos, -sin_of(s))
UNARY(tanh, tanh_of(x)) DERIVATIVE(tanh, A(1) - s * s)
UNARY(sigmoid, sigmoid_of(x)) DERIVATIVE(sigmoid, s * (A(1) - s))
UNARY(erf, erf_of(x)) DERIVATIVE(erf, A(1.12837916709551257390) * exp_of(-s * s))
// A NaN stays a NaN.
UNARY(relu, x > A(0) || x != x ? x : A(0)) DERIVATIVE(relu, s > A(0) ? A(1) : A(0))
UNARY(leaky_relu, x > A(0) ? x : p * x) DERIVATIVE(leaky_relu, s > A(0) ? A(1) : p)
UNARY(gelu, A(0.5) * x * erfc_of(-x * A(0.70710678118654752440)))
DERIVATIVE(gelu, A(0.5) * erfc_of(-s * A(0.70710678118654752440)) + s * exp_of(A(-0.5) * s * s) * A(0.398942280401432678))
UNARY(gelu_tanh, x * gelu_gate(x))
struct gelu_tanh_der {
    template <class A> static DEVM A f(A s, A p, A q) {
        A t = gelu_gate(s);
        return t + s * t * (A(1) - t) * A(2 * 0.797884560802865356) * (A(1) + A(0.134145) * s * s);
    }
};
UNARY(silu, x * sigmoid_of(x))
struct silu_der {
    template <class A> static DEVM A f(A s, A p, A q) {
        A t = sigmoid_of(s);
        return t * (A(1) + s * (A(1) - t));
    }
};
UNARY(softplus, (x < A(0) ? A(0) : x) + log1p_of(exp_of(-abs_of(x)))) DERIVATIVE(softplus, sigmoid_of(s))
UNARY(powf, pow_of(x, p)) DERIVATIVE(powf, p == A(0) ? A(0) : p * pow_of(s, p - A(1)))
UNARY(add_scalar, x + p)
UNARY(mul_scalar, x * p)
UNARY(clamp, x < p ? p : x > q ? q : x) DERIVATIVE(clamp, s < p || s > q ? A(0) : A(1))

template <class Op, class T> DEV void unary_body(const T* x, T* y, i64 n, const Strided1& s, double p, double q) {
    typedef acc_t<T> A;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided1, 1> at;
    locate<1>(s, i, count, at);
    T v[4];
    load4(x, s, at, 0, count, v);
    A pa = (A)p, qa = (A)q;
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) v[k] = from_acc<T>(Op::template f<A>(to_acc(v[k]), pa, qa));
    store4(y, i, count, v);
}
template <class Op, class T>
DEV void grad_body(const T* g, const T* saved, T* dx, i64 n, const Strided2& s, double p, double q) {
    typedef acc_t<T> A;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided2, 2> at;
    locate<2>(s, i, count, at);
    T v[4], w[4];
    load4(g, s, at, 0, count, v);
    load4(saved, s, at, 1, count, w);
    A pa = (A)p, qa = (A)q;
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) v[k] = from_acc<T>(to_acc(v[k]) * Op::template f<A>(to_acc(w[k]), pa, qa));
    store4(dx, i, count, v);
}

#define INST_F(NAME, T, S)                                                                                     \
    KERNEL NAME##_##S(const T* x, T* y, i64 n, STRIDED(1) sx, double p, double q) {                        \
        unary_body<NAME##_op>(x, y, n, sx, p, q);                                                              \
    }
#define INST_D(NAME, T, S)                                                                                     \
    KERNEL NAME##_grad_##S(const T* g, const T* s, T* dx, i64 n, STRIDED(2) sgs, double p, double q) {     \
        grad_body<NAME##_der>(g, s, dx, n, sgs, p, q);                                                         \
    }
#define INST(NAME, T, S) INST_F(NAME, T, S) INST_D(NAME, T, S)
#define INSTANCES(T, S)                                                                                        \
    INST_F(neg, T, S) INST_F(add_scalar, T, S) INST_F(mul_scalar, T, S)                                        \
    INST(exp, T, S) INST(log, T, S) INST(sqrt, T, S) INST(square, T, S) INST(abs, T, S) INST(recip, T, S)      \
    INST(sin, T, S) INST(cos, T, S) INST(tanh, T, S) INST(sigmoid, T, S) INST(erf, T, S) INST(relu, T, S)      \
    INST(leaky_relu, T, S) INST(gelu, T, S) INST(gelu_tanh, T, S) INST(silu, T, S) INST(softplus, T, S)        \
    INST(powf, T, S) INST(clamp, T, S)
FOR_FLOATS(INSTANCES)

template <class T> DEV void is_finite_body(const T* x, u8* y, i64 n, const Strided1& s) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided1, 1> at;
    locate<1>(s, i, count, at);
    T v[4];
    u8 r[4];
    load4(x, s, at, 0, count, v);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) {
            acc_t<T> a = to_acc(v[k]);
            r[k] = a - a == acc_t<T>(0); // ∞ − ∞ and NaN are NaN
        }
    store4(y, i, count, r);
}
#define FINITE(T, S) \
    KERNEL is_finite_##S(const T* x, u8* y, i64 n, STRIDED(1) sx) { is_finite_body(x, y, n, sx); }
FOR_FLOATS(FINITE)
