#!/usr/bin/env bash
# MosaicBERT against BERT in minutes: pretrain both for each budget, score each on GLUE, draw the curves.
#   bash launch/minutes.sh SHARDS GLUE_DIR OUT MINUTES ...
# RECIPES="mine.yaml bert-base-short": other recipes, each a curve. FINETUNE="--seeds 19": more for the scoring.
# A GPU of its own for each recipe where there are enough, else one after the other. Run again, it goes on.
set -euo pipefail
[ $# -ge 4 ] || {
  echo "error: $# arguments; give SHARDS, GLUE_DIR, OUT and one or several numbers of MINUTES" >&2
  exit 2
}
export SHARDS=$1 GLUE=$2 OUT=$3 MINUTES="${*:4}" FINETUNE=${FINETUNE:-}
export PRETRAIN="$(dirname "$0")/../mosaicbert_ds/pretrain.py" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
read -ra RECIPES <<<"${RECIPES:-mosaicbert-base-short bert-base-short}"

race() { # RECIPE GPU
  set -euo pipefail
  local curve runs=() minutes run port
  curve=$(basename "$1" .yaml)
  for minutes in $MINUTES; do
    run="$OUT/$curve-${minutes}min"
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed --include "localhost:$2" --master_port "$port" --log_level warning "$PRETRAIN" \
      --recipe "$1" --data "$SHARDS" --out "$run" duration.minutes="$minutes" checkpoint.keep_last=1
    rm -f /dev/shm/deepspeed_allreduce_buffer_*_"$port"_* # DeepSpeed leaves 66 MiB a process on CPUs
    runs+=("$curve=$run")
    CUDA_VISIBLE_DEVICES=$2 mosaicbert pareto "${runs[@]}" --glue-dir "$GLUE" --out "$OUT/$curve" \
      --recipe glue-short --jobs-per-gpu 4 $FINETUNE
  done
}
export -f race

VISIBLE=${CUDA_VISIBLE_DEVICES:+--id=$CUDA_VISIBLE_DEVICES} # indices or UUIDs; `deepspeed` takes indices alone
INDICES=$(nvidia-smi $VISIBLE --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)
IFS=, read -ra GPUS <<<"${INDICES:-0}"
SIDE_BY_SIDE=1
[ ${#GPUS[@]} -ge ${#RECIPES[@]} ] && SIDE_BY_SIDE=${#RECIPES[@]}
for number in "${!RECIPES[@]}"; do
  printf '%s\0%s\0' "${RECIPES[number]}" "${GPUS[number % SIDE_BY_SIDE]}"
done | xargs -0 -n 2 -P "$SIDE_BY_SIDE" bash -c 'race "$@"' race

curves=() runs=()
for recipe in "${RECIPES[@]}"; do
  curve=$(basename "$recipe" .yaml)
  curves+=("$OUT/$curve")
  runs+=("$OUT/$curve-${!#}min")
done
mosaicbert plot "${runs[@]}" --out "$OUT/loss.png"
mosaicbert pareto "${curves[@]}" --out "$OUT/pareto"
