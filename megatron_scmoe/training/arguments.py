"""The command line: Megatron's own flags, and a group generated from each subject of ``config``.

What cannot work is refused here, before any process group starts: one line with the rule, the two values and the fix,
and exit code 2 (which torchrun, that starts nothing again then, turns into 1).
"""

from __future__ import annotations

import enum
import sys
import traceback
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from megatron.training.argument_utils import ArgumentGroupFactory, core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import get_tokenizer, set_global_variables

from megatron_scmoe.config import (
    ARCHITECTURE_FIELDS,
    CODEC_FIELDS,
    SUBJECTS,
    Combine,
    ConfigError,
    Overlap,
    Router,
    ScMoEConfig,
    Shortcut,
)
from megatron_scmoe.job import last_words, orphans
from megatron_scmoe.job.meeting import Meeting
from megatron_scmoe.mcore import checkpoints, version
from megatron_scmoe.training import (
    corpus,
    prediction_rules,
    queues,
    refusals,
    resume,
    script_rules,
    sequence_rules,
    sizes,
    slower,
    stage_rules,
    untried,
    whole_step,
)
from megatron_scmoe.training.unread_flags import UnreadFlags

EXIT_REFUSED = 2

CORE_FORGETS = (
    # latent attention, and how positions turn queries and keys
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim", "use_rope_scaling", "rope_scaling_factor"),
    *("rotary_seq_len_interpolation_factor", "no_rope_freq", "mrope_section"),
    *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    "yarn_correction_range_round_to_int",
    # attention
    *("window_size", "window_attn_skip_freq", "softmax_type", "qk_layernorm", "qk_l2_norm", "attention_output_gate"),
    *("experimental_attention_variant", "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk"),
    *("dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset", "dsa_indexer_rope_interleaved"),
    *("dsa_indexer_rotate_activation", "dsa_indexer_scoring_relu", "dsa_indexer_k_norm_epsilon"),
    *("dsa_indexer_k_norm_fp32", "linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    # norms, residuals and MLPs
    *("layernorm_epsilon", "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
    *("quick_geglu", "glu_linear_offset", "activation_func_clamp_value"),
    # experts and their router
    *("moe_shared_expert_gate", "moe_router_dtype", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_apply_probs_on_input", "moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"),
    # factors of embedding, attention and logits
    *("use_mup", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "mup_base_head_dim"),
    "mup_attn_scale_power",
)
"""Flags that decide what parameters mean and that Core's --use-checkpoint-args leaves as they are (seen in 0.19.2)."""

OF_CONVERSION = ("hf_config", "hf_has_unused_tensors")
"""What tools/convert_checkpoint.py saved of a Hugging Face source; no flags, but the way back needs them."""


class _FlagFactory(ArgumentGroupFactory):
    """Core's flag generator, taught choices that are words and one value for each group.

    The namespace gets plain strings, numbers and lists: it is pickled into every checkpoint, which must load where this
    package is not installed.
    """

    def _extract_type(self, config_type: Any) -> dict[str, Any]:
        if typing.get_origin(config_type) is tuple:
            return {**self._extract_type(typing.get_args(config_type)[0]), "nargs": "+"}
        if isinstance(config_type, type) and issubclass(config_type, enum.StrEnum):
            return {"type": str, "choices": [member.value for member in config_type]}
        return super()._extract_type(config_type)

    def _build_argparse_kwargs_from_field(self, attribute: Any) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        kwargs["default"] = _plain(kwargs["default"])
        return kwargs


def add_scmoe_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our flags to Megatron's parser, and let it show its help."""
    version.mend_help(parser)
    for subject, settings in SUBJECTS.items():
        _FlagFactory(settings).build_group(parser, title=f"shortcut-connected MoE (megatron_scmoe): {subject}")
    return parser


def scmoe_config_from_args(args: Namespace) -> ScMoEConfig:
    """Our settings, from the namespace of a command line or of a checkpoint; flags that it lacks have their default."""
    values: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(ScMoEConfig).items():
        if not hasattr(args, name):
            continue
        if typing.get_origin(kind) is tuple:
            item_kind = typing.get_args(kind)[0]
            values[name] = tuple(item_kind(item) for item in getattr(args, name))
        else:
            values[name] = kind(getattr(args, name))
    return ScMoEConfig(**values)


def parse_and_validate_args(
    go_without: Callable[[Namespace], None] | None = None,
) -> tuple[Namespace, ScMoEConfig, Meeting]:
    """What ``validated_args`` returns; what it refuses ends this process in a line, and what is doubtful is said.

    Args:
        go_without: see there.
    """
    try:
        args, scmoe, meeting = validated_args(partial(Meeting, alone=go_without is not None), go_without)
    except ConfigError as error:
        refuse(str(error))
    if args.rank == 0:
        if warning := slower.one_queue_warning(scmoe, one_queue=queues.launches_in_one()):
            print(f" > overlap warning: {warning}", flush=True)
        if warning := slower.unique_warning(args, scmoe):
            print(f" > unique warning: {warning}", flush=True)
        if warning := slower.codec_warning(args, scmoe):
            print(f" > codec warning: {warning}", flush=True)
        for words in untried.found_in(args, scmoe):
            print(f" > untried: {words}", flush=True)
    return args, scmoe, meeting


def validated_args(
    meet: Callable[[Namespace], Meeting], go_without: Callable[[Namespace], None] | None = None
) -> tuple[Namespace, ScMoEConfig, Meeting]:
    """Parse the command line, refuse what cannot work, and set Megatron's global variables.

    Megatron's function of this name has no place between parsing and validation, where the MoE pattern has to be set,
    so its steps are called one by one.

    Args:
        meet: says where this job's ranks meet; called with Megatron's namespace as the command line has it.
        go_without: of a dry run, which has no other ranks and needs no Transformer Engine: takes out of the validated
            namespace what cannot be built without a GPU.

    Returns:
        Megatron's namespace, validated, our settings, and where this job's ranks meet.

    Raises:
        ConfigError: for what cannot work.
    """
    unread: list[UnreadFlags] = []

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        unread.append(UnreadFlags(parser))
        return add_scmoe_arguments(parser)

    args = parse_args(add_arguments)
    meeting = meet(args)
    version.check_core_version()
    queues.asked_for()  # before Megatron, which reads it as a text
    unread[0].check(args)
    sizes.check_sizes(args)
    script_rules.check_hooks(args, needs_transformer_engine=go_without is None)
    script_rules.check_restarts(args)
    scmoe, saved = _validate(args, meeting, go_without)
    script_rules.check_paths(args)
    corpus.check_datasets(args)
    corpus.say_if_order_changes(args, saved)
    set_global_variables(args)  # with the tokenizer, which decides the vocabulary
    if args.sft:
        sequence_rules.check_chat_template(args, get_tokenizer(), corpus.first_chat(args))
    resume.keep_vocabulary(args, saved)
    return args, scmoe, meeting


def _validate(
    args: Namespace, meeting: Meeting, go_without: Callable[[Namespace], None] | None
) -> tuple[ScMoEConfig, Namespace | None]:
    """Complete and validate ``args``; returns our settings, and the arguments of the checkpoint to load."""
    resume.use_pretrained(args)
    whole_step.choose_step(args, meeting)
    if args.use_checkpoint_args:
        _restore_args(args)
    scmoe = scmoe_config_from_args(args)
    if scmoe.enabled:
        scmoe.validate(_num_layers(args), args.hybrid_layer_pattern or "")
        refusals.check_megatron_args(args, scmoe)
        _set_megatron_args(args, scmoe)
    else:
        scmoe.validate(num_layers=0)
        if scmoe.replaces_stock_moe:
            refusals.check_pipelined(args, scmoe)
    _by_megatrons_rules(validate_args, args)
    if go_without is not None:
        go_without(args)
    script_rules.check_chunks(args, scmoe)
    script_rules.check_timing(scmoe)
    prediction_rules.check(args, scmoe)
    if scmoe.enabled:
        config = _by_megatrons_rules(core_transformer_config_from_args, args)
        for check in (stage_rules.check_pipeline, stage_rules.check_recompute, stage_rules.check_balance_losses):
            check(scmoe, config, args.hybrid_layer_pattern or "")
    saved = resume.check(args, scmoe, scmoe_config_from_args)
    if scmoe.overlap is Overlap.ADAPTIVE:
        args.overlap_plans = getattr(saved, "overlap_plans", {})
    if scmoe.lsh_target_rate:
        args.lsh_levels = getattr(saved, "lsh_levels", {})
    return scmoe, saved


def refuse(message: str) -> NoReturn:
    """Print ``message`` once for each machine and end this process with exit code 2."""
    last_words.say_once(f"refused: {message}")
    last_words.leave(message, is_refusal=True)
    orphans.end_launcher()  # it would start all ranks again, to be refused again
    sys.exit(EXIT_REFUSED)


def _restore_args(args: Namespace) -> None:
    """--use-checkpoint-args: take Megatron's model settings, those that Core forgets, and ours from the checkpoint.

    And what a conversion saved, so that later checkpoints have it too.
    """
    if args.load is None:
        raise ConfigError("--use-checkpoint-args reads the arguments of a checkpoint: --load is None; add --load DIR")
    saved = checkpoints.saved_args(args)  # first, since it says what cannot be read
    with checkpoints.without_warnings():
        load_args_from_checkpoint(args)
    if saved is None:
        return
    for name in dict.fromkeys((*CORE_FORGETS, *ARCHITECTURE_FIELDS, *CODEC_FIELDS, *OF_CONVERSION)):
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))


def _num_layers(args: Namespace) -> int:
    if args.hybrid_layer_pattern:
        return 0  # Megatron counts them in the pattern
    if args.num_layers is None:
        raise ConfigError("groups are cut from --num-layers blocks: --num-layers is None; add --num-layers N")
    return args.num_layers


def _set_megatron_args(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Set the Megatron flags that follow from ours."""
    pattern: int | list[int] = 1
    if scmoe.moe_every > 1 and not args.hybrid_layer_pattern:
        pattern = ([0] * (scmoe.moe_every - 1) + [1]) * (args.num_layers // scmoe.moe_every)
    if args.moe_layer_freq not in (1, pattern):
        raise ConfigError(
            f"--moe-every sets the MoE pattern: --moe-layer-freq is {args.moe_layer_freq} and --moe-every is "
            f"{scmoe.moe_every}; drop --moe-layer-freq"
        )
    args.moe_layer_freq = pattern
    if scmoe.router is Router.LONGCAT:
        args.moe_router_pre_softmax = True  # what its scaling factor needs by Megatron's rules
    args.moe_shared_expert_gate = scmoe.shortcut is Shortcut.SCMOE and scmoe.shortcut_combine is Combine.CG1


def _by_megatrons_rules[T](step: Callable[[Namespace], T], args: Namespace) -> T:
    """``step(args)``, with Megatron's own refusals in one line as ours are."""
    try:
        return step(args)
    except (AssertionError, ValueError) as error:
        # Many of its rules are bare asserts: then the asserted line is all there is to say.
        rule = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(f"Megatron's own rule: {rule}") from error


def _plain(value: Any) -> Any:
    """``value`` as builtin types alone."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value
