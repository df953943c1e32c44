#!/usr/bin/env bash
# Both user documents as a stranger follows them, without a network: the three steps on the embedded model, then all
# samples of the library's document in one session, and once more with FedCore imported first.
#
#   bash tests/user_documents.sh
#
# Variables: PYTHON (default: .venv/bin/python), OUT, a new folder that everything is written to (default: out/stranger).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON="${PYTHON:-.venv/bin/python}" OUT="${OUT:-out/stranger}" HF_HUB_OFFLINE=1
export MODEL=models/pydocs-llama DATASET=pydocs SEQLEN=128 BI_NSAMPLES=8 NSAMPLES=16 RATIOS=20
bash scripts/llama_bi.sh
"$PYTHON" compute_rank.py --bi_score "$OUT/ranks"
bash scripts/llama_7b.sh --eval_nsamples 8
for first in flatllmcore fedcore.algorithm.low_rank.reassembly.core_reassemblers; do
    mkdir "$OUT/session-$first"
    "$PYTHON" tests/user_document_session.py "$first" "$OUT/session-$first"
done
