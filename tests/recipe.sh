#!/usr/bin/env bash
# README's result from beginning to end: tests/recipe.sh WEIGHTS SUITE TRANSFER OUT [SEED [STEPS]]
# WEIGHTS holds whisper-base/ and qwen2.5-0.5b/, SUITE the eleven manifests below, TRANSFER those
# whose clips come from other sources than training's. Interrupted, it goes on where it was.
# (README's run began with 4000 updates and was shortened to 3000 after 500 of them.)
# BLEND: how far from the untouched encoder the judged one lies (1: all the way); README's was
# chosen by what stands in OUT/valid-*.json, by the rule in results/README.md. PADDED=1 also
# scores the untouched encoder on clips padded to 30 s, which takes hours.
set -euo pipefail
weights=$1 suite=$2 transfer=$3 out=$4 seed=${5:-0} steps=${6:-3000} blend=${BLEND:-0.5}
here=$(dirname "$0")/..
untouched=$weights/whisper-base
probed=("$suite"/{caption,command,drum,game_sound,instrument,language,pitch}.jsonl
        "$suite"/{speaker_count,tagging,voice}.jsonl)
others=("$transfer"/{command_festival,letters_language,game_sound_other}.jsonl)
spoken=("$suite/transcribe.jsonl" "$transfer/transcribe_dutch.jsonl")

# The C library keeps what an update frees: on a CPU a tenth faster.
[ -f "$out/encoder/config.json" ] || MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 \
    python "$here/train.py" --resume --seed "$seed" --out "$out" \
    --data "${probed[@]}" "$suite/transcribe.jsonl" --encoder "$untouched" \
    --task-weights caption=1 command=0.2 drum=1 game_sound=1 instrument=1 language=1 pitch=1 \
    speaker_count=1 tagging=1 transcribe=1 voice=1 --decoder "$weights/qwen2.5-0.5b" --stack 8 \
    --steps "$steps" --batch-seconds 16 --loss example --lr-encoder 1e-4 --lr-adapter 1e-3 \
    --freeze-encoder 40 --warmup 60 --words transcribe --workers 1 --eval-every 1000 \
    --eval-clips 8 --questions 0 --save-every 100 --keep 40

# What the share is chosen by: valid splits alone.
for share in 0 0.25 0.5 0.75 1; do
    [ -f "$out/valid-words-$share.json" ] && continue
    python "$here/uniwhisper.py" export --run "$out" "$out/blend-$share" --blend "$share"
    python "$here/probe.py" --encoder "$out/blend-$share" --precision bf16 --on valid --seeds 1 \
        --data "${probed[@]}" "$transfer/letters_language.jsonl" --json "$out/valid-$share.json"
    python "$here/tests/outside.py" wer --encoder "$out/blend-$share" --on valid --clips 40 \
        --data "${spoken[@]}" --json "$out/valid-words-$share.json"
done

trained=$out/blend-$blend
python "$here/probe.py" --encoder "$untouched" "$trained" --precision bf16 \
    --data "${probed[@]}" --json "$out/scores.json"
python "$here/probe.py" --encoder "$untouched" "$trained" --precision bf16 \
    --data "${others[@]}" --json "$out/transfer.json"
python "$here/tests/outside.py" wer --encoder "$untouched" "$trained" --clips 60 \
    --data "${spoken[@]}" --json "$out/words.json"
python "$here/tests/outside.py" knn --encoder "$untouched" "$trained" \
    --data "$suite"/{drum,game_sound,instrument,pitch,voice}.jsonl "${others[@]}" \
    --json "$out/neighbours.json"
python "$here/tests/look.py" --encoder "$untouched" "$trained" --names before after \
    --data "$suite"/{voice,pitch}.jsonl --json "$out/look.json" --picture "$out/look.png"
[ -z "${PADDED:-}" ] || python "$here/probe.py" --encoder "$untouched" --precision bf16 \
    --context window --data "${probed[@]}" "${others[@]}" --json "$out/padded.json"
