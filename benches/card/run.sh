#!/usr/bin/env bash
# Runs a bundle on a machine with a card: all suites, compute-sanitizer, and the benchmarks beside PyTorch, with a table at the end.
#
#   card/run.sh [folder for the results]
#
# PRISMGRAD_NVRTC names the folder of libnvrtc if it is not found automatically. The exit status is 1 if a suite fails.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${1:-$PWD/card-results}"
mkdir -p "$out"
export PRISMGRAD_DEVICE=cuda PRISMGRAD_ON_CARD=1
failed=0

suite() { # name, command…
  local name="$1" start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then
    echo "$name: passed in $((SECONDS - start)) s"
  else
    echo "$name: FAILED, see $out/$name.log"
    grep -E "panicked|ERROR SUMMARY|error" "$out/$name.log" | head -5
    failed=1
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee "$out/card.txt"
[ -s "$out/card.txt" ] || { echo "no card: nvidia-smi says nothing" >&2; exit 1; }

for t in "$here"/test_cuda*; do suite "$(basename "$t")" "$t"; done
suite "test_devices" "$here/test_engine" devices::
# A fault is reported by the launch that caused it, and guarded memory detects accesses outside a block.
for mode in guard poison; do
  suite "test_cuda_ops_$mode" env PRISMGRAD_CUDA_POOL=$mode PRISMGRAD_CUDA_SYNC=1 "$here/test_cuda" registry::
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    suite "sanitizer_$tool" compute-sanitizer --tool $tool --error-exitcode 9 "$here/test_cuda" every_op
  done
else
  echo "compute-sanitizer: not on this machine, left out"
fi

"$here/bench_cases" gemm gpt/ elt attn dp/gpt --isolate --min-seconds 2 >"$out/prismgrad.jsonl" 2>"$out/prismgrad.err" ||
  { echo "bench_cases: FAILED, see $out/prismgrad.err"; failed=1; }
"$here/bench_cases" gpt/M dp/gptM/all-layer --min-seconds 1 --profile >/dev/null 2>"$out/profile.txt"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  python3 "$here/torch_gpu.py" >"$out/torch.jsonl" 2>"$out/torch.err" || { echo "torch_gpu.py: FAILED"; failed=1; }
else
  echo "PyTorch with CUDA: not on this machine, its column stays empty"
  : >"$out/torch.jsonl"
fi
python3 "$here/table.py" "$out" | tee "$out/table.md"
exit $failed
