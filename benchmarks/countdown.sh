#!/usr/bin/env bash
# Countdown, LACE against Isolated Parallel, on third-party instances: pretrain -> the same SFT twice -> validation.
# Seeds run side by side on one GPU; each writes its logs and a JSON summary per evaluation into OUT.
#   benchmarks/countdown.sh OUT PROBLEMS.jsonl [SEED ...]          (docs/real-data.md has the table)
# STEPS="--trainer.max_steps 2" makes a smoke test of it, WORKERS sets the data processes of each run.
set -euo pipefail

out=$(realpath -m "$1") problems=$(realpath -m "$2")
shift 2
seeds=("${@:-0}")
[[ ! -e $out ]] || { echo "OUT=$out exists: name a new folder" >&2; exit 2; }
[[ -f $problems ]] || { echo "PROBLEMS=$problems is no file" >&2; exit 2; }
cd "$(dirname "$0")/.."

lace() { # lace LOG SUBCOMMAND STAGE RUN_FOLDER SEED [OPTIONS]
    local log=$1 command=$2 stage=$3 folder=$4 seed=$5
    shift 5
    python3 -m lace_lightning "$command" --config configs/countdown/base.yaml \
        --config "configs/countdown/$stage.yaml" "$@" --seed_everything "$seed" \
        --trainer.logger false --trainer.default_root_dir "$folder" \
        --data.init_args.task.init_args.seed "$seed" --data.init_args.task.init_args.exclude "$problems" \
        --data.init_args.num_workers "${WORKERS:-2}" >"$log" 2>&1 ||
        { echo "failed: see $log" >&2; tail -n 5 "$log" >&2; return 1; }
}

method() { # method NAME SEED [EXCHANGE OPTIONS]
    local name=$1 seed=$2 folder=$out/$2/$1
    shift 2
    # shellcheck disable=SC2086  # STEPS holds several words
    lace "$folder.fit.log" fit sft "$folder" "$seed" "$@" ${STEPS:-} \
        --model.init_args.init_from "[$out/$seed/backbone/checkpoints/last.ckpt]"
    local trained=(--ckpt_path "$folder/checkpoints/last.ckpt")
    lace "$folder.own.log" validate sft "$folder" "$seed" "$@" "${trained[@]}" \
        --trainer.callbacks.path "$folder.own.json"
    lace "$folder.third_party.log" validate sft "$folder" "$seed" "$@" "${trained[@]}" \
        --data.init_args.problems "$problems" --trainer.callbacks.path "$folder.third_party.json"
}

one_seed() {
    mkdir -p "$out/$1"
    # shellcheck disable=SC2086
    lace "$out/$1/backbone.log" fit pretrain "$out/$1/backbone" "$1" ${STEPS:-}
    method lace "$1" & local first=$!
    method isolated "$1" --config configs/exchange/isolated.yaml
    wait "$first"
}

mkdir -p "$out"
running=()
for seed in "${seeds[@]}"; do
    one_seed "$seed" &
    running+=($!)
done
for process in "${running[@]}"; do wait "$process"; done
python3 - "$out" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

for problems in ("third_party", "own"):
    print(f"{problems:<12} {'acc':>14} {'best_at_n':>14} {'mean_at_n':>14} {'vote_at_n':>14} {'fmt':>14}   mean ± std over seeds")
    for method in ("lace", "isolated"):
        files = sorted(Path(sys.argv[1]).glob(f"*/{method}.{problems}.json"))
        metrics = [json.loads(file.read_text())["metrics"] for file in files]
        cells = []
        for name in ("acc", "best_at_n", "mean_at_n", "vote_at_n", "fmt"):
            values = [one[name] for one in metrics]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"{method:<12} " + " ".join(f"{cell:>14}" for cell in cells) + f"   ({len(files)} seeds)")
PYTHON
