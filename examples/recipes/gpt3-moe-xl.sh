# GPT3-MoE-XL of the ScMoE paper (arXiv 2404.05019, tables 8 and 9): 4.1B parameters as top-2.
#
# The paper gives neither the width of experts nor the vocabulary. With GPT-3's, 4 x hidden size and 50,257 tokens, top-2
# has 4.13B parameters; a shared expert in each MoE block adds 0.4B.
nodes=1 vocabulary=50257 num_layers=24 moe_every=2 position=pos2 shared_width=8192
model=(
  --num-layers 24 --hidden-size 2048 --num-attention-heads 32 --ffn-hidden-size 8192 --disable-bias-linear
  --position-embedding-type learned_absolute --seq-length 2048 --max-position-embeddings 2048
)
experts=(
  --num-experts 8 --moe-ffn-hidden-size 8192 --moe-expert-capacity-factor 2.0
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
)
# One expert on each of 8 GPUs, as the paper has it. 8 experts reach no further than one node of 8: to train with the
# all-to-all on the network, give GPUS_PER_NODE=4 NNODES=2.
layout=(--expert-model-parallel-size 8)
# The paper gives no batch, rate or schedule: those of GPT-3 XL (arXiv 2005.14165, table 2.1 and appendix B): 1M tokens,
# 2e-4 after 375M tokens, cosine to a tenth at 260B, 300B in all.
schedule=(
  --micro-batch-size 4 --global-batch-size 512 --train-iters 286102
  --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 358 --lr-decay-iters 247955
  --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
