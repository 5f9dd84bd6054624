"""Packed documents in groups: each token's logits are those of its document alone, and routers read what Core's do."""

from __future__ import annotations

import dataclasses

import hybrids
import models
import pytest
import ranks
import torch
from cases import cases
from models import SEQ_LENGTH, VOCAB_SIZE, Case
from torch import Tensor

LENGTHS = (3, 1, 8)
SAMPLES = 2

CASES = {
    "scmoe": Case(),
    "pos1, top-2, in chunks": Case(position=("pos1",), topk=2, combine="add", chunks=2),
    "pos3": Case(position=("pos3",), combine="cg2", norms="upstream"),
    "dgmoe": Case(shortcut="dgmoe"),
    "longcat": Case(router="longcat", zero_experts=2, topk=3, combine="add"),
    "late": Case(span=2, landing=1),
    "farskip": Case(moe_every=1, position=("farskip",), span=2, landing=1),
    "shared": Case(shortcut="dgmoe", share_groups=2),
    "latents": Case(latent=8, topk=2),
    "recomputed": Case(recompute="full", recompute_method="uniform", recompute_blocks=2),
}
QUICK = {"scmoe", "dgmoe", "late"}


def packing(lengths: tuple[int, ...], tokens_per_sample: int | None = None):
    from megatron.core.packed_seq_params import PackedSeqParams

    begins = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=begins,
        cu_seqlens_kv=begins,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        tokens_per_sample=tokens_per_sample,
    )


def tokens_of(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token and position ids, [1, t]; positions begin anew with each document."""
    tokens = torch.randint(VOCAB_SIZE, (1, sum(lengths)), generator=torch.Generator().manual_seed(11))
    return tokens, torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


def logits(case: Case, hybrid: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of documents packed, of each alone, and of their tokens as one document."""
    model = (hybrids if hybrid else models).build(case)
    tokens, positions = tokens_of(LENGTHS)
    packed = model(tokens, positions, None, packed_seq_params=packing(LENGTHS))
    parts = zip(tokens.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
    alone = torch.cat([model(ids, places, None) for ids, places in parts], dim=1)
    return packed.detach(), alone.detach(), model(tokens, positions, None).detach()


@pytest.mark.parametrize(
    ("name", "hybrid"),
    [*(pytest.param(name, False, marks=() if name in QUICK else pytest.mark.full) for name in CASES), ("scmoe", True)],
)
def test_a_document_has_the_same_logits_packed_and_alone(name, hybrid):
    ((packed, alone, as_one),) = ranks.run(logits, 1, CASES[name], hybrid, layout={})
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert torch.allclose(as_one[:, : LENGTHS[0]], alone[:, : LENGTHS[0]], atol=1e-5)
    assert (as_one - alone)[:, LENGTHS[0] :].abs().amax(-1).min() > 1e-3  # negative control: documents are told apart


def latent_logits() -> tuple[Tensor, Tensor]:
    """With multi-latent attention, whose values Core fills up for packed sequences."""
    sizes = {"qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 8, "q_lora_rank": 16}
    use_settings(multi_latent_attention=True, rope_type="rope", qk_layernorm=True, **sizes)
    packed, alone, _ = logits(Case(), hybrid=False)
    return packed, alone


def use_settings(**settings: object) -> None:
    """Build models of ``models.build`` with other settings of Core's, too; ``MLATransformerConfig`` for latent ones."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    original = models.transformer_config

    def changed(case: Case):
        config = original(case)
        if not settings.get("multi_latent_attention"):
            return dataclasses.replace(config, **settings)
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        return MLATransformerConfig(**{**values, **settings})

    models.transformer_config = changed


def test_latent_attention_has_the_same_logits_packed_and_alone():
    ((packed, alone),) = ranks.run(latent_logits, 1, layout={})
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


# --- what routers read ---------------------------------------------------------------------------------------------

SEQUENCE_LOSS = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5}


def balanced(case: Case, packed: bool, stock: bool = False, tokens_per_sample: int | None = SEQ_LENGTH):
    """A step on samples of one document each: losses, gradients, the balance loss, and shapes that routers read."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import TopKRouter

    use_settings(**SEQUENCE_LOSS)
    model = stock_model(case) if stock else models.build(case)
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _router, inputs, _output: shapes.append(tuple(inputs[0].shape)))
    tokens, positions = tokens_of((SEQ_LENGTH,) * SAMPLES)
    labels = tokens.roll(-1, 1)
    shape = (1, -1) if packed else (SAMPLES, -1)
    params = packing((SEQ_LENGTH,) * SAMPLES, tokens_per_sample) if packed else None
    mask = positions.view(shape) == SEQ_LENGTH - 1  # a token of each sample is padding
    losses = model(
        tokens.view(shape),
        positions.view(shape),
        None,
        labels=labels.view(shape),
        packed_seq_params=params,
        padding_mask=mask,
    )
    losses.sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    loss = get_moe_metrics_tracker().metrics["seq_load_balancing_loss"].values.sum().item()
    return losses.detach().view(-1), gradients, loss, shapes


def stock_model(case: Case):
    """Core's own blocks, of the sizes of ``case``."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_scmoe.models.specs import local_block_spec

    config = GPTModelConfig(
        transformer=models.transformer_config(case),
        vocab_size=VOCAB_SIZE,
        seq_length=SEQ_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        transformer_layer_spec=local_block_spec,
    )
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


@pytest.mark.parametrize("name", cases(("scmoe", "dgmoe", "longcat", "late", "latents", "shared"), {"scmoe", "dgmoe"}))
def test_packed_samples_train_as_samples_do(name):
    """One document a sample is what there is without packing: losses, gradients, and the balance loss of a sequence."""
    case = CASES[name]
    ((losses, gradients, loss, shapes),) = ranks.run(balanced, 1, case, packed=True, layout={})
    ((expected, expected_gradients, expected_loss, expected_shapes),) = ranks.run(
        balanced, 1, case, packed=False, layout={}
    )
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert shapes == expected_shapes and set(shapes) == {(SEQ_LENGTH, SAMPLES, 16)}


def test_samples_that_are_not_told_apart_are_noticed():
    """Negative control: as one sequence they have another balance loss, and gradient of their router."""
    ((_, gradients, loss, shapes),) = ranks.run(
        balanced, 1, CASES["scmoe"], packed=True, tokens_per_sample=None, layout={}
    )
    ((_, expected_gradients, expected_loss, _),) = ranks.run(balanced, 1, CASES["scmoe"], packed=False, layout={})
    assert abs(loss - expected_loss) > 1e-3 * expected_loss
    (router,) = (name for name in gradients if name.endswith("1.mlp.router.weight"))
    assert (gradients[router] - expected_gradients[router]).norm() > 1e-3 * expected_gradients[router].norm()
    assert set(shapes) == {(SAMPLES * SEQ_LENGTH, 1, 16)}


def test_routers_read_what_cores_read():
    for tokens_per_sample in (SEQ_LENGTH, None):
        ((*_, ours),) = ranks.run(
            balanced, 1, CASES["scmoe"], packed=True, tokens_per_sample=tokens_per_sample, layout={}
        )
        ((*_, cores),) = ranks.run(
            balanced, 1, CASES["scmoe"], packed=True, stock=True, tokens_per_sample=tokens_per_sample, layout={}
        )
        assert ours == cores


# --- the other container -------------------------------------------------------------------------------------------


def on_parts(case: Case, hybrid: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """A step where each of two ranks takes its tokens for a half of twice as long sequences."""
    use_settings(context_parallel_size=2)
    return (hybrids if hybrid else models).losses_and_gradients(case)


def test_hybrid_model_equals_blocks_on_parts_of_sequences():
    """Which agree with one rank (tests/training/test_context_parallel.py)."""
    layout = {"context_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    found, expected = (ranks.run(on_parts, 2, Case(), hybrid, layout=layout) for hybrid in (True, False))
    for (losses, gradients), (their_losses, their_gradients) in zip(found, expected, strict=True):
        assert torch.equal(losses, their_losses)
        assert gradients.keys() == their_gradients.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in their_gradients.items())
    ((alone, _), _) = ranks.run(models.losses_and_gradients, 2, Case(), layout={"expert_model_parallel_size": 2})
    assert not torch.equal(alone, expected[0][0])  # negative control: the halves see one another
