#!/usr/bin/env bash
# README's result from beginning to end: tests/recipe.sh WEIGHTS SUITE OUT [SEED [TRANSFER]]
# WEIGHTS holds whisper-base/ and qwen2.5-0.5b/, SUITE the nine manifests below. TRANSFER: tasks
# whose clips come from other sources than training's; scored in a second table.
# Interrupted, it goes on where it was.
set -euo pipefail
weights=$1 suite=$2 out=$3 seed=${4:-0} transfer=${5:-}
here=$(dirname "$0")/..
classes=("$suite"/{command,drum,game_sound,instrument,language,pitch,speaker_count,voice}.jsonl)
encoders=("$weights/whisper-base" "$out"/blend-{0.25,0.5,0.75} "$out/encoder")

train() {  # the C library keeps what an update frees: on a CPU a tenth faster
    MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 python "$here/train.py" --resume --stack 8 \
        --encoder "$weights/whisper-base" --decoder "$weights/qwen2.5-0.5b" "$@"
}

words() {  # JSON, FLAGS...: word error rates, of Whisper's decoder and of the run's own
    python "$here/tests/outside.py" words --run "$out/before" "$out" --clips 100 --json "$@" \
        --encoder "$weights/whisper-base" "$out"/blend-{0.5,0.75} "$out/encoder"
}

[ -f "$out/encoder/config.json" ] || train --seed "$seed" --out "$out" \
    --data "${classes[@]}" "$suite/transcribe.jsonl" \
    --task-weights pitch=1 instrument=1 game_sound=1 drum=1 voice=1 speaker_count=1 language=1 \
    command=1 transcribe=1 --steps 4000 --batch-seconds 32 --loss example --lr-encoder 1.5e-4 \
    --lr-adapter 1e-3 --freeze-encoder 40 --warmup 40 --workers 1 \
    --eval-every 1000 --eval-clips 24 --save-every 100 --keep 3
for share in 0.25 0.5 0.75; do
    python "$here/uniwhisper.py" export --run "$out" "$out/blend-$share" --blend $share
done
python "$here/probe.py" --encoder "${encoders[@]}" --data "${classes[@]}" --precision bf16 \
    --json "$out/probe.json"
# what a choice among them may look at
python "$here/probe.py" --encoder "$out/encoder" "$out"/blend-{0.5,0.75} --on valid \
    --data "${classes[@]}" --precision bf16 --json "$out/valid.json"
# a run that learns nothing
[ -f "$out/before/encoder/config.json" ] || train --data "$suite/transcribe.jsonl" \
    --out "$out/before" --steps 1 --batch-seconds 8 --lr-encoder 0 --lr-adapter 0 \
    --eval-clips 1 --questions 0 --workers 0
words "$out/words.json" --data "$suite/transcribe.jsonl"
python "$here/tests/outside.py" knn --encoder "$weights/whisper-base" "$out/encoder" \
    --data "${classes[@]}" --json "$out/neighbours.json"
if [ "$transfer" ]; then
    python "$here/probe.py" --encoder "${encoders[@]}" --precision bf16 \
        --data "$transfer"/{command_festival,letters_language,game_sound_other}.jsonl \
        --json "$out/transfer.json"
    words "$out/transfer_words.json" --data "$transfer/transcribe_dutch.jsonl"
fi
