#!/usr/bin/env bash
# Scores a model, allocates ranks, compresses it at several ratios in one run and reports perplexity against size.
# The other scripts name a model and call this one.
#
#   MODEL=meta-llama/Llama-2-7b-hf RATIOS="20 30" bash scripts/compress.sh
#
# Variables, besides those of scripts/settings.sh:
#   MODEL          local folder, GGUF file or hub id
#   RATIOS         percentages of decoder-layer linear weights to remove (default: 10 20 30 40 50)
#   METHOD         compression method, flatllm or flatllm+ (default: flatllm); the names of scores and models of the
#                  latter end in -plus
#   NSAMPLES       windows to compress on (default: 256)
#   RANK_MULTIPLE  1 gives the published floors (default: 8 if heads are 64 wide or more, else 1)
#   WIDTH_MULTIPLE of MLP widths (default: 64 where it costs next to nothing, else the rank's)
#   PRUNE_QK       1 prunes Q and K too (default: they stay whole)
#   SHAPE          stock gives models of the dense class, whose names end in -stock, without scores (default: per-layer)
#   OVERWRITE      1 does ratios again whose ranks, or record and model, are there (default: they are left alone)
# Arguments go to main.py; what changes the ranks is a variable here, since compute_rank.py needs it too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
: "${MODEL:?is not set; name a local folder or a hub id}"
places "$MODEL"
ratios="${RATIOS:-10 20 30 40 50}"
method="${METHOD:-flatllm}"
rank_flags=()
[[ -z "${RANK_MULTIPLE:-}" ]] || rank_flags+=(--rank_multiple "$RANK_MULTIPLE")
[[ -z "${WIDTH_MULTIPLE:-}" ]] || rank_flags+=(--width_multiple "$WIDTH_MULTIPLE") flags+=(--width_multiple "$WIDTH_MULTIPLE")
if [[ "${PRUNE_QK:-}" == 1 ]]; then
    rank_flags+=(--prune_qk)
    flags+=(--prune_qk)
fi

folder="$out/$name" # main.py puts the percentage behind it, unless there is only one
if [[ "$method" == "flatllm+" ]]; then # allocates by damage, and takes rotary pairs of Q and K
    folder+=-plus
    scores="${BI_SCORE:-$scores-plus}"
    rank_flags+=(--importance_method damage --prune_qk)
fi

if [[ "${SHAPE:-}" == stock ]]; then # one for all layers, whatever matters most
    folder+=-stock
    flags+=(--shape stock)
    kind="${method}_stock"
else
    kind="$method"
    [[ "$method" != "flatllm+" ]] || flags+=(--importance_method damage)
    left=()
    for percent in $ratios; do
        if [[ "${OVERWRITE:-}" != 1 && -e "$scores/ranks_$percent.json" ]]; then
            printf '\n%s is there and used as it is; OVERWRITE=1 makes it anew\n' "$scores/ranks_$percent.json"
        else
            left+=("$percent")
        fi
    done
    if ((${#left[@]} > 0)); then
        [[ -e "$scores/importance.json" ]] ||
            score "$MODEL" "$scores" "$records" --sparsity_ratio "${left[@]}" "${rank_flags[@]}" "$@"
        run "$PYTHON" compute_rank.py --bi_score "$scores" --sparsity_ratio "${left[@]}" "${rank_flags[@]}"
    fi
    flags+=(--bi_score "$scores")
fi

left=()
for percent in $ratios; do
    record="$records/${name}_${kind}_$percent.json"
    if [[ "${OVERWRITE:-}" != 1 && -e "$record" && -e "$folder-$percent/config.json" ]]; then
        printf '\n%s is there; OVERWRITE=1 does it again\n' "$record"
    else
        left+=("$percent")
    fi
done
if ((${#left[@]} > 0)); then
    ((${#left[@]} > 1)) || folder+="-${left[0]}"
    run "${main[@]}" --prune_method "$method" --model "$MODEL" --sparsity_ratio "${left[@]}" \
        --nsamples "${NSAMPLES:-256}" --save "$records" --save_model "$folder" "${flags[@]}" "$@"
fi
run "$PYTHON" -m flatllmbench.report "$out/records" --out "$out"
