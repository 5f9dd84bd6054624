"""A hybrid model's layers that cannot be built: what this machine lacks for them, and numbers that do not divide."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import torch

from megatron_scmoe.config import ConfigError, stages_of_pattern

_LAYERS_OF_GPUS = {
    "G": ("kernels of flash-linear-attention (a gated delta net)", "fla"),
    "D": ("Transformer Engine's linears (a sparse attention)", "transformer_engine"),
}
"""Symbols of --hybrid-layer-pattern without a local layer: what they need, and the package that has it."""
_ON_GPUS = {"M": ("layer M", "mamba_ssm"), "": ("a hybrid model", "transformer_engine")}
"""Packages that such layers need on a GPU; with any layers, for the norm behind the last one."""
_RECOMPUTED = {
    **{"core_attn": "*+D", "mla_up_proj": "+D", "mlp": "-", "gdn_norm_out": "G"},
    **dict.fromkeys(("moe", "moe_act", "shared_experts"), "E"),
}
"""Symbols of the layers that have what --recompute-modules names; a Mamba layer has nothing to name."""
_UNREAD = {
    "use_rope_scaling": "stretches no rotary positions",
    "rotary_interleaved": "makes the angles of channels that turn in halves",
}
"""Flags that a GPT model reads and Core's HybridModel does not (seen in 0.19.2), and what that does."""


def check_layers(args: Namespace) -> None:
    """Raise ConfigError for the first layer of ``args.hybrid_layer_pattern`` that cannot be built.

    Args:
        args: Megatron's namespace, as it was parsed.
    """
    pattern, has_gpu = args.hybrid_layer_pattern, torch.cuda.is_available()
    for symbol, (needed, package) in _LAYERS_OF_GPUS.items():
        lacks = {
            "--transformer-impl is local": args.transformer_impl == "local",
            "there is no CUDA device": not has_gpu,
            f"the package {package} is not installed": _is_missing(package),
        }
        if symbol in pattern and (why := [words for words, is_so in lacks.items() if is_so]):
            raise ConfigError(
                f"layer {symbol} needs {needed}: --hybrid-layer-pattern is {pattern} and {why[0]}; "
                "leave it out, or use --transformer-impl transformer_engine on GPUs"
            )
    for symbol, (layers, package) in _ON_GPUS.items():
        if has_gpu and symbol in pattern and _is_missing(package):
            raise ConfigError(
                f"on a GPU {layers} needs the package {package}: --hybrid-layer-pattern is {pattern} and it is not "
                "installed; install it"
            )
    if "M" in pattern and not args.use_checkpoint_args:  # which has these sizes
        _check_mamba(args)


def check_cuts(args: Namespace) -> None:
    """Raise ConfigError where the stages of ``args.hybrid_layer_pattern`` are not as many on each pipeline rank.

    Without a cut there is one stage, which Core cuts into equal parts, and a shortcut refuses (``stage_rules.py``).
    """
    stages, ranks = len(stages_of_pattern(args.hybrid_layer_pattern)), args.pipeline_model_parallel_size
    if stages > 1 and (ranks == 1 or stages % ranks):
        raise ConfigError(
            "a | ends a pipeline stage, of which each rank has as many: --hybrid-layer-pattern "
            f"{args.hybrid_layer_pattern} has {stages} stages and --pipeline-model-parallel-size is {ranks}; use "
            f"--pipeline-model-parallel-size {stages}, or other cuts"
        )


def check_recomputation(args: Namespace) -> None:
    """Raise ConfigError where no layer of ``args.hybrid_layer_pattern`` has a module that is to be recomputed."""
    if args.recompute_granularity != "selective" and not args.recompute_activations:
        return
    pattern = args.hybrid_layer_pattern
    for module in args.recompute_modules or ["core_attn"]:
        if module in _RECOMPUTED and not set(_RECOMPUTED[module]) & set(pattern):
            raise ConfigError(
                f"no layer would recompute anything for it: --recompute-modules has {module} (core_attn where none is "
                f"given) and --hybrid-layer-pattern {pattern} has none of {_RECOMPUTED[module]}; drop {module}, or use "
                "--recompute-granularity full"
            )


def check_positions(args: Namespace) -> None:
    """Raise ConfigError for a flag of rotary positions that Core's hybrid model does not read."""
    for name, does in _UNREAD.items():
        if "*" in args.hybrid_layer_pattern and getattr(args, name):
            raise ConfigError(
                f"Core's hybrid model {does}: --hybrid-layer-pattern is {args.hybrid_layer_pattern} and "
                f"--{name.replace('_', '-')} is set; drop it"
            )


def check_norms(args: Namespace) -> None:
    """Raise ConfigError for norms of queries, keys or latents that the layers of Core's hybrid model do not have."""
    pattern = args.hybrid_layer_pattern
    is_fused = args.transformer_impl == "transformer_engine" and args.latent_scaling == "none"
    missing = {
        "qk_l2_norm": (True, "drop it"),
        "qk_layernorm": (is_fused, "drop it, or use --transformer-impl local"),  # longcat's are in layers of ours
    }
    for name, (lacks, fix) in missing.items():
        if lacks and getattr(args, name) and set("*+") & set(pattern):
            raise ConfigError(
                "Core's hybrid layers would leave these norms out (seen in 0.19.2): --hybrid-layer-pattern is "
                f"{pattern}, --transformer-impl is {args.transformer_impl} and --{name.replace('_', '-')} is set; {fix}"
            )


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _check_mamba(args: Namespace) -> None:
    """Refuse sizes that Core's mixer asserts to divide one another once it is built."""
    heads, width = args.mamba_num_heads, args.mamba_head_dim
    said = f"--mamba-num-heads is {heads}"
    if heads is None and args.hidden_size is not None:
        inner = 2 * args.hidden_size
        if inner % width:
            raise ConfigError(
                f"without --mamba-num-heads a Mamba layer has 2 x --hidden-size values, of whole heads: --hidden-size "
                f"is {args.hidden_size} and --mamba-head-dim is {width}; give --mamba-num-heads"
            )
        heads = inner // width
        said = f"--mamba-num-heads is not set, which makes {heads} of --mamba-head-dim {width}"
    groups, ranks = args.mamba_num_groups, args.tensor_model_parallel_size
    if heads is not None and heads % groups:
        raise ConfigError(
            f"each group of a Mamba layer serves as many heads: {said}, and --mamba-num-groups is {groups}; use a "
            f"multiple of {groups} heads, or --mamba-num-groups 1"
        )
    if groups % ranks:
        raise ConfigError(
            "a tensor-parallel rank holds whole groups of a Mamba layer: --mamba-num-groups is "
            f"{groups} and --tensor-model-parallel-size is {ranks}; use a multiple of {ranks} groups"
        )
