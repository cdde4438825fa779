#!/usr/bin/env bash
# Countdown: trains all models of the comparison from one backbone per seed, then runs every method on third-party problems
# and on the puzzle's own (docs/countdown.md).
#   benchmarks/countdown.sh OUT PROBLEMS.jsonl [SEED ...]
# Seeds run side by side, on as many GPUs as there are (or CUDA_VISIBLE_DEVICES names). Finished stages are skipped when it is called again: OUT/SEED/STAGE.done says how many
# seconds a stage took, OUT/SEED/STAGE.log how it went. The tables of all seeds together are in OUT/eval/report.md.
#   GRPO=1, CAUSAL=1   also Lattice GRPO for LACE and Isolated Parallel; also LACE with causal scope
#   STEPS, EVAL        options for every training, for the evaluation
#   WORKERS            data processes of each training; default: the cores shared among what runs at once
#   PYTHON             the interpreter
# A smoke test of it on two cores (two minutes, where nothing else runs):
#   STEPS="--trainer.max_steps 2 --data.init_args.batch_size 8" GRPO=1 CAUSAL=1 WORKERS=0 \
#   EVAL="--benchmarks.own.num_problems=3 --benchmarks.third_party.num_problems=3" benchmarks/countdown.sh OUT PROBLEMS.jsonl
set -euo pipefail

(($# >= 2)) || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }
out=$(realpath -m "$1") problems=$(realpath -m "$2")
shift 2
seeds=("${@:-0}")
[[ -f $problems ]] || { echo "PROBLEMS=$problems is no file" >&2; exit 2; }
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
fine_tunings=$((3 + ${CAUSAL:-0}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}      # else each of the processes takes all cores

descendants() { local child; for child in $(pgrep -P "$1"); do echo "$child"; descendants "$child"; done; }
trap 'kill $(descendants $$) 2>/dev/null; exit 130' INT TERM   # what runs in the background ends too

workers() { # workers RUNS: data processes of each of so many trainings per seed at once
    local free=$(($(nproc --all) - $1 * ${#seeds[@]})) runs=$(($1 * ${#seeds[@]}))
    echo "${WORKERS:-$((free > runs ? free / runs : 1))}"
}

stage() { # stage SEED NAME COMMAND...: run it once, with log and time
    local seed=$1 name=$2 start=$SECONDS
    local mark=$out/$1/$2
    shift 2
    [[ ! -e $mark.done ]] || { echo "seed $seed  $name: done before"; return; }
    echo "seed $seed  $name: started"
    "$@" >"$mark.log" 2>&1 || { echo "seed $seed  $name failed: see $mark.log" >&2; tail -n 5 "$mark.log" >&2; return 1; }
    echo $((SECONDS - start)) >"$mark.done"
    echo "seed $seed  $name: $((SECONDS - start)) s"
}

fit() { # fit SEED NAME WORKERS INIT_FROM CONFIG... -- [OPTIONS]
    local folder=$out/$1/$2 seed=$1 name=$2 workers=$3 from=$4 options=()
    shift 4
    for config in base "$@"; do options+=(--config "configs/$([[ $config == */* ]] || echo countdown/)$config.yaml"); done
    [[ -z $from ]] || options+=(--model.init_args.init_from "[$out/$seed/$from/checkpoints/last.ckpt]")
    # A run that was cut off left checkpoints, beside which Lightning would put those of the next under another name.
    [[ -e $folder.done ]] || rm -rf "$folder"
    # shellcheck disable=SC2086  # STEPS holds several words
    stage "$seed" "$name" "$python" -m lace_lightning fit "${options[@]}" --seed_everything "$seed" \
        --trainer.logger false --trainer.default_root_dir "$folder" \
        --data.init_args.task.init_args.seed "$seed" --data.init_args.task.init_args.exclude "$problems" \
        --data.init_args.num_workers "$workers" ${STEPS:-}
}

all() { # all PROCESS...: wait for each, and fail if one failed
    local failed=0
    for process in "$@"; do wait "$process" || failed=1; done
    return $failed
}

checkpoint() { echo "--policies.$2.init_from=[$out/$1/$2/checkpoints/last.ckpt]"; }

one_seed() {
    local seed=$1 few running=() configs=(--config configs/countdown/eval.yaml) policies=(lace isolated single)
    few=$(workers $fine_tunings)
    mkdir -p "$out/$seed"
    fit "$seed" backbone "$(workers 1)" "" pretrain
    fit "$seed" lace "$few" backbone sft & running+=($!)
    fit "$seed" isolated "$few" backbone sft exchange/isolated & running+=($!)
    # Drills are larger batches of more work: twice the processes.
    fit "$seed" single $((2 * few)) backbone sft drills & running+=($!)
    if ((${CAUSAL:-0})); then
        fit "$seed" lace_causal "$few" backbone sft exchange/causal & running+=($!)
        configs+=(--config configs/countdown/eval_causal.yaml) policies+=(lace_causal)
    fi
    all "${running[@]}"
    if ((${GRPO:-0})); then
        fit "$seed" lace_grpo 0 lace grpo & running=($!)
        fit "$seed" isolated_grpo 0 isolated grpo exchange/isolated & running+=($!)
        all "${running[@]}"
        configs+=(--config configs/countdown/eval_grpo.yaml) policies+=(lace_grpo isolated_grpo)
    fi
    # The evaluation itself goes on where it was; it is a stage only for its log and time.
    # shellcheck disable=SC2046,SC2086
    stage "$seed" eval "$python" -m lace_lightning eval "${configs[@]}" "--output=$out/$seed/eval" "--seeds=[$seed]" \
        $(for policy in "${policies[@]}"; do checkpoint "$seed" "$policy"; done) \
        "--benchmarks.third_party.problems=$problems" ${EVAL:-}
}

mkdir -p "$out"
gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
IFS=, read -ra gpus <<<"$gpus"
running=()
for index in "${!seeds[@]}"; do                   # seeds share out the GPUs
    ((${#gpus[@]} < 2)) || export CUDA_VISIBLE_DEVICES=${gpus[index % ${#gpus[@]}]}
    one_seed "${seeds[index]}" &
    running+=($!)
done
all "${running[@]}"

# Every seed evaluated its own models under its own number, so their outcomes are those of one evaluation.
mkdir -p "$out/eval"
cp "$out/${seeds[0]}/eval/evaluation.json" "$out/eval"
for file in outcomes errors; do
    for seed in "${seeds[@]}"; do cat "$out/$seed/eval/$file.jsonl"; done >"$out/eval/$file.jsonl"
done
"$python" -m lace_lightning eval report "$out/eval"
"$python" - "$out" "${seeds[@]}" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

out, seeds = Path(sys.argv[1]), sys.argv[2:]
found = {}
for seed in seeds:
    for line in (out / seed / "eval/outcomes.jsonl").open():
        row = json.loads(line)
        found.setdefault((row["benchmark"], row["method"]), {}).setdefault(seed, []).append(row["statistics"]["acc"])
print("accuracy of each seed, mean and standard deviation over seeds")
for (benchmark, method), by_seed in sorted(found.items()):
    values = [statistics.mean(by_seed[seed]) for seed in seeds]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"{benchmark:<12} {method:<16} {' '.join(f'{v:.3f}' for v in values)}  {statistics.mean(values):.3f} ± {spread:.3f}")
PYTHON
