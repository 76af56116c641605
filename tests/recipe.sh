#!/usr/bin/env bash
# README's result from beginning to end: tests/recipe.sh WEIGHTS SUITE OUT [SEED]
# WEIGHTS holds whisper-base/ and qwen2.5-0.5b/, SUITE the nine manifests. Interrupted, it goes on where it was.
set -euo pipefail
weights=$1 suite=$2 out=$3 seed=${4:-0}
here=$(dirname "$0")/..
classes=$(printf "$suite/%s.jsonl " language speaker_count voice command instrument pitch drum game_sound)

resume=$([ -d "$out/checkpoints" ] && echo --resume || true)
[ -f "$out/encoder/config.json" ] || python "$here/train.py" --data "$suite"/*.jsonl --out "$out" --seed "$seed" $resume \
    --encoder "$weights/whisper-base" --decoder "$weights/qwen2.5-0.5b" --stack 8 --steps 600 --batch-seconds 32 \
    --loss example --temperature 100 --lr-encoder 1.5e-4 --lr-adapter 1e-3 --freeze-encoder 40 --warmup 40 \
    --eval-every 600 --eval-clips 24 --save-every 50 --keep 20 --workers 1

encoders=("$weights/whisper-base" "$out/encoder")
python "$here/probe.py" --encoder "${encoders[@]}" --data $classes --json "$out/probe.json"
python "$here/tests/outside.py" words --encoder "${encoders[@]}" --run "$out" --data "$suite/transcribe.jsonl" --json "$out/words.json"
python "$here/tests/outside.py" knn --encoder "${encoders[@]}" --data "$suite"/{drum,voice,game_sound}.jsonl --json "$out/neighbours.json"
