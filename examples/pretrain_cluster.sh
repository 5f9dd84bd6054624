#!/usr/bin/env bash
# Pretrain a ScMoE GPT on a GPU cluster: run this on every node, under Slurm or by hand.
#
#   MASTER_ADDR=host NNODES=4 NODE_RANK=0 DATA=/data/corpus SAVE=/checkpoints/scmoe examples/pretrain_cluster.sh [flags ...]
#
# DATA is a folder that tools/preprocess_data.py wrote. Flags given here come last and win. As it stands the model has about 8
# billion parameters, of which about 1.5 billion work on a token (with a vocabulary of 32,000). It has not run on GPUs yet: see
# the README.
#
# GPUs: 8 to 512, a power of two, since --global-batch-size 512 is a multiple of them and 8 share the experts. With others raise
# that flag; where they are no power of two, see "padded gradient bucket" in docs/parallelism.md. Without Apex add
# --no-gradient-accumulation-fusion, which Megatron then asks for.
set -euo pipefail
if [[ ${1:-} == --help ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
fi
: "${DATA:?set DATA to a folder written by tools/preprocess_data.py}" "${SAVE:?set SAVE to the folder for checkpoints}"
nodes=${NNODES:-${SLURM_NNODES:-1}}
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
gpus=${GPUS_PER_NODE:-8}
root=$(dirname "$(dirname "$(realpath "$0")")")

# With 1, all streams would share one queue, in which a collective that waits holds up what is launched after it. Up to
# Hopper, Megatron insists on 1 with tensor or context parallelism: set it before you call this script.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}

exec torchrun --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$gpus" \
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" "$root/pretrain_gpt_scmoe.py" \
  --transformer-impl transformer_engine --bf16 --use-distributed-optimizer --overlap-grad-reduce \
  --dist-ckpt-optim-fully-reshardable --ckpt-format torch_dist \
  --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 --swiglu --normalization RMSNorm \
  --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights \
  --seq-length 4096 --max-position-embeddings 4096 --hidden-dropout 0 --attention-dropout 0 \
  --shortcut scmoe --shortcut-position pos2 --shortcut-combine cg1 --moe-every 2 --overlap fixed \
  --num-experts 64 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 1408 --moe-grouped-gemm \
  --moe-shared-expert-intermediate-size 5632 --moe-token-dispatcher-type alltoall \
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 \
  --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 \
  --micro-batch-size 1 --global-batch-size 512 --train-iters 100000 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine \
  --lr-warmup-iters 2000 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 \
  --data-path "$DATA/text_document" --split 99,1,0 --no-create-attention-mask-in-dataloader \
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model" \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --eval-interval 1000 --eval-iters 10 --log-interval 10 \
  --tensorboard-dir "$SAVE/tensorboard" "$@"
