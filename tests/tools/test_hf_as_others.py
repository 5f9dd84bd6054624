"""Exported models are models like others: sharded by block, checkpointed, spread over devices, served, asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import cases
from test_hf_scmoe import EXACT, TOKENS, TOOLS, exported, loaded, logits_of  # noqa: F401  (a fixture among them)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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
    """What programs that serve put in the place of a list of experts: stacked weights, SwiGLU, three arguments.

    It writes over its input, as their kernels may.
    """

    def __init__(self, experts, topk: int) -> None:
        super().__init__()
        self.gate = torch.stack([expert.gate_proj.weight for expert in experts])
        self.up = torch.stack([expert.up_proj.weight for expert in experts])
        self.down = torch.stack([expert.down_proj.weight for expert in experts])
        self.topk = topk
        self.ids_seen = 0

    def forward(self, hidden_states, top_k_index, top_k_weights):
        assert hidden_states.dim() == 2 and top_k_index.shape == top_k_weights.shape
        assert top_k_index.shape == (len(hidden_states), self.topk)  # as many as the configuration says
        assert int(top_k_index.max()) < self.gate.shape[0]  # a fused kernel would read behind its weights
        self.ids_seen += top_k_index.numel()
        gate, up, down = (weights[top_k_index.int()] for weights in (self.gate, self.up, self.down))
        inner = functional.silu(torch.einsum("nkih,nh->nki", gate, hidden_states))
        inner = inner * torch.einsum("nkih,nh->nki", up, hidden_states)
        output = torch.einsum("nkhi,nki->nkh", down, inner)
        hidden_states.fill_(torch.nan)
        return (output * top_k_weights.float().unsqueeze(-1)).sum(dim=1).to(output.dtype)


def served_attention(module, query, key, value, mask, *, scaling, attention_instances, **_):
    """A backend's attention: its state is found by the layer's index, and a head is as large in q, k and v.

    It takes one row of tokens, without a mask, and gives [n, heads * d].
    """
    assert len(query) == 1 and value.shape[-1] == query.shape[-1]
    attention_instances[module.layer_idx] += 1
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~causal, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(length, -1), None


def assert_tuple(output: object) -> None:
    assert isinstance(output, tuple)


def served(model):
    """Swap attention and experts as the Transformers backends of vLLM and SGLang do."""
    ALL_ATTENTION_FUNCTIONS["served"] = served_attention
    model.config._attn_implementation = "served"
    for name, module in list(model.named_modules()):
        if name.endswith(".experts") and isinstance(module, torch.nn.ModuleList):
            parent = model.get_submodule(name.rpartition(".")[0])
            # What stands beside the experts is added up over ranks with them, and would count many times.
            assert {name for name, _ in parent.named_children()} == {"router", "experts"}
            # A block that gives one tensor, and reads one, is one whose routing they may replace by their own.
            parent.register_forward_hook(lambda *called: assert_tuple(called[-1]))
            parent.experts = ServedExperts(module, model.config.num_experts_per_tok)
    return model


@torch.no_grad()
def served_states(model, **inputs) -> torch.Tensor:
    """Hidden states [n, h] of one row of tokens, as the backends call a model without its output layer."""
    length = inputs.get("input_ids", inputs.get("inputs_embeds")).shape[1]
    calls = dict.fromkeys(range(model.config.num_hidden_layers), 0)
    outputs = model.model(
        **inputs,
        use_cache=False,
        position_ids=torch.arange(length).unsqueeze(0),
        attention_instances=calls,
        return_dict=False,
    )
    here = [index for index, block in enumerate(model.model.layers) if not isinstance(block, torch.nn.Identity)]
    assert [index for index, number in calls.items() for _ in range(number)] == here
    return outputs[0][0]


def served_logits(model) -> torch.Tensor:
    return model.lm_head(torch.stack([served_states(model, input_ids=row.unsqueeze(0)) for row in TOKENS]))


@pytest.mark.parametrize("case", CASES)
def test_backends_that_swap_attention_and_experts_compute_the_same(exported, case):  # noqa: F811
    _, folder, expected = exported(case)
    model = loaded(folder)
    assert model.is_backend_compatible() and model.model.is_backend_compatible()
    served(model)
    assert (served_logits(model) - expected).abs().max() <= 10 * TOLERANCE
    stand_ins = [module for module in model.modules() if isinstance(module, ServedExperts)]
    # Fused experts compute SwiGLU, so those with another activation are no list that a backend would swap.
    assert bool(stand_ins) == (model.config.activation == "swiglu")
    assert all(module.ids_seen for module in stand_ins)


@pytest.mark.parametrize("case", CASES)
def test_backends_cut_it_into_stages(exported, case):  # noqa: F811
    """A stage has identities in the places of what other stages have, and gets hidden states for embeddings."""
    _, folder, expected = exported(case)
    config = loaded(folder).config
    unit = config.moe_every * config.moe_share_groups
    half = (config.num_hidden_layers // unit + 1) // 2 * unit
    assert config.base_model_pp_plan.keys() == {"embed_tokens", "layers", "norm"}
    first, second = served(loaded(folder)), served(loaded(folder))
    for index in range(config.num_hidden_layers):
        (first if index >= half else second).model.layers[index] = torch.nn.Identity()
    first.model.norm = second.model.embed_tokens = torch.nn.Identity()
    rows = [served_states(first, input_ids=row.unsqueeze(0)) for row in TOKENS]
    found = torch.stack([served_states(second, inputs_embeds=row.unsqueeze(0)) for row in rows])
    assert (second.lm_head(found) - expected).abs().max() <= 10 * TOLERANCE


def on_ranks(folder: Path) -> tuple[torch.Tensor, int]:
    """Logits of a model that ranks share as its plan says, and how many of its parameters are shared."""
    from transformers.distributed.configuration_utils import DistributedConfig

    sys.path.insert(0, str(TOOLS))
    from checkpoints.mappings.hf_scmoe.modeling_scmoe import ScMoEForCausalLM

    model = ScMoEForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    shared = sum(isinstance(value, DTensor) for value in model.parameters())
    logits = logits_of(model)
    return logits.full_tensor() if isinstance(logits, DTensor) else logits, shared


@pytest.mark.parametrize("case", cases(EXACT, ["pos2", "longcat"]))
def test_ranks_of_tensor_parallelism_share_it(exported, case):  # noqa: F811
    _, folder, expected = exported(case)
    for logits, shared in ranks.run(on_ranks, 2, folder):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert shared


def test_a_backend_that_mixes_up_experts_is_noticed(exported):  # noqa: F811
    """Negative control of the test above."""
    _, folder, expected = exported("pos2")
    model = served(loaded(folder))
    for module in model.modules():
        if isinstance(module, ServedExperts):
            module.down = module.down.flip(0)
    assert (served_logits(model) - expected).abs().max() > 1e-3


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
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


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
        torch.testing.assert_close(found[name].full_tensor(), gradient, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize(("case", "blocks"), [("pos2", 1), ("dgmoe pos3 share", 2)])
def test_a_part_of_a_group_alone_is_refused(exported, case, blocks):  # noqa: F811
    """As in a pipeline stage that begins within a group: what its experts read, or its experts, were before."""
    _, folder, _ = exported(case)
    model = loaded(folder)
    for index in range(blocks):
        model.model.layers[index] = torch.nn.Identity()
    with pytest.raises(ValueError, match="give a pipeline stage whole groups of blocks"):
        model(inputs_embeds=torch.randn(1, 3, model.config.hidden_size))


def test_rotary_positions_that_depend_on_the_length_are_refused(exported):  # noqa: F811
    """Frequencies are computed once for a kind, whatever the length."""
    _, folder, _ = exported("pos2")
    with pytest.raises(ValueError, match="rope_type is one of .* it is 'dynamic'"):
        loaded(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def test_the_default_configuration_makes_a_model(exported):  # noqa: F811
    _, folder, _ = exported("pos2")
    kind = type(loaded(folder).config)
    config = kind()
    assert config.shortcut == "scmoe" and config.shared_expert_intermediate_size == config.moe_intermediate_size
    assert config.kv_lora_rank is None and kind(attention="multi_latent").latent_sizes == (512, 128, 64, 128)
