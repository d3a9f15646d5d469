#!/usr/bin/env bash
# All that needs a CUDA device, in one command of less than nine minutes, or a part of it:
#   bash tools/bench/gpu.sh OUT_FOLDER [python] [all|tests|head|scale|data]
# In the order of their worth, each with the time that is left; what none was left for is named:
#   head   1. against the textbook head, fp32 and TF32: C 1e6 and 1e5, B 4096, r 1, .1, .01:    37 s
#   tests  2. tests/gpu and all kernels, side by side where pytest-xdist is: 240 s at most
#   head   3. C 1e6, 1e5, 1e7 x B 1024, 4096, 8192 x r 1, .3, .1, .01, by tiles and fused:    105 s
#          4. TF32; sizes of a tile; 16-bit centers and 8-bit momentum; margins:             115 s
# The seconds are what an H200 should take (ESTIMATE=1 says it and measures nothing): 497 s in all.
# Not in all: scale, ten, fifty and a hundred million identities, six minutes; data, loaders.
# DRY=1 runs every command on the CPU at a hundredth of the sizes, to find what is misspelt.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # nothing is installed there
out=${1:-tools/bench/results}
python=${2:-python3}
part=${3:-all}
case $part in
    all | tests | head | scale | data) ;;
    *) echo "gpu.sh: part must be all, tests, head, scale or data, got $part" >&2; exit 2 ;;
esac
mkdir -p "$out"
failed=0
dry=${DRY:-} only_say=${ESTIMATE:+--dry-run}
bf16=bf16 tf32=tf32 device=cuda passes=tiles,fused
[ -z "$dry" ] || { bf16=fp32 tf32=fp32 device=cpu passes=tiles; }

wants() { [ "$part" = all ] && [ "$1" != scale ] && [ "$1" != data ] || [ "$part" = "$1" ]; }
few() { if [ -n "$dry" ]; then echo "$2"; else echo "$1"; fi; }
last=$(few 500 5000) # seconds after which no row begins: the longest takes half a minute
left() { echo $((SECONDS < last ? last - SECONDS : 0)); }
head() {
    "$python" tools/bench/head.py --device $device --steps 5 --seconds "$(few 0.5 0)" \
        --dim "$(few 512 64)" --budget "$(left)" $only_say "$@" || failed=1
}
scale() {
    "$python" tools/bench/scale.py --device $device --state fp16+int8 --seconds "$(few 2 0)" \
        --dim "$(few 512 16)" --batch "$(few 4096 32)" $only_say "$@" || failed=1
}

b=$(few 4096 32) m1=$(few 1000000 2000)
if wants head; then
    head --classes "$(few 1000000,100000 2000)" --batch "$b" --rate "$(few 1,0.1,0.01 1,0.1)" \
        --dtype $bf16 --passes $passes --json "$out/head_gpu_textbook.json"
fi
if wants tests && [ -z "$only_say" ]; then
    "$python" -c "import xdist" 2>/dev/null && beside="-n 8" || beside=
    timeout -s INT -k 10 240 "$python" -m pytest -q $beside \
        tests/gpu tests/head/test_kernels.py tests/head/test_fused_kernels.py -k "cuda or gpu" \
        | tee "$out/gpu_tests.txt" || failed=1
fi
if wants head; then
    head --classes "$(few 1000000,100000,10000000 2000,500)" --dtype $bf16 --only ours \
        --batch "$(few 1024,4096,8192 16,32)" --rate "$(few 1,0.3,0.1,0.01 1,0.01)" \
        --passes $passes --json "$out/head_gpu.json"
    head --classes "$m1" --batch "$b" --rate 1,0.1 --dtype $tf32 --json "$out/head_gpu_tf32.json"
    head --classes "$m1" --batch "$b" --rate 1,0.1 --dtype $bf16 --only ours \
        --tile-mib "$(few 32,512 1,2)" --json "$out/head_gpu_tiles.json"
    head --classes "$m1" --batch "$b" --rate 1,0.1 --dtype $bf16 --only ours --passes $passes \
        --centers fp16 --momentum int8 --json "$out/head_gpu_fp16_int8.json"
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
if wants data && [ -z "$only_say" ]; then
    "$python" tools/bench/data.py --parts loaders --threads 2,4,8 --seconds 3 --rounds 1 \
        --json "$out/data_gpu.json" || failed=1
fi
exit $failed
