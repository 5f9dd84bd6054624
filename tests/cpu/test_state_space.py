"""Mamba's stand-ins for CUDA: equal to the recurrence token by token and to transformers' Mamba2, in any layout."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

from megatron_scmoe.cpu import state_space

HEADS, HEAD_DIM, STATE, WIDTH = 4, 3, 5, 4
Inputs = dict[str, Tensor]

# ---- the scan against the recurrence -------------------------------------------------------------


def inputs(ngroups: int, *, tokens: int = 13, d_has_hdim: bool = False, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    inner, channels = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * ngroups * STATE

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + mean
        return drawn.to(dtype).requires_grad_()

    return {
        "zxbcdt": normal(2, tokens, inner + channels + HEADS),
        "conv1d_weight": normal(channels, WIDTH, scale=0.5),
        "conv1d_bias": normal(channels, scale=0.5),
        "dt_bias": normal(HEADS, mean=-2.0),
        "A": (-torch.rand(HEADS, generator=generator, dtype=torch.float64) * 15 - 1).to(dtype).requires_grad_(),
        "D": normal(HEADS, HEAD_DIM) if d_has_hdim else normal(HEADS),
    }


def ours(given: Inputs, ngroups: int, chunk_size: int, state_dtype: torch.dtype | None = None) -> Tensor:
    return state_space.split_conv1d_scan_combined(
        **given,
        ngroups=ngroups,
        chunk_size=chunk_size,
        seq_idx=None,
        state_dtype=state_dtype,
        activation="silu",
        headdim=None,
        norm_before_gate=False,
    )


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def recurrence(given: Inputs, ngroups: int, wrong: str = "") -> Tensor:
    """Token by token, from the formulas of arXiv 2405.21060; with what is named in ``wrong`` done wrong."""
    zxbcdt, weight, bias, dt_bias, A, D = given.values()
    channels, rows = len(weight), ngroups * STATE
    z, xbc, dt = zxbcdt.split([channels - 2 * rows, channels, HEADS], dim=-1)
    batch, tokens = z.shape[:2]
    seen = torch.nn.functional.pad(xbc, (0, 0, WIDTH - 2, 1) if wrong == "shifted conv" else (0, 0, WIDTH - 1, 0))
    xbc = silu(bias + sum(seen[:, tap : tap + tokens] * weight[:, tap] for tap in range(WIDTH)))
    x, B, C = xbc.split([channels - 2 * rows, rows, rows], dim=-1)
    x = x.view(batch, tokens, HEADS, HEAD_DIM)
    group_of_head = torch.arange(HEADS) * ngroups // HEADS
    if wrong == "group of head":
        group_of_head = torch.arange(HEADS) % ngroups
    B, C = (rows.view(batch, tokens, ngroups, STATE)[:, :, group_of_head] for rows in (B, C))
    dt = torch.log1p(torch.exp(dt + (0 if wrong == "no dt bias" else dt_bias)))
    state = torch.zeros(batch, HEADS, HEAD_DIM, STATE, dtype=z.dtype)
    outputs = []
    for now in range(tokens):
        decay = torch.exp((1 if wrong == "constant decay" else dt[:, now]) * A)
        written = dt[:, now, :, None] * x[:, now]
        state = state * decay.view(-1, HEADS, 1, 1) + written[..., None] * B[:, now, :, None]
        if wrong == "state of the token before" and now:
            C = C.roll(1, 1)
        outputs.append(
            (state * C[:, now, :, None]).sum(-1) + (0 if wrong == "no skip" else D.view(HEADS, -1)) * x[:, now]
        )
    y = torch.stack(outputs, dim=1).flatten(2)
    return y if wrong == "no gate" else y * silu(z)


def with_gradients(output: Tensor, given: Inputs) -> dict[str, Tensor]:
    """An output, and the gradients that a random gradient of it gives."""
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = torch.autograd.grad(output, list(given.values()), gradient.to(output.dtype))
    return {"output": output.detach(), **dict(zip(given, found, strict=True))}


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor the largest difference, in units of the largest value."""
    assert found.keys() == expected.keys()
    return {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected}


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 13, 128])
@pytest.mark.parametrize("ngroups, d_has_hdim", [(1, False), (2, False), (4, True)])
def test_scan_is_the_recurrence(ngroups, d_has_hdim, chunk_size):
    given = inputs(ngroups, d_has_hdim=d_has_hdim)
    found = with_gradients(ours(given, ngroups, chunk_size), given)
    expected = with_gradients(recurrence(given, ngroups), given)
    assert max(distances(found, expected).values()) < 1e-13


WRONG = ("no dt bias", "shifted conv", "group of head", "constant decay", "no skip", "no gate")


@pytest.mark.parametrize("wrong", [*WRONG, "state of the token before"])
def test_another_recurrence_is_noticed(wrong):
    """Negative control of the test above."""
    given = inputs(2)
    found = {"output": ours(given, 2, 5)}
    assert distances(found, {"output": recurrence(given, 2, wrong)})["output"] > 0.01


def test_long_chunks_of_strong_decay_keep_their_digits():
    """From differences of running sums the gradients of A and dt_bias would be 4e-5 off."""
    given = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs(2, tokens=256).items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    found = with_gradients(ours(given, 2, 256), given)
    assert max(distances(found, with_gradients(recurrence(wide, 2), wide)).values()) < 2e-6


def test_bf16_is_computed_in_fp32():
    given = inputs(2, tokens=100, dtype=torch.bfloat16)
    given["A"] = (given["A"].detach() / 100).requires_grad_()  # a long memory, in which rounding adds up
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    expected = with_gradients(recurrence(wide, 2), wide)
    found = with_gradients(ours(given, 2, 8), given)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    ours_off, naive_off = (distances(one, expected) for one in (found, with_gradients(recurrence(given, 2), given)))
    assert max(ours_off.values()) < 0.02
    assert naive_off["output"] > 4 * ours_off["output"]  # negative control: in bf16 throughout


def test_states_are_rounded_between_chunks_alone():
    given = inputs(1, tokens=16)
    exact, rounded = (ours(given, 1, 8, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert torch.equal(exact[:, :8], rounded[:, :8])
    assert 1e-5 < (exact[:, 8:] - rounded[:, 8:]).abs().max() < 0.1


def test_states_behind_the_last_token():
    generator = torch.Generator().manual_seed(7)
    x, dt, B, C = (torch.randn(2, 7, *shape, generator=generator) for shape in ((4, 3), (4,), (2, 5), (2, 5)))
    A, zeros = -torch.rand(4, generator=generator), torch.zeros(4)

    def scan(tokens: slice) -> Tensor:
        parts = [x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens]]
        return state_space.chunk_scan_combined(*parts, 3, D=zeros, z=None, dt_bias=zeros, return_final_states=True)

    _, state = scan(slice(None))
    alone, _ = scan(slice(6, 7))
    y, _ = scan(slice(None))
    # What the last token reads is its own plus what of the state before it is left.
    _, before = scan(slice(6))
    decay = torch.exp(torch.nn.functional.softplus(dt[:, 6]) * A)[..., None, None]
    read = (before * decay * C[:, 6].repeat_interleave(2, 1)[:, :, None]).sum(-1)
    torch.testing.assert_close(y[:, 6] - alone[:, 0], read, atol=1e-6, rtol=1e-5)
    assert state.shape == (2, 4, 3, 5)


def kept(output: Callable[[], Tensor]) -> set[int]:
    """Addresses of what autograd keeps of a computation."""
    found = set()

    def pack(tensor: Tensor) -> Tensor:
        found.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output()
    return found


def test_nothing_but_its_input_is_kept_for_backward():
    given = inputs(1)
    held = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    assert kept(lambda: ours(given, 1, 4)) == held
    assert len(kept(lambda: recurrence(given, 1))) > 5 * len(held)  # negative control


def test_packed_sequences_are_refused():
    given = inputs(1)
    with pytest.raises(RuntimeError, match="leave packing out"):
        state_space.split_conv1d_scan_combined(
            **given,
            ngroups=1,
            chunk_size=4,
            seq_idx=torch.zeros(2, 13),
            state_dtype=None,
            activation="silu",
            headdim=None,
            norm_before_gate=False,
        )


# ---- Core's mixer against that of transformers ---------------------------------------------------


def transformer_config(num_layers: int, ngroups: int, **changes: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    settings: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "mamba_state_dim": 8,
        "mamba_head_dim": 8,
        "mamba_num_groups": ngroups,
        "tensor_model_parallel_size": tensor_parallel,
        "sequence_parallel": tensor_parallel > 1,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**settings | changes)


def mamba_layer(ngroups: int, *, chunk_size: int = 128, **changes: Any) -> Any:
    """Of the local spec, with parameters none of which is what it begins as."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from megatron_scmoe.models.hybrid_parts import local_mamba_layer_spec

    spec = local_mamba_layer_spec()
    spec.submodules.mixer.params["chunk_size"] = chunk_size
    config = transformer_config(1, ngroups, **changes)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return layer


def transformers_mixer(ours: torch.nn.Module, ngroups: int, chunk_size: int, wrong: str = "") -> torch.nn.Module:
    """transformers' Mamba2Mixer with the parameters of ours, or with one of them changed."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=ngroups,
        chunk_size=chunk_size,
        layer_norm_epsilon=1e-5,
        num_hidden_layers=1,
    )
    parameters = {theirs_name(name): value.detach().clone() for name, value in ours.named_parameters()}
    if wrong:
        parameters[wrong] = parameters[wrong].flip(-1)
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(parameters)
    return theirs


def theirs_name(name: str) -> str:
    return name.replace("conv1d_", "conv1d.")


def mixers(ngroups: int, tokens: int, chunk_size: int, wrong: str = "", **changes: Any) -> dict[str, float]:
    """On a rank: how far output, input gradient and every parameter's gradient are from those of transformers."""
    layer = mamba_layer(ngroups, chunk_size=chunk_size, **changes)
    theirs = transformers_mixer(layer.mixer, ngroups, chunk_size, wrong)
    hidden = torch.randn(tokens, 2, 32).requires_grad_()
    output, _ = layer.mixer(hidden)
    hidden_too = hidden.detach().transpose(0, 1).clone().requires_grad_()
    output_too = theirs(hidden_too)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    output_too.backward(gradient.transpose(0, 1))
    found = {"output": output.detach(), "input": hidden.grad}
    expected = {"output": output_too.detach().transpose(0, 1), "input": hidden_too.grad.transpose(0, 1)}
    found |= {theirs_name(name): value.grad for name, value in layer.mixer.named_parameters()}
    expected |= {name: value.grad for name, value in theirs.named_parameters()}
    return distances(found, expected)


PARAMETERS = {
    "A_log",
    "D",
    "conv1d.bias",
    "conv1d.weight",
    "dt_bias",
    "in_proj.weight",
    "norm.weight",
    "out_proj.weight",
}


@pytest.mark.parametrize("ngroups, tokens, chunk_size", [(1, 7, 128), (2, 40, 16), (2, 33, 8), (1, 150, 128)])
def test_mixer_is_that_of_transformers(ngroups, tokens, chunk_size):
    (found,) = ranks.run(mixers, 1, ngroups, tokens, chunk_size, layout={})
    assert found.keys() == {"output", "input", *PARAMETERS}
    assert max(found.values()) < 1e-5


def mixers_with_another_parameter() -> dict[str, float]:
    """On a rank: how far the output is where one parameter of transformers' is another."""
    return {wrong: mixers(2, 40, 16, wrong)["output"] for wrong in PARAMETERS}


def test_other_parameters_are_noticed():
    """Negative control of the test above."""
    (found,) = ranks.run(mixers_with_another_parameter, 1, layout={})
    assert found.keys() == PARAMETERS and min(found.values()) > 0.01


def test_mixer_without_the_path_that_saves_memory():
    (found,) = ranks.run(mixers, 1, 2, 33, 8, layout={}, use_mamba_mem_eff_path=False)
    assert max(found.values()) < 1e-5


def refusals() -> list[str]:
    """On a rank: what is said of packed sequences, and of a gated delta net."""
    from megatron.core.packed_seq_params import PackedSeqParams

    mixer = mamba_layer(1).mixer
    said = []
    for refused in (
        lambda: mixer(torch.randn(4, 1, 32), packed_seq_params=PackedSeqParams()),
        lambda: hybrid_model("G"),
    ):
        try:
            refused()
        except Exception as error:
            said.append(str(error))
    return said


def test_refusals_are_one_line_each():
    ((packed, gated),) = ranks.run(refusals, 1, layout={})
    assert packed == state_space.NO_PACKING
    assert re.fullmatch(r"--hybrid-layer-pattern has G, .* no layer; leave it out, or use .*", gated)


# ---- in Core's HybridModel -----------------------------------------------------------------------

PATTERN = "M-M*-"
TOKENS, VOCABULARY = 12, 32


def hybrid_model(pattern: str) -> Any:
    """Core's own, with the parts of the local spec."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megatron_scmoe.mcore.norm import SequenceParallelNorm
    from megatron_scmoe.models.hybrid_parts import local_mamba_layer_spec, missing_layer_spec

    hybrid_block.TENorm = SequenceParallelNorm  # the final norm; this process ends with the job
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = hybrid_block.HybridStackSubmodules(
        mamba_layer=local_mamba_layer_spec(),
        gdn_layer=missing_layer_spec("G"),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=SequenceParallelNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=SequenceParallelNorm,
                mlp=functools.partial(MLP.as_mlp_submodule, submodules=mlp),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    )
    return HybridModel(
        config=transformer_config(len(pattern), ngroups=2),
        hybrid_stack_spec=ModuleSpec(module=hybrid_block.HybridStack, submodules=parts),
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        hybrid_layer_pattern=pattern,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        position_embedding_type="rope",
    )


def train(model: Any, steps: int, *, reduced: bool = True) -> list[float]:
    """Loss before each step of gradient descent; ``reduced``: gradients are summed where each rank sees a part."""
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(VOCABULARY, (2, TOKENS + 1), generator=generator)
    positions = torch.arange(TOKENS).expand(2, -1)
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None and parameter.grad.abs().max() > 0
                if reduced and getattr(parameter, "sequence_parallel", False):
                    dist.all_reduce(parameter.grad)
                parameter -= 0.1 * parameter.grad
    return losses


def checkpoint_keys(model: Any) -> set[str]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.utils import nested_values

    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    return {value.key for value in nested_values(sharded) if isinstance(value, ShardedTensor)}


def saved_and_trained(folder: str) -> tuple[set[str], list[float]]:
    """On one rank: save the model as it begins, then train it."""
    from megatron.core import dist_checkpointing

    model = hybrid_model(PATTERN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    return checkpoint_keys(model), train(model, 4)


def loaded_and_trained(folder: str, reduced: bool) -> list[float]:
    """On each tensor-parallel rank."""
    from megatron.core import dist_checkpointing

    model = hybrid_model(PATTERN)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    return train(model, 4, reduced=reduced)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[Path, set[str], list[float]]:
    folder = tmp_path_factory.mktemp("hybrid")
    ((keys, losses),) = ranks.run(saved_and_trained, 1, str(folder), layout={})
    return folder, keys, losses


def test_hybrid_model_trains(one_rank):
    _, _, losses = one_rank
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.1


def test_checkpoint_keys_are_those_of_transformer_engine(one_rank):
    _, keys, _ = one_rank
    parts = {"conv1d.bias": "x B C", "conv1d.weight": "x B C", "in_proj.weight": "z x B C dt"}
    split = {f"{name}.{part}" for name, names in parts.items() for part in names.split()}
    whole = {"A_log", "D", "dt_bias", "norm.weight", "out_proj.weight", "in_proj.layer_norm_weight"}
    layer = "decoder.layers.0."
    assert {key for key in keys if key.startswith(layer)} == {f"{layer}mixer.{name}" for name in split | whole}


def test_tensor_and_sequence_parallel_ranks_train_alike(one_rank):
    folder, _, losses = one_rank
    layout = {"tensor_model_parallel_size": 2}
    for found in ranks.run(loaded_and_trained, 2, str(folder), True, layout=layout):
        assert found == pytest.approx(losses, abs=1e-5)
    for found in ranks.run(loaded_and_trained, 2, str(folder), False, layout=layout):  # negative control
        assert found[0] == pytest.approx(losses[0], abs=1e-5) and abs(found[-1] - losses[-1]) > 1e-4
