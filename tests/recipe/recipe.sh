#!/usr/bin/env bash
# README's recipe, from the weights to the picture. What is done is not done again: take a new OUT
# for other settings.
#
#     tests/recipe/recipe.sh WEIGHTS OUT
#     STEPS=20 SEEDS=0 TASKS="drum letters_language" tests/recipe/recipe.sh WEIGHTS OUT  # a trial
#
# WEIGHTS holds whisper-base/ and qwen2.5-0.5b/ (weights/README.md). OUT gets suite/, transfer/,
# seed-*/ (runs), the probes' scores in valid/, test/, part/ and part-30s/, and the picture.
# Needs pip install -e '.[test,plot]' and what make_suite.py and make_transfer.py name.
#
# The judged encoders lie a share of the way from the untouched weights to the trained ones. It is
# chosen on the first seed's valid splits. A share's score is (mean over the suite's tasks + mean
# over command_flite and letters_language) / 2, averaged over kNN and MLP. The highest score wins,
# of the shares at which neither of those two lies more than .02 below untouched by either probe;
# if all do, the share that loses least.
set -euo pipefail
seeds=${SEEDS:-0 1 2}             # a run each
steps=${STEPS:-1900}              # updates of a run: 8.1 hours heard
lr=${LR:-1.5e-4}                  # the encoder's
silence=${SILENCE:-1}             # seconds behind a clip, in training and probes
shares=${SHARES:-0.5 0.75 1}
part=${PART:-150 75}              # most clips of train, and of test, of a task at 30 s
tasks=${TASKS:-}                  # probe these alone; default: all. The runs train on all

here=$(realpath "$(dirname "$0")/../..")
mkdir -p "$2"
ln -sfn "$(realpath "$1")" "$2/weights"
cd "$2"  # so that the files written here name no other folder
untouched=weights/whisper-base

manifests() {  # FOLDER TASK...: those that are to be probed
    for task in "${@:2}"; do
        if [[ -z $tasks || " $tasks " == *" $task "* ]]; then echo "$1/$task.jsonl"; fi
    done
}

probe() {  # JSON ENCODER SILENCE FLAGS...; probe.py writes after each task: renamed when whole
    [ ! -f "$1" ] || return 0
    mkdir -p "$(dirname "$1")"
    python "$here/probe.py" --precision "$precision" --cache cache --encoder "$2" --silence "$3" \
        --json "$1.part" "${@:4}"
    mv "$1.part" "$1"
}

export_share() { python "$here/uniwhisper.py" export --run "$1" "$1/share-$2" --blend "$2"; }

# ---- clips
build() {  # FOLDER SCRIPT ARGUMENTS...; renamed when whole
    [ ! -d "$1" ] || return 0
    python "$here/tests/recipe/$2" "${@:3}" "$1.part"
    mv "$1.part" "$1"
}
build suite make_suite.py
build transfer make_transfer.py suite
mapfile -t suite < <(manifests suite language speaker_count voice command instrument pitch drum \
    game_sound tagging caption)
mapfile -t choice < <(manifests transfer command_flite letters_language)
mapfile -t others < <(manifests transfer command_festival letters_language game_sound_other)
python "$here/tests/recipe/choose.py" clips $part part "${suite[@]}" "${others[@]}"

# ---- runs: through the frozen Qwen, one loss, all eleven tasks. At first the adapter trains alone,
# or its random start would reach the encoder. Rates halve with each lower layer, or words by other
# voices would be lost. `command` is one synthesizer's voice, so it comes half as often as the
# others; `transcribe`, with the most words and voices, twice. Seeds train side by side, each on one
# CPU core: on two cores both together heard more than one run on two processes.
parallel=$(nproc)
train=(python "$here/tests/recipe/fast_qwen.py" train.py --threads 1)
if python -c 'import torch; exit(not torch.cuda.is_available())'; then
    parallel=1 train=(python "$here/train.py")
fi
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT  # a run that is stopped saves first
running=0
finish() {  # waits until so many runs are left
    while ((running > $1)); do
        wait -n || { tail -n 3 seed-*.log >&2; exit 1; }
        running=$((running - 1))
    done
}
for seed in $seeds; do
    [ ! -f "seed-$seed/encoder/config.json" ] || continue
    finish $((parallel - 1))
    echo "seed $seed trains: see $PWD/seed-$seed.log"
    # The C library keeps what an update frees: on a CPU a tenth faster.
    MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 \
        "${train[@]}" --resume --seed "$seed" --out "seed-$seed" \
        --data suite/*.jsonl --silence "$silence" \
        --encoder "$untouched" --decoder weights/qwen2.5-0.5b --stack 8 \
        --task-weights caption=1 command=0.5 drum=1 game_sound=1 instrument=1 language=1 pitch=1 \
        speaker_count=1 tagging=1 transcribe=2 voice=1 --steps "$steps" --batch-seconds 24 \
        --loss example --freeze-encoder $(((steps + 23) / 24)) --warmup 100 --lr-encoder "$lr" \
        --layer-decay 0.5 --lr-adapter 1e-3 --workers 1 --eval-every 1000 --eval-clips 8 \
        --questions 0 > "seed-$seed.log" 2>&1 &
    running=$((running + 1))
done
finish 0

# ---- the share, on valid splits
first=seed-${seeds%% *}
# Probes run the encoder in training's precision: bf16 where that is fast. On a CPU without it, bf16
# takes many times as long.
precision=$(sed -n 's/.*"precision": "\(.*\)".*/\1/p' "$first/config.json")
on_valid() { probe "$1" "$2" "$silence" --on valid --seeds 1 --data "${suite[@]}" "${choice[@]}"; }
on_valid valid/untouched.json "$untouched"
for share in $shares; do
    export_share "$first" "$share"
    on_valid "valid/share-$share.json" "$first/share-$share"
done
[ -f share.txt ] || {
    python "$here/tests/recipe/choose.py" share valid/untouched.json valid/share-*.json > share.part
    mv share.part share.txt
}
share=$(cat share.txt)

# ---- the result, on test splits: all clips; and a part, which is encoded at 30 s, too
judge() {  # NAME ENCODER
    probe "test/$1.json" "$2" "$silence" --data "${suite[@]}" "${others[@]}"
    probe "part/$1.json" "$2" "$silence" --data part/*.jsonl
}
judge untouched "$untouched"
for seed in $seeds; do
    export_share "seed-$seed" "$share"
    judge "seed-$seed" "seed-$seed/share-$share"
done
probe part-30s/untouched.json "$untouched" 30 --data part/*.jsonl
probe "part-30s/$first.json" "$first/share-$share" 30 --data part/*.jsonl
mapfile -t checked < <(manifests suite voice instrument pitch drum game_sound)
[ -f cross_check.json ] || python "$here/tests/recipe/cross_check.py" --json cross_check.json \
    --encoder spectrum "$untouched" "$first/share-$share" --data "${checked[@]}" "${others[@]}"
python "$here/tests/recipe/plot.py" .
