#!/usr/bin/env bash
# Importance scores of one or several models, from which compute_rank.py allocates ranks for any target.
#
# Hardware: one A100 40GB; host memory for the weights, 14 GB for the default.
#
#   bash scripts/llama_bi.sh
#   MODEL=mistralai/Mistral-7B-v0.1 bash scripts/llama_bi.sh
#   python compute_rank.py      # where OUT was set: --bi_score "$OUT/ranks"
#
# Variables, besides those of scripts/settings.sh:
#   MODEL      local folder, GGUF file or hub id (default: meta-llama/Llama-2-7b-hf)
#   MODELS     several, separated by spaces
#   OVERWRITE  1 scores models again whose scores are there (default: they are left alone)
# Arguments go to main.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
read -ra models <<<"${MODELS:-}"
((${#models[@]} > 0)) || models=("${MODEL:-meta-llama/Llama-2-7b-hf}")
if ((${#models[@]} > 1)) && [[ -n "${BI_SCORE:-}" ]]; then
    printf 'error: BI_SCORE is the folder of one model, and MODELS names %d; leave one out\n' "${#models[@]}" >&2
    exit 2
fi
for model in "${models[@]}"; do
    places "$model"
    if [[ "${OVERWRITE:-}" != 1 && -e "$scores/importance.json" ]]; then
        printf '%s is there; OVERWRITE=1 scores the model again\n' "$scores/importance.json"
        continue
    fi
    score "$model" "$scores" "$records" "$@"
done
printf '\nNext: python compute_rank.py%s\n' "${OUT:+ --bi_score $OUT/ranks}"
