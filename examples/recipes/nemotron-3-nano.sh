# The shape of Nemotron 3 Nano 30B-A3B (arXiv 2512.20848) as ScMoE: 31.6B parameters, 3.2B of which work on a token
# (3.6B with embeddings). 23 Mamba, 6 attention and 23 MoE layers in Megatron's HybridModel.
#
# Pattern, widths, router and losses are those of Megatron-Bridge's Nemotron3NanoProvider
# (src/megatron/bridge/models/nemotronh/nemotron_h_provider.py). ARCH=shared-expert is that model, scmoe the same with
# experts that read one layer earlier; top-2, top-1 and dgmoe, whose two gates take one expert each, have no shared
# expert and fewer experts a token. 17 of the 23 groups are ME, 6 are M*E: pos1 is the one position that all have.
nodes=16 vocabulary=131072 position=pos1 shared_width=3712 combine=add topk=6
scores=() # a sigmoid weighs each expert by itself
model=(
  --hybrid-layer-pattern 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME'
  --hidden-size 2688 --num-attention-heads 32 --kv-channels 128 --group-query-attention --num-query-groups 2
  --mamba-num-heads 64 --mamba-head-dim 64 --mamba-state-dim 128 --mamba-num-groups 8
  --squared-relu --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear --position-embedding-type none
  --untie-embeddings-and-output-weights --init-method-std 0.0173 --seq-length 8192 --max-position-embeddings 8192
)
experts=(
  --num-experts 128 --moe-ffn-hidden-size 1856 --moe-router-score-function sigmoid --moe-router-enable-expert-bias
  --moe-router-topk-scaling-factor 2.5 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
)
# One expert on each of 128 GPUs of 16 nodes: 15 of 16 tokens cross the network, where there is time to hide. With two on
# each of 64, a GPU of 80 GiB would have little room left.
layout=(--expert-model-parallel-size 128)
# Batch, rate and schedule of Megatron-Bridge's nemotron_3_nano_pretrain_config, which is for 1T tokens; the model was
# trained on 25T. One sequence of 8,192 tokens with 6 choices each is 252 MiB an exchange; two would hold 111 GiB (dry run).
schedule=(
  --micro-batch-size 1 --global-batch-size 3072 --train-iters 39735
  --lr 1.6e-3 --min-lr 1.6e-5 --lr-decay-style cosine --lr-warmup-iters 333
  --weight-decay 0.1 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0
)
