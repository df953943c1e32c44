#!/usr/bin/env bash
# Evaluates a model, dense or compressed, on tasks of the evaluation harness (the package lm_eval): by default the
# paper's seven, MMLU with 5 examples and PIQA, WinoGrande, HellaSwag, ARC-e, ARC-c and OpenBookQA with none.
#
#   bash scripts/eval.sh meta-llama/Llama-2-7b-hf
#   bash scripts/eval.sh out/Llama-2-7b-hf-20
#   TASKS=piqa,arc_easy DATASET_ROOT=/data bash scripts/eval.sh out/Llama-2-7b-hf-20  # no network
#   TASKS=pydocs_endings,pydocs_text INCLUDE_PATH=tests/tasks bash scripts/eval.sh models/pydocs-llama  # no network
#
# Hardware: the whole model on one device; a 7B model takes one A100 40GB.
# Expected of Llama-2 7B, mean accuracy: dense 62.14, FLAT-LLM at 20 % 55.16.
#
# Relative paths start at the repository's root.
#
# Variables, besides CACHE_DIR, DEVICE and PYTHON of scripts/settings.sh:
#   TASKS         tasks or groups of tasks, separated by commas
#   NUM_FEWSHOT   examples before every question
#   LIMIT         questions of every task, for a trial (default: all)
#   BATCH_SIZE    questions run at a time (default: 8)
#   INCLUDE_PATH  folder with task definitions of your own
#   DATASET_ROOT  folder with copies of the tasks' data, each in a folder called like its hub id, such as baber/piqa
#                 (default: none, the hub is asked)
#   OUT           gets the record and the log (default: logs)
# Further arguments go to the program: bash scripts/eval.sh FOLDER --dtype float32
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
model="${1:?is missing; name a local folder or a hub id}"
flags=(--save "${OUT:-logs}")
for name in TASKS NUM_FEWSHOT LIMIT BATCH_SIZE INCLUDE_PATH DATASET_ROOT DEVICE CACHE_DIR; do
    [[ -z "${!name:-}" ]] || flags+=("--${name,,}" "${!name}")
done
run "$PYTHON" -m flatllmbench.zero_shot "$model" "${flags[@]}" "${@:2}"
