#!/usr/bin/env bash
# README's result from beginning to end: tests/recipe.sh WEIGHTS SUITE OUT [SEED]
# WEIGHTS holds whisper-base/ and qwen2.5-0.5b/, SUITE the nine manifests. Interrupted, it goes on where it was.
set -euo pipefail
weights=$1 suite=$2 out=$3 seed=${4:-0}
here=$(dirname "$0")/..
classes=("$suite"/{language,speaker_count,voice,command,instrument,pitch,drum,game_sound}.jsonl)

[ -f "$out/encoder/config.json" ] || python "$here/train.py" --resume --seed "$seed" \
    --data "$suite"/*.jsonl --out "$out" --encoder "$weights/whisper-base" --decoder "$weights/qwen2.5-0.5b" --stack 8 \
    --steps 4000 --batch-seconds 32 --loss example --lr-encoder 1.5e-4 --lr-adapter 1e-3 --freeze-encoder 40 --warmup 40 \
    --eval-every 1000 --eval-clips 24 --save-every 100 --keep 3 --workers 1 --task-weights pitch=1 instrument=1 \
    game_sound=1 drum=1 voice=1 speaker_count=1 language=1 command=1 transcribe=1

for share in 0.25 0.5 0.75; do
    python "$here/uniwhisper.py" export --run "$out" "$out/blend-$share" --blend $share
done
python "$here/probe.py" --encoder "$weights/whisper-base" "$out"/blend-* "$out/encoder" --data "${classes[@]}" --precision bf16 \
    --json "$out/probe.json"
mkdir -p "$out/valid"  # the same without test, valid in its place
for manifest in "${classes[@]}"; do
    sed -n "/\"split\": \"test\"/!{s/\"split\": \"valid\"/\"split\": \"test\"/; s#\"audio\": \"#&$(realpath "$suite")/#; p}" \
        "$manifest" > "$out/valid/${manifest##*/}"
done
python "$here/probe.py" --encoder "$out/encoder" "$out"/blend-0.[57]* --data "$out"/valid/*.jsonl --precision bf16 \
    --json "$out/valid.json"
[ -f "$out/before/encoder/config.json" ] || python "$here/train.py" --resume --data "$suite/transcribe.jsonl" --out "$out/before" \
    --stack 8 --encoder "$weights/whisper-base" --decoder "$weights/qwen2.5-0.5b" --steps 1 --batch-seconds 8 --lr-encoder 0 --lr-adapter 0 \
    --eval-clips 1 --questions 0 --workers 0  # a run that learns nothing
python "$here/tests/outside.py" words --encoder "$weights/whisper-base" "$out"/blend-0.[57]* "$out/encoder" \
    --run "$out/before" "$out" --data "$suite/transcribe.jsonl" --clips 100 --json "$out/words.json"
python "$here/tests/outside.py" knn --encoder "$weights/whisper-base" "$out/encoder" --data "${classes[@]}" \
    --json "$out/neighbours.json"
