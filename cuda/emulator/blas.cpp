// A stand-in for libcublasLt: the few functions that src/device/cuda/blas.rs calls, computed in f64 one element at a time on
// the emulated streams. It follows the documentation's words (column-major, operations on A and B, one bias per row of D), so
// that what the crate asks for is checked against them.
#define CUEMU_RUNTIME
#include "cuemu.h"
#include "cuemu_api.h"
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

int prismgrad_emu_queue(void* stream, const char* what, std::function<int()> run, const std::vector<std::pair<uint64_t, size_t>>& reads, std::pair<uint64_t, size_t> writes);

namespace {
enum { OK = 0, INVALID = 7 };
struct Layout { int type; uint64_t rows, cols; int64_t ld; int32_t batch = 1; int64_t step = 0; };
struct Desc { int sums, scale; int32_t op[2] = {0, 0}; int32_t epilogue = 1; const void* bias = nullptr; };
size_t width(int type) { return type == 1 ? 8 : type == 0 ? 4 : 2; }
double get(const void* p, int64_t i, int type) {
    switch (type) {
        case 0: return ((const float*)p)[i];
        case 1: return ((const double*)p)[i];
        case 2: return cuemu_f16_to_f32(((const uint16_t*)p)[i]);
        default: { uint32_t u = (uint32_t)((const uint16_t*)p)[i] << 16; float f; memcpy(&f, &u, 4); return f; }
    }
}
void put(void* p, int64_t i, int type, double v) {
    float f = (float)v;
    if (type == 1) ((double*)p)[i] = v;
    else if (type == 0) ((float*)p)[i] = f;
    else ((uint16_t*)p)[i] = type == 14 ? cuemu_f32_to_bf16(f) : cuemu_f32_to_f16(f);
}
// From the first byte to the last that the matrices of a layout hold.
std::pair<uint64_t, size_t> range(const void* p, const Layout& l) {
    return {(uint64_t)p, ((l.batch - 1) * l.step + (l.cols - 1) * l.ld + l.rows) * width(l.type)};
}
} // namespace

#define API extern "C" __attribute__((visibility("default"))) int
API cublasLtCreate(void** h) { static int one; *h = &one; return OK; }
API cublasLtMatmulDescCreate(void** d, int sums, int scale) { *d = new Desc{sums, scale}; return OK; }
API cublasLtMatmulDescSetAttribute(void* d, int a, const void* v, size_t n) {
    Desc& x = *(Desc*)d;
    if ((a == 3 || a == 4) && n == 4) memcpy(&x.op[a - 3], v, 4);
    else if (a == 7 && n == 4) memcpy(&x.epilogue, v, 4);
    else if (a == 8 && n == 8) memcpy(&x.bias, v, 8);
    else return INVALID;
    return OK;
}
API cublasLtMatrixLayoutCreate(void** l, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (ld < (int64_t)rows) return INVALID;
    *l = new Layout{type, rows, cols, ld};
    return OK;
}
API cublasLtMatrixLayoutSetAttribute(void* l, int a, const void* v, size_t n) {
    Layout& x = *(Layout*)l;
    if (a == 5 && n == 4) memcpy(&x.batch, v, 4);
    else if (a == 6 && n == 8) memcpy(&x.step, v, 8);
    else return INVALID;
    return OK;
}
API cublasLtMatmulPreferenceCreate(void** p) { static int one; *p = &one; return OK; }
API cublasLtMatmulPreferenceSetAttribute(void*, int a, const void*, size_t n) {
    return (a == 1 && n == 8) || (a == 3 && n == 4) || (a >= 5 && a <= 8 && n == 4) ? OK : INVALID;
}
struct Found { uint64_t algo[8]; size_t workspace; int state; float waves; int reserved[4]; };
API cublasLtMatmulAlgoGetHeuristic(void*, void* d, void* a, void* b, void* c, void*, void*, int wanted, Found* found, int* count) {
    Desc& x = *(Desc*)d;
    Layout &A = *(Layout*)a, &B = *(Layout*)b, &C = *(Layout*)c;
    uint64_t m = x.op[0] ? A.cols : A.rows, k = x.op[0] ? A.rows : A.cols;
    *count = 0;
    if (wanted < 1 || m != C.rows || k != (x.op[1] ? B.cols : B.rows) || (x.op[1] ? B.rows : B.cols) != C.cols) return INVALID;
    memset(found, 0, sizeof *found);
    found->algo[0] = 0x70726973;
    *count = 1;
    return OK;
}
API cublasLtMatmul(void*, void* d, const void* alpha, const void* pa, void* a, const void* pb, void* b, const void* beta, const void* pc, void* c, void* pd, void* dl, const uint64_t* algo,
                   void*, size_t, void* stream) {
    Desc x = *(Desc*)d;
    Layout A = *(Layout*)a, B = *(Layout*)b, C = *(Layout*)c, D = *(Layout*)dl;
    if (algo[0] != 0x70726973 || pc != pd || ((uint64_t)pa | (uint64_t)pb | (uint64_t)pd) & 15) return INVALID;
    double al = x.scale == 1 ? *(const double*)alpha : *(const float*)alpha, be = x.scale == 1 ? *(const double*)beta : *(const float*)beta;
    std::vector<std::pair<uint64_t, size_t>> in = {range(pa, A), range(pb, B)};
    if (be != 0) in.push_back(range(pc, C));
    if (x.epilogue == 4) in.push_back({(uint64_t)x.bias, D.rows * width(D.type)});
    auto run = [=] {
        int64_t k = x.op[0] ? A.rows : A.cols;
        for (int q = 0; q < D.batch; q++)
            for (uint64_t j = 0; j < D.cols; j++)
                for (uint64_t i = 0; i < D.rows; i++) {
                    double s = 0;
                    for (int64_t p = 0; p < k; p++)
                        s += get(pa, q * A.step + (x.op[0] ? i * A.ld + p : p * A.ld + i), A.type) * get(pb, q * B.step + (x.op[1] ? p * B.ld + j : j * B.ld + p), B.type);
                    int64_t at = q * D.step + j * D.ld + i;
                    double v = al * s + (be != 0 ? be * get(pc, at, C.type) : 0);
                    if (x.epilogue == 4) v += get(x.bias, i, D.type);
                    put(pd, at, D.type, v);
                }
        return 0;
    };
    return prismgrad_emu_queue(stream, "cublasLtMatmul", run, in, range(pd, D)) ? 13 : OK;
}
