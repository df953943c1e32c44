#!/usr/bin/env bash
# Everything that the results page says of the embedded model, made anew: scores, compression at 10 to 50 % by both
# methods, tasks, and speed of the published one by both protocols, with one thread and in float32, which every CPU
# multiplies. 26 minutes on two cores that ran tests too; they ought to have nothing else to do.
#
#   bash scripts/embedded.sh
#
# Variables: VENV, PYTHON, SKIP_INSTALL (see scripts/environment.sh), and
#   OUT      gets the models, records and the report (default: results, whose page is in the repository)
#   REPEATS  timed runs of every model (default: 21; by SliceGPT's measure, 256 steps each, 3)
#   LIMIT    questions of every task, for a trial (default: all)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
pip_install evaluation -e '.[eval]'
export PYTHON
export OUT="${OUT:-results}"
export MODEL=models/pydocs-llama DATASET=pydocs SEQLEN=256 NSAMPLES=128 DEVICE=cpu
export OVERWRITE=1
export TASKS=pydocs_endings,pydocs_text INCLUDE_PATH=tests/tasks
export THREADS=1 DTYPE=float32 # of the speed
unset BI_SCORE SEED BI_NSAMPLES RATIOS RANK_MULTIPLE WIDTH_MULTIPLE SHAPE METHOD PRUNE_QK PROCESSES
unset DATASET_ROOT CACHE_DIR EVAL_DATASET NUM_FEWSHOT PROTOCOL BATCH_SIZE PROMPT_LENGTH NEW_TOKENS
records="$OUT/records/pydocs-llama"

rm -f "$OUT"/ranks/pydocs-llama{,-plus}/importance.json # so that the layers are scored, and timed, again
bash scripts/compress.sh
METHOD=flatllm+ bash scripts/compress.sh
compressed=("$OUT"/pydocs-llama-{10,20,30,40,50})
for model in "$MODEL" "${compressed[@]}" "$OUT"/pydocs-llama-plus-{10,20,30,40,50}; do
    OUT="$records" bash scripts/eval.sh "$model"
done
OUT="$records" REPEATS="${REPEATS:-3}" bash scripts/test_speedup.sh "$MODEL" "${compressed[@]}"
OUT="$records" REPEATS="${REPEATS:-21}" PROTOCOL=grid PROMPT_LENGTH=128 bash scripts/test_speedup.sh "$MODEL" "${compressed[@]}"
"$PYTHON" -m flatllmbench.report "$OUT/records" --out "$OUT"
