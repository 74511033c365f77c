#include "prelude.cuh"
// Counter-based randomness: element i is a function of (key, i), with the same bits as src/random on the CPU. Arithmetic that must give
// equal bits is written with Exact<…>: each operation is rounded separately, never fused. Block 256.
//
//   dropout_{f32,f64,bf16,f16} (const T* x, T* y, i64 n, u64 seed, f64 p)          grid ceil(n / 1024); y may be x
//       Four elements share a Philox block. Backward is the same kernel on the gradient.
//   philox_uniform_{f32,f64} (T* y, i64 n, u64 seed, u64 stream, f64 bound)   grid ceil(n / 512)
//       bound > 0: bound·(2u − 1); bound 0: u in [0, 1).
//   philox_normal_{f32,f64} (T* y, i64 n, u64 seed, u64 stream, f64 std)      grid ceil(n / 512)
//       std·z, by the Box–Muller transform in f64; the logarithm, sine and cosine are written out below.
//   chacha_digest (const u32* words, i64 n, const u32* key, u32* out)         grid ceil(n / 2048)
//       Four words for each chunk of 2048: one level of src/random/digest.rs.
//   chacha_release (ChaChaKey key, u64 step, u64 context0, u64 context1, const u32* digest, u32* out, const u64* live)
//       grid 1, block 32. The eight words of a release's key; if digest is null, it counts as zeros.
//   chacha_gaussian_{f32,f64} (T* y, i64 n, const u32* key, u64 step, u64 first, f64 std, f64 magic, const u64* live)
//       y[i] ← grid(y[i] + std·z(key, step, first + i)); magic is 1.5·2⁵² steps of the grid.
//       grid ceil(16·groups / 256), groups = ceil((first + n) / 256) − first / 256.
//   live, if not null, holds the step (for captured graphs). Only keys of single releases are ever stored in memory.

// ---------------------------------------------------------------- Philox 4×32-10
struct Four { u32 v[4]; };
DEV Four philox(u64 seed, u64 stream, u64 index) {
    u32 c0 = (u32)index, c1 = (u32)(index >> 32), c2 = (u32)stream, c3 = (u32)(stream >> 32);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 a = 0xd2511f53ull * c0, b = 0xcd9e8d57ull * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}
template <class T> DEV void dropout_body(const T* x, T* y, i64 n, u64 seed, double p) {
    typedef acc_t<T> A;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    T v[4];
    load4(x, i, count, v);
    Four r = philox(seed, 0x64726f70ull, (u64)i / 4);
    float threshold = (float)p;
    A keep = (A)(1.0 / (1.0 - p));
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) {
            float u = (float)(r.v[k] >> 8) / 16777216.f; // 24 bits, so exact
            v[k] = from_acc<T>(u < threshold ? A(0) : to_acc(v[k]) * keep);
        }
    store4(y, i, count, v);
}

typedef Exact<double> D;
typedef Exact<float> F;
DEV u64 high53(u32 low, u32 high) { return ((u64)low | (u64)high << 32) >> 11; }
// Two elements per thread and Philox block: 2i from words 0 and 1, 2i + 1 from words 2 and 3.
template <class T> DEV void uniform_body(T* y, i64 n, u64 seed, u64 stream, double bound) {
    i64 pair = (i64)blockIdx.x * 256 + threadIdx.x;
    if (2 * pair >= n) return;
    Four r = philox(seed, stream, (u64)pair);
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (2 * pair + k < n) {
            D u = (double)high53(r.v[2 * k], r.v[2 * k + 1]) / 9007199254740992.0;
            y[2 * pair + k] = from_f64<T>((bound > 0 ? bound * (2.0 * u - 1.0) : u).v);
        }
}

// ln u for u in (0, 1], a multiple of 2⁻⁵³: u = 2ᵉ·(1 + m), ln(1 + m) = 2·artanh(m / (2 + m)), |s| ≤ 0.1716: twelve terms.
DEV D ln_unit(double u) {
    u64 bits = bits_of(u);
    i64 e = (i64)(bits - 0x3fe6a09e667f3bcdull) >> 52; // bits of √½
    union { u64 b; double d; } c;
    c.b = bits - ((u64)e << 52);
    D m = D(c.d) - 1.0, s = m / (2.0 + m), z = s * s, p = 1.0 / 23.0;
#pragma unroll
    for (int k = 10; k >= 0; k--) p = 1.0 / (2 * k + 1) + z * p;
    D ed = (double)e;
    // ln 2 in two parts, of which the first is exact in 32 bits.
    return ed * 0.693147180369123816490 + (ed * 1.90821492927058770002e-10 + 2.0 * s * p);
}
// Sine and cosine of k / 2⁵³ of a turn: reduced to the nearest quarter turn, then a series on at most an eighth of a turn to either side.
DEV void sin_cos_turn(u64 k, D& sine, D& cosine) {
    u64 q = (k + (1ull << 50)) >> 51;
    D t = D((double)((i64)k - (i64)(q << 51))) * (6.283185307179586476925 / 9007199254740992.0), z = t * t;
    D s = 1.0 / 355687428096000.0;
    s = -1.0 / 1307674368000.0 + z * s;
    s = 1.0 / 6227020800.0 + z * s;
    s = -1.0 / 39916800.0 + z * s;
    s = 1.0 / 362880.0 + z * s;
    s = -1.0 / 5040.0 + z * s;
    s = 1.0 / 120.0 + z * s;
    s = -1.0 / 6.0 + z * s;
    s = t * (1.0 + z * s);
    D c = -1.0 / 6402373705728000.0;
    c = 1.0 / 20922789888000.0 + z * c;
    c = -1.0 / 87178291200.0 + z * c;
    c = 1.0 / 479001600.0 + z * c;
    c = -1.0 / 3628800.0 + z * c;
    c = 1.0 / 40320.0 + z * c;
    c = -1.0 / 720.0 + z * c;
    c = 1.0 / 24.0 + z * c;
    c = -0.5 + z * c;
    c = 1.0 + z * c;
    D a = q & 1 ? c : s, d = q & 1 ? s : c;
    sine = q & 2 ? D(-a.v) : a;
    cosine = (q + 1) & 2 ? D(-d.v) : d;
}
template <class T> DEV void normal_body(T* y, i64 n, u64 seed, u64 stream, double std) {
    i64 pair = (i64)blockIdx.x * 256 + threadIdx.x;
    if (2 * pair >= n) return;
    Four r = philox(seed, stream, (u64)pair);
    D u = 1.0 - D((double)high53(r.v[0], r.v[1]) / 9007199254740992.0), s, c;
    sin_cos_turn(high53(r.v[2], r.v[3]), s, c);
    D radius = sqrt_of((-2.0 * ln_unit(u.v)).v);
    y[2 * pair] = from_f64<T>((std * (radius * c)).v);
    if (2 * pair + 1 < n) y[2 * pair + 1] = from_f64<T>((std * (radius * s)).v);
}
#define DROPOUT(T, S)                                                                                          \
    KERNEL dropout_##S(const T* x, T* y, i64 n, u64 seed, double p) { dropout_body(x, y, n, seed, p); }
FOR_FLOATS(DROPOUT)
#define PHILOX(T, S)                                                                                           \
    KERNEL philox_uniform_##S(T* y, i64 n, u64 seed, u64 stream, double bound) {                               \
        uniform_body(y, n, seed, stream, bound);                                                               \
    }                                                                                                          \
    KERNEL philox_normal_##S(T* y, i64 n, u64 seed, u64 stream, double std) {                                  \
        normal_body(y, n, seed, stream, std);                                                                  \
    }
PHILOX(float, f32)
PHILOX(double, f64)

// ---------------------------------------------------------------- ChaCha20
struct ChaChaKey { u32 word[8]; };
DEV u32 rotate(u32 x, int n) { return x << n | x >> (32 - n); }
DEV void quarter(u32& a, u32& b, u32& c, u32& d) {
    a += b; d = rotate(d ^ a, 16);
    c += d; b = rotate(b ^ c, 12);
    a += b; d = rotate(d ^ a, 8);
    c += d; b = rotate(b ^ c, 7);
}
// Block `counter` of the stream of one step: 16 words.
DEV void chacha_block(const ChaChaKey& key, u64 counter, u32 domain, u64 step, u32 (&x)[16]) {
    u32 init[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u, key.word[0], key.word[1], key.word[2], key.word[3],
                    key.word[4], key.word[5], key.word[6], key.word[7], (u32)counter, domain ^ (u32)(counter >> 32),
                    (u32)step, (u32)(step >> 32)};
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = init[i];
#pragma unroll 1
    for (int round = 0; round < 10; round++) {
        quarter(x[0], x[4], x[8], x[12]);
        quarter(x[1], x[5], x[9], x[13]);
        quarter(x[2], x[6], x[10], x[14]);
        quarter(x[3], x[7], x[11], x[15]);
        quarter(x[0], x[5], x[10], x[15]);
        quarter(x[1], x[6], x[11], x[12]);
        quarter(x[2], x[7], x[8], x[13]);
        quarter(x[3], x[4], x[9], x[14]);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] += init[i];
}
// √(−2·ln u) for u = (a + ½)/2³², near 1 computed from 1 − u, and for u = (2³²·a + b + ½)/2⁶⁴; and sine and cosine of b/2³² of a turn, as
// in src/random/chacha.rs.
DEV F unit_of(u32 a) { return F((float)a) * __uint_as_float(0x2f800000u) + __uint_as_float(0x2f000000u); }
DEV F radius_of(F u, bool near_one, F rest) {
    u32 bits = bits_of(u.v);
    i32 e = (i32)(bits - 0x3f3504f3u) >> 23;
    F m = F(__uint_as_float(bits - ((u32)e << 23))) - 1.f, ef = (float)e;
    if (near_one) {
        m = F(-rest.v);
        ef = 0.f;
    }
    F s = m / (2.f + m), z = s * s;
    F p = 1.f + z * (1.f / 3.f + z * (1.f / 5.f + z * (1.f / 7.f + z * F(1.f / 9.f))));
    return F(sqrtf((-2.f * (ef * 0.6933594f + (ef * -2.1219444e-4f + 2.f * s * p))).v));
}
DEV F radius(u32 a) { return radius_of(unit_of(a), a >= 0xc0000000u, unit_of(~a)); }
DEV F rare_radius(u32 a, u32 b) {
    F u = F((float)((u64)a << 32 | b)) * __uint_as_float(0x1f800000u) + __uint_as_float(0x1f000000u);
    return radius_of(u, false, F(0.f));
}
DEV void sin_cos_turn(u32 b, F& sine, F& cosine) {
    u32 q = (b + (1u << 29)) >> 30;
    F t = F((float)(i32)(b - (q << 30))) * (6.28318530717958647692f / 4294967296.f), z = t * t;
    F s = t * (1.f + z * (-1.f / 6.f + z * (1.f / 120.f + z * (-1.f / 5040.f + z * F(1.f / 362880.f)))));
    F c = 1.f + z * (-0.5f + z * (1.f / 24.f + z * (-1.f / 720.f + z * F(1.f / 40320.f))));
    F a = q & 1 ? c : s, d = q & 1 ? s : c;
    sine = q & 2 ? F(-a.v) : a;
    cosine = (q + 1) & 2 ? F(-d.v) : d;
}
// One thread per ChaCha block: word w of block l of a group of 16 is element 256·group + 16·w + l, so that 16 neighbouring threads write 16
// neighbouring elements. It takes about 700 integer, 400 float and 130 double operations for 16 normals, and for one block in 8,000 also
// the words of a second block.
template <class T>
DEV void gaussian_body(T* y, i64 n, const u32* words, u64 step, u64 first, double std, double magic, const u64* live) {
    u64 block = first / 256 * 16 + (u64)blockIdx.x * 256 + threadIdx.x, at = block / 16 * 256 + block % 16, end = first + n;
    if (block / 16 * 256 >= end) return;
    if (live) step = *live;
    ChaChaKey key;
#pragma unroll
    for (int i = 0; i < 8; i++) key.word[i] = words[i];
    u32 x[16];
    chacha_block(key, block, 0x6e6f6973u, step, x);
#pragma unroll
    for (int pair = 0; pair < 8; pair++) {
        F r = radius(x[2 * pair]), s, c;
        if (x[2 * pair] < (1u << 16)) {
            u32 more[16], second = 0;
            chacha_block(key, block, 0x7461696cu, step, more);
#pragma unroll
            for (int i = 0; i < 16; i++) second = i == 2 * pair ? more[i] : second;
            r = rare_radius(x[2 * pair], second);
        }
        sin_cos_turn(x[2 * pair + 1], s, c);
        // Products of two f32 numbers are exact in f64.
        D z[2] = {D((double)r.v) * (double)c.v, D((double)r.v) * (double)s.v};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            u64 e = at + (2 * pair + k) * 16;
            if (e < first || e >= end) continue;
            D sum = D((double)y[e - first]) + std * z[k];
            y[e - first] = (T)((sum + magic) - magic).v;
        }
    }
}
#define CHACHA(T, S)                                                                                           \
    KERNEL chacha_gaussian_##S(T* y, i64 n, const u32* key, u64 step, u64 first, double std, double magic,     \
                               const u64* live) {                                                              \
        gaussian_body(y, n, key, step, first, std, magic, live);                                               \
    }
CHACHA(float, f32)
CHACHA(double, f64)

// The key of a release is derived by three blocks in sequence: from the step, the scale of the noise, and the digest of the sum.
KERNEL chacha_release(const __grid_constant__ ChaChaKey key, u64 step, u64 context0, u64 context1, const u32* digest, u32* out,
                      const u64* live) {
    if (threadIdx.x) return;
    if (live) step = *live;
    u64 low[3] = {0x64657269ull << 32, context0, 0}, high[3] = {step, context1, 0};
    if (digest) {
        low[2] = digest[0] | (u64)digest[1] << 32;
        high[2] = digest[2] | (u64)digest[3] << 32;
    }
    ChaChaKey now = key;
#pragma unroll 1
    for (int i = 0; i < 3; i++) {
        u32 x[16];
        chacha_block(now, (u32)low[i], (u32)(low[i] >> 32), high[i], x);
#pragma unroll
        for (int w = 0; w < 8; w++) now.word[w] = x[w];
    }
#pragma unroll
    for (int w = 0; w < 8; w++) out[w] = now.word[w];
}

// NH of a chunk, computed twice: each thread processes four pairs of words; for each pair it reads 8 bytes and computes two products of
// sums of a word and a key word, so that the pass is bound by memory. Integer sums mod 2⁶⁴ are the same in any order.
KERNEL chacha_digest(const u32* words, i64 n, const u32* key, u32* out) {
    SHARED(u64, parts, [2][8]);
    i64 from = (i64)blockIdx.x * 2048, count = n - from < 2048 ? n - from : 2048;
    u64 sum[2] = {0, 0};
    // Word i of the first half of a block of 32 is paired with word i of the second half; missing words are zeros.
    for (i64 pair = threadIdx.x; pair < (count + 31) / 32 * 16; pair += 256) {
        i64 i = pair / 16 * 32 + pair % 16;
        u32 a = i < count ? words[from + i] : 0, b = i + 16 < count ? words[from + i + 16] : 0;
        sum[0] += (u64)(a + key[i]) * (b + key[i + 16]);
        sum[1] += (u64)(a + key[i + 32]) * (b + key[i + 48]);
    }
#pragma unroll
    for (int t = 0; t < 2; t++) {
        for (int d = 16; d; d /= 2) sum[t] += __shfl_down_sync(0xffffffffu, sum[t], d);
        if (threadIdx.x % 32 == 0) parts[t][threadIdx.x / 32] = sum[t];
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        u64 total = 0;
        for (int w = 0; w < 8; w++) total += parts[threadIdx.x][w];
        out[4 * (i64)blockIdx.x + 2 * threadIdx.x] = (u32)total;
        out[4 * (i64)blockIdx.x + 2 * threadIdx.x + 1] = (u32)(total >> 32);
    }
}
