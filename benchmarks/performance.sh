#!/usr/bin/env bash
# Every number and figure of docs/performance.md, measured on this machine's GPU: JSON into OUT, then tables and plots.
#   benchmarks/performance.sh [OUT] [STEP ...]      steps: decode context large memory rollout train growth plot (all)
# OUT is benchmarks/results unless given. A step that fails is named at the end; the others run.
# COMMIT names the commit where the code runs outside of a git checkout. About 25 minutes on one H200.
set -uo pipefail

cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
shift || true
(($#)) || set -- decode context large memory rollout train growth plot
steps=("$@")
failed=()

lace() { # lace COMMAND [OPTIONS]
    local options=(--out "$out")
    [[ -z ${COMMIT:-} ]] || options+=(--commit "$COMMIT")
    echo "lace bench $*"
    python3 -m lace_lightning bench "$@" "${options[@]}" || failed+=("lace bench $*")
}

decode() { # the paper's setting, with everybody else in the same run
    lace decode --shape qwen3-1.7b --device cuda --peers
    lace decode --shape qwen3-4b --device cuda --peers dynamic graph
}
context() { # long prompts, and lattices that have grown long
    lace decode --shape qwen3-1.7b --device cuda --threads 1 4 128 --prompt 2048
    lace decode --shape qwen3-1.7b --device cuda --lattice-time 2048 --repeats 5
}
large() { lace decode --shape qwen3-4b --device cuda --threads 128; }
memory() {
    lace memory --shape qwen3-1.7b --device cuda
    lace memory --shape qwen3-4b --device cuda
}
rollout() { lace rollout --shape qwen3-1.7b --device cuda; }
train() {
    lace train --shape qwen3-1.7b --device cuda --compile --grid 4x2048
    lace train --shape qwen3-1.7b --device cuda --compile --grid 4x2048 --no-checkpointing
    lace train --shape qwen3-1.7b --device cuda --compile --grid 8x4096 --repeats 5
}
growth() { lace growth --shape qwen3-1.7b --device cuda; }
plot() { python3 -m lace_lightning bench plot --results "$out" || failed+=("lace bench plot"); }

for step in "${steps[@]}"; do
    declare -F "$step" >/dev/null || { echo "STEP=$step is unknown; see the head of $0" >&2; exit 2; }
done
for step in "${steps[@]}"; do "$step"; done
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
