#!/usr/bin/env bash
# Pretrain a small ScMoE GPT on one machine: on its GPUs with NCCL, without any on 2 gloo ranks, one thread each.
#
#   examples/pretrain_small.sh FOLDER [ITERATIONS] [flags for pretrain_gpt_scmoe.py ...]
#
# FOLDER/data is what tools/preprocess_data.py wrote; checkpoints and TensorBoard logs go to FOLDER. A second call
# continues from the last checkpoint. `make pretrain` calls this.
set -euo pipefail
if [[ $# -lt 1 || $1 == --help ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit $(($# < 1 ? 2 : 0))
fi
folder=$1
iterations=${2:-300}
shift $(($# < 2 ? $# : 2))
if [[ ! -f $folder/data/manifest.json ]]; then
  echo "$0: no data: $folder/data has no manifest.json; run tools/preprocess_data.py --output $folder/data first" >&2
  exit 2
fi
cd_here=$(dirname "$(dirname "$(realpath "$0")")")

tracker=$folder/checkpoints/latest_checkpointed_iteration.txt
if [[ -f $tracker ]]; then
  if (($(<"$tracker") >= iterations)); then
    echo "Training is complete at iteration $(<"$tracker"): this run evaluates it. ITERS=$((iterations * 2)) trains on."
  else
    echo "Continuing from the checkpoint of iteration $(<"$tracker")."
  fi
fi

num_gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
if ((num_gpus > 0)); then
  backend=nccl num_ranks=$num_gpus precision=(--bf16)
else
  backend=gloo num_ranks=2 precision=()
  export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi
# 8 experts: as many ranks share them as divide 8.
expert_parallel=$num_ranks
while ((8 % expert_parallel != 0 || num_ranks % expert_parallel != 0)); do ((expert_parallel -= 1)); done

model=(
  --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 344 --swiglu --normalization RMSNorm
  --position-embedding-type rope --seq-length 256 --max-position-embeddings 256 --disable-bias-linear
  --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02
)
experts=(
  --shortcut scmoe --shortcut-position pos2 --shortcut-combine cg1 --moe-every 2 --overlap fixed
  --num-experts 8 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 344
  --moe-shared-expert-intermediate-size 344 --moe-token-dispatcher-type alltoall
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --expert-model-parallel-size "$expert_parallel"
)
training=(
  --micro-batch-size 4 --global-batch-size $((4 * num_ranks)) --train-iters "$iterations" "${precision[@]}"
  --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-decay-iters 1000 --lr-warmup-iters 20 --weight-decay 0.1
  --adam-beta2 0.95 --clip-grad 1.0 --override-opt-param-scheduler --seed 1234
)
data=(
  --data-path "$folder/data/text_document" --split 95,5,0 --num-workers 0 --no-create-attention-mask-in-dataloader
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$folder/data/tokenizer.model"
  --data-cache-path "$folder/cache"
)
# What the local spec runs without Transformer Engine and Apex.
plain=(
  --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
  --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
)
output=(
  --save "$folder/checkpoints" --load "$folder/checkpoints" --save-interval 100 --ckpt-format torch_dist
  --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
  --log-interval 10 --eval-interval 120 --eval-iters 10 --tensorboard-dir "$folder/tensorboard"
)

torchrun --standalone --nproc-per-node "$num_ranks" "$cd_here/pretrain_gpt_scmoe.py" --distributed-backend "$backend" \
  "${model[@]}" "${experts[@]}" "${training[@]}" "${data[@]}" "${plain[@]}" "${output[@]}" "$@"

cat <<END

The checkpoint is in $folder/checkpoints; the validation perplexity ("lm loss PPL") stands above.
What to try next:
  make pretrain ITERS=$((iterations * 2))                               train on
  make pretrain RUN=run-off ARGS='--overlap off'          the same numbers, without overlap
  make pretrain RUN=run-pos1 ARGS='--shortcut-position pos1'
  make pretrain RUN=run-lsh ARGS='--a2a-codec lsh --overlap-report run-lsh/report'
  make pretrain CORPUS=path/to/text                       your own text or JSONL
  $cd_here/.venv/bin/tensorboard --logdir $folder/tensorboard
END
