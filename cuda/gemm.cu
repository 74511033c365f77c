#include "prelude.cuh"
// Batched matrix products with an epilogue, in any strides, optionally split along K.
//
//   C[i, j] = act(alpha · Σₖ wₖ·A[i, k]·B[k, j]  (+ C[i, j])  (+ bias[j]))        2·M·N·K FLOPs
//
// Kernels (all: grid x = ⌈M/TILE⌉·⌈N/TILE⌉·batch0·batch1·splits, exactly; y = z = 1). Block 256 threads.
//
//   gemm_{nn,nt,tn,tt}_f32        true f32 (no tf32)   TILE 128, K step 16, dynamic shared memory 33 792 bytes
//   gemm_{nn,nt,tn,tt}_f64        f64                  TILE 64,  K step 16, dynamic shared memory 33 792 bytes
//   gemm_{nn,nt,tn,tt}_{bf16,f16}          16-bit operands, result, bias and pre; f32 inside     TILE 128, K step 32
//   gemm_{nn,nt,tn,tt}_{bf16,f16}_f32      16-bit operands, f32 result, bias and pre             TILE 128, K step 32
//   gemm_{nn,nt,tn,tt}_tf32                f32 throughout, operands rounded to tf32 (10 bits)    TILE 128, K step 16
//                                 on the tensor cores, all with dynamic shared memory 65 536 bytes (raise the limit first)
//   gemm_splitk_{f32,f64,bf16,f16}  second pass of a split product: any grid (grid-stride over M·N·batch), block 256, no shared memory
//
// The letters give the layout of the operands: first letter A, second B. n = row-major (unit stride along the second index), t =
// column-major. They determine how threads access an operand; every kernel is correct for every stride.
//
// Arguments, in order:
//   const T* a, const T* b        first element of matrix 0 of the batch
//   O* c                          result; unit stride along columns
//   const O* bias                 [N] or null
//   O* pre                        receives the values before the activation, in the layout of C; or null
//   const acc* w                  weight of each step of K, or null; a step of zero weight is skipped, even if it is not finite
//   const u32* owner              weight of step k is w[owner[k]]; null: w[k / each]
//   acc* part                     splits > 1: [batch, splits, M, N] partial sums (f32, f64 for f64), no epilogue; gemm_splitk_* adds
//                                 them in order and applies the epilogue. Otherwise null
//   GemmShape s                   below, by value. K may be 0 (C = act(bias)); M, N and batch must not be 0
//
// Weights on the tensor cores: w·A is rounded to the operands' type once more (by 2⁻⁹ of it in bf16, 2⁻¹² in f16 and tf32), so that a
// clipped sum computed there may exceed the threshold by that much; the f32 kernels do not round.
//
// splits divides K (below 2³¹ steps) into equal stretches (multiples of the K step). The split depends on the arguments alone, so that
// results have the same bits on every run. Bytes of a tile row: one read of A per ⌈N/TILE⌉, one of B per ⌈M/TILE⌉, mostly from L2: tiles
// are ordered in columns of 8 row tiles. No kernel spills registers (sm_80, sm_90); each uses at most 128 registers, so that two blocks fit
// a multiprocessor, except gemm_tn_f32 and tf32 (about 170 and 200 registers, one block).

struct GemmShape {
    i64 m, n, k;
    i64 a_rs, a_cs, b_rs, b_cs; // strides between rows and between columns
    i64 c_rs;                   // stride between rows of C and pre
    i64 batch0, batch1;         // matrix z is (z / batch1, z % batch1)
    i64 a_s0, a_s1, b_s0, b_s1, c_s0, c_s1;
    i64 each;     // rows of one sample, for w without owners; 1 = one weight per row
    double alpha;
    i32 act;      // ACT_*
    i32 accumulate;
    i32 splits;   // 1 = not split
    i32 reserved;
};

template <class O> DEV void finish(const GemmShape& s, O* c, const O* bias, O* pre, i64 at, i64 col, acc_t<O> v) {
    v *= (acc_t<O>)s.alpha;
    if (s.accumulate) v += to_acc(c[at]);
    if (bias) v += to_acc(bias[col]);
    if (pre) pre[at] = from_acc<O>(v);
    c[at] = from_acc<O>(activate(s.act, v));
}

template <class Tile, class O>
DEV void gemm_body(const typename Tile::T* a, const typename Tile::T* b, O* c, const O* bias, O* pre, const acc_t<O>* w,
                   const u32* owner, acc_t<O>* part, const GemmShape& s) {
    typedef typename Tile::T T;
    DYN_SHARED(char, smem);
    // Order in columns of 8 row tiles: neighbouring blocks share a strip of B and few strips of A.
    i64 tm = cdiv(s.m, Tile::M), tn = cdiv(s.n, Tile::N), z = blockIdx.x / (tm * tn), at = blockIdx.x - z * tm * tn;
    i64 group = at / (8 * tn), rows = min64(8, tm - group * 8), in = at - group * 8 * tn;
    i64 m0 = (group * 8 + in % rows) * Tile::M, n0 = in / rows * Tile::N;
    i64 each = cdiv(cdiv(s.k, s.splits), Tile::KT) * Tile::KT;
    i64 zb = z / s.splits, split = z % s.splits, z0 = zb / s.batch1, z1 = zb % s.batch1;
    Operand<T> oa = {a + z0 * s.a_s0 + z1 * s.a_s1 + m0 * s.a_rs, s.a_rs, s.a_cs, s.m - m0, nullptr, nullptr};
    Operand<T> ob = {b + z0 * s.b_s0 + z1 * s.b_s1 + n0 * s.b_cs, s.b_cs, s.b_rs, s.n - n0, nullptr, nullptr};
    KScale<acc_t<T>> scale = {w, owner, s.each};
    // The values that the epilogue needs are stored in shared memory: the registers of the main loop determine how many blocks fit.
    SHARED(i64, place, [4]);
    if (threadIdx.x == 0) {
        place[0] = m0;
        place[1] = n0;
        place[2] = z0 * s.c_s0 + z1 * s.c_s1;
        place[3] = z * s.m * s.n;
    }
    Tile t;
    t.zero();
    t.run(smem, oa, ob, split * each, min64((split + 1) * each, s.k), scale);
    t.each(smem, [&](int r, int j, acc_t<O> v) {
        i64 row = place[0] + r, col = place[1] + j;
        if (row >= s.m || col >= s.n) return;
        if (part) part[place[3] + row * s.n + col] = v;
        else finish(s, c, bias, pre, place[2] + row * s.c_rs + col, col, v);
    });
}

#define GEMM_ARGS(T, O) const T *__restrict__ a, const T *__restrict__ b, O *c, const O *__restrict__ bias, O *pre, \
    const acc_t<O> *__restrict__ w, const u32 *__restrict__ owner, acc_t<O> *part, GemmShape s
#define SIMT(NAME, T, AK, BK, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) NAME(GEMM_ARGS(T, T)) { gemm_body<SimtTile<T, AK, BK>, T>(a, b, c, bias, pre, w, owner, part, s); }
SIMT(gemm_nn_f32, float, true, false, 2)
SIMT(gemm_nt_f32, float, true, true, 2)
SIMT(gemm_tn_f32, float, false, false, 1)
SIMT(gemm_tt_f32, float, false, true, 2)
SIMT(gemm_nn_f64, double, true, false, 2)
SIMT(gemm_nt_f64, double, true, true, 2)
SIMT(gemm_tn_f64, double, false, false, 2)
SIMT(gemm_tt_f64, double, false, true, 2)

#define MMA(NAME, T, O, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) gemm_nn_##NAME(GEMM_ARGS(T, O)) { gemm_body<MmaTile<T, true, false>, O>(a, b, c, bias, pre, w, owner, part, s); } \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) gemm_nt_##NAME(GEMM_ARGS(T, O)) { gemm_body<MmaTile<T, true, true>, O>(a, b, c, bias, pre, w, owner, part, s); } \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) gemm_tn_##NAME(GEMM_ARGS(T, O)) { gemm_body<MmaTile<T, false, false>, O>(a, b, c, bias, pre, w, owner, part, s); } \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) gemm_tt_##NAME(GEMM_ARGS(T, O)) { gemm_body<MmaTile<T, false, true>, O>(a, b, c, bias, pre, w, owner, part, s); }
MMA(bf16, bf16, bf16, 2)
MMA(f16, f16, f16, 2)
MMA(tf32, float, float, 1)

// Reads splits + 1 values and writes one for each element of C.
template <class O> DEV void splitk_body(const acc_t<O>* part, O* c, const O* bias, O* pre, const GemmShape& s) {
    i64 mn = s.m * s.n, step = (i64)gridDim.x * blockDim.x;
    for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < mn * s.batch0 * s.batch1; e += step) {
        i64 zb = e / mn, at = e % mn, row = at / s.n, col = at % s.n;
        const acc_t<O>* p = part + zb * s.splits * mn + at;
        acc_t<O> v = 0;
        for (i32 i = 0; i < s.splits; i++) v += p[i * mn];
        finish(s, c, bias, pre, zb / s.batch1 * s.c_s0 + zb % s.batch1 * s.c_s1 + row * s.c_rs + col, col, v);
    }
}
#define SPLITK(NAME, O) \
    extern "C" __global__ void __launch_bounds__(256) NAME(const acc_t<O> *__restrict__ part, O *c, const O *__restrict__ bias, O *pre, GemmShape s) { splitk_body<O>(part, c, bias, pre, s); }
SPLITK(gemm_splitk_f32, float)
SPLITK(gemm_splitk_f64, double)
SPLITK(gemm_splitk_bf16, bf16)
SPLITK(gemm_splitk_f16, f16)
