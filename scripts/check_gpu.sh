#!/usr/bin/env bash
# The day a GPU is at hand: what the tests on a CPU cannot know, in under 4 minutes, without network; one table.
#
#     scripts/check_gpu.sh [--device cuda] [--seconds 240] [--only NAME]... [--logs FOLDER]
#
# In the environment that has cascade and its extras (pip install -e ".[dev]"). Exit status 1 when a check failed; with
# --device cpu the checks that a CPU can take, to see that the script itself works.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "${PYTHON:-python}" scripts/check_gpu.py "$@"
