#!/usr/bin/env bash
# From a fresh checkout to a pretrained model that fills a mask, in a few minutes, on CPUs or GPUs:
#   bash launch/quickstart.sh [FOLDER]          (default: runs/quickstart)
# Installs into .venv, then tokenizer, shards, pretraining on two processes, export, fill-mask.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${1:-runs/quickstart}
[ ! -e "$OUT/model" ] || {
  echo "error: $OUT/model is there already; remove $OUT or give another folder" >&2
  exit 2
}
echo "== 1/6 install into .venv"
source launch/setup.sh

SAMPLES=mosaicbert_ds/samples/pretrain
RANKS=2 WHERE=(--num_gpus 2)
if [ -n "$HAS_GPU" ]; then
  VISIBLE=${CUDA_VISIBLE_DEVICES:+--id=$CUDA_VISIBLE_DEVICES} # indices or UUIDs; `deepspeed` takes indices alone
  IFS=, read -ra GPUS <<<"$(nvidia-smi $VISIBLE --query-gpu=index --format=csv,noheader | paste -sd,)"
  GPUS=("${GPUS[@]:0:2}")
  RANKS=${#GPUS[@]} WHERE=(--include "localhost:$(IFS=,; echo "${GPUS[*]}")")
fi
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# DeepSpeed leaves 66 MiB of memory a process behind on CPUs.
trap 'rm -f /dev/shm/deepspeed_allreduce_buffer_*_"$PORT"_*' EXIT

echo "== 2/6 train a tokenizer"
[ -d "$OUT/tokenizer" ] ||
  mosaicbert tokenizer train $SAMPLES/train.jsonl --vocab-size 2048 --out "$OUT/tokenizer"

echo "== 3/6 prepare shards"
mosaicbert data prepare $SAMPLES/train.jsonl --held-out-sources $SAMPLES/val.jsonl \
  --recipe tiny --tokenizer "$OUT/tokenizer" --out "$OUT/shards"

echo "== 4/6 pretrain the tiny recipe on $RANKS processes"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
deepspeed "${WHERE[@]}" --master_port "$PORT" --log_level warning \
  mosaicbert_ds/pretrain.py --recipe tiny --data "$OUT/shards" --out "$OUT/run"

echo "== 5/6 export for Hugging Face"
mosaicbert export "$OUT/run" "$OUT/model"

echo "== 6/6 fill a mask"
python - "$OUT/model" <<'PY'
import sys
from transformers import pipeline

fill = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)
for text in ("He looked at [MASK] and said nothing.", "The city is in the [MASK] of the country."):
    words = ", ".join(f"{guess['token_str']} ({guess['score']:.0%})" for guess in fill(text))
    print(f"  {text}\n    {words}")
PY

cat <<EOF

Done. The model is in $OUT/model. To look at the run:
  source .venv/bin/activate
  tensorboard --logdir $OUT/run/tensorboard
and open http://localhost:6006/#custom_scalars
EOF
