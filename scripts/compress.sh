#!/usr/bin/env bash
# Scores a model, allocates ranks, compresses it at several ratios and reports perplexity against size.
# The other scripts name a model and call this one.
#
#   MODEL=meta-llama/Llama-2-7b-hf RATIOS="20 30" bash scripts/compress.sh
#
# Variables, besides those of scripts/settings.sh:
#   MODEL          local folder or hub id
#   RATIOS         percentages of decoder-layer linear weights to remove (default: 10 20 30 40 50)
#   NSAMPLES       windows to compress on (default: 256)
#   RANK_MULTIPLE  1 gives the published floors (default: 8 if heads are 64 wide or more, else 1)
#   BI_SCORE       folder of the importance scores, made if there are none (default: ranks/<model>)
#   OUT            gets <model>-<percent>/, logs/, README.md and perplexity.png (default: results/<model>)
# Arguments go to main.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
: "${MODEL:?is not set; name a local folder or a hub id}"
name="$(basename "$MODEL")"
ratios="${RATIOS:-10 20 30 40 50}"
scores="${BI_SCORE:-ranks/$name}"
out="${OUT:-results/$name}"
rank_flags=()
[[ -z "${RANK_MULTIPLE:-}" ]] || rank_flags+=(--rank_multiple "$RANK_MULTIPLE")

[[ -e "$scores/importance.json" ]] || score "$MODEL" "$scores" "$@"
# shellcheck disable=SC2086 # one word per ratio
run "$PYTHON" compute_rank.py --bi_score "$scores" --sparsity_ratio $ratios "${rank_flags[@]}"

records=()
for percent in $ratios; do
    run "$PYTHON" main.py --prune_method flatllm --model "$MODEL" --sparsity_ratio "$percent" --bi_score "$scores" \
        --nsamples "${NSAMPLES:-256}" --save "$out/logs" --save_model "$out/$name-$percent" "${flags[@]}" "$@"
    records+=("$out/logs/${name}_flatllm_$percent.json")
done
run "$PYTHON" -m flatllmbench.report "${records[@]}" --out "$out"
