# LLaMA2-MoE of the ScMoE paper (arXiv 2404.05019, tables 8 and 9): 6.7B parameters as top-2, an MoE in every block.
#
# The paper gives neither the width of experts nor the vocabulary. With Llama 2's 32,000 tokens and 5,504, the width of
# the public Llama of this shape (Sheared-LLaMA-1.3B, arXiv 2310.06694: 24 blocks, 2,048, 16 heads), top-2 has 6.88B
# parameters, 2.6% more; a shared expert in each block adds 0.8B.
nodes=1 vocabulary=32000 num_layers=24 moe_every=1 position=pos1 shared_width=5504
model=(
  --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --group-query-attention --num-query-groups 4
  --ffn-hidden-size 5504 --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear
  --position-embedding-type rope --untie-embeddings-and-output-weights
  --seq-length 2048 --max-position-embeddings 2048
)
experts=(
  --num-experts 8 --moe-ffn-hidden-size 5504 --moe-expert-capacity-factor 2.0
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
)
# One expert on each of 8 GPUs, as the paper has it. 8 experts reach no further than one node of 8: to train with the
# all-to-all on the network, give GPUS_PER_NODE=4 NNODES=2.
layout=(--expert-model-parallel-size 8)
# The paper gives no batch, rate or schedule: those of Llama 2 7B (arXiv 2307.09288, section 2.2 and table 1): 4M tokens,
# 3e-4 after 2,000 steps, cosine to a tenth, 2T tokens in all; Adam's epsilon is its 1e-5.
schedule=(
  --micro-batch-size 2 --global-batch-size 2048 --train-iters 476837
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
  --weight-decay 0.1 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0
)
