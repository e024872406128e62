#!/bin/bash
# The checks that need a GPU, and a table of its speed, in at most eight minutes: benchmarks/speed/gpu.sh
# Needs an installed package with the extra `dev`, and no network. Arguments go to gpu.py, for example
# `--device cpu --small --max_batch 2 --output outputs/gpu` to try it without a GPU. PYTHON names the interpreter.
cd "$(dirname "$0")/../.." || exit 1
export HF_HUB_OFFLINE=1
status=0
timeout 150 "${PYTHON:-python}" -m pytest -q -m gpu tests/test_gpu.py || status=$?
timeout 320 "${PYTHON:-python}" benchmarks/speed/gpu.py "$@" || status=$?
exit $status
