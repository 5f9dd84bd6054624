"""Who makes what the flights of a group carry: tokens, for each expert or each rank once, or centroids of them.

And in which form they travel.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.codec.centroids import Centroids
from megatron_scmoe.codec.compensation import ResidualMap
from megatron_scmoe.codec.lsh import Hasher
from megatron_scmoe.codec.rate import RateControl
from megatron_scmoe.codec.rounding import Bf16, Fp8
from megatron_scmoe.config import Codec, Compensation, Evaluation, HashKind, ScMoEConfig
from megatron_scmoe.contracts import Cargo, Form, TransferName
from megatron_scmoe.dispatch.exchange import Tag
from megatron_scmoe.dispatch.tokens import How, Tokens
from megatron_scmoe.dispatch.unique import UniqueTokens
from megatron_scmoe.mcore import blocks


class CargoMaker:
    """Makes what the flights of one group carry.

    Args:
        scmoe: the codec and its settings.
        config: Core's; gives the width of what the experts read.
        group: whose flights they are; each group has rotations of its own.
        residual_map: the group's own, where compensation is lowrank.

    Attributes:
        rate_control: where a target rate is set.
        waits_to_pack: whether the host has to know the counts of all ranks, or of its own rows, before it can pack.
    """

    def __init__(
        self, scmoe: ScMoEConfig, config: TransformerConfig, group: int, residual_map: ResidualMap | None = None
    ) -> None:
        self._compensation, self._residual_map = scmoe.lsh_compensation, residual_map
        self._refinement = scmoe.lsh_refinement
        self._travels_topk = not scmoe.zero_experts
        self._sends_once = scmoe.sends_once
        forms = forms_of(scmoe)
        check = scmoe.a2a_codec is Codec.FP8 and TransferName.DISPATCH_FORWARD in forms
        refusal = f"group {group}: tokens with NaN or infinity have no scale in fp8" if check else ""
        self._how = How(apart_above=scmoe.a2a_weights_apart_above * 2**20, forms=forms, refusal=refusal)
        keeps_some = not self._travels_topk or config.moe_expert_capacity_factor is not None
        self.waits_to_pack = scmoe.sends_centroids or scmoe.sends_once or keeps_some
        self._tokens_in_evaluation = scmoe.lsh_evaluation is Evaluation.TOKENS
        self._hasher: Hasher | None = None
        self.rate_control: RateControl | None = None
        hashes, width = scmoe.lsh_hashes, 1 if scmoe.lsh_kind is HashKind.SPHERICAL else scmoe.lsh_width
        if scmoe.lsh_target_rate:
            self.rate_control = RateControl(scmoe.lsh_target_rate, hashes, width, torch.cuda.current_device())
        if scmoe.sends_centroids:
            self._hasher = Hasher(blocks.width_of_experts(config), hashes=hashes, width=width, seed=_seed(scmoe, group))

    def cargo(
        self, moe: MoELayer, hidden_states: Tensor, probs: Tensor, routing_map: Tensor, *, chunks: int, tag: Tag
    ) -> Cargo:
        """The cargo of one routing, whose counts are exchanged here; see ``Centroids`` for the arguments."""
        if self._sends_once:
            return UniqueTokens(moe, hidden_states, probs, chunks=chunks, how=self._how)
        routed = moe, hidden_states, probs, routing_map
        if self._hasher is None or (self._tokens_in_evaluation and not moe.training):
            return Tokens(*routed, chunks=chunks, travels_topk=self._travels_topk, how=self._how)
        return Centroids(
            *routed,
            chunks=chunks,
            travels_topk=self._travels_topk,
            hasher=self._hasher,
            rate_control=self.rate_control,
            refinement=self._refinement,
            compensation=self._compensation,
            residual_map=self._residual_map,
            tag=tag,
        )


def forms_of(scmoe: ScMoEConfig) -> dict[TransferName, Form]:
    """In which rows travel, of the transfers in which they do not as they are."""
    match scmoe.a2a_codec:
        case Codec.FP8:
            return dict.fromkeys(scmoe.fp8_transfers, Fp8())
        case Codec.BF16:
            return dict.fromkeys(TransferName, Bf16())
        case _:
            return {}


def residual_map_of(scmoe: ScMoEConfig, config: TransformerConfig, group: int) -> ResidualMap | None:
    """The learned map of one group, for its module tree; None where compensation has none."""
    if scmoe.lsh_compensation is not Compensation.LOWRANK:
        return None
    return ResidualMap(config, scmoe.lsh_rank, seed=_seed(scmoe, group))


def _seed(scmoe: ScMoEConfig, group: int) -> int:
    return scmoe.lsh_seed * 100_003 + group
