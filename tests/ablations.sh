#!/usr/bin/env bash
# Does the encoder gain on a task that it never saw? The recipe for 150 updates without one task, scored on that task:
# tests/transfer.sh WEIGHTS SUITE OUT
set -euo pipefail
weights=$1 suite=$2 out=$3
here=$(dirname "$0")/..
mixture="pitch=2 instrument=1 game_sound=1 drum=1 voice=1 speaker_count=1 language=1 command=1 transcribe=1"

for task in instrument game_sound drum; do
    [ -f "$out/no_$task/encoder/config.json" ] || python "$here/train.py" --resume \
        --data "$suite"/*.jsonl --out "$out/no_$task" --encoder "$weights/whisper-base" --decoder "$weights/qwen2.5-0.5b" \
        --stack 8 --steps 150 --batch-seconds 32 --loss example --lr-encoder 1.5e-4 --lr-adapter 1e-3 --freeze-encoder 20 \
        --warmup 20 --eval-every 150 --eval-clips 24 --save-every 150 --samples 0 --workers 1 --task-weights ${mixture/$task=1/}
    python "$here/probe.py" --encoder "$weights/whisper-base" "$out/no_$task/encoder" --data "$suite/$task.jsonl" --precision bf16 \
        --json "$out/no_$task.json"
done
