#!/usr/bin/env bash
# All that needs a CUDA device, in one command, or a part of it:
#   bash tools/bench/gpu.sh OUT_FOLDER [python] [all|tests|head|scale|data]
# tests: tests/gpu and all kernels. head: against the textbook head (fp32, and TF32 on). scale: ten,
# fifty and a hundred million identities, tile by tile and by the fused kernels, under eight minutes
# on an H200; it says how long it should take. data: loaders.
# DRY=1 runs every command on the CPU at a hundredth of the sizes, to find what is misspelt.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-tools/bench/results}
python=${2:-python3}
part=${3:-all}
case $part in
    all | tests | head | scale | data) ;;
    *) echo "gpu.sh: part must be all, tests, head, scale or data, got $part" >&2; exit 2 ;;
esac
mkdir -p "$out"
failed=0
dry=${DRY:-}
bf16=bf16 tf32=tf32 device=cuda passes=tiles,fused
[ -z "$dry" ] || { bf16=fp32 tf32=fp32 device=cpu passes=tiles; }

wants() { [ "$part" = all ] || [ "$part" = "$1" ]; }
few() { if [ -n "$dry" ]; then echo "$2"; else echo "$1"; fi; }
head() {
    "$python" tools/bench/head.py --device $device --steps 5 --seconds 0 "$@" || failed=1
}
scale() {
    "$python" tools/bench/scale.py --device $device --state fp16+int8 --seconds "$(few 2 0)" \
        --dim "$(few 512 16)" --batch "$(few 4096 32)" "$@" || failed=1
}

b=$(few 4096 32) m1=$(few 1000000 2000)
if wants tests; then
    timeout 400 "$python" -m pytest -q tests/gpu tests/test_kernels.py tests/test_fused_kernels.py \
        -k "cuda or gpu" | tee "$out/gpu_tests.txt" || failed=1
fi
if wants head; then
    head --classes "$(few 100000,1000000 500,2000)" --batch "$b" --rate 1,0.1,0.01 --dtype $bf16 \
        --json "$out/head_gpu_bf16.json"
    head --classes "$m1" --batch "$(few 1024,8192 16,64)" --rate 1,0.3,0.1 --dtype $bf16 --only ours \
        --json "$out/head_gpu_batches.json"
    head --classes "$m1" --batch "$b" --rate 1,0.1 --dtype $tf32 --json "$out/head_gpu_tf32.json"
    head --classes "$m1" --batch "$b" --rate 1,0.1 --dtype $bf16 --only ours \
        --centers fp16 --momentum int8 --json "$out/head_gpu_fp16_int8.json"
    head --classes "$(few 10000000 20000)" --batch "$b" --rate 0.1,0.01 --dtype $bf16 --only ours \
        --json "$out/head_gpu_1e7.json"
    head --classes "$m1" --batch "$b" --rate 0.1 --dtype $bf16 \
        --margins arcface,cosface,adaface,magface,curricularface,mv_softmax,elasticface,adacos \
        --json "$out/margins_gpu.json"
fi
if wants scale; then
    # fp16 centers on the device; 8-bit momentum there, or in pinned host memory for the hundred
    # million. What the card cannot hold fails alone.
    scale --identities "$(few 1e7,5e7 1e5,5e5)" --rate 0.01,0.1 --passes $passes --place device \
        --json "$out/scale_gpu_device.json"
    scale --identities "$(few 1e8 1e6)" --rate 0.01,0.1 --passes $passes --place states \
        --json "$out/scale_gpu_states.json"
    scale --identities "$(few 1e6 1e4)" --rate 1,0.1 --passes $passes --place device \
        --json "$out/scale_gpu_fused.json"
fi
if wants data; then
    "$python" tools/bench/data.py --parts loaders --threads 2,4,8 --seconds 3 --rounds 1 \
        --json "$out/data_gpu.json" || failed=1
fi
exit $failed
