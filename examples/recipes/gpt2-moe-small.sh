# GPT2-MoE-Small of the ScMoE paper (arXiv 2404.05019, tables 8 and 9): 323M parameters as top-2.
#
# The paper gives neither the width of experts nor the vocabulary. With GPT-2's, 4 x hidden size and 50,257 tokens, top-2
# has 322M parameters; a shared expert in each MoE block adds 28M.
nodes=1 vocabulary=50257 num_layers=12 moe_every=2 position=pos2 shared_width=3072
model=(
  --num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 3072 --disable-bias-linear
  --position-embedding-type learned_absolute --seq-length 1024 --max-position-embeddings 1024
)
experts=(
  --num-experts 8 --moe-ffn-hidden-size 3072 --moe-expert-capacity-factor 2.0
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
)
# One expert on each of 8 GPUs, as the paper has it. 8 experts reach no further than one node of 8: to train with the
# all-to-all on the network, give GPUS_PER_NODE=4 NNODES=2.
layout=(--expert-model-parallel-size 8)
# The paper gives no batch, rate or schedule: those of GPT-3 Small (arXiv 2005.14165, table 2.1 and appendix B): 0.5M
# tokens, 6e-4 after 375M tokens, cosine to a tenth at 260B, 300B in all. Its dense model does a little less work for a token.
schedule=(
  --micro-batch-size 8 --global-batch-size 512 --train-iters 572205
  --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-iters 715 --lr-decay-iters 495911
  --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
