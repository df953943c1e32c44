#!/usr/bin/env bash
# All that needs a GPU, in at most 9 minutes on one card of 80 GB: random weights of published shapes, no download.
#
#   bash benchmarks/gpu_session.sh                      # records in out/gpu
#   DEVICE=cpu SHAPE=tiny bash benchmarks/gpu_session.sh   # a trial: every part, at a size for a few seconds each
#
# Each part has a time limit and writes its record as it goes; one that fails or runs out of time is named at the end,
# and the others run. Variables: PYTHON, DEVICE (default: cuda), SHAPE (default: 7b), OUT (default: out/gpu).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}" device="${DEVICE:-cuda}" out="${OUT:-out/gpu}"
export PYTHONPATH="$PWD/lib:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$out"
if [[ "${SHAPE:-7b}" == tiny ]]; then
    patience=20 # times the limits: a trial is for the parts, on a machine of any speed
    dtype=float32 shape=64x2 layers=64x2 sizes=(--nsamples 4 --seqlen 64) windows=2 config=models/pydocs-llama
    wide=(--hidden_size 128 --intermediate_size 128)
    speed=(--batch_size 1,2 --prompt_length 16 --new_tokens 2 --repeats 1) tests=(tests/test_devices.py)
    captured=(--batch_size 1 2 --prompt_length 16 --repeats 1)
else
    patience=1
    dtype=bfloat16 shape=llama-2-7b layers=llama-2-7b-4-layers sizes=(--nsamples 256 --seqlen 4096) windows=64
    config=benchmarks/shapes/llama-2-7b
    wide=(--hidden_size 8192 --intermediate_size 28672 --seqlen 512) # as 70B is
    speed=(--batch_size 1,64 --prompt_length 512 --new_tokens 32 --repeats 3) captured=()
    tests=(-k cuda tests/test_devices.py tests/test_engine.py tests/test_memory.py tests/test_flatllm_plus.py tests/layers)
fi
failed=()

# part LIMIT NAME COMMAND...: runs a command for at most so many seconds of the 540 of all, and keeps what it says.
part() {
    local left=$((patience * 540 - SECONDS)) limit=$((patience * $1)) name="$2"
    limit=$((limit < left ? limit : left))
    printf '\n%s (%s s at most)\n' "$name" "$limit"
    ((limit > 0)) && timeout "$limit" "${@:3}" 2>&1 | tee "$out/$name.log" | tail -n 20
    ((limit > 0 && PIPESTATUS[0] == 0)) || failed+=("$name")
}

part 40 tests "$python" -m pytest -q "${tests[@]}"
for method in flatllm flatllm+; do # stages beside their bounds, at 20 %
    part 60 "time_$method" "$python" benchmarks/compression_time.py --shape "$layers" "${sizes[@]}" \
        --batch_size 4 --dtype "$dtype" --device "$device" --method "$method" --out "$out/time_$method.json"
done
part 45 authors_loop "$python" benchmarks/published_loop.py --shape "$shape" "${sizes[@]}" --device "$device" \
    --out "$out/authors_loop.json"
part 80 speed "$python" -m flatllmbench.speed --shape "$config" --ratios 20,50 --rank_multiple 8 "${speed[@]}" \
    --dtype "$dtype" --device "$device" --save "$out"
part 20 kernels "$python" benchmarks/attention_kernels.py --shape "$shape" --device "$device" --out "$out/kernels.json"
part 80 captured_steps "$python" benchmarks/captured_steps.py --shape "$shape" "${captured[@]}" --dtype "$dtype" \
    --device "$device" --out "$out/captured_steps.json"
part 30 new_lengths "$python" benchmarks/new_lengths.py --shape "$layers" --device "$device" \
    --out "$out/new_lengths.json"
part 90 out_of_core "$python" benchmarks/out_of_core.py --folder "$out/checkpoint" --layers 1 "${wide[@]}" \
    --device "$device" --out "$out/out_of_core.json"
for tokens in 4096 16384; do # a batch of one window, and of four
    part 40 "moments_$tokens" "$python" benchmarks/moment_precision.py --model models/pydocs-llama --dataset pydocs \
        --nsamples $((2 * windows)) --seqlen 128 --batch_tokens "$tokens" --device "$device" --out "$out/moments_$tokens.json"
done
part 60 accuracy "$python" benchmarks/accuracy.py --model models/pydocs-llama --dataset pydocs --eval_dataset pydocs \
    --nsamples "$windows" --seqlen 128 --eval_windows "$windows" --sparsity_ratio 20 --device "$device" --out "$out/accuracy.jsonl"
rm -rf "$out/checkpoint"
((${#failed[@]} == 0)) || printf '\nfailed or out of time: %s\n' "${failed[*]}"
((${#failed[@]} == 0))
