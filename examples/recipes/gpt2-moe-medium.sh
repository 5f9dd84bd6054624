# GPT2-MoE-Medium of the ScMoE paper (arXiv 2404.05019, tables 8 and 9): 1.7B parameters as top-2.
#
# The paper gives neither the width of experts nor the vocabulary. GPT-2's, 4 x hidden size and 50,257 tokens, meet the
# totals of the Small and the XL model; here they make 1.87B, a tenth more: 16 experts in 12 blocks are 1.61B alone.
nodes=2 vocabulary=50257 num_layers=24 moe_every=2 position=pos2 shared_width=4096
model=(
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --ffn-hidden-size 4096 --disable-bias-linear
  --position-embedding-type learned_absolute --seq-length 2048 --max-position-embeddings 2048
)
experts=(
  --num-experts 16 --moe-ffn-hidden-size 4096 --moe-expert-capacity-factor 2.0
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
)
# One expert on each of 16 GPUs of 2 nodes: half of what is sent crosses the network, where there is time to hide.
layout=(--expert-model-parallel-size 16)
# The paper gives no batch, rate or schedule: those of GPT-3 Medium (arXiv 2005.14165, table 2.1 and appendix B): 0.5M
# tokens, 3e-4 after 375M tokens, cosine to a tenth at 260B, 300B in all.
schedule=(
  --micro-batch-size 4 --global-batch-size 256 --train-iters 572205
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 715 --lr-decay-iters 495911
  --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
