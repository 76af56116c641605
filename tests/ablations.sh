#!/usr/bin/env bash
# What each choice of the recipe does: 150 updates, with `pitch` twice as often as in recipe.sh,
# one thing changed at a time, scored on all class tasks; and transfer: one task left out, scored
# on that task. Runs that are done are not repeated.
# tests/ablations.sh WEIGHTS SUITE OUT
set -euo pipefail
weights=$1 suite=$2 out=$3
here=$(dirname "$0")/..
classes="command drum game_sound instrument language pitch speaker_count voice"
mixture="pitch=2 instrument=1 game_sound=1 drum=1 voice=1 speaker_count=1 language=1 command=1"
mixture="$mixture transcribe=1"

manifests() {  # TASKS...: their paths, in the array `paths`
    paths=("${@/#/$suite/}")
    paths=("${paths[@]/%/.jsonl}")
}

run() {  # NAME "PROBE TASKS" "TASK WEIGHTS" FLAGS...; the later of two equal flags counts
    local name=$1 tasks=$2 mixture=$3 paths
    shift 3
    manifests $classes transcribe
    # The C library keeps what an update frees: on a CPU a tenth faster.
    [ -f "$out/$name/encoder/config.json" ] || MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 \
        python "$here/train.py" --resume --data "${paths[@]}" --out "$out/$name" \
        --encoder "$weights/whisper-base" --decoder "$weights/qwen2.5-0.5b" --stack 8 \
        --steps 150 --batch-seconds 32 --loss example --lr-encoder 1.5e-4 --lr-adapter 1e-3 \
        --freeze-encoder 20 --warmup 20 --eval-every 150 --eval-clips 24 --save-every 150 \
        --questions 0 --workers 1 ${mixture:+--task-weights $mixture} "$@"
    manifests $tasks
    [ -f "$out/$name.json" ] && return  # probe.py writes after each task: rename a whole file
    python "$here/probe.py" --encoder "$out/$name/encoder" \
        --precision bf16 --data "${paths[@]}" --json "$out/$name.json.part"
    mv "$out/$name.json.part" "$out/$name.json"
}

run recipe "$classes" "$mixture"
run loss_token "$classes" "$mixture" --loss token
run stack_4 "$classes" "$mixture" --stack 4
run without_transcribe "$classes" "${mixture/transcribe=1/}"
run by_square_root_of_size "$classes" ""
run encoder_rate_3e-4 "$classes" "$mixture" --lr-encoder 3e-4
run no_adapter_warm-up "$classes" "$mixture" --freeze-encoder 0
run stack_2 "$classes" "$mixture" --stack 2
for task in instrument game_sound drum; do
    run "without_$task" "$task" "${mixture/$task=1/}"
done
