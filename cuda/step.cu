#include "prelude.cuh"
// The counters of a training step, for which the host would otherwise have to wait. One block of 256. The counters stay on the device and
// are copied to the host when a report's loss is requested.
//
//   step_losses_{f32,f64,bf16,f16} (const T* losses, i64 n, i64 before, StepCounters* counters, u64 step, i32 guard,
//                                        const u64* live)
//       counters.loss += Σ losses, in f64 and a fixed order. With guard, a non-finite loss stops training: stop = step
//       (counted from 1; live, if not null, holds it, so that a captured graph can be replayed), sample = before + its
//       position, value = the loss; only the first one is recorded. Optimizers do nothing once stop is set, so that the parameters
//       keep their values from the last good step, however late the host reads the counters.

struct StepCounters {
    double loss;
    u64 stop, sample;
    double value;
    u64 pairs, clipped, broken; // as clip_weights (factored.cu) counts them
    u64 reserved;
};
template <class T> DEV void losses_body(const T* losses, i64 n, i64 before, StepCounters* counters, u64 step, i32 guard, const u64* live) {
    SHARED(double, red, [8]);
    SHARED(i64, first, [256]);
    double sum = 0;
    i64 bad = n;
    for (i64 i = threadIdx.x; i < n; i += 256) {
        double v = (double)to_acc(losses[i]);
        sum += v;
        if (bad == n && !(v - v == 0.)) bad = i;
    }
    first[threadIdx.x] = bad;
    int any = __syncthreads_or(bad < n);
    sum = block_sum_256(sum, red);
    if (threadIdx.x != 0) return;
    counters->loss += sum;
    if (!guard || !any || counters->stop) return;
    for (int t = 1; t < 256; t++) bad = min64(bad, first[t]);
    counters->stop = live ? *live : step;
    counters->sample = (u64)(before + bad);
    counters->value = (double)to_acc(losses[bad]);
}
#define LOSSES(T, S)                                                                                           \
    KERNEL step_losses_##S(const T* losses, i64 n, i64 before, StepCounters* counters, u64 step, i32 guard,            \
                           const u64* live) {                                                                  \
        losses_body(losses, n, before, counters, step, guard, live);                                             \
    }
FOR_FLOATS(LOSSES)
