#!/usr/bin/env bash
# Llama-2 70B at 10-50 %, calibrated and measured on WikiText-2 (256 windows of 4096 tokens, seed 42): its column of
# Table 1, perplexity.
#
# Hardware: four A100 40GB, or one with PROCESSES=1. Host memory of 64 GB will do: layers are read from disk when the
# weights (138 GB) do not fit. Planned (benchmarks/plan.py), not run.
# Expected at 20 %, perplexity at length 4096: dense 3.12, FLAT-LLM 4.33.
#
#   bash scripts/llama_70b.sh
#   PROCESSES=1 bash scripts/llama_70b.sh
#   MODEL=/data/Llama-2-70b-hf DATASET_ROOT=/data bash scripts/llama_70b.sh   # without a network
#
# Variables: see scripts/compress.sh. Arguments go to main.py.
set -euo pipefail
export RANK_MULTIPLE="${RANK_MULTIPLE:-1}" # the published floors
export PROCESSES="${PROCESSES:-4}"
export MODEL="${MODEL:-meta-llama/Llama-2-70b-hf}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/compress.sh" "$@"
