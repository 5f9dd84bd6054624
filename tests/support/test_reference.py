"""The reference against a stock Megatron GPTModel, against numbers worked by hand, and broken on purpose."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import (
    Block,
    Group,
    Params,
    ReferenceConfig,
    combine_outputs,
    feed_forward,
    loss_and_gradients,
    model_loss,
    moe_outputs,
    norm,
    parameter_shapes,
    route,
    route_twice,
    span_forward,
    wire_span,
)
from torch import Tensor

from megatron_scmoe.cpu import backend as cpu_backend

VOCAB_SIZE, SEQUENCE_LENGTH, BATCH_SIZE = 40, 16, 4
TOLERANCE = 1e-5  # largest difference, as a share of the largest value of the tensor
CHANGED = 1e-3

BASE = ReferenceConfig(
    num_layers=4, hidden_size=16, num_attention_heads=4, ffn_hidden_size=24, moe_ffn_hidden_size=20,
    shared_ffn_hidden_size=12, num_experts=4, topk=1, moe_every=2, positions=("pos2", "pos2"), combine="cg1",
)  # fmt: skip
STOCK = replace(BASE, positions=("none", "none"))
DGMOE = replace(BASE, arch="dgmoe", shared_ffn_hidden_size=None, combine="add")


def random_params(cfg: ReferenceConfig, dtype: torch.dtype = torch.float32) -> Params:
    """Norms away from their start at 1 and 0, embeddings that keep the tokens apart so that every expert gets some."""
    torch.manual_seed(1234)
    shapes = parameter_shapes(cfg, vocab_size=VOCAB_SIZE, max_sequence_length=SEQUENCE_LENGTH)
    params = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, dtype=torch.float64) * (1.0 if name.startswith("embedding") else 0.25)
        params[name] = (values + 1.0 if name.endswith("norm.weight") else values).to(dtype)
    return params


def idle(gradients: dict[str, Tensor]) -> list[str]:
    """Parameters whose gradient is zero: a comparison of zeros proves nothing."""
    return [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-6]


def random_batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels [b, s]."""
    torch.manual_seed(99)
    ids = torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, SEQUENCE_LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference as a share of the largest absolute true value."""
    assert value.shape == truth.shape
    return ((value - truth).abs().max() / truth.abs().max().clamp_min(1e-12)).item()


# Position 'none' is the stock model


@pytest.fixture(scope="module")
def single_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One gloo rank with Megatron's groups and the CPU stand-ins; all undone afterwards."""
    already_installed = cpu_backend.is_installed()
    cpu_backend.install()
    from megatron.core import parallel_state, tensor_parallel

    store = f"file://{tmp_path_factory.mktemp('single_rank')}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)  # attention forks this generator even with dropout 0
    yield
    tensor_parallel.get_cuda_rng_tracker().reset()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    if not already_installed:
        cpu_backend.uninstall()


def stock_model(cfg: ReferenceConfig) -> Any:
    """Megatron's own GPTModel of the same shape, local spec."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=cfg.num_layers,
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_attention_heads,
        num_query_groups=cfg.query_groups,
        kv_channels=cfg.head_size,
        ffn_hidden_size=cfg.ffn_hidden_size,
        moe_ffn_hidden_size=cfg.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=cfg.shared_ffn_hidden_size,
        moe_shared_expert_gate=cfg.combine == "cg1",
        num_moe_experts=cfg.num_experts,
        moe_router_topk=cfg.topk,
        moe_router_pre_softmax=cfg.pre_softmax,
        moe_router_load_balancing_type="none",
        moe_layer_freq=([0] * (cfg.moe_every - 1) + [1]) * cfg.num_groups,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=cfg.swiglu,
        activation_func=F.silu if cfg.swiglu else F.gelu,
        normalization=cfg.normalization,
        layernorm_epsilon=cfg.layernorm_epsilon,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=cfg.normalization),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE_LENGTH,
        position_embedding_type="rope" if cfg.rotary else "learned_absolute",
        share_embeddings_and_output_weights=not cfg.untied_embeddings,
    )


def stock_loss_and_gradients(cfg: ReferenceConfig, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as `loss_and_gradients`, by Megatron."""
    model = stock_model(cfg).train()
    named = dict(model.named_parameters())
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == {
        name: tuple(tensor.shape) for name, tensor in params.items()
    }
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(params[name])
    tokens, labels = random_batch()
    loss = model(tokens, torch.arange(SEQUENCE_LENGTH).expand_as(tokens), None, labels=labels)
    loss.mean().backward()
    return loss.detach(), {name: parameter.grad for name, parameter in named.items()}


STOCK_CASES = {
    "top1_gated_shared_gelu_layernorm_learned": STOCK,
    "top2_pre_softmax_swiglu_rmsnorm_rope_tied": replace(
        STOCK, topk=2, swiglu=True, normalization="RMSNorm", rotary=True, untied_embeddings=False
    ),
    "top2_post_softmax_grouped_queries_ungated": replace(
        STOCK, topk=2, pre_softmax=False, num_query_groups=2, combine="add", rotary=True
    ),
    "top3_no_shared_wide_heads_moe_every_1": replace(
        STOCK, topk=3, pre_softmax=False, shared_ffn_hidden_size=None, combine="add", kv_channels=6,
        moe_every=1, positions=("none",) * 4,
    ),
    "top1_swiglu_layernorm_rope_moe_every_3": replace(
        STOCK, num_layers=3, moe_every=3, positions=("none",), swiglu=True, rotary=True, layernorm_epsilon=1e-3
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STOCK_CASES)
def test_position_none_is_the_stock_model(case: str, single_rank: None) -> None:
    """Loss per token and every gradient, by the same parameter names."""
    cfg = STOCK_CASES[case]
    params = random_params(cfg)
    loss, gradients = loss_and_gradients(params, *random_batch(), cfg)
    stock_loss, stock_gradients = stock_loss_and_gradients(cfg, params)
    errors = {"loss": relative_error(loss, stock_loss)}
    errors |= {name: relative_error(gradient, stock_gradients[name]) for name, gradient in gradients.items()}
    print(f"{case}: worst of {len(errors)}: {max(errors.items(), key=lambda item: item[1])}")
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
    assert idle(gradients) == []


def test_other_formulas_are_not_the_stock_model(single_rank: None) -> None:
    """Negative control of the test above: one choice changed on our side only, and the losses part."""
    params = random_params(STOCK)
    stock_loss, _ = stock_loss_and_gradients(STOCK, params)
    for change in ({"positions": ("pos2", "none")}, {"topk": 2}, {"layernorm_epsilon": 0.1}):
        loss, _ = model_loss(params, *random_batch(), replace(STOCK, **change))
        assert relative_error(loss, stock_loss) > CHANGED, change


def moe_output(params: Params, source: Tensor, current: Tensor, cfg: ReferenceConfig) -> Tensor:
    """All that the MoE of the first group adds."""
    shared, routed = moe_outputs(params, 0, source, current, cfg)
    return shared + routed


# Wiring and gating worked by hand


def numbered_block(index: int, *, is_moe: bool) -> Block:
    """Norms that write which norm they are: block 0 times 10 and 100, block 1 times 1000 and 10000, and so on.

    Attention and MLP undo it and get 1 or 0: every op adds 1 if and only if it read its own norm of the value it should
    have read (block 0 of H = 1: attention sees 10, MLP sees 200).
    """
    entering, middle = 2 * index + 1, 2 * index + 2
    input_scale, mlp_scale = 10 ** (2 * index + 1), 10 ** (2 * index + 2)
    return Block(
        input_norm=lambda x: x * input_scale,
        attention=lambda x: (x == entering * input_scale).long(),
        pre_mlp_norm=lambda x: x * mlp_scale,
        mlp=None if is_moe else lambda x: (x == middle * mlp_scale).long(),
    )


@pytest.mark.parametrize(
    ("num_blocks", "position", "source", "current"),
    [
        # H(l-1)=1, H_MH(l)=2, H(l)=3, H_MH(l+1)=4; the digit says which tensor, the zeros which norm
        (2, "pos3", 1 * 10, 4 * 10_000),
        (2, "pos2", 2 * 100, 4 * 10_000),
        (2, "pos1", 3 * 1_000, 4 * 10_000),
        (2, "none", 4 * 10_000, 4 * 10_000),
        # one block: H=1, H_MH=2
        (1, "pos1", 1 * 10, 2 * 100),
        (1, "none", 2 * 100, 2 * 100),
        # three blocks count to 6; positions lie in the last two
        (3, "pos3", 3 * 1_000, 6 * 1_000_000),
        (3, "pos2", 4 * 10_000, 6 * 1_000_000),
        (3, "pos1", 5 * 100_000, 6 * 1_000_000),
    ],
)
def test_wiring_by_hand(num_blocks: int, position: str, source: int, current: int) -> None:
    """The experts read `source`, the shared expert `current`, and their sum lands on H_MH of the MoE block."""
    read = []

    def feed_forward_7(source: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        read.append((source.item(), current.item()))
        return torch.tensor(0), torch.tensor(7)

    blocks = [numbered_block(index, is_moe=index == num_blocks - 1) for index in range(num_blocks)]
    output = wire_span(torch.tensor(1), [Group(blocks, feed_forward_7, position)], landing=0)
    assert read == [(source, current)]
    assert output.item() == 2 * num_blocks + 7


def counting_groups(reads: list[int], positions: list[str], num_blocks: int = 2) -> list[Group]:
    """Groups whose n-th part adds a one at the n-th digit, and the routed part a 5 at the shared expert's.

    So a number says what it is the sum of; what each part reads is noted in ``reads``, in the order of the sums.
    """
    digits = iter(10**n for n in range(100))

    def part(digit: int):
        def run(hidden: Tensor) -> Tensor:
            reads.append(hidden.item())
            return torch.tensor(digit)

        return run

    def moe(digit: int):
        def run(source: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
            reads.extend((source.item(), current.item()))
            return torch.tensor(digit), torch.tensor(5 * digit)

        return run

    def block(*, is_moe: bool) -> Block:
        same = lambda x: x  # noqa: E731
        return Block(same, part(next(digits)), same, None if is_moe else part(next(digits)))

    return [
        Group([block(is_moe=n == num_blocks - 1) for n in range(num_blocks)], moe(next(digits)), position)
        for position in positions
    ]


SPANS = {
    # position, landing -> what attention, MLP, attention, routed and shared experts of the second group read
    ("pos2", 0): (6_111, 16_111, 116_111, 16_111, 1_116_111),
    ("pos2", 1): (1_111, 16_111, 116_111, 16_111, 1_116_111),
    ("pos2", 2): (1_111, 11_111, 116_111, 11_111, 1_116_111),
    ("pos2", 3): (1_111, 11_111, 111_111, 11_111, 1_116_111),
    ("pos1", 1): (1_111, 16_111, 116_111, 116_111, 1_116_111),
    ("pos1", 3): (1_111, 11_111, 111_111, 111_111, 1_116_111),
    ("pos3", 1): (1_111, 16_111, 116_111, 1_111, 1_116_111),
}


@pytest.mark.parametrize(("position", "landing"), SPANS)
def test_span_by_hand(position: str, landing: int) -> None:
    """The routed 5 of the first group is missing where the second reads before the landing, and nowhere else."""
    reads: list[int] = []
    groups = counting_groups(reads, [position] * 2)
    assert wire_span(torch.tensor(0), groups, landing).item() == 61_116_111
    assert tuple(reads[5:]) == SPANS[position, landing]


def test_farskip_by_hand() -> None:
    """Attention reads without the routed 5 of the block before, the MoE with it and without this block's attention."""
    reads: list[int] = []
    assert (
        wire_span(torch.tensor(0), counting_groups(reads, ["farskip"] * 3, num_blocks=1), landing=1).item() == 616_161
    )
    assert reads == [0, 0, 0, 61, 61, 11, 6_161, 6_161, 1_161]  # routed and shared experts, attention


def shares(*numbers: float) -> Tensor:
    """Logits whose softmax is `numbers` over their sum."""
    return torch.tensor([math.log(number) for number in numbers], dtype=torch.float64)


def rounded(choices: list[tuple[int, Tensor]]) -> list[tuple[int, float]]:
    return [(expert, round(weight.item(), 12)) for expert, weight in choices]


def test_route_by_hand() -> None:
    """Shares 1/8, 4/8, 3/8: before top-k they stay, after top-k 4 and 3 share one whole."""
    logits = shares(1, 4, 3)
    assert rounded(route(logits, 1, pre_softmax=True)) == [(1, 0.5)]
    assert rounded(route(logits, 2, pre_softmax=True)) == [(1, 0.5), (2, 0.375)]
    assert rounded(route(logits, 2, pre_softmax=False)) == [(1, round(4 / 7, 12)), (2, round(3 / 7, 12))]


def test_route_twice_by_hand() -> None:
    """The current layer's first choice stands unless the preceding layer took it; weights are never renormalised."""
    assert rounded(list(route_twice(shares(1, 4, 3), shares(5, 2, 1)))) == [(1, 0.5), (0, 0.625)]
    assert rounded(list(route_twice(shares(1, 4, 3), shares(2, 5, 1)))) == [(1, 0.5), (0, 0.25)]


def test_combine_by_hand() -> None:
    """SE = 8, routed = 100; a logit of 0 halves, logits of (ln 3, 0) weigh 3/4 and 1/4."""
    outputs = torch.tensor([8.0]), torch.tensor([100.0])
    assert combine_outputs(*outputs, None, "add") == (8, 100)
    assert combine_outputs(*outputs, torch.tensor([0.0]), "cg1") == (4, 100)
    assert combine_outputs(*outputs, torch.tensor([math.log(3.0), 0.0]), "cg2") == (pytest.approx(6), pytest.approx(25))


def test_one_expert_is_a_dense_layer() -> None:
    """One expert has weight 1: at 'none' without a shared expert the MoE is the plain feed-forward layer."""
    cfg = replace(STOCK, num_experts=1, shared_ffn_hidden_size=None, combine="add")
    params = random_params(cfg, torch.float64)
    hidden = torch.randn(3, 2, cfg.hidden_size, dtype=torch.float64)
    dense = feed_forward(params, "decoder.layers.1.mlp.experts.local_experts.0.", hidden, cfg)
    torch.testing.assert_close(moe_output(params, hidden, hidden, cfg), dense, rtol=1e-12, atol=1e-12)


def test_dgmoe_on_twice_the_same_token_is_top2() -> None:
    """If both gates see one tensor they choose its first and second expert: pre-softmax top-2."""
    params = random_params(DGMOE, torch.float64)
    hidden = torch.randn(3, 2, DGMOE.hidden_size, dtype=torch.float64)
    double = moe_output(params, hidden, hidden, DGMOE)
    top2 = moe_output(params, hidden, hidden, replace(DGMOE, arch="scmoe", topk=2))
    torch.testing.assert_close(double, top2, rtol=1e-12, atol=1e-12)


def test_dgmoe_share_by_holding_one_tensor() -> None:
    """Two groups whose names hold one tensor: the gradient under either name is the sum of both uses."""
    params = random_params(DGMOE, torch.float64)
    shared = {n: params[n.replace("layers.3.", "layers.1.")] if "layers.3.mlp." in n else params[n] for n in params}
    batch = random_batch()
    _, together = loss_and_gradients(shared, *batch, DGMOE)
    _, apart = loss_and_gradients({name: tensor.clone() for name, tensor in shared.items()}, *batch, DGMOE)
    first, second = "decoder.layers.1.mlp.router.weight", "decoder.layers.3.mlp.router.weight"
    torch.testing.assert_close(together[first], apart[first] + apart[second])
    torch.testing.assert_close(together[first], together[second])


@pytest.mark.parametrize("cfg", [DGMOE, replace(BASE, combine="cg2")], ids=["dgmoe", "scmoe"])
def test_share_groups_is_holding_one_tensor(cfg: ReferenceConfig) -> None:
    """Router, experts and shared expert are the first group's; norms and the gate of cg2 stay each group's own."""
    params = random_params(cfg, torch.float64)
    alike = {n: params[n.replace("layers.3.", "layers.1.")] if "layers.3.mlp." in n else params[n] for n in params}
    sharing = replace(cfg, share_groups=2)
    once = {name: params[name] for name in random_params(sharing)}
    assert params.keys() - once.keys() == {name for name in params if "layers.3.mlp." in name}
    loss, gradients = loss_and_gradients(alike, *random_batch(), cfg)
    shared_loss, shared_gradients = loss_and_gradients(once, *random_batch(), sharing)
    torch.testing.assert_close(shared_loss, loss, rtol=0, atol=0)
    torch.testing.assert_close(shared_gradients, {name: gradients[name] for name in once}, rtol=1e-12, atol=1e-12)


# Every architecture: dtype, true gradients, and what must make a difference

ARCHITECTURES = {
    "scmoe_pos2_cg1": BASE,
    "scmoe2_pos1_then_pos3_cg2": replace(BASE, topk=2, positions=("pos1", "pos3"), combine="cg2"),
    "scmoe_moe_every_1_add": replace(BASE, moe_every=1, positions=("pos1",) * 4, combine="add"),
    "dgmoe_pos2": DGMOE,
    "span_lands_late_cg2": replace(BASE, span=2, landing=1, combine="cg2"),
    "dgmoe_span_shares": replace(DGMOE, span=2, landing=2, share_groups=2),
    "farskip": replace(BASE, topk=2, moe_every=1, positions=("farskip",) * 4, span=4, landing=1),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float32_agrees_with_float64(arch: str) -> None:
    """The reference follows the dtype of its parameters; the two agree to fp32 rounding."""
    cfg = ARCHITECTURES[arch]
    wide = random_params(cfg, torch.float64)
    wide = {name: tensor.float().double() for name, tensor in wide.items()}
    loss64, gradients64 = loss_and_gradients(wide, *random_batch(), cfg)
    loss32, gradients32 = loss_and_gradients({n: t.float() for n, t in wide.items()}, *random_batch(), cfg)
    assert loss64.dtype == torch.float64 and loss32.dtype == torch.float32
    errors = {"loss": relative_error(loss32.double(), loss64)}
    errors |= {name: relative_error(gradients32[name].double(), gradients64[name]) for name in wide}
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
    assert idle(gradients64) == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_slopes(arch: str) -> None:
    """Float64 central difference of the mean loss along one random direction of all parameters."""
    cfg = ARCHITECTURES[arch]
    params = random_params(cfg, torch.float64)
    batch = random_batch()
    _, gradients = loss_and_gradients(params, *batch, cfg)
    direction = {name: torch.randn_like(tensor) for name, tensor in params.items()}
    step = 1e-6

    def mean_loss(sign: int) -> float:
        moved = {name: tensor + sign * step * direction[name] for name, tensor in params.items()}
        return model_loss(moved, *batch, cfg)[0].mean().item()

    slope = (mean_loss(+1) - mean_loss(-1)) / (2 * step)
    assert slope == pytest.approx(sum((gradients[n] * direction[n]).sum().item() for n in params), rel=1e-6)


def test_each_position_and_gate_matters() -> None:
    """Negative control: swap the position or drop the gate, and the outcome moves by more than 1e-3."""
    params = random_params(BASE)
    ungated = {name: tensor for name, tensor in params.items() if not name.endswith("gate_weight")}
    pairs = [(position, position) for position in ("pos1", "pos2", "pos3", "none")] + [("pos1", "pos2")]
    variants = {"+".join(pair): (params, replace(BASE, positions=pair)) for pair in pairs}
    variants["ungated"] = ungated, replace(BASE, combine="add")
    losses = {name: model_loss(p, *random_batch(), cfg)[0] for name, (p, cfg) in variants.items()}
    for one in losses:
        for other in losses:
            assert one == other or relative_error(losses[one], losses[other]) > CHANGED, (one, other)


def test_dgmoe_collisions_happen_and_matter() -> None:
    """The random model has tokens whose two first choices coincide, so the second-choice rule is exercised."""
    params = random_params(DGMOE, torch.float64)
    torch.manual_seed(5)
    source, current = torch.randn(2, 64, 1, DGMOE.hidden_size, dtype=torch.float64)
    router = params["decoder.layers.1.mlp.router.weight"].T
    collides = (source @ router).argmax(-1) == (current @ router).argmax(-1)
    assert 0 < collides.sum() < collides.numel()
    top1 = replace(DGMOE, arch="scmoe")
    both = moe_output(params, source, current, DGMOE)
    naive = moe_output(params, source, source, top1) + moe_output(params, current, current, top1)
    moved = (both - naive).abs().amax(dim=-1)
    assert torch.equal(moved > 1e-12, collides)
    assert moved.max() > CHANGED


@pytest.mark.parametrize("combine", ["add", "cg1", "cg2"])
def test_span_forward_is_the_formula_of_pos2(combine: str) -> None:
    """Design section 2 once more for one group; with top-k of all experts the routed part is a dense sum.

    With a projection of zero attention adds nothing: H_MH(l) is the group's input, and H_MH(l+1) is H(l).
    """
    cfg = replace(BASE, num_layers=2, positions=("pos2",), combine=combine, topk=BASE.num_experts)
    params = random_params(cfg, torch.float64)
    params |= {name: torch.zeros_like(params[name]) for name in params if name.endswith("linear_proj.weight")}
    hidden = torch.randn(5, 2, cfg.hidden_size, dtype=torch.float64)
    block, moe = "decoder.layers.0.", "decoder.layers.1.mlp."

    source = norm(params, block + "pre_mlp_layernorm.", hidden, cfg)
    after_mlp = hidden + feed_forward(params, block + "mlp.", source, cfg)
    current = norm(params, "decoder.layers.1.pre_mlp_layernorm.", after_mlp, cfg)
    gate = torch.softmax(source @ params[moe + "router.weight"].T, dim=-1)
    experts = [feed_forward(params, f"{moe}experts.local_experts.{e}.", source, cfg) for e in range(cfg.num_experts)]
    routed = torch.einsum("sbe,esbh->sbh", gate, torch.stack(experts))
    shared = feed_forward(params, moe + "shared_experts.", current, cfg)
    if combine == "cg1":
        shared = shared / (1 + torch.exp(-(current * params[moe + "shared_experts.gate_weight"]).sum(-1, keepdim=True)))
    if combine == "cg2":
        exps = torch.exp(current @ params[moe.removesuffix("mlp.") + "combine_gate.weight"].T)
        shared, routed = (part * exps[..., [i]] / exps.sum(-1, keepdim=True) for i, part in enumerate((shared, routed)))
    expected = after_mlp + shared + routed
    torch.testing.assert_close(span_forward(params, hidden, cfg, 0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"num_layers": 3}, "multiple of moe_every"),
        ({"positions": ("pos2",)}, "one position per group"),
        ({"moe_every": 1, "positions": ("pos2",) * 4}, "pos2 and pos3 need moe_every >= 2"),
        ({"shared_ffn_hidden_size": None}, "cg1 and cg2 weigh a shared expert"),
        ({"pre_softmax": False}, "top-1 needs pre_softmax"),
        ({"arch": "dgmoe"}, "dgmoe has no shared expert"),
        ({"span": 3}, "spans are whole"),
        ({"span": 2, "landing": 4}, "landing is behind a sub-layer"),
        ({"landing": 1}, "only a span has a next group"),
        ({"positions": ("farskip",) * 2}, "farskip is scmoe in every block"),
        ({"share_groups": 3}, "an MoE serves whole groups"),
    ],
)
def test_config_refuses(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        replace(BASE, **change)


def test_biases_and_foreign_names_are_refused() -> None:
    """A parameter that no formula reads would silently get a zero gradient."""
    params = random_params(BASE)
    bias = "decoder.layers.0.mlp.linear_fc1.bias"
    with pytest.raises(ValueError, match=bias):
        model_loss(params | {bias: torch.zeros(24)}, *random_batch(), BASE)
    del params["decoder.layers.1.mlp.router.weight"]
    with pytest.raises(ValueError, match="layers.1.mlp.router.weight: expected"):
        model_loss(params, *random_batch(), BASE)
