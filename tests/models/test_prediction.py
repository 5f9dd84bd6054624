"""Prediction layers behind the groups: against the reference, and against the same groups without them."""

from __future__ import annotations

import hybrids
import models
import pytest
import ranks
import reference_prediction
import torch
from models import Case

EP = {size: {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1} for size in (1, 2)}
CASES = [
    Case(predictions=1),
    Case(position=("pos1",), combine="add", topk=2, predictions=2),
    Case(position=("pos3",), combine="cg2", chunks=2, predictions=1),
    Case(shortcut="dgmoe", predictions=1),
    Case(shortcut="dgmoe", num_groups=4, share_groups=2, predictions=1),
    Case(router="longcat", zero_experts=2, topk=3, combine="add", predictions=1),
    Case(latent=8, predictions=1),
    Case(num_groups=4, span=2, landing=1, predictions=1),
]


def with_predictions(case: Case, container=models):
    """Loss per token and every gradient, and the mean loss of each depth, of this rank's part of the batch."""
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0 / torch.distributed.get_world_size()))
    MTPLossLoggingHelper.tracker.clear()
    loss, gradients = container.losses_and_gradients(case)
    return loss, gradients, MTPLossLoggingHelper.tracker["loss_values"].clone()


def run(case: Case, ep: int, function=with_predictions, **kwargs):
    """The same of the whole batch, from ``ep`` expert-parallel ranks."""
    results = ranks.run(function, ep, case, layout=EP[ep], **kwargs)
    gradients = {name: gradient for result in results for name, gradient in result[1].items()}
    return torch.cat([one[0] for one in results]), gradients, torch.stack([one[2] for one in results]).mean(dim=0)


def of_reference(case: Case, depths: int | None = None):
    config, depths = case.reference_config(), depths or case.predictions
    parameters = models.reference_parameters(config, depths)
    (main, *further), gradients = reference_prediction.loss_and_gradients(parameters, *models.batch(), config, depths)
    return main, gradients, torch.stack([loss.mean() for loss in further])


def largest_difference(one, other) -> float:
    """Over losses and gradients, relative to the largest value of each tensor."""
    assert one[1].keys() == other[1].keys()
    pairs = [(one[0], other[0]), (one[2], other[2]), *((one[1][name], other[1][name]) for name in one[1])]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


def name_of(case: Case) -> str:
    return f"{case.shortcut}-{case.position[0]}-{case.combine}-{case.router}-span{case.span}-share{case.share_groups}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_they_equal_the_reference(case):
    """On two expert-parallel ranks: losses and every gradient, of the prediction layers and of the groups."""
    found, expected = run(case, 2), of_reference(case)
    assert largest_difference(found, expected) < 1e-5
    idle = [name for name, gradient in expected[1].items() if "mtp." in name and gradient.abs().max() < 1e-6]
    assert all("local_experts" in name for name in idle), idle


@pytest.mark.parametrize("wrong", ["embedding", "order", "factor", "shift"])
def test_another_prediction_layer_is_noticed(wrong, monkeypatch):
    """Negative control: the reference with one mistake is far away."""
    case = Case(predictions=1)
    if wrong == "factor":
        monkeypatch.setattr(reference_prediction, "FACTOR", 0.2)
    predicted = reference_prediction.predicted

    def mistaken(params, name, hidden, tokens, cfg):
        if wrong == "embedding":
            params = {**params, "embedding.word_embeddings.weight": params["output_layer.weight"]}
        if wrong == "order":
            halves = params[name + "eh_proj.weight"].chunk(2, dim=1)
            params = {**params, name + "eh_proj.weight": torch.cat(halves[::-1], dim=1)}
        if wrong == "shift":
            tokens = tokens.roll(1, dims=1)
        return predicted(params, name, hidden, tokens, cfg)

    monkeypatch.setattr(reference_prediction, "predicted", mistaken)
    assert largest_difference(run(case, 1), of_reference(case)) > 1e-3


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=name_of)
def test_the_model_before_them_is_the_same(case):
    """Bit for bit: the loss of the next token does not know of prediction layers."""
    ((without, _),) = ranks.run(models.losses_and_gradients, 1, case.replace(predictions=0), layout=EP[1])
    assert torch.equal(run(case, 1)[0], without)


def of_hybrid(case: Case):
    return with_predictions(case, hybrids)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_hybrid_model_equals_blocks(case):
    """What stands behind ``/`` is the same prediction layer, bit for bit."""
    found, blocks = run(case, 2, of_hybrid), run(case, 2)
    assert torch.equal(found[0], blocks[0]) and torch.equal(found[2], blocks[2])
    assert found[1].keys() == blocks[1].keys()
    for name, gradient in blocks[1].items():
        assert torch.equal(found[1][name], gradient), name


def kinds(case: Case, container: str) -> tuple[set[str], list[int]]:
    """Classes of the modules of the prediction layers, and the groups that a session plans."""
    from argparse import Namespace

    from megatron_scmoe.training.session import OverlapSession

    model = {"blocks": models, "hybrid": hybrids}[container].build(case)
    session = OverlapSession(Namespace(), models.settings(case))
    session.see(model)
    return {type(module).__name__ for module in model.mtp.modules()}, [*session._planned]


@pytest.mark.parametrize("container", ["blocks", "hybrid"])
def test_they_are_no_groups(container):
    """Layers of the stock model, which no plan is made for."""
    ((names, planned),) = ranks.run(kinds, 1, Case(predictions=2), container, layout=EP[1])
    assert {"MoELayer", "TransformerLayer"} <= names and not {"GroupBlock", "LeadingBlock", "_GroupLayer"} & names
    assert planned == [0, 1]


def kinds_in_chunks() -> list[set[str]]:
    """Classes of MoEs in a hybrid model whose tokens travel in chunks: before and behind ``/``."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_scmoe.config import ScMoEConfig
    from megatron_scmoe.models.hybrid import ScMoEHybridModelBuilder, ScMoEHybridModelConfig

    transformer = models.transformer_config(Case(predictions=1))
    config = ScMoEHybridModelConfig(
        transformer=transformer,
        vocab_size=models.VOCAB_SIZE,
        seq_length=models.SEQ_LENGTH,
        position_embedding_type="rope",
        hybrid_layer_pattern="*-*E/*E",
        scmoe=ScMoEConfig(overlap_chunks=2),
    )
    model = ScMoEHybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    named = [{type(module).__name__ for module in part.modules()} for part in (model.decoder, model.mtp)]
    return [{name for name in names if name.endswith("MoELayer")} for names in named]


def test_chunks_are_those_of_the_model_before_them():
    assert ranks.run(kinds_in_chunks, 1, layout=EP[1]) == [[{"PipelinedMoELayer"}, {"MoELayer"}]]
