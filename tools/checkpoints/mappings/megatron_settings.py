"""What the arguments that a Megatron checkpoint saves may be, as far as they are read here, and their defaults."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from checkpoints import settings as rules
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings.layers import (
    ATTENTION,
    LATENT_ATTENTION,
    MAMBA,
    MOE,
    SYMBOLS,
    carries_moe,
    pattern_of,
    prediction_patterns,
)
from checkpoints.mappings.mamba import heads_of
from checkpoints.mappings.norms import SPECS
from checkpoints.settings import COUNT, FLAG, NUMBER, POSITIVE, SHARE, SIZE, WORD, Rule, each, either, one_of, optional
from checkpoints.tensors import CheckpointError, TensorInfo


def _is_json_object(value: object) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


_NEEDED = "num_layers hidden_size ffn_hidden_size num_attention_heads padded_vocab_size max_position_embeddings"
_LATENT = "kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim"
_POSITIONS = ("learned_absolute", "rope", "yarn", "mrope", "relative", "none")
# With Megatron's defaults and ours: older checkpoints, and those that were converted, do not have every name.
_READ: tuple[tuple[Rule, Any, str], ...] = (
    (FLAG, False, "group_query_attention multi_latent_attention add_qkv_bias qk_layernorm swiglu squared_relu"),
    (FLAG, False, "use_rope_scaling untie_embeddings_and_output_weights"),
    (FLAG, False, "mtp_use_repeated_layer"),
    (FLAG, False, "moe_shared_expert_gate moe_router_pre_softmax moe_router_enable_expert_bias"),
    (optional(SIZE), None, "kv_channels q_lora_rank moe_ffn_hidden_size moe_router_num_groups moe_router_group_topk"),
    (optional(SIZE), None, "moe_latent_size"),
    (optional(COUNT), None, "mtp_num_layers"),
    (optional(SIZE), 1, "num_query_groups"),
    (optional(COUNT), None, "num_experts moe_shared_expert_intermediate_size"),
    (optional(POSITIVE), None, "moe_router_topk_scaling_factor"),
    (SIZE, 2, "moe_every moe_router_topk"),
    (SIZE, 4096, "original_max_position_embeddings"),
    (COUNT, 0, "zero_experts"),
    (SIZE, 1, "moe_share_groups"),
    (either(SIZE, each(one_of(0, 1))), 1, "moe_layer_freq"),
    (POSITIVE, 1e-5, "layernorm_epsilon"),
    (POSITIVE, 10000, "rotary_base"),
    (POSITIVE, 32, "beta_fast"),
    (POSITIVE, 1, "beta_slow"),
    (POSITIVE, 1.0, "rotary_scaling_factor"),
    (SHARE, 1.0, "rotary_percent"),
    (NUMBER, 1.0, "mscale"),
    (NUMBER, 0.0, "mscale_all_dim"),
    (one_of("softmax", "sigmoid", "sqrtsoftplus"), "softmax", "moe_router_score_function"),
    (one_of(None, "fp32", "fp64"), None, "moe_router_dtype"),
    (one_of(*_POSITIONS), "learned_absolute", "position_embedding_type"),
    (one_of(None, "rope", "yarn"), None, "rope_type"),
    (one_of("LayerNorm", "RMSNorm"), "LayerNorm", "normalization"),
    (one_of(*SPECS), "transformer_engine", "transformer_impl"),
    (one_of("none", "scmoe", "dgmoe"), "none", "shortcut"),
    (each(one_of("pos1", "pos2", "pos3", "farskip")), ["pos2"], "shortcut_position"),
    (one_of("add", "cg1", "cg2"), "cg1", "shortcut_combine"),
    (one_of("core", "longcat"), "core", "router"),
    (one_of("none", "longcat"), "none", "latent_scaling"),
    (one_of("none", "upstream"), "none", "shortcut_norms"),
    (optional(WORD), None, "hybrid_layer_pattern"),
    (SIZE, 128, "mamba_state_dim"),
    (SIZE, 64, "mamba_head_dim"),
    (SIZE, 8, "mamba_num_groups"),
    (optional(SIZE), None, "mamba_num_heads"),
    (one_of("none", "fp8", "bf16", "lsh"), "none", "a2a_codec"),
    (one_of("paper", "none", "lowrank"), "paper", "lsh_compensation"),
)
DEFAULTS = {name: default for _, default, names in _READ for name in names.split()}
RULES = rules.by_name(
    (SIZE, f"{_NEEDED} {_LATENT}"),
    *((rule, names) for rule, _, names in _READ),
    (optional(SIZE), "vocab_size seq_length"),
    (FLAG, "add_bias_linear"),
    (NUMBER, "init_method_std"),
    (POSITIVE, "rope_scaling_factor"),
    (either(WORD, each(WORD)), "moe_router_load_balancing_type"),
    (Rule("a JSON object as text", _is_json_object), "hf_config"),
)


def complete(args: Namespace) -> Namespace:
    """``args`` with a value for every name that is read here, but those that every checkpoint has."""
    return Namespace(**{**DEFAULTS, **vars(args)})


def check_saved(source: MegatronCheckpoint) -> None:
    """Refuse saved arguments that no model has."""
    check_args(f"the saved arguments of {source.folder}", source.args, source.infos)


def check_args(origin: str, args: Namespace, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse arguments that no model has, or none with these tensors, of a checkpoint or of what becomes one."""
    rules.check(origin, vars(args), RULES, needed=tuple(_NEEDED.split()))
    settings = vars(complete(args))
    for name in ("num_layers", "mtp_num_layers"):
        rules.check_layers(origin, settings, name, infos)
    _check_heads(origin, settings)
    if settings["hybrid_layer_pattern"]:
        _check_pattern(origin, settings)
    _check_groups(origin, settings)
    if settings["num_experts"]:
        _check_experts(origin, settings, infos)


def _check_heads(origin: str, settings: Mapping[str, Any]) -> None:
    if settings["multi_latent_attention"]:
        rules.check(origin, settings, {}, needed=tuple(_LATENT.split()))
        return
    if not settings["kv_channels"]:
        rules.check_multiple(origin, settings, "hidden_size", "num_attention_heads")
    if settings["group_query_attention"]:
        rules.check(origin, settings, {"num_query_groups": SIZE})
        rules.check_multiple(origin, settings, "num_attention_heads", "num_query_groups")


def _check_pattern(origin: str, settings: Mapping[str, Any]) -> None:
    """Refuse layers of a hybrid model that are not known here, or that the other settings contradict."""
    args = Namespace(**settings)
    pattern, behind = pattern_of(args), prediction_patterns(args)
    symbols = {*pattern, *"".join(behind)}
    if unknown := symbols - set(SYMBOLS):
        raise CheckpointError(
            f"layers {SYMBOLS} are known here: hybrid_layer_pattern is {settings['hybrid_layer_pattern'][:60]!a} in "
            f"{origin}, with {min(unknown)!a}; use Megatron's tools"
        )
    other = ATTENTION if args.multi_latent_attention else LATENT_ATTENTION
    heads, groups = heads_of(args), args.mamba_num_groups
    faults = {
        f"num_layers is {args.num_layers}": len(pattern) != args.num_layers,
        f"mtp_num_layers is {args.mtp_num_layers}": len(behind) != (args.mtp_num_layers or 0),
        f"multi_latent_attention is {args.multi_latent_attention}": other in symbols,
        f"num_experts is {args.num_experts}": MOE in symbols and not args.num_experts,
        f"{heads} heads make no {groups} groups (mamba_num_groups)": MAMBA in symbols and heads % groups > 0,
    }
    for words, broken in faults.items():
        if broken:
            raise CheckpointError(
                f"hybrid_layer_pattern is {settings['hybrid_layer_pattern'][:60]!a} in {origin}, and {words}; correct "
                "it, or get it anew"
            )


def _check_groups(origin: str, settings: Mapping[str, Any]) -> None:
    layers, pattern = settings["num_layers"], settings["moe_layer_freq"]
    hybrid = pattern_of(Namespace(**settings))
    if isinstance(pattern, list | tuple) and len(pattern) != layers and not hybrid:
        raise CheckpointError(
            f"moe_layer_freq has {len(pattern)} values in {origin}, and should have one for each of {layers} layers"
        )
    if settings["shortcut"] == "none":
        return
    if not hybrid:
        rules.check_multiple(origin, settings, "num_layers", "moe_every")
    rules.check(origin, settings, {"num_experts": SIZE})
    groups = hybrid.count(MOE) if hybrid else layers // settings["moe_every"]
    positions = settings["shortcut_position"]
    if len(positions) not in (1, groups):
        raise CheckpointError(
            f"shortcut_position has {len(positions)} values in {origin}, and should have one for all or for each of "
            f"{groups} groups"
        )


def _check_experts(origin: str, settings: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    args = Namespace(**settings)
    num_moes = sum(carries_moe(args, block) for block in range(args.num_layers))
    shared = 1 if args.shortcut == "none" else args.moe_share_groups
    rules.check_experts(origin, settings, "num_experts", infos, num_moes=num_moes // shared)
    choices = args.num_experts + args.zero_experts
    if args.moe_router_topk > choices:
        raise CheckpointError(
            f"moe_router_topk is {args.moe_router_topk} in {origin}, and a token has {choices} experts to choose from; "
            "correct it, or get it anew"
        )
