#!/usr/bin/env bash
# README's result from beginning to end: tests/recipe.sh WEIGHTS SUITE TRANSFER OUT [SEED [STEPS]]
# (README's own run was begun for 1,200 updates and shortened to 900 after update 745.)
# WEIGHTS holds whisper-base/ and qwen2.5-0.5b/, SUITE the eleven manifests below, TRANSFER those
# whose clips come from other sources than training's. Interrupted, it goes on where it was.
set -euo pipefail
weights=$1 suite=$2 transfer=$3 out=$4 seed=${5:-0} steps=${6:-900}
here=$(dirname "$0")/..
untouched=$weights/whisper-base
probed=("$suite"/{caption,command,drum,game_sound,instrument,language,pitch}.jsonl
        "$suite"/{speaker_count,tagging,voice}.jsonl)
others=("$transfer"/{command_festival,letters_language,game_sound_other}.jsonl)

# The C library keeps what an update frees: on a CPU a tenth faster.
[ -f "$out/encoder/config.json" ] || MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 \
    python "$here/train.py" --resume --seed "$seed" --out "$out" \
    --data "${probed[@]}" "$suite/transcribe.jsonl" --encoder "$untouched" \
    --task-weights caption=1 command=0.2 drum=1 game_sound=1 instrument=1 language=1 pitch=1 \
    speaker_count=1 tagging=1 transcribe=1 voice=1 --decoder "$weights/qwen2.5-0.5b" --stack 8 \
    --steps "$steps" --batch-seconds 16 --loss example --lr-encoder 7e-5 --lr-adapter 1e-3 \
    --freeze-encoder 40 --warmup 60 --hold transcribe language command --words transcribe \
    --workers 1 --eval-every 400 --eval-clips 24 --questions 0 --save-every 100 --keep 40
python "$here/probe.py" --encoder "$untouched" "$out/encoder" --precision bf16 \
    --data "${probed[@]}" --json "$out/scores.json"
python "$here/probe.py" --encoder "$untouched" "$out/encoder" --precision bf16 \
    --data "${others[@]}" --json "$out/transfer.json"
python "$here/tests/outside.py" wer --encoder "$untouched" "$out/encoder" --clips 60 \
    --data "$suite/transcribe.jsonl" "$transfer/transcribe_dutch.jsonl" --json "$out/words.json"
python "$here/tests/outside.py" knn --encoder "$untouched" "$out/encoder" \
    --data "$suite"/{drum,game_sound,instrument,pitch,voice}.jsonl --json "$out/neighbours.json"
