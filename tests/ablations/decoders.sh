#!/usr/bin/env bash
# The paper's ablation: the same updates and clips through a frozen Qwen, through Whisper's own
# decoder, frozen, and through Whisper's decoder that trains, too; two seeds each, scored on the
# suite's ten probed tasks and on those from other sources, at own length. What is done is not
# repeated.
# tests/ablations/decoders.sh WEIGHTS SUITE TRANSFER OUT
set -euo pipefail
weights=$1 suite=$2 transfer=$3 out=$4
here=$(dirname "$0")/../..
probed=("$suite"/{caption,command,drum,game_sound,instrument,language,pitch}.jsonl
        "$suite"/{speaker_count,tagging,voice}.jsonl
        "$transfer"/{command_festival,letters_language,game_sound_other}.jsonl)

run() {  # NAME FLAGS...: 600 updates of 16 s, every task as often as the others
    local name=$1
    shift
    [ -f "$out/$name/encoder/config.json" ] || MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 \
        python "$here/tests/ablations/whisper_decoder.py" train.py --resume \
        --data "${probed[@]:0:10}" "$suite/transcribe.jsonl" \
        --task-weights caption=1 command=1 drum=1 game_sound=1 instrument=1 language=1 pitch=1 \
        speaker_count=1 tagging=1 transcribe=1 voice=1 --encoder "$weights/whisper-base" \
        --out "$out/$name" --steps 600 --batch-seconds 16 --loss example --lr-encoder 3e-5 \
        --warmup 40 --workers 1 --threads "${THREADS:-0}" --eval-every 600 --eval-clips 24 \
        --questions 0 --save-every 100 --silence 0 "$@"
    [ -f "$out/$name.json" ] && return  # probe.py writes after each task: rename a whole file
    python "$here/probe.py" --encoder "$out/$name/encoder" --silence 0 \
        --precision bf16 --data "${probed[@]}" --json "$out/$name.json.part"
    mv "$out/$name.json.part" "$out/$name.json"
}

for seed in 0 1; do
    run "whisper-frozen-$seed" --decoder "$weights/whisper-base" --stack 0 --seed $seed
    run "whisper-trained-$seed" --decoder "$weights/whisper-base" --stack 0 --seed $seed \
        --lr-decoder 3e-5
    run "qwen-$seed" --decoder "$weights/qwen2.5-0.5b" --stack 8 --lr-adapter 1e-3 \
        --freeze-encoder 40 --seed $seed
done
