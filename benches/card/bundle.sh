#!/usr/bin/env bash
# Builds a bundle for a machine with a card but without cargo: stripped tests and benchmarks, the PyTorch scripts, and one command.
#
#   benches/card/bundle.sh            # makes target/card.tar.gz
#   tar xzf card.tar.gz && card/run.sh   # there: needs a driver and NVRTC; PyTorch and compute-sanitizer if they are there
set -euo pipefail
cd "$(dirname "$0")/../.."
out=target/card
rm -rf "$out"
mkdir -p "$out"
tests=(cuda cuda_device cuda_blas engine)
cargo build --release --example bench_cases
cp target/release/examples/bench_cases "$out/"
# The tests are those of the emulated device; with PRISMGRAD_ON_CARD=1 they use the real one.
args=()
for t in "${tests[@]}"; do args+=(--test "$t"); done
cargo test --release --features emulator --no-run --message-format=json "${args[@]}" 2>/dev/null |
  python3 -c '
import json, shutil, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["kind"] == ["test"]:
        shutil.copy(m["executable"], sys.argv[1] + "/test_" + m["target"]["name"])
' "$out"
for t in "${tests[@]}"; do [ -x "$out/test_$t" ] || { echo "bundle: no binary of $t" >&2; exit 1; }; done
strip "$out"/bench_cases "$out"/test_*
cp benches/card/run.sh benches/card/torch_gpu.py benches/card/table.py "$out/"
tar czf target/card.tar.gz -C target card
du -sh "$out" target/card.tar.gz
