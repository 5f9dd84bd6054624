#!/usr/bin/env bash
# Pretrain a small ScMoE GPT on one machine: on its GPUs with NCCL, without any on 2 gloo ranks, one thread each.
#
#   examples/pretrain_small.sh FOLDER [ITERATIONS] [flags for pretrain_gpt_scmoe.py ...]
#
# FOLDER/data is what tools/preprocess_data.py wrote; checkpoints and TensorBoard logs go to FOLDER, those of a hybrid
# model to FOLDER/hybrid. A second call continues from the last checkpoint. `make pretrain` calls this.
#
#   CONTAINER   gpt (default), or hybrid: Megatron's HybridModel, with Mamba layers in the place of half the attention
set -euo pipefail
if [[ $# -lt 1 || $1 == --help ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit $(($# < 1 ? 2 : 0))
fi
folder=$1
container=${CONTAINER:-gpt}
iterations=${2:-300}
shift $(($# < 2 ? $# : 2))
if [[ ! -f $folder/data/manifest.json ]]; then
  echo "$0: no data: $folder/data has no manifest.json; run tools/preprocess_data.py --output $folder/data first" >&2
  exit 2
fi
if [[ $container != gpt && $container != hybrid ]]; then
  echo "$0: CONTAINER is '$container', which is no model of Megatron's: use gpt or hybrid" >&2
  exit 2
fi
runs=$folder
[[ $container == gpt ]] || runs=$folder/hybrid
cd_here=$(dirname "$(dirname "$(realpath "$0")")")

tracker=$runs/checkpoints/latest_checkpointed_iteration.txt
if [[ -f $tracker ]]; then
  if (($(<"$tracker") >= iterations)); then
    echo "Training is complete at iteration $(<"$tracker"): this run evaluates it. ITERS=$((iterations * 2)) trains on."
  else
    echo "Continuing from the checkpoint of iteration $(<"$tracker")."
  fi
fi

implementation=local
num_gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
if ((num_gpus > 0)); then
  backend=nccl num_ranks=$num_gpus precision=(--bf16)
  # On a GPU Core takes the last norm of its HybridModel from there, and Mamba layers need the package mamba_ssm.
  [[ $container == gpt ]] || implementation=transformer_engine
else
  backend=gloo num_ranks=2 precision=()
  export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi
# 8 experts: as many ranks share them as divide 8.
expert_parallel=$num_ranks
while ((8 % expert_parallel != 0 || num_ranks % expert_parallel != 0)); do ((expert_parallel -= 1)); done

if [[ $container == gpt ]]; then
  layers=(--num-layers 4 --moe-every 2)
else
  layers=(--hybrid-layer-pattern 'M-*EM-*E')
  layers+=(--mamba-num-heads 8 --mamba-head-dim 32 --mamba-state-dim 32 --mamba-num-groups 2)
fi
model=(
  "${layers[@]}" --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 344 --swiglu --normalization RMSNorm
  --position-embedding-type rope --seq-length 256 --max-position-embeddings 256 --disable-bias-linear
  --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02
)
experts=(
  --shortcut scmoe --shortcut-position pos2 --shortcut-combine cg1 --overlap fixed
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
# What runs without Apex, and but for hybrid models on GPUs, without Transformer Engine.
plain=(
  --transformer-impl "$implementation" --no-persist-layer-norm --no-gradient-accumulation-fusion
  --no-masked-softmax-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
)
output=(
  --save "$runs/checkpoints" --load "$runs/checkpoints" --save-interval 100 --ckpt-format torch_dist
  --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
  --log-interval 10 --eval-interval 120 --eval-iters 10 --tensorboard-dir "$runs/tensorboard"
)

torchrun --standalone --nproc-per-node "$num_ranks" "$cd_here/pretrain_gpt_scmoe.py" --distributed-backend "$backend" \
  "${model[@]}" "${experts[@]}" "${training[@]}" "${data[@]}" "${plain[@]}" "${output[@]}" "$@"

again="make pretrain" other=hybrid
[[ $container == gpt ]] || again="make pretrain CONTAINER=hybrid" other=gpt
cat <<END

The checkpoint is in $runs/checkpoints; the validation perplexity ("lm loss PPL") stands above.
What to try next:
  $again ITERS=$((iterations * 2))    train on
  $again RUN=run-off ARGS='--overlap off'    the same numbers, without overlap
  $again RUN=run-pos1 ARGS='--shortcut-position pos1'
  $again RUN=run-lsh ARGS='--a2a-codec lsh --overlap-report run-lsh/report'
  $again CORPUS=path/to/text    your own text or JSONL
  make pretrain CONTAINER=$other    Megatron's other model, on the same data
  $cd_here/.venv/bin/tensorboard --logdir $runs/tensorboard
END
