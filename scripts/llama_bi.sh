#!/usr/bin/env bash
# Importance scores of one or several models, from which compute_rank.py allocates ranks for any target.
#
# Hardware: one A100 40GB; host memory for the weights, 14 GB for the default.
#
#   bash scripts/llama_bi.sh
#   MODELS="meta-llama/Llama-2-7b-hf mistralai/Mistral-7B-v0.1" bash scripts/llama_bi.sh
#   python compute_rank.py
#
# Variables, besides those of scripts/settings.sh:
#   MODELS  local folders or hub ids, separated by spaces (default: meta-llama/Llama-2-7b-hf)
#   OUT     gets <model>/importance.json (default: ranks)
#   OVERWRITE  1 scores models again whose scores are there (default: they are left alone)
# Arguments go to main.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
for model in ${MODELS:-meta-llama/Llama-2-7b-hf}; do
    folder="${OUT:-ranks}/$(basename "$model")"
    if [[ "${OVERWRITE:-}" != 1 && -e "$folder/importance.json" ]]; then
        printf '%s is there; OVERWRITE=1 scores the model again\n' "$folder/importance.json"
        continue
    fi
    score "$model" "$folder" "$folder" "$@"
done
