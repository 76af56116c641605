#!/usr/bin/env bash
# README's result, from weights and clips to the picture. What is done is not done again.
#
#     tests/recipe/recipe.sh WEIGHTS SUITE TRANSFER OUT        # some hours of a CPU for each seed
#
# WEIGHTS holds whisper-base/, SUITE the eleven manifests below, TRANSFER those whose clips come
# from other sources than training's. In the environment:
# SEEDS   the runs ("0 1 2")
# SHARE   how far from the untouched encoder the judged ones lie (1: all the way). The rule, on
#         OUT/valid/ of the first seed: of those within 0.05 of the untouched encoder's word error
#         rate on transcribe_dutch at 30 s, the best mean of the suite's kNN and MLP; if there is
#         none, the one that reads Dutch best. (0.25 is too near to read a clip at its own length.)
# FLITE   a folder of make_flite.py, whose words are then judged on valid, too
set -euo pipefail
here=$(realpath "$(dirname "$0")/../..")
mkdir -p "$4"
ln -sfn "$(realpath "$1")" "$4/weights"
ln -sfn "$(realpath "$2")" "$4/suite"
ln -sfn "$(realpath "$3")" "$4/transfer"
[ -z "${FLITE:-}" ] || ln -sfn "$(realpath "$FLITE")" "$4/flite"
cd "$4"  # so that the files written here name no other folder
seeds=${SEEDS:-0 1 2} share=${SHARE:-0.5}
untouched=weights/whisper-base
suite=(suite/{caption,command,drum,game_sound,instrument,language,pitch}.jsonl
       suite/{speaker_count,tagging,voice}.jsonl)
others=(transfer/{command_festival,letters_language,game_sound_other}.jsonl)
spoken=(suite/transcribe.jsonl transfer/transcribe_dutch.jsonl)

probe() {  # JSON FLAGS...; probe.py writes after each task, so only a whole file gets the name
    [ -f "$1" ] && return
    python "$here/probe.py" --precision bf16 --cache cache --json "$1.part" "${@:2}"
    mv "$1.part" "$1"
}

outside() {  # JSON wer|knn FLAGS...
    [ -f "$1" ] || python "$here/tests/recipe/outside.py" "${@:2}" --json "$1"
}

# ---- training

for seed in $seeds; do
    # The C library keeps what an update frees: on a CPU a tenth faster.
    [ -f "seed-$seed/encoder/config.json" ] || MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 \
        python "$here/train.py" --resume --seed "$seed" --out "seed-$seed" \
        --data "${suite[@]}" suite/transcribe.jsonl --encoder "$untouched" \
        --task-weights caption=1 command=0.2 drum=1 game_sound=1 instrument=1 language=1 \
        pitch=1 speaker_count=1 tagging=1 transcribe=1 voice=1 --decoder "$untouched" \
        --stack 0 --lr-decoder 3e-5 --steps 3000 --batch-seconds 16 --loss example \
        --lr-encoder 4e-5 --warmup 60 --words transcribe --words-weight 5 --workers 1 \
        --eval-every 1000 --eval-clips 8 --questions 0 --save-every 500 --keep 10
done

# ---- choices, on valid splits alone: the first seed's shares, and its way there

first=seed-${seeds%% *}
on_valid() {  # JSON FOLDER
    probe "$1" --encoder "$2" --on valid --seeds 1 --data "${suite[@]}" \
        transfer/letters_language.jsonl ${FLITE:+flite/command_flite.jsonl}
}
judge() {  # NAME FOLDER
    on_valid "valid/$1.json" "$2"
    outside "valid/$1-words.json" wer --encoder "$2" --on valid --clips 40 --data "${spoken[@]}"
}
mkdir -p valid
judge untouched "$untouched"
for each in 0.5 0.75 1; do
    python "$here/uniwhisper.py" export --run "$first" "$first/share-$each" --blend "$each"
    judge "share-$each" "$first/share-$each"
done
for updates in 1000 2000; do
    on_valid "valid/after-$updates.json" "$first/checkpoints/step-0000$updates/encoder"
done

# ---- the result, on test splits

trained=()
for seed in $seeds; do
    trained+=("seed-$seed/share-$share")
    python "$here/uniwhisper.py" export --run "seed-$seed" "${trained[-1]}" --blend "$share"
done
# The untouched encoder once more, on clips padded to 30 s, as Whisper was trained: an hour.
probe padded.json --encoder "$untouched" --context window --data "${suite[@]}" "${others[@]}"
probe scores.json --encoder "$untouched" "${trained[@]}" --data "${suite[@]}" "${others[@]}"
outside words.json wer --encoder "$untouched" "${trained[@]}" --clips 60 --data "${spoken[@]}"
# The first seed, not averaged.
probe trained.json --encoder "$first/share-1" --data "${suite[@]}" "${others[@]}"
outside trained-words.json wer --encoder "$first/share-1" --clips 60 --data "${spoken[@]}"
outside neighbours.json knn --encoder "$untouched" "${trained[0]}" \
    --data suite/{drum,game_sound,instrument,pitch,voice}.jsonl "${others[@]}"
[ -f look.json ] || python "$here/tests/look.py" \
    --encoder "$untouched" "${trained[0]}" "$first/share-1" --names untouched "share $share" \
    trained --data suite/{voice,pitch}.jsonl --json look.json --picture look.png
python "$here/tests/recipe/plot.py" .
