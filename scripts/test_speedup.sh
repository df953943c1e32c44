#!/usr/bin/env bash
# Speed of compressed models against their dense one, by SliceGPT's measure: a batch of 128, 256 tokens one by one with
# a growing cache, the median step.
#
# Hardware: one A100 80GB: Llama-2 7B and its five compressed ones, which take turns and so are all held, are 61 GB, the
# cache 17 GB.
# Expected of Llama-2 7B, speed-up at 10, 20, 30, 40, 50 %: 1.04, 1.10, 1.11, 1.17, 1.23.
#
#   bash scripts/test_speedup.sh DENSE COMPRESSED...
#   bash scripts/test_speedup.sh meta-llama/Llama-2-7b-hf out/Llama-2-7b-hf-{20,50}
#   PROTOCOL=grid BATCH_SIZE=1,8 bash scripts/test_speedup.sh models/pydocs-llama demo/pydocs-llama-{20,50}
#
# Variables; relative paths start at the repository's root:
#   PROTOCOL       grid times prompts and decoding apart (default: slicegpt)
#   BATCH_SIZE     one or several, separated by commas (default: 128; grid: 1,8)
#   PROMPT_LENGTH  for the grid, likewise (default: 128,512)
#   NEW_TOKENS     decoding steps (default: 256; grid: 32)
#   REPEATS        timed runs of every model (default: 7)
#   THREADS        of the CPU (default: one per core)
#   DTYPE          of the weights (default: the checkpoint's own)
#   DEVICE, CACHE_DIR, PYTHON  see scripts/settings.sh
#   OUT            gets the record (default: logs)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
: "${1:?is missing; name the dense model, then compressed ones}"
flags=(--protocol "${PROTOCOL:-slicegpt}" --repeats "${REPEATS:-7}" --save "${OUT:-logs}")
for name in BATCH_SIZE PROMPT_LENGTH NEW_TOKENS THREADS DTYPE DEVICE CACHE_DIR; do
    [[ -z "${!name:-}" ]] || flags+=("--${name,,}" "${!name}")
done
run "$PYTHON" -m flatllmbench.speed "$@" "${flags[@]}"
