# A fine-grained ScMoE for several nodes: 8.0B parameters, about 1.5B of which work on a token.
#
# 64 experts of a quarter of the dense width (fine-grained experts: DeepSeekMoE, arXiv 2401.06066), and a shared expert
# of the full one.
nodes=8 vocabulary=32000 num_layers=24 moe_every=2 position=pos2 shared_width=5632
model=(
  --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 --swiglu --normalization RMSNorm
  --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
  --seq-length 4096 --max-position-embeddings 4096
)
experts=(
  --num-experts 64 --moe-ffn-hidden-size 1408 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
)
# One expert on each of 64 GPUs of 8 nodes: 7 of 8 tokens cross the network, where there is time to hide. Within a node
# of NVLink there is little: by arithmetic 4% of a group's time, of which hiding it would gain 0 to 2.5%.
layout=(--expert-model-parallel-size 64)
# Batch, rate and schedule of Llama 2 7B (arXiv 2307.09288, section 2.2), with half its batch, for 200B tokens.
schedule=(
  --micro-batch-size 2 --global-batch-size 512 --train-iters 100000
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
  --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
