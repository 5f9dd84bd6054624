"""Every flag of the entry script has its place in the planner: priced, counted, without effect, refused, or named."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import ranks
from test_plan import BASE, EP2, of_flags, run_of
from training import STOCK_SHARED_EXPERT, with_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from command_line import UserError
from planning import dry, flags, running, unpriced
from planning.training import Dispatcher, Graphs, Precision, Training
from planning.unpriced import UNPRICED, Unpriced, refuse
from planning.workload import Attention, Span

STOCK = with_flags(STOCK_SHARED_EXPERT, "--bf16", "--expert-model-parallel-size 2")
STOCK = with_flags(STOCK, "--transformer-impl transformer_engine")


def parser() -> Any:
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_scmoe.training.arguments import add_scmoe_arguments

    made = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(made)
    return add_scmoe_arguments(made)


def of_the_parser() -> tuple[dict[str, tuple[str, object]], set[str]]:
    """Names of values and defaults by flag, and flags that the entry script refuses whatever their value."""
    from megatron_scmoe.cpu import backend

    backend.install()
    from megatron_scmoe.training.refused_flags import HOOK_REFUSALS
    from megatron_scmoe.training.unread_flags import UnreadFlags

    its = parser()
    unread = {"--" + name.replace("_", "-") for name, _, _ in UnreadFlags(its)._unread}
    deprecated = {"-h", "--batch-size", "--checkpoint-activations", "--model-parallel-size"}  # Megatron refuses them
    known = {action.option_strings[0]: (action.dest, action.default) for action in its._actions}
    others = {flag for action in its._actions for flag in action.option_strings[1:]}
    always = unread | deprecated | {one.flag for one in HOOK_REFUSALS}
    return {flag: (name, _plain(default)) for flag, (name, default) in known.items()}, always - others


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | list | None) else str(value)


@pytest.fixture(scope="module")
def known() -> tuple[dict[str, tuple[str, object]], set[str]]:
    (found,) = ranks.run(of_the_parser, 1, distributed=False)
    return found


def test_every_flag_is_in_one_table(known):
    """So that none is ignored without a word."""
    all_flags, refused = known
    places = {flag: list(flags.tables_with(flag)) for flag in all_flags}
    assert {flag for flag, tables in places.items() if not tables} <= refused
    assert {flag: tables for flag, tables in places.items() if len(tables) > 1} == {}
    assert len(all_flags) > 800 and list(flags.tables_with("--no-such-flag")) == []


def test_no_table_has_what_is_no_flag(known):
    all_flags, _ = known
    words = [flag.removeprefix("--") for flag in all_flags]
    patterns = (*flags.PRICED, *flags.COUNTED, *flags.COSTS_NOTHING)
    assert [one for one in patterns if not any(fnmatchcase(word, one) for word in words)] == []
    named = [one.flag for one in (*UNPRICED, *unpriced.REFUSED)]
    assert [flag for flag in named if flag not in all_flags] == [] and len(set(named)) == len(named)


def test_what_is_not_priced_is_named_with_its_value(known):
    """Each flag alone: silent where the price is right, and else with both values."""
    all_flags, _ = known
    for one in UNPRICED:
        name, default = all_flags[one.flag]
        assert name == (one.name or one.flag.removeprefix("--").replace("-", "_")), one.flag
        always = one._replace(only=lambda _: True)
        assert always.found_in(Namespace(**{name: one.priced[0]})) == ""
        other = not one.priced[0] if isinstance(one.priced[0], bool) else "another"
        words = always.found_in(Namespace(**{name: [other] if isinstance(default, list) else other}))
        assert words.startswith(f"{one.flag} ") and "(priced: " in words, one
        assert one._replace(only=lambda _: False).found_in(Namespace(**{name: other})) == ""


@pytest.mark.parametrize("kind", ["tensor", "expert_tensor"])
@pytest.mark.parametrize(("ranks_", "named"), [(8, False), (4, True)])
def test_weights_in_more_parts_than_ranks_are_named(kind, ranks_, named):
    """Core's default is one for each rank of a tensor-parallel group."""
    flag = f"--{kind.replace('_', '-')}-parallel-num-weight-shards"
    (one,) = [one for one in UNPRICED if one.flag == flag]
    size = "tensor_model_parallel_size" if kind == "tensor" else "expert_tensor_parallel_size"
    words = one.found_in(Namespace(**{f"{kind}_parallel_num_weight_shards": 8, size: ranks_}))
    assert words == (f"{flag} 8 (priced: off)" if named else "")


def test_switches_are_shown_as_they_are_given():
    off = Unpriced("--no-rope-fusion", (True,), "apply_rope_fusion")
    assert off.found_in(Namespace(apply_rope_fusion=False)) == "--no-rope-fusion on (priced: off)"
    on = Unpriced("--moe-permute-fusion", (True,))
    assert on.found_in(Namespace(moe_permute_fusion=False)) == "--moe-permute-fusion off (priced: on)"
    several = Unpriced("--cp-comm-type", ("p2p",))
    assert several.found_in(Namespace(cp_comm_type=["p2p", "a2a"])) == "--cp-comm-type p2p a2a (priced: p2p)"


class Noted(Namespace):
    """Notes which of its values are read."""

    def __init__(self, args: Namespace, read: set[str]) -> None:
        super().__init__(**vars(args))
        object.__setattr__(self, "noted", read)

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_") and name != "noted":
            object.__getattribute__(self, "noted").add(name)
        return object.__getattribute__(self, name)


def what_is_read(found: dry.DryRun) -> set[str]:
    from planning import whatif

    from megatron_scmoe.training.arguments import scmoe_config_from_args

    read: set[str] = set()
    layers = [stage.blocks for stage in found.stages]
    stock = {"shortcut": "none", "overlap_chunks": 1, "overlap": "fixed"}
    for changes in (
        {},
        {"optimizer": "sgd", "moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0},
        {"use_precision_aware_optimizer": True, "recompute_granularity": "full", "recompute_method": "block"},
        {
            "recompute_granularity": "selective",
            "multi_latent_attention": True,
            "fp8": "hybrid",
            "cuda_graph_impl": "local",
        },
        stock | {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep", "mtp_num_layers": 1},
        stock | {"hybrid_layer_pattern": "M*-E" * 2, "moe_router_group_topk": 1, "moe_router_num_groups": 2},
        {"bf16": False, "fp16": True, "swiglu": False, "group_query_attention": True},
        {"group_query_attention": True, "recompute_num_layers": 1, "use_transformer_engine_op_fuser": True},
    ):
        args = Noted(found.args, read)
        vars(args).update({"recompute_num_layers": 1, "q_lora_rank": 8} | changes)
        whatif.Run(args, scmoe_config_from_args(args), layers).workload  # noqa: B018 (reads)
    return read


VIRTUAL = ("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank")
VOCABULARY = ("vocab-size", "padded-vocab-size", "make-vocab-size-divisible-by", "no-pad-vocab-size")
BECOMES = {
    **dict.fromkeys(VIRTUAL, "virtual_pipeline_model_parallel_size"),
    **dict.fromkeys(VOCABULARY, "padded_vocab_size"),
    **dict.fromkeys(("enable-cuda-graph", "external-cuda-graph"), "cuda_graph_impl"),
    "cuda-graph-scope": "cuda_graph_modules",
    "recompute-activations": "recompute_granularity",
    "moe-enable-deepep": "moe_flex_dispatcher_backend",
}
"""Values into which Megatron's validation turns others."""


def test_what_is_called_priced_is_read(known):
    """By name, while workloads are made of a namespace; nothing else of it is."""
    all_flags, _ = known
    read = of_flags(EP2, 2, what_is_read)
    names = {word: BECOMES.get(word, all_flags[f"--{word}"][0]) for word in flags.PRICED}
    assert [word for word, name in names.items() if name not in read] == []
    assert {"lr", "hidden_dropout", "cp_comm_type"}.isdisjoint(read)


def test_a_plan_refuses_what_has_no_price():
    for one in unpriced.REFUSED:
        with pytest.raises(UserError, match=f"{one.flag}.* is given; drop it"):
            refuse(["--bf16", one.flag, *(one.values[:1] or ["1"])])
    refuse([*BASE, "--attention-backend", "unfused"])


def training_and_words(found: dry.DryRun) -> tuple[Training, list[str], list[Any], int]:
    workload = run_of(found).workload
    return (
        workload.training,
        found.not_priced,
        [op for stage in workload.stages for op in stage],
        found.stages[0].activations,
    )


def test_what_needs_a_gpu_is_planned_without_one():
    """From the command line: the dry run builds without it, and the model of time reads it all the same."""
    words = (
        *("--fp8-format hybrid", "--fp8-recipe mxfp8", "--moe-token-dispatcher-type flex", "--moe-grouped-gemm"),
        *(
            "--moe-flex-dispatcher-backend hybridep",
            "--cuda-graph-impl transformer_engine",
            "--cuda-graph-modules attn",
        ),
        *("--recompute-granularity selective", "--recompute-modules moe_act", "--sequence-parallel"),
    )
    training, said, ops, _ = of_flags(
        with_flags([*STOCK, "--use-transformer-engine-op-fuser"], *words), 2, training_and_words
    )
    assert (training.precision, training.dispatcher, training.cuda_graphs) == (
        Precision.MXFP8,
        Dispatcher.HYBRIDEP,
        Graphs.PARTIAL,
    )
    assert training.fused_experts and training.recompute == {"moe_act"} and not training.sequence_parallel
    assert any(words.startswith("NVTE_CUTEDSL_FUSED_GROUPED_MLP ") for words in said)
    assert any(words.startswith("--moe-permute-fusion off") for words in said)
    assert not any(words.startswith(("--moe-grouped-gemm", "--use-transformer-engine-op-fuser")) for words in said)
    assert all(op.fused for op in ops if isinstance(op, Attention))


def test_scores_that_are_kept_are_counted_and_priced():
    plain = of_flags(STOCK, 2, training_and_words)
    unfused = of_flags(
        with_flags(STOCK, "--attention-backend unfused", "--recompute-activations"), 2, training_and_words
    )
    assert [all(op.fused for op in ops if isinstance(op, Attention)) for _, _, ops, _ in (plain, unfused)] == [
        True,
        False,
    ]
    assert unfused[0].recompute == {"core_attn"} and plain[0].recompute == frozenset()
    kept = of_flags(with_flags(STOCK, "--attention-backend unfused"), 2, training_and_words)
    assert kept[3] > 1.05 * plain[3]
    local = of_flags(with_flags(STOCK, "--transformer-impl local"), 2, training_and_words)
    assert local[3] == kept[3] and not any(op.fused for op in local[2] if isinstance(op, Attention))
    assert any(words.startswith("--transformer-impl local") for words in local[1])


def owners_of(found: dry.DryRun) -> list[tuple[set[int], float, int]]:
    from planning.counts import Parameters, parameters

    workload = run_of(found).workload
    spans = [op for stage in workload.stages for op in stage if isinstance(op, Span)]
    counted = sum((parameters(op, workload) for op in spans), Parameters())
    return [({call.owners for op in spans for call in op.calls}, counted.expert, found.stages[0].in_the_model.expert)]


@pytest.mark.parametrize(
    ("words", "owners"),
    [
        ((), 1),
        (("--moe-share-groups 2",), 2),
        (("--shortcut dgmoe", "--moe-router-topk 2", "--moe-share-groups 2"), 4),
    ],
)
def test_groups_that_share_an_moe_have_its_parameters_once(words, owners):
    made = with_flags(EP2, *words)
    if owners == 4:
        place = made.index("--moe-shared-expert-intermediate-size")
        made = [*made[:place], *made[place + 2 :]]
    ((found, counted, held),) = of_flags(made, 2, owners_of)
    assert found == {owners} and counted == held


def test_recomputed_modules_are_known():
    def args(**values: object) -> Namespace:
        told = {"moe_layer_recompute": False, "recompute_granularity": "selective", "recompute_modules": None}
        return Namespace(**(told | values))

    read: Callable[..., Any] = running._recompute
    assert read(args(), 8) == ({"core_attn"}, 1.0)  # Core's own default
    assert read(args(recompute_modules=["mlp"], moe_layer_recompute=True), 8) == ({"moe", "mlp"}, 1.0)
    assert read(args(recompute_granularity=None), 8) == (frozenset(), 1.0)
    with pytest.raises(UserError, match="no recomputation of gdn_norm_out: --recompute-modules has it; use some of"):
        read(args(recompute_modules=["mlp", "gdn_norm_out"]), 8)
