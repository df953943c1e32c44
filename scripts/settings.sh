# Sourced, not run: the variables that the experiments share, with the published settings as
# defaults. Relative paths start at the repository's root, which becomes the working folder.
#   BI_SCORE      folder of one model's scores and ranks (default: ranks/<model>, below OUT if that is set)
#   OUT           gets models, records/<model>/ and the report of all records in it (default: out)
#   DATASET       calibration and test text (default: wikitext2)
#   BI_NSAMPLES   windows to score layers on (default: 128)
#   SEQLEN        tokens per window (default: 4096)
#   SEED          of the sampling (default: 42)
#   CACHE_DIR     where hub downloads are kept (default: the hub's own)
#   DATASET_ROOT  folder with local copies of the datasets (default: none, the hub is asked)
#   DEVICE        cpu, cuda or cuda:N (default: the GPU if there is one)
#   PROCESSES     that share out the windows, each with a GPU of its own (default: 1)
#   PYTHON        interpreter of the environment that requirements.txt is installed in (default: that of .venv, where
#                 demo.sh and test.sh install, or python3)
# shellcheck shell=bash disable=SC2034 # the scripts that source this use the arrays

cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=.venv/bin/python
    [[ -x "$PYTHON" ]] || PYTHON=python3
    if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("flatllmcore") is None)'; then
        printf 'error: %s has no flatllmcore; run scripts/demo.sh, or install as INSTALL.md says, or set PYTHON\n' "$PYTHON" >&2
        exit 2
    fi
fi
flags=(--dataset "${DATASET:-wikitext2}" --seqlen "${SEQLEN:-4096}" --seed "${SEED:-42}" --overwrite)
[[ -z "${CACHE_DIR:-}" ]] || flags+=(--cache_dir "$CACHE_DIR")
[[ -z "${DATASET_ROOT:-}" ]] || flags+=(--dataset_root "$DATASET_ROOT")
[[ -z "${DEVICE:-}" ]] || flags+=(--device "$DEVICE")
main=("$PYTHON" main.py)
if ((${PROCESSES:-1} > 1)); then
    main=("$PYTHON" -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$PROCESSES"
        --mixed_precision no --dynamo_backend no main.py)
fi

# run COMMAND...: shows a command and runs it.
run() {
    printf '\n+ %s\n' "$*"
    "$@"
}

# places MODEL: sets the places of a model that all steps share: name, scores, out, records.
places() {
    name="$(basename "$1" .gguf)"
    scores="${BI_SCORE:-${OUT:+$OUT/}ranks/$name}"
    out="${OUT:-out}"
    records="$out/records/$name"
}

# score MODEL FOLDER RECORDS FLAG...: writes FOLDER/importance.json, and the log and the record of the run to RECORDS.
score() {
    local before=()
    [[ ! -e "$2/importance.json" ]] || mapfile -t before < <(find "$2/" -maxdepth 1 -regex '.*/ranks_[0-9.]+\.json')
    run "${main[@]}" --prune_method bi --model "$1" --bi_score "$2" --save "$3" \
        --nsamples "${BI_NSAMPLES:-128}" "${flags[@]}" "${@:4}"
    ((${#before[@]} == 0)) || rm -f "${before[@]}" # of the scores before
}
