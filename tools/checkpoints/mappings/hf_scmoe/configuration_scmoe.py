"""Configuration of shortcut-connected mixture-of-experts models (ScMoE and DGMoE, arXiv 2404.05019)."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PretrainedConfig

_CHOICES = {
    "activation": ("swiglu", "gelu", "squared_relu"),
    "normalization": ("RMSNorm", "LayerNorm"),
    "position_embedding": ("rope", "learned_absolute", "none"),
    "attention": ("grouped_query", "multi_latent"),
    "latent_scaling": ("none", "longcat"),
    "shortcut": ("none", "scmoe", "dgmoe"),
    "shortcut_combine": ("add", "cg1", "cg2"),
    "router": ("core", "longcat"),
    "router_score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "router_dtype": (None, "float32", "float64"),
}
# Residual ops of a group that lie behind the tensor which its routed experts read, the shared expert included: pos1
# [attention, shared expert], pos2 [MLP, attention, shared expert], pos3 [attention, MLP, attention, shared expert].
_OPS_BEHIND_TAP = {"pos1": 2, "pos2": 3, "pos3": 4}
_POSITIONS = tuple(_OPS_BEHIND_TAP)
# Symbols of layer_pattern, and what transformers calls layers with such a cache; those without one are moe to it.
_LAYER_TYPES = {"M": "linear_attention", "*": "full_attention", "+": "full_attention", "-": "moe", "E": "moe"}
_LATENT_SIZES = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
# Kinds of rope_parameters whose frequencies are the same at every length.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# How ranks share linears (transformers' tensor parallelism).
_SPLIT_MLP = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


class ScMoEConfig(PretrainedConfig):
    """What a model is made of. The docstring below a field says what it means.

    A model is a row of blocks: attention, then an MLP or an MoE. ``moe_every`` consecutive blocks are a group, the last
    of which carries the MoE; its routed experts may read an earlier tensor of the group than the rest of that block.

    With ``layer_pattern`` a block is one layer of another row: a Mamba layer, an attention, an MLP or an MoE. A run of
    them that ends with an MoE is a group.
    """

    model_type = "scmoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the name and type are those of transformers)
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    """Rows of the embedding. Megatron pads them to a round number; padded rows are kept, and no token has their ids."""

    hidden_size: int = 1024

    num_hidden_layers: int = 24
    """Blocks, each with one attention; a multiple of ``moe_every`` unless ``shortcut`` is none. With ``layer_pattern``
    its symbols."""

    intermediate_size: int = 2816
    """Width of the MLP of a block without an MoE."""

    activation: str = "swiglu"
    """Of every MLP and expert. swiglu: silu(gate) * up; gelu (exact) and squared_relu have no gate projection."""

    normalization: str = "RMSNorm"
    """RMSNorm, or LayerNorm with a bias."""

    norm_eps: float = 1e-5
    """Epsilon of every norm, except those of latents where ``latent_scaling`` is longcat."""

    max_position_embeddings: int = 4096
    """Tokens of a sequence in training; with learned_absolute there is an embedding for each and no more."""

    position_embedding: str = "rope"
    """rope: queries and keys turn; learned_absolute: an embedding is added to that of the token; none. Multi-latent
    attention turns its rotary parts whatever this is."""

    rope_parameters: dict[str, Any] = field(default_factory=dict)
    """Of transformers: rope_type (default, llama3 or yarn), rope_theta, partial_rotary_factor, and a kind's own."""

    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding."""

    attention: str = "grouped_query"
    """grouped_query: each key and value head serves several query heads; multi_latent: queries, and keys with values,
    are projected from a latent each (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    num_attention_heads: int = 16

    num_key_value_heads: int = 16
    """Heads of keys and values; grouped_query only."""

    head_dim: int = 64
    """Size of a head; multi_latent: of its part that turns, ``qk_rope_head_dim``."""

    attention_bias: bool = False
    """Whether the projections of queries, keys and values have biases; grouped_query only."""

    qk_norm: bool = False
    """grouped_query: a norm over each head's query and key, before they turn; multi_latent: norms of the latents."""

    softmax_scale: float | None = None
    """Factor of the attention scores; None: 1 / sqrt(size of a query)."""

    q_lora_rank: int | None = None
    """Size of the latent of queries; None: queries are projected from the hidden state."""

    kv_lora_rank: int | None = None
    """Size of the latent of keys and values; multi_latent only, as the next three. Their defaults are then 512, 128, 64
    and 128."""

    qk_nope_head_dim: int | None = None
    """Size of a query's or key's part that does not turn."""

    qk_rope_head_dim: int | None = None

    v_head_dim: int | None = None

    latent_scaling: str = "none"
    """longcat: norms of latents have an epsilon of 1e-6 and are multiplied by sqrt(hidden size / rank)
    (LongCat-Flash, arXiv 2509.01322)."""

    shortcut: str = "scmoe"
    """scmoe: the routed experts read the tensor at ``shortcut_position``, the shared expert the current one; dgmoe: no
    shared expert, and two top-1 gates of one router that read one of them each and choose different experts; none: the
    MoE reads the current tensor."""

    shortcut_position: list[str] = field(default_factory=list)
    """One position for all groups, or one for each. pos1: output of the preceding block; pos2: between attention and
    MLP of the preceding block; pos3: input of the preceding block. Always behind the norm that follows there. Empty:
    pos2, or pos1 where a group has one block."""

    shortcut_combine: str = "cg1"
    """How the shared expert is added to the routed ones. add: sum; cg1: times a sigmoid gate; cg2: a softmax over two
    coefficients weighs them."""

    moe_every: int = 2
    """Blocks in a group."""

    moe_share_groups: int = 1
    """2: the second group of each pair uses router and experts of the first; dgmoe only."""

    layer_pattern: str = ""
    """A symbol for each layer: M Mamba-2, * attention, + multi-latent attention, - MLP, E MoE. Empty: blocks."""

    mamba_num_heads: int = 32
    """Heads of a Mamba layer."""

    mamba_head_dim: int = 64

    mamba_num_groups: int = 8
    """Groups of its heads, which share their projections into the state and out of it."""

    mamba_state_size: int = 128

    moe_layer_pattern: list[int] = field(default_factory=list)
    """For shortcut none: 1 for a block with an MoE, 0 for one with an MLP. Empty: all have an MoE, or, without
    ``num_experts``, an MLP."""

    num_experts: int = 8
    """Routed experts; 0 for a model without an MoE."""

    num_experts_per_tok: int = 1
    """Routed experts of a token. dgmoe: 2, one for each gate."""

    moe_intermediate_size: int = 2816
    """Width of a routed expert."""

    shared_expert_intermediate_size: int | None = None
    """Width of the shared expert; None: that of a routed expert in scmoe, and elsewhere there is none."""

    router: str = "core"
    """core: Megatron's; longcat: chosen by softmax plus bias, weighed by the softmax alone (LongCat-Flash)."""

    zero_experts: int = 0
    """Experts behind the others that give a token back as it is; longcat only."""

    router_score_function: str = "softmax"
    """softmax, sigmoid or sqrtsoftplus of the router's logits. The last two are divided by their sum over the chosen
    experts, where there is more than one."""

    router_pre_softmax: bool = False
    """Whether the softmax runs over all experts, and chosen ones keep their share of it, or over the chosen alone."""

    router_expert_bias: bool = False
    """Whether a bias takes part in the choice (and not in the weights)."""

    router_num_groups: int | None = None
    """Groups of experts, of which a token uses ``router_group_topk``."""

    router_group_topk: int | None = None

    routed_scaling_factor: float = 1.0
    """Factor of the weights of routed experts."""

    router_dtype: str | None = None
    """float32 or float64: in which the router's logits are computed; None: as the hidden states."""

    output_router_logits: bool = False
    """Whether the router's logits are given where a call does not say."""

    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    megatron: dict[str, Any] | None = None
    """What the way back to a Megatron checkpoint needs beside all this; the model does not read it."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what depends on other fields, and refuse what is no model."""
        if not self.shortcut_position:
            self.shortcut_position = ["pos1" if self.moe_every == 1 else "pos2"]
        if not self.moe_layer_pattern:
            self.moe_layer_pattern = [int(self.num_experts > 0)] * self.num_hidden_layers
        if self.layer_pattern:
            # Only where there are several: transformers asks whether there is such a field.
            self.layer_types = [_LAYER_TYPES.get(symbol, "moe") for symbol in self.layer_pattern]
        if self.attention == "multi_latent":
            for name, size in _LATENT_SIZES.items():
                if getattr(self, name) is None:
                    setattr(self, name, size)
            self.head_dim = self.latent_sizes[2]
        if self.shortcut == "scmoe" and self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.moe_intermediate_size
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise a ValueError that says what cannot be, where this describes no model."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {choices}: it is {getattr(self, name)!r}")
        if (kind := (self.rope_parameters or {}).get("rope_type", "default")) not in _ROPE_TYPES:
            raise ValueError(f"rope_type is one of {_ROPE_TYPES}: it is {kind!r}")
        num_groups, rest = divmod(self.num_hidden_layers, self.moe_every)
        if self.layer_pattern:
            num_groups, rest = self.layer_pattern.count("E"), 0
        rules = {
            "every group is whole": self.shortcut == "none" or rest == 0,
            "shortcut_position has one value or one for each group": self.shortcut == "none"
            or len(self.shortcut_position) in (1, num_groups),
            f"a position is one of {_POSITIONS}": set(self.shortcut_position) <= set(_POSITIONS),
            "a group of one block has pos1 alone": self.moe_every > 1 or set(self.shortcut_position) == {"pos1"},
            "moe_layer_pattern has one value for each block": len(self.moe_layer_pattern) == self.num_hidden_layers,
            "scmoe has a shared expert": self.shortcut != "scmoe" or bool(self.shared_expert_intermediate_size),
            "dgmoe has no shared expert": self.shortcut != "dgmoe" or not self.shared_expert_intermediate_size,
            "dgmoe's gates take one expert each": self.shortcut != "dgmoe" or self.num_experts_per_tok == 2,
            "groups share in pairs, in dgmoe": self.moe_share_groups == 1
            or (self.moe_share_groups == 2 and self.shortcut == "dgmoe" and num_groups % 2 == 0),
            "zero experts are chosen by the router longcat": not self.zero_experts or self.router == "longcat",
            "that many experts can be chosen": not self.num_experts
            or 1 <= self.num_experts_per_tok <= self.num_experts + self.zero_experts,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"{'; '.join(broken)}: {self.shortcut=}, {self.moe_every=}, {self.num_hidden_layers=}")
        if self.layer_pattern:
            self._check_layers()

    def _check_layers(self) -> None:
        """As ``check``, of ``layer_pattern``."""
        symbols = set(self.layer_pattern)
        other = "*" if self.attention == "multi_latent" else "+"
        taps = [self._tapped_layer(layer) for layer, symbol in enumerate(self.layer_pattern) if symbol == "E"]
        rules = {
            f"a layer is one of {tuple(_LAYER_TYPES)}": symbols <= set(_LAYER_TYPES),
            "layer_pattern has a symbol for each layer": len(self.layer_pattern) == self.num_hidden_layers,
            f"{other} is not the attention {self.attention}": other not in symbols,
            "an E needs experts": "E" not in symbols or self.num_experts > 0,
            "a group is as long as its position wants": self.shortcut == "none" or None not in taps,
            "groups of Mamba heads are whole": self.mamba_num_heads % self.mamba_num_groups == 0,
            "positions are learned where an attention's cache counts them": self.attends
            or self.position_embedding != "learned_absolute",
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"{'; '.join(broken)}: {self.layer_pattern=}, {self.num_hidden_layers=}")

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How ranks of tensor parallelism share the linears that there are; transformers and what serves read it."""
        split = ["q_proj", "k_proj", "v_proj"]
        if self.attention == "multi_latent":
            split = ["q_proj" if self.q_lora_rank is None else "q_b_proj", "kv_b_proj"]
        attention = {**dict.fromkeys(split, "colwise"), "o_proj": "rowwise"}
        mlp = {name: how for name, how in _SPLIT_MLP.items() if name != "gate_proj" or self.activation == "swiglu"}
        layers = range(self.num_hidden_layers)
        carries = [self.carries_moe(block) for block in layers if self.has_feed_forward(block)]
        parts = {"self_attn": attention} if self.attends else {}
        if not all(carries):
            parts["mlp"] = mlp
        if any(carries):
            parts["moe.experts.*"] = mlp
            if self.shared_expert_intermediate_size:
                parts["shared_expert"] = mlp
        return {f"layers.*.{part}.{name}": how for part, names in parts.items() for name, how in names.items()}

    @property
    def latent_sizes(self) -> tuple[int, int, int, int]:
        """Of multi-latent attention: latent of keys and values, a query's still part and its turning one, value."""
        kv_rank, still, turning, value = (int(getattr(self, name)) for name in _LATENT_SIZES)
        return kv_rank, still, turning, value

    def mixer(self, block: int) -> str | None:
        """What mixes tokens in ``block``: attention, mamba or None."""
        if not self.layer_pattern:
            return "attention"
        symbol = self.layer_pattern[block]
        return "mamba" if symbol == "M" else "attention" if symbol in "*+" else None

    @property
    def attends(self) -> bool:
        """Whether any block has an attention."""
        return not self.layer_pattern or bool({"*", "+"} & set(self.layer_pattern))

    def has_feed_forward(self, block: int) -> bool:
        """Whether ``block`` has an MLP or an MoE."""
        return not self.layer_pattern or self.layer_pattern[block] in "-E"

    def tapped_op(self, block: int) -> str | None:
        """Whose normed input, of the ops of ``block``, the routed experts of its group read: mixer, mlp or None."""
        if self.shortcut == "none":
            return None
        if self.layer_pattern:
            moe = self.layer_pattern.find("E", block)
            is_tapped = moe >= 0 and self._tapped_layer(moe) == block
            return ("mlp" if self.has_feed_forward(block) else "mixer") if is_tapped else None
        group, block_in_group = divmod(block, self.moe_every)
        position = self.shortcut_position[0 if len(self.shortcut_position) == 1 else group]
        tapped_block, op = divmod(2 * self.moe_every - _OPS_BEHIND_TAP[position], 2)
        return ("mixer", "mlp")[op] if tapped_block == block_in_group else None

    def _tapped_layer(self, moe: int) -> int | None:
        """The layer of ``layer_pattern`` whose normed input the routed experts of layer ``moe`` read; None: no such."""
        position = self.shortcut_position[0 if len(self.shortcut_position) == 1 else self._group(moe)]
        layer = moe + 1 - _OPS_BEHIND_TAP[position]
        return layer if layer > self.layer_pattern.rfind("E", 0, moe) else None

    def _group(self, block: int) -> int:
        """Index of the group of ``block``."""
        return self.layer_pattern[:block].count("E") if self.layer_pattern else block // self.moe_every

    def carries_moe(self, block: int) -> bool:
        """Whether an MoE stands in the place of the MLP of a block, its own or a borrowed one."""
        if self.layer_pattern:
            return self.layer_pattern[block] == "E"
        if self.shortcut == "none":
            return bool(self.moe_layer_pattern[block])
        return (block + 1) % self.moe_every == 0

    def borrows_moe(self, block: int) -> bool:
        """Whether the MoE of a block is that of the group before it."""
        return self.carries_moe(block) and self._group(block) % self.moe_share_groups > 0
