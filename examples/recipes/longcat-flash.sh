# LongCat-Flash (arXiv 2509.01322) from a converted checkpoint, trained on: 560B parameters, 27B of which work on a token.
#
#   tools/convert_checkpoint.py --from hf-longcat --to megatron --load LongCat-Flash-Chat --save longcat
#   LOAD=longcat DATA=... SAVE=... sbatch --nodes 56 examples/slurm.sbatch longcat-flash
#
# The shape is that of the published config.json; a layer of LongCat-Flash is two blocks. Its multi-token prediction layer
# is left out; --mtp-num-layers 1 --recompute-num-layers 1 trains it, too.
nodes=56 vocabulary=131072 num_layers=56 moe_every=2 shared_width=12288
model=(
  --num-layers 56 --hidden-size 6144 --num-attention-heads 64 --kv-channels 128 --ffn-hidden-size 12288 --swiglu
  --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear --untie-embeddings-and-output-weights
  --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
  --v-head-dim 128 --qk-layernorm --latent-scaling longcat
  --position-embedding-type rope --rope-type rope --rotary-base 10000000
  --seq-length 8192 --max-position-embeddings 131072
)
experts=(
  --num-experts 512 --zero-experts 256 --moe-ffn-hidden-size 2048
  --moe-router-load-balancing-type none --moe-router-topk-scaling-factor 6.0
)
form=(
  --shortcut scmoe --shortcut-position pos2 --shortcut-combine add --moe-every 2 --overlap fixed
  --router longcat --moe-router-topk 12 --moe-shared-expert-intermediate-size 12288
)
# 448 GPUs of 80 GiB: 7 stages of 8 blocks, and 8 experts on each of the 64 ranks of a stage. All that a forward pass keeps
# would not fit beside them: groups are computed again.
layout=(
  --pipeline-model-parallel-size 7 --expert-model-parallel-size 64
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 2
)
fusion=() # which knows no bias beside a softmax
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "${LOAD:-}/tokenizer")
# The report gives no rate or batch. DeepSeek-V3, an MoE of this size, is tuned with 5e-6, cosine to 1e-6 (arXiv
# 2412.19437, section 5.1), and its routers' biases rest at the end of training (section 4.2). Adam's epsilon is
# LongCat-Flash's. A batch of 512 gives each of the 7 stages 8 micro-batches.
# One sequence of 8,192 tokens, two thirds of whose 12 choices travel, is 768 MiB an exchange: no latency to hide by more.
schedule=(
  --micro-batch-size 1 --global-batch-size 512 --train-iters 1000
  --lr 5e-6 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 20 --moe-router-bias-update-rate 0
  --weight-decay 0.1 --adam-beta2 0.95 --adam-eps 1e-16 --clip-grad 1.0
)
