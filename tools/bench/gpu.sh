#!/usr/bin/env bash
# All that needs a GPU, in less than eight minutes: bash tools/bench/gpu.sh OUT; --help says more.
# PYTHON names another interpreter than python3.
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # nothing needs to be installed
exec "${PYTHON:-python3}" "$root/tools/bench/gpu.py" "$@"
