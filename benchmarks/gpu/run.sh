#!/usr/bin/env bash
# All that this project can say about a GPU, in one command:
#
#   benchmarks/gpu/run.sh                       a Llama-3.2-1B of random weights, end to end
#   MODEL=Qwen/Qwen2.5-1.5B benchmarks/gpu/run.sh    or a model of your own, folder or hub name
#   benchmarks/gpu/run.sh --smoke               minutes, without a GPU: only shows it is in place
#
# 1. every kernel against a float64 product (pytest -m gpu);
# 2. all kernels and the dense product on the layers of real models, 1 to 4096 tokens;
# 3. prefill and decode under vLLM, 2:4 against dense, with kernels timed for this GPU.
#
# Results: gpu-*.json in benchmarks/results, or in $RESULTS. PYTHON is the interpreter to use.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
smoke=false
if [ "${1:-}" = --smoke ]; then
  smoke=true
elif [ $# -gt 0 ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if $smoke; then results=$work/results; else results=${RESULTS:-benchmarks/results}; fi
mkdir -p "$results"
step() { echo "== $*" >&2; }

gpu=$("$python" -c "
import re, torch
name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ''
print(re.sub(r'[^a-z0-9]+', '-', name.lower().replace('nvidia', '')).strip('-'))")
if [ -z "$gpu" ] && ! $smoke; then
  echo "torch sees no CUDA device; --smoke runs without one" >&2
  exit 1
fi
gpu=${gpu:-none}

step "correctness of every kernel"
failed=0
"$python" -m pytest -q -m gpu tests/gpu --junitxml="$work/tests.xml" || failed=$?
"$python" -m benchmarks.gpu.outcomes "$work/tests.xml" --output "$results/gpu-tests-$gpu.json"

step "kernels on the layers of real models"
if $smoke; then sweep=(--smoke); else sweep=(); fi
"$python" -m benchmarks.gpu.kernel_sweep "${sweep[@]}" --output "$results/gpu-kernels-$gpu.json"

step "end to end under vLLM"
if $smoke; then
  shape=tiny
  bench=(--batch-sizes 1,2 --input-length 16 --output-length 4 --repeats 1 --samples 1
    --sequence-length 64 --dtype float32)
else
  shape=llama-1b
  bench=(--batch-sizes 1,2,4,8,16,32,64 --input-length 512 --output-length 128 --repeats 5)
fi
model=${MODEL:-}
if [ -z "$model" ]; then
  model=$work/$shape
  "$python" -m benchmarks.gpu.random_model "$shape" "$model"
fi
# Speed does not depend on which weights were kept, so the quickest method will do.
"$python" -m sparseserve prune-and-export "$model" --method magnitude \
  --samples 2 --sequence-length 64 --format packed24 -o "$work/sparse"
"$python" -m sparseserve bench "$work/sparse" --baseline "$model" "${bench[@]}" \
  -o "$results/gpu-bench-$gpu.json"

step "results"
ls -l "$results"/gpu-*.json >&2
if [ "$failed" -ne 0 ]; then
  echo "some kernels are not correct on this GPU: see gpu-tests-$gpu.json" >&2
  exit "$failed"
fi
