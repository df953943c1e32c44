#!/usr/bin/env bash
# Trains adapters on a compressed model and merges them: an ordinary folder, FOLDER-recovered, whose recovery.json has
# the perplexity before and after. Nothing else calls this: compression trains nothing, and its tables are without it.
#
#   bash scripts/recover.sh out/Llama-2-7b-hf-20
#   STEPS=20 SEQLEN=256 BATCH_SIZE=1 EVAL_NSAMPLES=16 bash scripts/recover.sh out/Llama-2-7b-hf-20      # a trial
#
# Needs pip install '.[recover]'. Hardware: the whole model on one device, with its activations. Interrupted, the same
# command goes on. Relative paths start at the repository's root.
#
# Variables, besides DATASET, SEQLEN, SEED, DATASET_ROOT, DEVICE and PYTHON of scripts/settings.sh:
#   STEPS          of training (default: 200)
#   BATCH_SIZE     windows of a step (default: about 4096 tokens)
#   RANK           of the adapters (default: 8)
#   LEARNING_RATE  at the beginning; it falls to 0 (default: 0.001)
#   EVAL_DATASET   text for perplexity (default: the test split of DATASET)
#   EVAL_NSAMPLES  windows of it (default: all)
#   OUT            gets the recovered model (default: FOLDER-recovered)
# Further arguments go to the program.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
model="${1:?is missing; name a compressed model}"
flags=()
for name in DATASET SEQLEN SEED DATASET_ROOT DEVICE STEPS BATCH_SIZE RANK LEARNING_RATE EVAL_DATASET EVAL_NSAMPLES; do
    [[ -z "${!name:-}" ]] || flags+=("--${name,,}" "${!name}")
done
run "$PYTHON" scripts/recover.py "$model" "${OUT:-$model-recovered}" "${flags[@]}" "${@:2}"
