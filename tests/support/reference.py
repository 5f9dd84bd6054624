"""The truth: ScMoE and DGMoE as a slow, plain, single-process model, written from the papers' formulas.

Everything the distributed implementation does with groups, flights and plans must come out as if this file had run.
So nothing here is shared with it: no import of `megatron_scmoe` or of Megatron, one Python loop per head, token and
expert, and the wiring is spelled in the paper's tensors (ScMoE, arXiv 2404.05019), not as taps and slots:

    H_MH(l)   = H(l-1)   + Attn_l(input_norm_l(H(l-1)))
    H(l)      = H_MH(l)  + MLP_l(pre_mlp_norm_l(H_MH(l)))                        blocks before the MoE block
    H(l+1)    = H_MH(l+1) + combine(SE(current), sum_i G(source)_i E_i(source))  the MoE block
    current   = pre_mlp_norm_{l+1}(H_MH(l+1)),  source = the normed tensor at the shortcut position

In a span of groups whose outputs land late (`landing` K above 0) the last line is two. A group ends without its routed
part, which is added behind the K-th attention or MLP of the next group; the span's last group adds its own at its end:

    A(l+1)    = H_MH(l+1) + c0 SE(current)        r = c1 sum_i G(source)_i E_i(source)
    H_MH(l+2) = A(l+1) + Attn_{l+2}(input_norm_{l+2}(A(l+1))) + r                K = 1: complete from here on

`params` is a flat dict named like the parameters of a single-rank Megatron-Core 0.19.2 GPTModel with the local spec.
Shapes: s sequence, b batch, h hidden, e experts, v vocabulary, d head. Hidden states are [s, b, h], as in Megatron.
A sum that Megatron takes in fp32 is taken in the dtype of the parameters if that is wider, so that float64
parameters give a float64 truth. Where groups share an MoE, `.mlp.` parameters are those of the first of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from slow_fp8 import travelled
from torch import Tensor

Params = dict[str, Tensor]
Function = Callable[[Tensor], Tensor]

POSITIONS = ("none", "pos1", "pos2", "pos3", "farskip")
COMBINES = ("add", "cg1", "cg2")
ROPE_BASE = 10000.0
LSH_RANK = 8
UPSTREAM_NORMS = ("shortcut_pre_mlp_layernorm.", "shortcut_post_norm.")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Sizes and choices of one model; the words are those of docs/architecture.md."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    moe_ffn_hidden_size: int
    shared_ffn_hidden_size: int | None
    num_experts: int
    topk: int
    moe_every: int
    positions: tuple[str, ...]
    combine: str = "add"
    arch: str = "scmoe"
    span: int = 1
    landing: int = 0
    upstream_norms: bool = False
    """Those of Megatron's ShortcutMoE: one of what routed experts read, one of the sum of shared and routed output."""
    share_groups: int = 1
    pre_softmax: bool = True
    swiglu: bool = False
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    rotary: bool = False
    num_query_groups: int | None = None
    kv_channels: int | None = None
    untied_embeddings: bool = True
    zero_experts: int = 0
    router_biases: tuple[Tensor, ...] = ()
    """LongCat-Flash's router: for each group, the bias of a choice, [experts + zero experts]; none: Megatron's."""
    routed_scaling: float = 1.0
    latent_size: int | None = None
    """Width of the projections that routed experts read and write (--moe-latent-size); None: the hidden state."""
    lsh_columns: tuple[tuple[Tensor, ...], ...] = ()
    """LSH-MoE: for each group, the columns [h, width] that each of its hash functions keeps; none: no compression."""
    lsh_compensation: str = "paper"
    lsh_sketches: tuple[Tensor, ...] = ()
    """For each group, the subspace [h, w] in which a token joins the nearest mean of its expert; none: it does not."""
    rounded: tuple[str, ...] = ()
    """Transfers in which rows are rounded to fp8: `dispatch-forward`, `combine-backward` and so on."""
    ranks: int | None = None
    """That experts are on, where a row is for those of a rank (--a2a-unique rank); None: for one expert."""

    def __post_init__(self) -> None:
        """Refuse what the formulas do not define."""
        rules = {
            "num_layers is a multiple of moe_every": self.num_layers % self.moe_every == 0,
            "one position per group": len(self.positions) == self.num_groups,
            f"positions are of {POSITIONS}": set(self.positions) <= set(POSITIONS),
            "pos2 and pos3 need moe_every >= 2": self.moe_every >= 2 or not {"pos2", "pos3"} & set(self.positions),
            "spans are whole": self.num_groups % self.span == 0,
            "landing is behind a sub-layer of the next group": 0 <= self.landing < 2 * self.moe_every,
            "only a span has a next group": self.span > 1 or self.landing == 0,
            "a norm of the sum needs the sum": not self.upstream_norms or self.landing == 0,
            "farskip is scmoe in every block, and lands behind attention": "farskip" not in self.positions
            or (self.moe_every == 1 and self.arch == "scmoe" and (self.span == 1 or self.landing == 1)),
            "an MoE serves whole groups": self.num_groups % self.share_groups == 0,
            f"combine is of {COMBINES}": self.combine in COMBINES,
            "cg1 and cg2 weigh a shared expert": self.combine == "add" or self.shared_ffn_hidden_size is not None,
            "1 <= topk <= num_experts": 1 <= self.topk <= self.num_experts + self.zero_experts,
            "zero experts need LongCat-Flash's router": not self.zero_experts or bool(self.router_biases),
            "top-1 needs pre_softmax, or its gate is the constant 1": self.topk > 1 or self.pre_softmax,
            "normalization is LayerNorm or RMSNorm": self.normalization in ("LayerNorm", "RMSNorm"),
            "arch is scmoe or dgmoe": self.arch in ("scmoe", "dgmoe"),
        }
        if self.arch == "dgmoe":
            rules |= {
                "dgmoe has no shared expert": self.shared_ffn_hidden_size is None,
                "dgmoe is two top-1 gates: topk=1, pre_softmax": self.topk == 1 and self.pre_softmax,
                "dgmoe needs a shortcut position": "none" not in self.positions,
                "dgmoe needs a second choice": self.num_experts >= 2,
            }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"{'; '.join(broken)}: {self}")

    @property
    def num_groups(self) -> int:
        """Groups of `moe_every` consecutive blocks."""
        return self.num_layers // self.moe_every

    def moe_block(self, group: int) -> str:
        """Prefix of the parameters of the group's last block."""
        return f"decoder.layers.{(group + 1) * self.moe_every - 1}."

    def moe(self, group: int) -> str:
        """Prefix of the parameters of the MoE that serves the group: that of the first group that shares it."""
        return self.moe_block(group // self.share_groups * self.share_groups) + "mlp."

    @property
    def query_groups(self) -> int:
        """Heads of keys and values; grouped-query attention shares each among several query heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


# The wiring: which tensor goes where (ScMoE, arXiv 2404.05019; FarSkip-Collective, arXiv 2511.11505).


@dataclass(frozen=True)
class Block:
    """What one Transformer block computes; the residual sums belong to the wiring. An MoE block's `mlp` is None."""

    input_norm: Function
    attention: Function
    pre_mlp_norm: Function
    mlp: Function | None


@dataclass(frozen=True)
class Group:
    """`moe(source, current)` is what the last block, the MoE block, adds to H_MH: shared part and routed part."""

    blocks: Sequence[Block]
    moe: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    position: str
    upstream_norms: tuple[Function, Function] | None = None


def wire_span(hidden: Tensor, groups: Sequence[Group], landing: int) -> Tensor:
    """Run neighbouring groups; with a `landing` the routed part of each but the last is added in the next one."""
    late = None
    for group in groups:
        if group.position == "farskip":
            hidden, routed = wire_farskip(hidden, group, late)
        else:
            hidden, routed = wire_group(hidden, group, late, landing)
        late = routed if landing and group is not groups[-1] else None
        if late is None:
            hidden = hidden + routed
    return hidden


def wire_group(hidden: Tensor, group: Group, late: Tensor | None, landing: int) -> tuple[Tensor, Tensor]:
    """Run one group: its output without its routed part, and that.

    `late`, the routed part of the group before, is added behind the `landing`-th attention or MLP.
    """

    def landed(hidden: Tensor, sublayer: int) -> Tensor:
        return hidden if late is None or sublayer != landing else hidden + late

    entering = []  # H(i-1), the input of block i
    after_attention = []  # H_MH(i)
    for number, block in enumerate(group.blocks):
        entering.append(hidden)
        hidden = landed(hidden + block.attention(block.input_norm(hidden)), 2 * number + 1)
        after_attention.append(hidden)
        if block.mlp is not None:
            hidden = landed(hidden + block.mlp(block.pre_mlp_norm(hidden)), 2 * number + 2)

    blocks, position = group.blocks, group.position
    current = blocks[-1].pre_mlp_norm(after_attention[-1])
    if position == "none":  # the stock layer
        its_norm, source = blocks[-1].pre_mlp_norm, after_attention[-1]
    elif position == "pos1":  # output of the preceding block
        its_norm, source = blocks[-1].input_norm, entering[-1]
    elif position == "pos2":  # between attention and MLP of the preceding block
        its_norm, source = blocks[-2].pre_mlp_norm, after_attention[-2]
    elif position == "pos3":  # input of the preceding block
        its_norm, source = blocks[-2].input_norm, entering[-2]
    else:
        raise ValueError(f"position is of {POSITIONS}: {position!r}")
    if group.upstream_norms is None:
        shared, routed = group.moe(its_norm(source), current)
        return hidden + shared, routed
    pre, post = group.upstream_norms
    shared, routed = group.moe(pre(source), current)
    return hidden, post(shared + routed)


def wire_farskip(without_late: Tensor, group: Group, late: Tensor | None) -> tuple[Tensor, Tensor]:
    """One block of FarSkip-Collective: attention reads A, the residual without `late`, and the whole MoE reads R.

    R = A + late;  A' = R + Attn(input_norm(A)) + SE(n);  r' = sum_i G(n)_i E_i(n),  n = pre_mlp_norm(R).
    """
    (block,) = group.blocks
    whole = without_late if late is None else without_late + late
    normed = block.pre_mlp_norm(whole)
    pre, post = group.upstream_norms or (None, None)
    shared, routed = group.moe(pre(whole) if pre else normed, normed)
    with_attention = whole + block.attention(block.input_norm(without_late))
    return (with_attention, post(shared + routed)) if post else (with_attention + shared, routed)


# Gating: which experts a token uses, with which weight. One token at a time, logits [e].


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis in fp32 or wider, back in the dtype of the logits."""
    return torch.softmax(logits, dim=-1, dtype=_wide(logits.dtype)).to(logits.dtype)


def route(logits: Tensor, topk: int, *, pre_softmax: bool) -> list[tuple[int, Tensor]]:
    """(expert, weight) of the `topk` choices of one token.

    `pre_softmax`: the weight is the expert's share among all experts, not renormalised (ScMoE's G), so a top-1 gate
    still gets a gradient. Otherwise the softmax runs over the chosen logits only.
    """
    chosen = _ranking(logits)[:topk]
    weights = softmax(logits)[chosen] if pre_softmax else softmax(logits[chosen])
    return list(zip(chosen, weights.unbind(), strict=True))


def route_longcat(logits: Tensor, bias: Tensor, topk: int, factor: float) -> list[tuple[int, Tensor]]:
    """(expert, weight) of the `topk` choices of one token as LongCat-Flash makes them (arXiv 2509.01322, section 2.1).

    The softmax runs over real and zero experts; the bias decides who is chosen and has no part in the weights, which do
    not sum to one. Experts behind the real ones are zero experts.
    """
    scores = softmax(logits)
    chosen = _ranking(scores + bias)[:topk]
    return [(expert, factor * scores[expert]) for expert in chosen]


def route_twice(previous_logits: Tensor, current_logits: Tensor) -> tuple[tuple[int, Tensor], tuple[int, Tensor]]:
    """DGMoE's two top-1 gates for one token: (expert, weight) for the preceding layer, then for the current one.

    A token may not use one expert twice (arXiv 2404.05019, DGMoE): the current layer then takes its second choice.
    Only the selection is masked. Both weights are the full softmax probability of the expert that was chosen.
    """
    previous_expert = _ranking(previous_logits)[0]
    current_expert = next(expert for expert in _ranking(current_logits) if expert != previous_expert)
    previous = (previous_expert, softmax(previous_logits)[previous_expert])
    current = (current_expert, softmax(current_logits)[current_expert])
    return previous, current


def combine_outputs(shared: Tensor, routed: Tensor, gate_logits: Tensor | None, combine: str) -> tuple[Tensor, Tensor]:
    """Shared and routed output as they are summed; `gate_logits` are those of the input of the shared expert.

    add: SE + routed. cg1: sigmoid(w.x) * SE + routed, one logit. cg2: c0 * SE + c1 * routed, c = softmax(W.x).
    """
    if combine == "add":
        return shared, routed
    assert gate_logits is not None
    if combine == "cg1":
        return torch.sigmoid(gate_logits) * shared, routed
    weights = softmax(gate_logits)
    return weights[..., 0:1] * shared, weights[..., 1:2] * routed


def _ranking(logits: Tensor) -> list[int]:
    """Experts of one token, best first."""
    return sorted(range(len(logits)), key=lambda expert: -logits[expert].item())


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or the dtype itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)


# Building blocks, named after the parameters they read. None has a bias; `mlp.` etc. are prefixes ending in a dot.


def norm(params: Params, prefix: str, hidden: Tensor, cfg: ReferenceConfig) -> Tensor:
    """LayerNorm or RMSNorm over the last axis; the variance is the biased one."""
    wide = hidden.to(_wide(hidden.dtype))
    if cfg.normalization == "LayerNorm":
        wide = wide - wide.mean(dim=-1, keepdim=True)
    normed = (wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + cfg.layernorm_epsilon)).to(hidden.dtype)
    scaled = normed * params[prefix + "weight"]
    return scaled + params[prefix + "bias"] if cfg.normalization == "LayerNorm" else scaled


def feed_forward(params: Params, prefix: str, hidden: Tensor, cfg: ReferenceConfig) -> Tensor:
    """Two linears around gelu (exact, by erf) or swiglu: silu(first half of fc1's rows) * second half."""
    inner = hidden @ params[prefix + "linear_fc1.weight"].T
    if cfg.swiglu:
        gate, value = inner.chunk(2, dim=-1)
        inner = F.silu(gate) * value
    else:
        inner = F.gelu(inner)
    return inner @ params[prefix + "linear_fc2.weight"].T


def attention(params: Params, prefix: str, hidden: Tensor, cfg: ReferenceConfig) -> Tensor:
    """Causal self-attention of hidden [s, b, h], one head at a time.

    Megatron lays the rows of `linear_qkv` out by query group: [its query heads.., its key, its value], next group.
    """
    num_tokens = hidden.shape[0]
    queries_per_group = cfg.num_attention_heads // cfg.query_groups
    qkv = hidden @ params[prefix + "linear_qkv.weight"].T
    heads = torch.split(qkv, cfg.head_size, dim=-1)  # each [s, b, d]
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=hidden.device).triu(diagonal=1)
    outputs = []
    for group in range(cfg.query_groups):
        first = group * (queries_per_group + 2)
        *queries, key, value = heads[first : first + queries_per_group + 2]
        if cfg.rotary:
            key = rotate(key)
        for query in queries:
            if cfg.rotary:
                query = rotate(query)
            scores = torch.einsum("qbd,kbd->bqk", query, key) / math.sqrt(cfg.head_size)
            weights = softmax(scores.masked_fill(future, -math.inf))
            outputs.append(torch.einsum("bqk,kbd->qbd", weights, value))
    return torch.cat(outputs, dim=-1) @ params[prefix + "linear_proj.weight"].T


def rotate(heads: Tensor) -> Tensor:
    """RoPE on [s, b, d], not interleaved: channel i turns with channel i + d/2 by the angle s * base^(-2i/d)."""
    num_tokens, _, size = heads.shape
    dtype = _wide(heads.dtype)
    positions = torch.arange(num_tokens, dtype=dtype, device=heads.device)
    channels = torch.arange(0, size, 2, dtype=dtype, device=heads.device)
    angles = torch.outer(positions, 1.0 / ROPE_BASE ** (channels / size))
    cos, sin = angles.cos().to(heads.dtype)[:, None], angles.sin().to(heads.dtype)[:, None]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


Choices = list[tuple[int, Tensor]]


def experts_output(params: Params, prefix: str, choices: Choices, token: Tensor, cfg: ReferenceConfig) -> Tensor:
    """sum_i G_i E_i(token) of one token [h] over its chosen experts; a zero expert returns the token.

    With `rounded` sum_r R(sum_{i on r} G_i E_i(R(token))): R rounds what travels, and gradients of what travelled.
    """
    output = torch.zeros_like(token)
    places: dict[int, Choices] = {}
    for expert, weight in choices:
        if expert >= cfg.num_experts:
            output = output + weight * token
        else:
            place = expert if cfg.ranks is None else expert // (cfg.num_experts // cfg.ranks)
            places.setdefault(place, []).append((expert, weight))
    for here in places.values():
        arrived = travelled(token, "dispatch", cfg.rounded)
        results = [
            weight * feed_forward(params, f"{prefix}experts.local_experts.{expert}.", arrived, cfg)
            for expert, weight in here
        ]
        output = output + travelled(sum(results[1:], results[0]), "combine", cfg.rounded)
    return output


def latent_experts_output(
    params: Params, group: int, choices: list[Choices], tokens: list[Tensor], cfg: ReferenceConfig
) -> list[Tensor]:
    """`all_experts_output` of latents: U sum_i G_i E_i(D x), and what zero experts return of x itself."""
    if cfg.latent_size is None:
        return all_experts_output(params, group, choices, tokens, cfg)
    down, up = (params[f"{cfg.moe(group)}fc{number}_latent_proj.weight"] for number in (1, 2))
    real = [[(expert, weight) for expert, weight in one if expert < cfg.num_experts] for one in choices]
    outputs = all_experts_output(params, group, real, [down @ token for token in tokens], cfg)
    zero = [sum(weight for expert, weight in one if expert >= cfg.num_experts) for one in choices]
    return [up @ output + weight * token for output, weight, token in zip(outputs, zero, tokens, strict=True)]


def bucket(token: Tensor, columns: Sequence[Tensor]) -> tuple[tuple[int, bool], ...]:
    """What each hash function answers for one token [h]: the axis of the largest coordinate, and its sign (LSH-MoE)."""
    answers = []
    for frame in columns:
        coordinates = (token.detach() @ frame.to(token.dtype)).tolist()
        axis = max(range(len(coordinates)), key=lambda i: abs(coordinates[i]))
        answers.append((axis, coordinates[axis] < 0))
    return tuple(answers)


def all_experts_output(
    params: Params, group: int, choices: list[Choices], tokens: list[Tensor], cfg: ReferenceConfig
) -> list[Tensor]:
    """`experts_output` of every token; under LSH-MoE (arXiv 2411.08446) sum_i G_i (E_i(c) + x - c).

    c is the mean of the tokens x that chose the expert and answer all hash functions alike. The tokens are those of one
    rank: clusters never reach over ranks. Compensation none leaves x - c out, lowrank maps it: A_i B_i (x - c).
    """
    prefix = cfg.moe(group)
    if not cfg.lsh_columns:
        return [experts_output(params, prefix, *routed, cfg) for routed in zip(choices, tokens, strict=True)]
    columns = cfg.lsh_columns[group]
    homes = {
        (number, expert): (expert, bucket(token, columns))
        for number, (token, its_choices) in enumerate(zip(tokens, choices, strict=True))
        for expert, _ in its_choices
    }
    if cfg.lsh_sketches:
        homes = with_nearest_means(homes, [token.detach() @ cfg.lsh_sketches[group] for token in tokens])
    clusters = members_of(homes, tokens)
    outputs = []
    for number, (token, its_choices) in enumerate(zip(tokens, choices, strict=True)):
        output = torch.zeros_like(token)
        for expert, weight in its_choices:
            if expert >= cfg.num_experts:
                output = output + weight * token
                continue
            members = clusters[homes[number, expert]]
            centroid = sum(members[1:], members[0]) / len(members)
            result = feed_forward(params, f"{prefix}experts.local_experts.{expert}.", centroid, cfg)
            residual = token - centroid
            if cfg.lsh_compensation == "lowrank":
                down, up = (params[cfg.moe_block(group) + f"residual_map.{part}"] for part in ("down", "up"))
                residual = residual @ down[expert] @ up[expert]
            output = output + weight * (result if cfg.lsh_compensation == "none" else result + residual)
        outputs.append(output)
    return outputs


type Homes = dict[tuple[int, int], tuple]
"""Cluster, whose name begins with its expert, of each token (by number) and each of its experts."""


def members_of(homes: Homes, tokens: list[Tensor]) -> dict[tuple, list[Tensor]]:
    """The tokens of each cluster."""
    clusters: dict[tuple, list[Tensor]] = {}
    for (number, _), home in homes.items():
        clusters.setdefault(home, []).append(tokens[number])
    return clusters


def with_nearest_means(homes: Homes, tokens: list[Tensor]) -> Homes:
    """One step of Lloyd's algorithm among the clusters of an expert, for those who gain a thousandth by it."""
    means = {home: sum(members[1:], members[0]) / len(members) for home, members in members_of(homes, tokens).items()}
    found = {}
    for (number, expert), home in homes.items():
        token = tokens[number]
        distances = {other: (token - mean).square().sum() for other, mean in means.items() if other[0] == expert}
        nearest = min(distances, key=distances.__getitem__)
        gain = distances[home] - distances[nearest]
        found[number, expert] = nearest if gain > 1e-3 * token.square().sum() else home
    return found


def moe_outputs(
    params: Params, group: int, source: Tensor, current: Tensor, cfg: ReferenceConfig
) -> tuple[Tensor, Tensor]:
    """What the MoE block adds to H_MH, shared and routed part; no capacity, no auxiliary loss, no dropout.

    ScMoE: combine(SE(current), routed(source)). DGMoE: top-1 of `source` plus top-1 of `current`, one set of experts.
    """
    router = params[cfg.moe(group) + "router.weight"].to(current.dtype).T  # Megatron's is in fp32 whatever the rest is
    sources, currents = list(source.flatten(0, 1)), list(current.flatten(0, 1))
    if cfg.arch == "dgmoe":
        pairs = [route_twice(x @ router, y @ router) for x, y in zip(sources, currents, strict=True)]
        previous = latent_experts_output(params, group, [[one] for one, _ in pairs], sources, cfg)
        routed = latent_experts_output(params, group, [[other] for _, other in pairs], currents, cfg)
        routed = [one + other for one, other in zip(previous, routed, strict=True)]
    else:
        if cfg.router_biases:
            bias = cfg.router_biases[group]
            choices = [route_longcat(token @ router, bias, cfg.topk, cfg.routed_scaling) for token in sources]
        else:
            choices = [route(token @ router, cfg.topk, pre_softmax=cfg.pre_softmax) for token in sources]
        routed = latent_experts_output(params, group, choices, sources, cfg)
    routed_output = torch.stack(routed).view_as(current)
    if cfg.shared_ffn_hidden_size is None:
        return torch.zeros_like(routed_output), routed_output
    shared = feed_forward(params, cfg.moe(group) + "shared_experts.", current, cfg)
    gate_name = combine_gate_name(group, cfg)
    gate_logits = None if gate_name is None else current @ params[gate_name].T
    return combine_outputs(shared, routed_output, gate_logits, cfg.combine)


def combine_gate_name(group: int, cfg: ReferenceConfig) -> str | None:
    """cg1 is Megatron's own shared-expert gate; cg2's two rows belong to the MoE block itself; `add` has no gate."""
    names = {
        "cg1": cfg.moe(group) + "shared_experts.gate_weight",
        "cg2": cfg.moe_block(group) + "combine_gate.weight",
    }
    return names.get(cfg.combine)


# The model


def group_of(params: Params, cfg: ReferenceConfig, group: int) -> Group:
    """Blocks [group * moe_every, ...) of the model."""
    last = (group + 1) * cfg.moe_every - 1

    def block(index: int) -> Block:
        name = f"decoder.layers.{index}."
        return Block(
            input_norm=lambda x: norm(params, name + "input_layernorm.", x, cfg),
            attention=lambda x: attention(params, name + "self_attention.", x, cfg),
            pre_mlp_norm=lambda x: norm(params, name + "pre_mlp_layernorm.", x, cfg),
            mlp=None if index == last else lambda x: feed_forward(params, name + "mlp.", x, cfg),
        )

    return Group(
        [block(index) for index in range(group * cfg.moe_every, last + 1)],
        lambda source, current: moe_outputs(params, group, source, current, cfg),
        cfg.positions[group],
        upstream_norms(params, cfg, group) if cfg.upstream_norms else None,
    )


def upstream_norms(params: Params, cfg: ReferenceConfig, group: int) -> tuple[Function, Function]:
    """Of what the group's routed experts read, and of the sum of its MoE's outputs."""
    pre, post = (cfg.moe_block(group) + name for name in UPSTREAM_NORMS)
    return lambda x: norm(params, pre, x, cfg), lambda x: norm(params, post, x, cfg)


def span_forward(params: Params, hidden: Tensor, cfg: ReferenceConfig, first_group: int) -> Tensor:
    """The span that begins with group `first_group`: hidden [s, b, h] -> [s, b, h]."""
    groups = [group_of(params, cfg, group) for group in range(first_group, first_group + cfg.span)]
    return wire_span(hidden, groups, cfg.landing)


def last_hidden(params: Params, tokens: Tensor, cfg: ReferenceConfig) -> Tensor:
    """What the output layer reads, [s, b, h], of token ids [b, s]."""
    embedding = params["embedding.word_embeddings.weight"]
    hidden = embedding[tokens]
    if not cfg.rotary:
        hidden = hidden + params["embedding.position_embeddings.weight"][: tokens.shape[1]]
    hidden = hidden.transpose(0, 1)
    for first_group in range(0, cfg.num_groups, cfg.span):
        hidden = span_forward(params, hidden, cfg, first_group)
    return norm(params, "decoder.final_layernorm.", hidden, cfg)


def model_loss(params: Params, tokens: Tensor, labels: Tensor, cfg: ReferenceConfig) -> tuple[Tensor, Tensor]:
    """Cross entropy per token [b, s] and logits [b, s, v] of token and label ids [b, s]."""
    check_names(params, cfg)
    return output_loss(params, last_hidden(params, tokens, cfg), labels, cfg)


def output_loss(params: Params, hidden: Tensor, labels: Tensor, cfg: ReferenceConfig) -> tuple[Tensor, Tensor]:
    """Cross entropy per token [b, s] and logits [b, s, v] of the output layer on hidden [s, b, h]."""
    output = params["output_layer.weight" if cfg.untied_embeddings else "embedding.word_embeddings.weight"]
    logits = (hidden @ output.T).transpose(0, 1)
    wide = logits.to(_wide(logits.dtype))
    return wide.logsumexp(dim=-1) - wide.gather(-1, labels[..., None])[..., 0], logits


def loss_and_gradients(
    params: Params, tokens: Tensor, labels: Tensor, cfg: ReferenceConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token [b, s], and the gradient of its mean by every parameter; zero for an expert without a token.

    Names that hold one tensor object share one parameter: each gets the gradient of all their uses.
    """
    copies = {id(tensor): tensor.detach().clone().requires_grad_() for tensor in params.values()}
    leaves = {name: copies[id(tensor)] for name, tensor in params.items()}
    loss, _ = model_loss(leaves, tokens, labels, cfg)
    gradients = torch.autograd.grad(loss.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def parameter_shapes(cfg: ReferenceConfig, *, vocab_size: int, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, as a single-rank Megatron GPTModel of the local spec has them."""
    h = cfg.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab_size, h)}
    if not cfg.rotary:
        shapes["embedding.position_embeddings.weight"] = (max_sequence_length, h)
    for index in range(cfg.num_layers):
        shapes |= _block_shapes(cfg, index)
    shapes |= _norm_shapes("decoder.final_layernorm.", cfg)
    if cfg.untied_embeddings:
        shapes["output_layer.weight"] = (vocab_size, h)
    return shapes


def _block_shapes(cfg: ReferenceConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Parameters of one block; the last block of a group carries the MoE."""
    h, name = cfg.hidden_size, f"decoder.layers.{index}."
    mlp = name + "mlp."
    attention_size = cfg.num_attention_heads * cfg.head_size
    shapes: dict[str, tuple[int, ...]] = _norm_shapes(name + "input_layernorm.", cfg)
    shapes[name + "self_attention.linear_proj.weight"] = (h, attention_size)
    shapes[name + "self_attention.linear_qkv.weight"] = (attention_size + 2 * cfg.query_groups * cfg.head_size, h)
    shapes |= _norm_shapes(name + "pre_mlp_layernorm.", cfg)
    group, block_in_group = divmod(index, cfg.moe_every)
    if block_in_group < cfg.moe_every - 1:
        return shapes | _feed_forward_shapes(mlp, cfg.ffn_hidden_size, h, cfg)
    read = cfg.latent_size or h
    if mlp == cfg.moe(group):
        if cfg.latent_size is not None:
            shapes[mlp + "fc1_latent_proj.weight"] = (read, h)
            shapes[mlp + "fc2_latent_proj.weight"] = (h, read)
        shapes[mlp + "router.weight"] = (cfg.num_experts + cfg.zero_experts, h)
        for expert in range(cfg.num_experts):
            shapes |= _feed_forward_shapes(f"{mlp}experts.local_experts.{expert}.", cfg.moe_ffn_hidden_size, read, cfg)
        if cfg.shared_ffn_hidden_size is not None:
            shapes |= _feed_forward_shapes(mlp + "shared_experts.", cfg.shared_ffn_hidden_size, h, cfg)
    if cfg.lsh_columns and cfg.lsh_compensation == "lowrank":
        shapes[name + "residual_map.down"] = (cfg.num_experts, read, LSH_RANK)
        shapes[name + "residual_map.up"] = (cfg.num_experts, LSH_RANK, read)
    if cfg.upstream_norms:
        for norm_name in UPSTREAM_NORMS:
            shapes |= _norm_shapes(name + norm_name, cfg)
    gate_name = combine_gate_name(group, cfg)
    if gate_name is not None:
        shapes[gate_name] = (1 if cfg.combine == "cg1" else 2, h)
    return shapes


def _norm_shapes(prefix: str, cfg: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if cfg.normalization == "LayerNorm" else ("weight",)
    return {prefix + part: (cfg.hidden_size,) for part in parts}


def _feed_forward_shapes(prefix: str, size: int, width: int, cfg: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    rows = 2 * size if cfg.swiglu else size
    return {prefix + "linear_fc1.weight": (rows, width), prefix + "linear_fc2.weight": (width, size)}


def check_names(params: Params, cfg: ReferenceConfig) -> None:
    """Refuse a parameter that is missing, has another shape, or that no formula here reads (a linear's bias, say)."""
    vocab_size = params["embedding.word_embeddings.weight"].shape[0]
    max_sequence_length = 0 if cfg.rotary else params["embedding.position_embeddings.weight"].shape[0]
    expected = parameter_shapes(cfg, vocab_size=vocab_size, max_sequence_length=max_sequence_length)
    found = {name: tuple(tensor.shape) for name, tensor in params.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        lines = [f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong]
        raise ValueError("parameters do not fit the config (None = no such parameter):\n" + "\n".join(lines))
