"""What the planner does with each flag of the entry script: reads it, refuses it, says that it is not priced, or knows
that a step takes no longer by it.

The tables have every flag of Megatron-Core 0.19.2's parser and of ours but those that the entry script refuses whatever
their value. What none of them has is said to be unknown.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from planning.running import fuses_experts
from planning.unpriced import REFUSED, UNPRICED


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PRICED = _names("""
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
    expert-tensor-parallel-size sequence-parallel num-layers-per-virtual-pipeline-stage
    num-virtual-stages-per-pipeline-rank micro-batch-size global-batch-size seq-length bf16 fp16
    num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention num-query-groups kv-channels
    window-size window-attn-skip-freq attention-output-gate attention-backend swiglu quick-geglu
    multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
    hybrid-layer-pattern mamba-state-dim mamba-head-dim mamba-num-groups mamba-num-heads mtp-num-layers
    num-experts moe-layer-freq moe-ffn-hidden-size moe-router-topk moe-router-num-groups moe-router-group-topk
    moe-shared-expert-intermediate-size moe-latent-size moe-expert-capacity-factor moe-pad-expert-input-to-capacity
    moe-token-dispatcher-type moe-flex-dispatcher-backend moe-enable-deepep disable-bias-linear
    untie-embeddings-and-output-weights vocab-size padded-vocab-size make-vocab-size-divisible-by no-pad-vocab-size
    fp8-format fp8-recipe fp8-param-gather fp4-format fp4-param-gather cuda-graph-impl cuda-graph-modules
    cuda-graph-scope enable-cuda-graph external-cuda-graph recompute-granularity recompute-method recompute-num-layers
    recompute-modules recompute-activations moe-layer-recompute optimizer sgd-momentum use-distributed-optimizer
    use-precision-aware-optimizer main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype
    grad-reduce-in-bf16 overlap-grad-reduce overlap-param-gather overlap-moe-expert-parallel-comm
    shortcut shortcut-position shortcut-span shortcut-landing moe-every moe-share-groups zero-experts overlap
    overlap-chunks expert-slot a2a-codec fp8-transfers a2a-unique
""")
"""What the model of time reads."""
COUNTED = _names("""
    pipeline-model-parallel-layout decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
    microbatch-group-size-per-virtual-pipeline-stage accumulate-allreduce-grads-in-fp32 max-position-embeddings
    position-embedding-type no-position-embedding optimizer-cpu-offload optimizer-offload-fraction
    use-torch-optimizer-for-cpu-offload overlap-cpu-optimizer-d2h-h2d no-pin-cpu-* muon-* lion-* spec
    use-checkpoint-args use-mp-args-from-checkpoint-args
    encoder-num-layers encoder-seq-length router add-qkv-bias moe-shared-expert-gate
""")
"""What the dry run reads alone, or refuses: stages, memory, optimizers."""
COSTS_NOTHING = _names("""
    ckpt-* no-ckpt-* save-* *-load-*
    no-load-* no-save-* load save non-persistent-* dist-ckpt-* use-dist-ckpt replication*
    async-* use-persistent-ckpt-worker auto-detect-ckpt-format pretrained-checkpoint finetune load-main-params-from-ckpt
    exit-* override-* use-checkpoint-opt_param-scheduler verify-integrity no-stream-ckpt-dequant
    distrib-optim-fully-reshardable-mem-efficient no-strict-fsdp-dtensor-load
    no-use-tokenizer-model-from-checkpoint-args shortcut-resume hang-limit
    lr* warmup min-lr decoupled-* start-weight-decay end-weight-decay weight-decay* apply-wd-* no-weight-decay-cond-type
    adam-* clip-grad loss-scale* initial-loss-scale min-loss-scale hysteresis
    log-* tensorboard-* wandb-* timing-log-* logging-level no-log-* no-barrier-with-level-1-timing one-logger-*
    no-one-logger app-tag-* enable-ft-package calc-ft-timeouts ft-* fault-injector-* error-injection-* rerun-mode
    straggler-* disable-straggler-on-startup run-workload-inspector-server adlr-* inprocess-* config-logger-dir
    flight-recorder-* no-flight-recorder-* moe-routing-trace-* moe-per-layer-logging overlap-report overlap-interval
    eval-* start-eval-at-iter skip-train test-mode full-validation multiple-validation-sets validation-set-names
    *data-path split *data-args-path per-dataset-sequences-path dataloader-type dataloader-fast-cache-load
    dataloader-defer-npy-index-mmap data-cache-path no-mmap-bin-files mock-data num-workers reset-position-ids
    eod-mask-loss num-dataset-builder-threads object-storage-cache-path mid-level-dataset-surplus
    allow-ambiguous-pad-tokens no-create-attention-mask-in-dataloader phase-transition-iterations no-data-sharding
    *tokenizer-* tiktoken-* vocab-file merge-file trust-remote-code chat-template enable-msc disable-msc
    seed te-rng-tracker inference-rng-tracker data-parallel-random-init *init-method* embedding-init-method-std
    no-initialization use-cpu-initialization init-model-with-meta-device use-mup mup-* freeze-all-layers
    train-iters train-samples iterations-to-skip manual-gc* no-manual-gc-eval train-sync-interval
    check-weight-hash-across-dp-replicas-interval gpu-sniff-test-interval no-check-for-nan-in-loss-and-grad
    check-for-large-grads check-for-spiky-loss result-rejected-tracker-filename dump-param-to-param-group-map
    use-mcore-models distributed-* local-rank lazy-mpu-init disable-gloo-process-groups fake-process-group
    tp-comm-bootstrap-backend no-gradient-reduce-div-fusion ddp-average-in-collective no-align-*
    calculate-per-token-loss norm-epsilon normalization apply-layernorm-1p glu-linear-offset activation-func-clamp-value
    squared-relu rotary-* rope-* use-rotary-position-embeddings use-rope-scaling no-rope-freq yarn-*
    no-yarn-correction-range-round-to-int mrope-section mscale* apply-query-key-layer-scaling softmax-type
    attention-softmax-in-fp32 mtp-loss-scaling-factor mtp-detach-heads
    moe-router-pre-softmax moe-router-topk-scaling-factor moe-router-score-function moe-router-dtype
    moe-router-enable-expert-bias moe-router-bias-update-rate moe-router-quantile-balancing-ema
    moe-router-force-load-balancing moe-router-force-biased moe-enable-routing-replay moe-router-load-balancing-type
    moe-aux-loss-coeff moe-z-loss-coeff moe-input-jitter-eps moe-token-drop-policy moe-apply-probs-on-input
    moe-use-upcycling moe-upcycling-granularity moe-single-grouped-* moe-ncclep-* moe-mlp-glu-interleave-size
    moe-shared-expert-glu-interleave-size moe-hybridep-pad-uneven-dispatch-inputs
    fp8-margin fp8-interval fp8-amax-* fp4-recipe num-layers-at-*-in-bf16 cuda-graph-warmup-steps enable-experimental
    disable-bf16-reduced-precision-matmul no-clone-scatter-output-in-embedding
    linear-conv-kernel-dim linear-*-head-dim linear-num-* dsa-* no-dsa-*
    no-use-layer-wise-param-layout create-all-gather-group fsdp-* megatron-fsdp-* torch-fsdp2-*
    data-parallel-sharding-strategy outer-dp-sharding-strategy keep-fp8-transpose-cache sharp-enabled-group
    suggested-communication-unit-size offload-modules min-offloaded-tensor-size activation-offload-fraction
    delta-offload-bytes-across-pp-ranks delay-offload-until-cuda-graph fine-grained-offloading-max-inflight-offloads
    cpu-offloading-retain-pinned-cpu-buffers moe-paged-stash-* no-tp-comm-* tp-comm-overlap-* wgrad-deferral-limit
    kitchen-attention-backend flash-attention-version qk-clip-* profile-* pytorch-profiler-* use-pytorch-profiler
    record-* memory-snapshot-path nvtx-ranges logits-save-* decrease-batch-size-if-needed
    shortcut-combine latent-scaling a2a-weights-apart-above lsh-* nccl-communicator-config-path
    inference-* mamba-inference-*
""")
"""Patterns of what no step takes longer by, or so little that no prediction tells it: data, logs, checkpoints, what is
between steps, small kernels; and what says more of a flag of the other tables."""


def not_priced(args: Namespace, flags: Sequence[str]) -> list[str]:
    """What of a run is predicted as if it were otherwise.

    Args:
        args: Megatron's namespace, validated.
        flags: of the command line, among which unknown ones are named.
    """
    found = [words for one in UNPRICED if (words := one.found_in(args))]
    if fuses_experts(args):
        found.append("NVTE_CUTEDSL_FUSED_GROUPED_MLP of the ranks (priced: 1, with which experts are fused)")
    given = dict.fromkeys(word for word in flags if word.startswith("--"))
    return [*found, *(f"{flag} (unknown here)" for flag in given if not any(tables_with(flag)))]


def tables_with(flag: str) -> Iterator[str]:
    """Names of the tables that have ``flag``."""
    word = flag.removeprefix("--")
    for name, patterns in (("priced", PRICED), ("counted", COUNTED), ("costs nothing", COSTS_NOTHING)):
        if any(fnmatchcase(word, pattern) for pattern in patterns):
            yield name
    for name, table in (("not priced", UNPRICED), ("refused", REFUSED)):
        if any(one.flag == flag and not getattr(one, "values", ()) for one in table):
            yield name
