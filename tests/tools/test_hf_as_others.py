"""Exported models are models like others: sharded by block, checkpointed, spread over devices, served, asked."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_hf_scmoe import EXACT, TOKENS, exported, loaded, logits_of  # noqa: F401  (a fixture among them)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TOLERANCE = 1e-5
# One of each kind for make test; make test-full has all.
KINDS = ("pos2", "dgmoe pos3 share", "longcat", "moe-every 3", "stock", "grouped queries")
CASES = [pytest.param(case, marks=[] if case in KINDS else pytest.mark.full) for case in EXACT]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def train_step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


class ServedExperts(torch.nn.Module):
    """What programs that serve put in the place of a list of experts: stacked weights, SwiGLU, three arguments."""

    def __init__(self, experts) -> None:
        super().__init__()
        self.gate = torch.stack([expert.gate_proj.weight for expert in experts])
        self.up = torch.stack([expert.up_proj.weight for expert in experts])
        self.down = torch.stack([expert.down_proj.weight for expert in experts])
        self.ids_seen = 0

    def forward(self, hidden_states, top_k_index, top_k_weights):
        assert hidden_states.dim() == 2 and top_k_index.shape == top_k_weights.shape
        assert int(top_k_index.max()) < self.gate.shape[0]  # a fused kernel would read behind its weights
        self.ids_seen += top_k_index.numel()
        gate, up, down = (weights[top_k_index] for weights in (self.gate, self.up, self.down))
        inner = functional.silu(torch.einsum("nkih,nh->nki", gate, hidden_states))
        inner = inner * torch.einsum("nkih,nh->nki", up, hidden_states)
        output = torch.einsum("nkhi,nki->nkh", down, inner)
        return (output * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


def served_attention(module, query, key, value, mask, *, scaling, calls, **_):
    """A backend's attention: it finds its state by the layer's index, and knows keys by their heads."""
    calls.append(module.layer_idx)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    causal = torch.ones(length, key.shape[2], dtype=torch.bool).tril(key.shape[2] - length)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~causal, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


def served(model) -> list[int]:
    """Swap attention and experts as the Transformers backends of vLLM and SGLang do; returns the attention's calls."""
    calls: list[int] = []
    ALL_ATTENTION_FUNCTIONS["served"] = lambda *args, **kwargs: served_attention(*args, calls=calls, **kwargs)
    model.config._attn_implementation = "served"
    for name, module in list(model.named_modules()):
        if name.endswith(".experts") and isinstance(module, torch.nn.ModuleList):
            model.get_submodule(name.rpartition(".")[0]).experts = ServedExperts(module)
    return calls


@pytest.mark.parametrize("case", CASES)
def test_backends_that_swap_attention_and_experts_compute_the_same(exported, case):  # noqa: F811
    _, folder, expected = exported(case)
    model = loaded(folder)
    assert model.is_backend_compatible() and model.model.is_backend_compatible()
    assert model.config.base_model_tp_plan and model.config.base_model_pp_plan
    calls = served(model)
    assert (logits_of(model) - expected).abs().max() <= 10 * TOLERANCE
    assert calls == list(range(model.config.num_hidden_layers))
    stand_ins = [module for module in model.modules() if isinstance(module, ServedExperts)]
    # Fused experts compute SwiGLU, so those with another activation are no list that a backend would swap.
    assert bool(stand_ins) == (model.config.activation == "swiglu")
    assert all(module.ids_seen for module in stand_ins)


def test_a_backend_that_mixes_up_experts_is_noticed(exported):  # noqa: F811
    """Negative control of the test above."""
    _, folder, expected = exported("pos2")
    model = loaded(folder)
    served(model)
    for module in model.modules():
        if isinstance(module, ServedExperts):
            module.down = module.down.flip(0)
    assert (logits_of(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_activation_checkpointing_changes_nothing(exported, case):  # noqa: F811
    _, folder, _ = exported(case)
    model = loaded(folder).train()
    loss, expected = train_step(model)
    runs = []
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable()
    again, found = train_step(model)
    assert len(runs) == 2 * len(model.model.layers)  # each block ran once more in backward
    assert torch.equal(loss, again) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_sharded_by_block_it_computes_the_same(exported, one_rank, case):  # noqa: F811
    _, folder, _ = exported(case)
    model = loaded(folder).train()
    loss, expected = train_step(model)
    for block in model.model.layers:
        fully_shard(block, mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    again, found = train_step(model)
    torch.testing.assert_close(again, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].full_tensor(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_it_spreads_over_two_devices(exported, case):  # noqa: F811
    """The second device is torch's meta, which refuses to mix with another as a GPU would."""
    hooks = pytest.importorskip("accelerate.hooks")
    _, folder, _ = exported(case)
    model = loaded(folder)
    model.tie_weights()
    # Groups that share an MoE stay together here: nothing comes back from meta, as it does from a GPU.
    unit = model.config.moe_every * model.config.moe_share_groups
    half = len(model.model.layers) // unit // 2 * unit
    places = {f"model.layers.{i}": "cpu" if i < half else "meta" for i in range(len(model.model.layers))}
    places |= {"model.embed_tokens": "cpu", "model.norm": "meta", "lm_head": "meta"}
    if hasattr(model.model, "embed_positions"):
        places["model.embed_positions"] = "cpu"
    hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device=places,
        offload=dict.fromkeys(places, False),
        skip_keys=model._skip_keys_device_placement,
    )
    hooks.remove_hook_from_module(model)  # it would bring the logits back
    with torch.no_grad():
        assert model(TOKENS, use_cache=False).logits.is_meta
    assert set(model._no_split_modules) == {"Block"}


@pytest.mark.parametrize("case", CASES)
def test_it_gives_what_it_is_asked_for(exported, case):  # noqa: F811
    _, folder, _ = exported(case)
    model = loaded(folder)
    model.config._attn_implementation = "eager"
    config = model.config
    with torch.no_grad():
        plain = model(TOKENS)
        asked = model(TOKENS, output_attentions=True, output_router_logits=True, output_hidden_states=True)
        config.output_hidden_states = True
        by_config = model(TOKENS)
    assert plain.hidden_states is None and plain.attentions is None and plain.router_logits is None
    batch, length = TOKENS.shape
    assert len(asked.hidden_states) == len(by_config.hidden_states) == config.num_hidden_layers + 1
    assert all(state.shape == (batch, length, config.hidden_size) for state in asked.hidden_states)
    assert torch.equal(model.lm_head(asked.hidden_states[-1]), asked.logits)
    assert len(asked.attentions) == config.num_hidden_layers
    for weights in asked.attentions:
        assert weights.shape == (batch, config.num_attention_heads, length, length)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(batch, config.num_attention_heads, length))
    gates = 2 if config.shortcut == "dgmoe" else 1
    num_moes = sum(config.carries_moe(block) for block in range(config.num_hidden_layers))
    assert len(asked.router_logits) == gates * num_moes
    assert {logits.shape[-1] for logits in asked.router_logits} == {config.num_experts + config.zero_experts}


def test_a_part_of_a_group_alone_is_refused(exported):  # noqa: F811
    """As in a pipeline stage that begins within a group: what its experts read was in the block before."""
    _, folder, _ = exported("pos2")
    model = loaded(folder)
    block = model.model.layers[1]
    hidden = torch.randn(1, 3, model.config.hidden_size)
    angles = (torch.ones(1, 1, 3, 16), torch.zeros(1, 1, 3, 16))
    with pytest.raises(ValueError, match="give a pipeline stage whole groups of blocks"):
        block(hidden, angles=angles)


def test_the_default_configuration_makes_a_model(exported):  # noqa: F811
    _, folder, _ = exported("pos2")
    kind = type(loaded(folder).config)
    config = kind()
    assert config.shortcut == "scmoe" and config.shared_expert_intermediate_size == config.moe_intermediate_size
    assert config.kv_lora_rank is None and kind(attention="multi_latent").latent_sizes == (512, 128, 64, 128)
