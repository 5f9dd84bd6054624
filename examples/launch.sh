#!/usr/bin/env bash
# Train a model of examples/recipes/ on GPUs: run this on every node, by hand or by examples/slurm.sbatch.
#
#   DRY_RUN=1 examples/launch.sh RECIPE [flags ...]                        what it needs; on any machine, no GPU, no data
#   DATA=/data/corpus SAVE=/checkpoints/mine examples/launch.sh RECIPE [flags ...]
#
# RECIPE is a name in examples/recipes/, or the path of such a file, with a / in it. Flags given here are those of
# pretrain_gpt_scmoe.py; they come last and win.
#
#   DATA            folder that tools/preprocess_data.py wrote; the same path on every node
#   SAVE            folder for checkpoints and TensorBoard; a second call continues from the last checkpoint
#   LOAD            checkpoint whose weights the first call starts from
#   ARCH            scmoe (default), dgmoe, shared-expert, top-2 or top-1: the form of the MoE, and nothing else
#   NNODES          nodes; default: Slurm's, else the recipe's
#   GPUS_PER_NODE   default: Slurm's, else 8
#   NODE_RANK       which node this is, from 0; default: Slurm's
#   MASTER_ADDR     host of node 0, and MASTER_PORT (29500), a free port there
#   RESTARTS        how often all ranks are started again where one has failed, to go on from SAVE; default 0
#   STOP_WITHIN     seconds that ranks have from SIGTERM on to finish their step and save; default 240
#   DOCTOR=1        examines all ranks with these flags (tools/doctor.py), and trains nothing; DOCTOR_OPTIONS are its own
#   DRY_RUN=1       tells parameters and memory of each pipeline stage's ranks, and trains nothing
#   DRY_RUN=flags   prints the number of GPUs and the flags, a line each (tools/plan.py --recipe plans with them)
#
# Nothing of it has run on GPUs yet: see the README. docs/cluster.md goes from nothing to a running job.
set -euo pipefail
here=$(dirname "$(realpath "$0")")

refuse() {
  echo "launch.sh: refused: $1" >&2
  exit 2
}
recipes=$(basename -s .sh "$here"/recipes/*.sh | paste -sd ' ')
if [[ ${1:-} == --help || $# -eq 0 ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  echo
  echo "Recipes: $recipes"
  exit $(($# == 0 ? 2 : 0))
fi
recipe=$1
shift
file=$here/recipes/$recipe.sh
[[ $recipe != */* ]] || file=$recipe # as tools/plan.py --write-recipe writes one
[[ -f $file ]] || refuse "$recipe is no recipe; use one of: $recipes"

dry_run=${DRY_RUN:-0}
# What a recipe may leave as it is. A hybrid model has no num_layers and no moe_every: its pattern says where an MoE is.
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "${DATA:-}/tokenizer.model")
form=() num_layers= moe_every= combine=cg1 topk=1
# Top-1 takes the softmax over all experts: over the one that was chosen it would be 1, and the router learn nothing.
scores=(--moe-router-pre-softmax)
# One kernel for softmax, choice and balance loss, of which Core launches some twenty just before a dispatch.
fusion=(--moe-router-fusion)
source "$file"

# --- Who takes part -------------------------------------------------------------------------------------------------
nodes=${NNODES:-${SLURM_NNODES:-$nodes}}
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "there is a node at least: NNODES is $nodes; give a number from 1"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || refuse "a node has a GPU at least: GPUS_PER_NODE is $gpus; give a number from 1"
if [[ $dry_run == 0 ]]; then
  [[ ${DATA:-} ]] || refuse "there is nothing to read: DATA is not set; set it to a folder that tools/preprocess_data.py wrote"
  [[ ${SAVE:-} ]] || refuse "there is nowhere to write: SAVE is not set; set it to a folder for checkpoints"
  ((nodes == 1)) || [[ ${MASTER_ADDR:-} ]] ||
    refuse "nodes have to find one another: there are $nodes and MASTER_ADDR is not set; set it to the host of node 0"
  ((${SLURM_NTASKS_PER_NODE:-1} == 1)) ||
    refuse "torchrun starts a process for each GPU: SLURM_NTASKS_PER_NODE is $SLURM_NTASKS_PER_NODE; use --ntasks-per-node 1"
fi

# --- The form of the MoE --------------------------------------------------------------------------------------------
arch=${ARCH:-scmoe}
groups=() stock=()
if [[ $moe_every ]]; then # MoE in the last block of each group
  groups=(--moe-every "$moe_every") stock=(--moe-layer-freq "([0]*$((moe_every - 1))+[1])*$((num_layers / moe_every))")
fi
shared=(--moe-shared-expert-intermediate-size "$shared_width")
[[ $arch != dgmoe ]] || fusion=() # which knows no choice that leaves out another gate's expert
routed=(--moe-router-topk "$topk" "${scores[@]}")
if ((${#form[@]})); then
  [[ $arch == scmoe ]] || refuse "$recipe has one form: ARCH is $arch; drop it"
else
  case $arch in
    scmoe) form=(
      --shortcut scmoe --shortcut-position "$position" --shortcut-combine "$combine" "${groups[@]}" --overlap fixed
      "${routed[@]}" "${shared[@]}"
    ) ;;
    dgmoe) form=(
      --shortcut dgmoe --shortcut-position "$position" "${groups[@]}" --overlap fixed
      --moe-router-topk 2 "${scores[@]}"
    ) ;;
    shared-expert)
      form=("${stock[@]}" "${routed[@]}" "${shared[@]}")
      [[ $combine != cg1 ]] || form+=(--moe-shared-expert-gate)
      ;;
    top-2) form=("${stock[@]}" --moe-router-topk 2) ;;
    top-1) form=("${stock[@]}" --moe-router-topk 1 "${scores[@]}") ;;
    *) refuse "$arch is no form: ARCH is scmoe, dgmoe, shared-expert, top-2 or top-1" ;;
  esac
fi

# --- What all recipes share -----------------------------------------------------------------------------------------
common=(
  # Linears with their norms, flash attention and grouped products; bf16 has the range of fp32, and needs no loss scale.
  --transformer-impl transformer_engine --bf16
  # Each rank keeps its share of the optimizer; gradients are reduced, and weights gathered, while others are computed.
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable # loads in any layout, and as any form
  --moe-token-dispatcher-type alltoall                         # the one whose collectives can be cut in halves
  # Without them Core sorts and multiplies expert by expert, with host time that leaves the GPU idle before a dispatch.
  --moe-grouped-gemm --moe-permute-fusion "${fusion[@]}"
  --moe-router-dtype fp32 # a softmax over many experts, and the sums of a token's outputs, round too much in bf16
  --cross-entropy-loss-fusion --cross-entropy-fusion-impl native # keeps one copy of the logits less
  # Python's garbage collector stops a rank when it likes, and all others wait in the all-to-all: let all stop together.
  --manual-gc --manual-gc-interval 100
  # The all-to-all runs beside matrix products that fill the GPU. With priority its blocks are scheduled as soon as any
  # block of these ends; with few of them (examples/nccl.yaml) it takes few multiprocessors from the products.
  --high-priority-stream-groups ep --nccl-communicator-config-path "$here/nccl.yaml"
  --no-create-attention-mask-in-dataloader # a causal mask needs no tensor
  --hidden-dropout 0 --attention-dropout 0 # each token is seen about once
  --log-interval 10 --eval-interval 1000 --eval-iters 10
)

# --- Data and checkpoints; a dry run can do without -----------------------------------------------------------------
if [[ ${DATA:-} ]]; then
  data=(--data-path "$DATA/text_document" --split 99,1,0 "${tokenizer[@]}")
else
  data=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$vocabulary")
fi
checkpoints=()
if [[ ${SAVE:-} ]]; then
  checkpoints=(
    --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard"
    --exit-signal-handler # at SIGTERM the step is finished and saved
  )
  # Each start asks anew whether there is something in SAVE: those of a restart find it.
  [[ ! ${LOAD:-} ]] || checkpoints+=(--pretrained-checkpoint "$LOAD")
fi

# --- Environment ----------------------------------------------------------------------------------------------------
# With 1, all streams share one queue, in which an all-to-all that waits for another one holds up what is launched behind
# both: so with more than one chunk, with dgmoe's two gates and with late landings less is hidden. One all-to-all at a time
# loses nothing. Up to Hopper Megatron insists on 1 with tensor or context parallelism: give 1 there.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
# Matrix products and norms that are scheduled once leave to NCCL as many multiprocessors as nccl.yaml lets it take. A
# product that counts on all of them ends only when the ones that NCCL had have done their share, too.
ctas=$(sed -n 's/^  max_ctas: //p' "$here/nccl.yaml")
export NVTE_EXT_MARGIN_SM=${NVTE_EXT_MARGIN_SM:-$ctas}
export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-$ctas}
export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-$ctas}
# Experts get another number of rows in every step; segments that grow are not left in pieces by that.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

root=$(dirname "$here")
words=(
  "${common[@]}" "${model[@]}" "${experts[@]}" "${form[@]}" "${layout[@]}" "${schedule[@]}" "${data[@]}"
  "${checkpoints[@]}" "$@"
)
if [[ $dry_run == flags ]]; then
  printf '%s\n' "$((nodes * gpus))" "${words[@]}"
  exit
fi
if [[ $dry_run != 0 ]]; then
  exec env DRY_RUN=1 WORLD_SIZE=$((nodes * gpus)) RANK=0 LOCAL_RANK=0 python "$root/pretrain_gpt_scmoe.py" "${words[@]}"
fi
script=("$root/pretrain_gpt_scmoe.py")
if [[ ${DOCTOR:-0} != 0 ]]; then
  RESTARTS=0
  read -ra options <<<"${DOCTOR_OPTIONS:-}"
  script=("$root/tools/doctor.py" "${options[@]}" --)
fi
# -- ahead of the script: torchrun would take away the first one behind it, which is the doctor's
exec torchrun --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$gpus" \
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
  --max-restarts "${RESTARTS:-0}" --shutdown-timeout "${STOP_WITHIN:-240}" -- "${script[@]}" "${words[@]}"
