"""Faults of Megatron-Core 0.19.2 that a group can meet: that they are there, and what a group makes of them.

`docs/parallelism.md`, "Core's own faults", is the table. Where a test of Core's part fails, Core has been mended: what
stands against the fault can go.
"""

from __future__ import annotations

import gc
import types

import entry
import models
import pytest
import ranks
import test_layer
import test_layouts as layouts
import torch
import training
from cases import cases
from models import Case
from training import SCMOE, with_flags, without_flag

EP2 = test_layer.EP[2]
TP2 = {"tensor_model_parallel_size": 2}

# ---- balance losses in the log (upstream 6748) -------------------------------------------------------------------


@pytest.mark.parametrize("model", ["scmoe", "hybrid-mamba"])
def test_logged_balance_losses_are_the_mean_over_all_moes(tmp_path, model):
    """Not over all layers: of even routing it is 1, and here a little more."""
    flags = layouts.flags_of(model, "one", *layouts.VARIANTS["aux_loss"], "--train-iters 1")
    layouts.run(1, with_flags(flags, f"--tensorboard-dir {tmp_path}"))
    (loss,) = training.scalars(tmp_path, "load_balancing_loss")["load_balancing_loss"].values()
    assert 0.95 < loss < 2


WITHOUT_MOE = with_flags(without_flag(SCMOE, "--num-layers"), "--hybrid-layer-pattern M*-E|*-", *layouts.MAMBA)
PP2 = "--pipeline-model-parallel-size 2"


def test_a_stage_without_an_moe_is_refused_where_balance_losses_are_logged():
    words = ["each have an MoE", "M*-E|*-, whose stage 1 has none", "--moe-aux-loss-coeff is 0.01", "move its cuts"]
    entry.assert_all_ranks_refuse(with_flags(WITHOUT_MOE, PP2), words, 2)
    flags = with_flags(WITHOUT_MOE, "--moe-aux-loss-coeff 0", "--moe-z-loss-coeff 0.1", PP2)
    entry.assert_all_ranks_refuse(flags, ["--moe-z-loss-coeff is 0.1"], 2)


def test_a_stage_without_an_moe_trains_without_balance_losses():
    """Negative control of the refusal."""
    layouts.run(2, with_flags(WITHOUT_MOE, PP2, "--moe-aux-loss-coeff 0", "--train-iters 1"))


def train_unchecked(flags: list[str]) -> None:
    from megatron_scmoe.training import stage_rules

    stage_rules.check_balance_losses = lambda *_args: None
    training.train(flags)


@pytest.mark.full
def test_core_cannot_sum_them_over_such_stages():
    with pytest.raises(ranks.RankError):
        ranks.run(train_unchecked, 2, with_flags(WITHOUT_MOE, PP2, "--train-iters 1"), timeout_s=60)


# ---- padding masks (upstream 6114, and 10 of 7452) -----------------------------------------------------------------


def counted_with_padding(*, by_core: bool) -> tuple[list[int], str]:
    """On a rank: what each router with a bias counts of a batch whose last two tokens are padding; an error's text."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_scmoe.mcore.padding import RouterOfPadded

    if by_core:
        RouterOfPadded._apply_expert_bias = TopKRouter._apply_expert_bias
    model = models.build(Case(router="longcat", zero_experts=2, topk=3, combine="add"))
    ((tokens, labels, positions),) = models.my_batch()
    mask = (torch.arange(models.SEQ_LENGTH) >= models.SEQ_LENGTH - 2).expand_as(tokens)
    try:
        model(tokens, positions, None, labels=labels, padding_mask=mask)
    except RuntimeError as error:
        return [], str(error)
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    return [int(router.local_tokens_per_expert.sum()) for router in routers], ""


def test_expert_biases_count_what_is_no_padding():
    ((counts, _),) = ranks.run(counted_with_padding, 1, by_core=False, layout=test_layer.EP[1])
    assert counts == [3 * models.BATCH_SIZE * (models.SEQ_LENGTH - 2)] * 2
    ((_, error),) = ranks.run(counted_with_padding, 1, by_core=True, layout=test_layer.EP[1])
    assert "must match the size" in error


def routers_of_groups() -> set[str]:
    """On a rank: which routers groups have."""
    return {type(layer.moe.router).__name__ for layer in models.build(Case()).decoder.layers if hasattr(layer, "moe")}


def test_groups_have_the_router_that_knows_padding():
    assert ranks.run(routers_of_groups, 1, layout=test_layer.EP[1]) == [{"RouterOfPadded"}]


def tokens_counted_by_core() -> int:
    """On each of two ranks with 4 tokens, all for two experts: what Core takes for the tokens of this rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_tokens_per_expert_and_token_count

    routing_map = torch.ones(4, 2, dtype=torch.bool)
    group = parallel_state.get_tensor_model_parallel_group()
    _, local, _ = get_tokens_per_expert_and_token_count(routing_map, group, topk=2, with_padding_mask=True)
    return int(local)


def test_core_takes_the_tokens_of_all_ranks_for_those_of_one():
    assert ranks.run(tokens_counted_by_core, 2, layout=TP2) == [8, 8]  # of 4 each


def masks_refused() -> list[str]:
    """On a rank: what is said of a mask of another rank's tokens, and of one beside a loss for each token."""
    from megatron_scmoe.mcore.padding import mask_of_rank

    group = types.SimpleNamespace(size=lambda: 2)
    router = types.SimpleNamespace(calculate_per_token_loss=True, tp_cp_group=group, is_aux_loss_enabled=lambda: True)
    said = []
    for tokens in (8, 4):
        try:
            mask_of_rank(torch.zeros(3, tokens), torch.zeros(4, 3, 5), router)
        except ValueError as error:
            said.append(str(error))
    router.calculate_per_token_loss = False
    mask = mask_of_rank(torch.eye(3, 4), torch.zeros(4, 3, 5), router)
    assert torch.equal(mask, torch.eye(4, 3, dtype=torch.bool))
    assert mask_of_rank(None, torch.zeros(4, 3, 5), router) is None
    return said


def test_masks_that_core_reads_wrongly_are_refused():
    ((shape, loss),) = ranks.run(masks_refused, 1, distributed=False)
    assert "has the shape (3, 8) and this rank has (4, 3)" in shape and shape.endswith("without padding_mask")
    assert "2 ranks share sequences" in loss and loss.endswith("drop --calculate-per-token-loss")


# ---- activations that stay behind full recompute (upstream 5197) -----------------------------------------------------


def tensors_left_to_the_collector(case: Case, *, with_a_circle: bool) -> int:
    """On each rank: tensors that a step leaves in circles of references, which wait for Python's collector."""
    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()

    def keep(_layer, _inputs, output):
        circle = [output]
        circle.append(circle)

    if with_a_circle:
        model.decoder.layers[-1].register_forward_hook(keep)
    gc.collect()
    gc.disable()
    model(tokens, positions, None, labels=labels).sum().backward()
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.garbage)


@pytest.mark.parametrize("chunks", [1, 2])
def test_full_recompute_leaves_no_tensor_to_the_collector(chunks):
    case = Case(recompute="full", recompute_blocks=2, chunks=chunks)
    assert ranks.run(tensors_left_to_the_collector, 2, case, with_a_circle=False, layout=EP2) == [0, 0]
    found = ranks.run(tensors_left_to_the_collector, 2, case, with_a_circle=True, layout=EP2)  # negative control
    assert min(found) > 0


# ---- a rank that gets no token (upstream 1877) -------------------------------------------------------------------


def prefer_first_expert() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    gating = TopKRouter.gating

    def preferring(self, tokens):
        logits = gating(self, tokens)
        return logits + 9 * torch.nn.functional.one_hot(torch.zeros((), dtype=torch.long), logits.shape[-1])

    TopKRouter.gating = preferring


def with_first_expert_alone(case: Case, fused: str = ""):
    """On each rank: losses and gradients where all tokens go to one expert.

    Args:
        fused: "asked for": with a fused sort that ends where there is nothing to sort; "always": also without what the
            package does there.
    """
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_scmoe.mcore import token_dispatcher as ours

    prefer_first_expert()
    if fused:
        sort, build = token_dispatcher.sort_chunks_by_idxs, models.build

        def fused_sort(rows, *args, fused, **kwargs):
            if fused and not len(rows):
                raise RuntimeError("nothing to sort")
            return sort(rows, *args, fused=False, **kwargs)

        def plain(function):
            return lambda *args, fused, **kwargs: function(*args, fused=False, **kwargs)

        def build_fused(case):
            model = build(case)
            model.config.moe_permute_fusion = True
            return model

        token_dispatcher.sort_chunks_by_idxs, models.build = fused_sort, build_fused
        token_dispatcher.permute = plain(token_dispatcher.permute)
        token_dispatcher.unpermute = plain(token_dispatcher.unpermute)
    if fused == "always":
        ours.sort_nothing_if_empty = lambda _dispatcher, _num_rows: None
    return models.losses_and_gradients(case)


def on_ranks(case: Case, size: int, fused: str = ""):
    results = ranks.run(with_first_expert_alone, size, case, fused, layout=test_layer.EP[size])
    gradients = {name: gradient for _, part in results for name, gradient in part.items()}
    return torch.cat([loss for loss, _ in results]), gradients


TRAINED = [(Case(), ""), (Case(chunks=2), "asked for"), (Case(position=("pos1",), chunks=2), ""), (Case(), "asked for")]


@pytest.mark.parametrize(("case", "fused"), cases(TRAINED, TRAINED[:2]))
def test_a_rank_without_tokens_trains(case, fused):
    """The losses and gradients of one rank, which has them all."""
    found = on_ranks(case, 2, fused)
    assert test_layer.largest_difference(found, on_ranks(case, 1)) < 1e-5
    busy = {name for name, gradient in found[1].items() if "local_experts" in name and gradient.any()}
    assert busy and all("local_experts.0." in name for name in busy)


def test_a_fused_sort_of_no_rows_would_end_it():
    """Negative control."""
    with pytest.raises(ranks.RankError, match="nothing to sort"):
        ranks.run(with_first_expert_alone, 2, Case(), "always", layout=EP2)


def train_first_expert(flags: list[str]) -> layouts.Result:
    prefer_first_expert()
    return layouts.train(flags)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp2 ep2", "expert tp2 ep2"])
def test_ranks_without_tokens_agree_with_one_under_tensor_parallelism(tmp_path, layout):
    layouts.run(1, layouts.flags_of("scmoe", "one", "--train-iters 1", f"--save {tmp_path}/start", "--save-interval 1"))
    more = [f"--load {tmp_path}/start", "--no-load-optim", "--train-iters 3"]
    found = []
    for name in ("one", layout):
        log = tmp_path / name.replace(" ", "-")
        flags = layouts.flags_of("scmoe", name, *more, f"--tensorboard-dir {log}")
        results = ranks.run(train_first_expert, layouts.LAYOUTS[name][0], flags, timeout_s=180)
        assert "exit code" not in results[0].printed, results[0].printed[-3000:]
        found.append(training.scalars(log, *layouts.NAMES))
    layouts.assert_agree(found[1], found[0])


# ---- learnable attention sinks under tensor parallelism (8 of 7452) ----------------------------------------------


def sinks_in_the_norm(*, marked: bool) -> set[bool]:
    """On each tensor-parallel rank: whether the gradients of its sinks are in the norm that clips."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    from megatron_scmoe.mcore import blocks

    original = models.transformer_config

    def with_sinks(case):
        config = original(case)
        config.softmax_type, config.tensor_model_parallel_size, config.sequence_parallel = "learnable", 2, True
        return config

    models.transformer_config, models.VOCAB_SIZE = with_sinks, 32
    if not marked:
        blocks.split_sinks_with_heads = lambda _model: None
    parameters = dict(models.build(Case()).named_parameters())
    sinks = [value for name, value in parameters.items() if name.endswith("softmax_offset")]
    assert len(sinks) == 4 and all(len(sink) == 1 for sink in sinks)  # a head each
    return {param_is_not_tensor_parallel_duplicate(sink) for sink in sinks}


def test_sinks_of_all_ranks_are_in_the_norm_of_gradients():
    assert ranks.run(sinks_in_the_norm, 2, marked=True, layout=TP2) == [{True}, {True}]
    assert ranks.run(sinks_in_the_norm, 2, marked=False, layout=TP2) == [{True}, {False}]


# ---- masked losses under context parallelism (9 of 7452) ---------------------------------------------------------


def test_losses_masked_unevenly_over_context_parallel_ranks_are_refused():
    flags = with_flags(SCMOE, "--context-parallel-size 2", "--eod-mask-loss")
    per_token = with_flags(flags, "--calculate-per-token-loss")
    words = ["counts by where it is", "--context-parallel-size is 2", "add --calculate-per-token-loss"]
    entry.assert_refused([(flags, words), (per_token, ["world size (1) is not divisible"])])


def gradients_of_one_token_in_all() -> float:
    """What Core makes of the loss 1 of the only token that counts, where it is on one of two context-parallel ranks."""
    from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

    config = types.SimpleNamespace(calculate_per_token_loss=False, timers=None)
    losses = []
    for counted in (1, 0):
        loss, _ = forward_step_calc_loss(
            None,
            torch.ones(()),
            lambda output, counted=counted: (output * counted, torch.tensor(counted), {}),
            config,
            vp_stage=None,
            collect_non_loss_data=False,
            num_microbatches=1,
            forward_data_store=[],
            cp_group_size=2,
            is_last_stage=True,
        )
        losses.append(float(loss))
    return sum(losses) / len(losses)  # as gradients are averaged over data and context parallel ranks


def test_core_weighs_a_token_by_where_it_is():
    """On one rank it would be 1."""
    assert ranks.run(gradients_of_one_token_in_all, 1, layout={}) == [0.5]
