#!/usr/bin/env bash
# Mistral-7B-v0.1 at 10-50 %, calibrated and measured on WikiText-2 (256 windows of 4096 tokens, seed 42): its column of
# Table 1, perplexity.
#
# Hardware: one A100 40GB; 15 GB of host memory for the weights. Planned (benchmarks/plan.py), not run.
# Expected at 20 %, perplexity at length 4096: dense 4.92, FLAT-LLM 6.11.
#
#   bash scripts/mistral.sh
#   MODEL=/data/Mistral-7B-v0.1 DATASET_ROOT=/data bash scripts/mistral.sh   # without a network
#
# Variables: see scripts/compress.sh. Arguments go to main.py.
set -euo pipefail
export RANK_MULTIPLE="${RANK_MULTIPLE:-1}" # the published floors
export MODEL="${MODEL:-mistralai/Mistral-7B-v0.1}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/compress.sh" "$@"
