#include "prelude.cuh"
// Kernels that check the launch path itself: argument passing, shared memory above 48 KiB, order on a stream.
// No op uses them; `Gpu::self_test` and the device tests do.

// y[i] = a * x[i] + y[i]. 12 bytes and 2 FLOPs per element.
extern "C" __global__ void __launch_bounds__(256) check_axpy_f32(const float* x, float* y, float a, i64 n) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) y[i] += a * x[i];
}

// A struct passed by value between arguments of other sizes, which checks that offsets and padding agree with the host's.
struct CheckArgs {
    i64 dims[3];
    u32 scale[2];
};
extern "C" __global__ void __launch_bounds__(32) check_args_f32(u32 first, CheckArgs s, float last, i64* out) {
    if (threadIdx.x == 0) {
        out[0] = (i64)first;
        for (int i = 0; i < 3; i++) out[1 + i] = s.dims[i];
        for (int i = 0; i < 2; i++) out[4 + i] = (i64)s.scale[i];
        out[6] = (i64)last;
    }
}

// One block reverses n floats through dynamic shared memory of n * 4 bytes, up to the device's limit.
extern "C" __global__ void __launch_bounds__(256) check_reverse_f32(const float* x, float* y, u32 n) {
    DYN_SHARED(float, buf);
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) buf[i] = x[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) y[i] = buf[n - 1 - i];
}

// One warp computes C [16, 8] f32 = A [16, 16]·B [16, 8] of 16-bit row-major values: global to shared memory by cp.async (A completely, B
// except for half a row that is filled with zeros), fragments by ldmatrix, the product by mma. Each block computes one such product.
template <class T, class M> DEV void check_mma_body(const T* a, const T* b, float* c, M mma) {
    SHARED(T, as, [16][24]); // rows 48 bytes apart: 16-byte aligned, in different banks
    SHARED(T, bs, [16][24]);
    int l = threadIdx.x, row = l >> 1, half = (l & 1) * 8;
    cp_async16(&as[row][half], a + (i64)blockIdx.x * 256 + row * 16 + half);
    cp_async16(&bs[row][half], b + (i64)blockIdx.x * 128 + row * 8, half ? 0 : 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    u32 fa[4], fb[2], fz[2];
    float d[4] = {}, z[4] = {};
    ldmatrix_x4(fa, &as[l & 15][(l >> 4) * 8]);
    ldmatrix_x2_trans(fb, &bs[l & 15][0]);
    ldmatrix_x2_trans(fz, &bs[l & 15][8]);
    mma(d, fa, fb);
    mma(z, fa, fz);
    for (int i = 0; i < 4; i++) c[(i64)blockIdx.x * 128 + ((l >> 2) + (i >> 1) * 8) * 8 + (l & 3) * 2 + (i & 1)] = d[i] + z[i];
}
extern "C" __global__ void __launch_bounds__(32) check_mma_bf16(const bf16* a, const bf16* b, float* c) {
    check_mma_body(a, b, c, [](float (&d)[4], const u32 (&x)[4], const u32 (&y)[2]) { mma_bf16(d, x, y); });
}
extern "C" __global__ void __launch_bounds__(32) check_mma_f16(const f16* a, const f16* b, float* c) {
    check_mma_body(a, b, c, [](float (&d)[4], const u32 (&x)[4], const u32 (&y)[2]) { mma_f16(d, x, y); });
}

// One warp computes C [16, 8] = A [16, 8]·B [8, 8] of f32 values that tf32 represents exactly.
extern "C" __global__ void __launch_bounds__(32) check_mma_tf32(const float* a, const float* b, float* c) {
    int l = threadIdx.x, g = l >> 2, t = l & 3;
    u32 fa[4], fb[2];
    float d[4] = {};
    for (int i = 0; i < 4; i++) fa[i] = __float_as_uint(to_tf32(a[(g + (i & 1) * 8) * 8 + t + (i >> 1) * 4]));
    for (int i = 0; i < 2; i++) fb[i] = __float_as_uint(to_tf32(b[(t + i * 4) * 8 + g]));
    mma_tf32(d, fa, fb);
    for (int i = 0; i < 4; i++) c[(g + (i >> 1) * 8) * 8 + t * 2 + (i & 1)] = d[i];
}
