#!/usr/bin/env bash
# All that needs a CUDA device, in one command of under nine minutes on an H200:
#   bash tools/bench/gpu.sh OUT_FOLDER [python]
# The tests of tests/gpu, the head against the textbook head (fp32, and TF32 on), the data.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-tools/bench/results}
python=${2:-python3}
mkdir -p "$out"
failed=0

head() {
    "$python" tools/bench/head.py --device cuda --steps 5 --seconds 0 "$@" || failed=1
}

timeout 150 "$python" -m pytest tests/gpu -q | tee "$out/gpu_tests.txt" || failed=1
head --classes 100000,1000000 --batch 4096 --rate 1,0.1,0.01 --dtype bf16 \
    --json "$out/head_gpu_bf16.json"
head --classes 1000000 --batch 1024,8192 --rate 1,0.3,0.1 --dtype bf16 --only ours \
    --json "$out/head_gpu_batches.json"
head --classes 1000000 --batch 4096 --rate 1,0.1 --dtype tf32 --json "$out/head_gpu_tf32.json"
head --classes 1000000 --batch 4096 --rate 1,0.1 --dtype bf16 --only ours \
    --centers fp16 --momentum int8 --json "$out/head_gpu_fp16_int8.json"
head --classes 10000000 --batch 4096 --rate 0.1,0.01 --dtype bf16 --only ours \
    --json "$out/head_gpu_1e7.json"
head --classes 1000000 --batch 4096 --rate 0.1 --dtype bf16 \
    --margins arcface,cosface,adaface,magface,curricularface,mv_softmax,elasticface,adacos \
    --json "$out/margins_gpu.json"
# Identities by the ten million; centers fp16 on the device, momentum there in 8 bits or in pinned
# host memory. What the card cannot hold fails alone.
for places in "1e7,5e7 device" "1e8 states"; do
    set -- $places
    "$python" tools/bench/scale.py --device cuda --identities "$1" --dim 512 --batch 4096 \
        --rate 0.01,0.1 --state fp16+int8 --place "$2" --seconds 2 \
        --json "$out/scale_gpu_$2.json" || failed=1
done
"$python" tools/bench/data.py --parts loaders --threads 2,4,8 --seconds 3 --rounds 1 \
    --json "$out/data_gpu.json" || failed=1
exit $failed
