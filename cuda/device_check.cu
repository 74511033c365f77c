#include "prelude.cuh"
// Kernels that check the launch path itself: argument passing, shared memory above 48 KiB, order on a stream.
// No op uses them; `Gpu::self_test` and the device tests do.

// y[i] = a * x[i] + y[i]. 12 bytes and 2 FLOPs an element.
extern "C" __global__ void __launch_bounds__(256) check_axpy_f32(const float* x, float* y, float a, i64 n) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) y[i] += a * x[i];
}

// A struct by value between arguments of other sizes: shows that offsets and padding agree with the host's.
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

// One block reverses n floats through dynamic shared memory: n * 4 bytes of it, up to the device's limit.
extern "C" __global__ void __launch_bounds__(256) check_reverse_f32(const float* x, float* y, u32 n) {
    DYN_SHARED(float, buf);
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) buf[i] = x[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) y[i] = buf[n - 1 - i];
}
