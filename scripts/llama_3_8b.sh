#!/usr/bin/env bash
# Llama-3 8B at 10-50 %, calibrated and measured on WikiText-2 (256 windows of 4096 tokens, seed 42): its column of
# Table 1, perplexity.
#
# Hardware: one A100 40GB; 16 GB of host memory for the weights. Planned (benchmarks/plan.py), not run.
# Expected at 20 %, perplexity at length 4096: dense 5.75, FLAT-LLM 8.15.
#
#   bash scripts/llama_3_8b.sh
#   MODEL=/data/Meta-Llama-3-8B DATASET_ROOT=/data bash scripts/llama_3_8b.sh   # without a network
#
# Variables: see scripts/compress.sh. Arguments go to main.py.
set -euo pipefail
export RANK_MULTIPLE="${RANK_MULTIPLE:-1}" # the published floors
export MODEL="${MODEL:-meta-llama/Meta-Llama-3-8B}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/compress.sh" "$@"
