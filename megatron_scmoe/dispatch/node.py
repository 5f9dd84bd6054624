"""Tokens that travel to a node once, and inside it to each rank that has experts of theirs (``--a2a-unique node``).

N nodes of L ranks; a row travels across nodes between ranks of the same local number, with the weights of all experts
of the node that its token has, and inside the node as ``unique.py`` has it; sums come back the same way::

    y = sum over nodes of  sum over their ranks of  sum over the token's experts there of  p E(x)

Each hop is an exchange over process groups of its own (``mcore/nodes.py``). The one across is that of the flight, and
flies. The one inside begins when a row has crossed, and is waited for there, beside the experts: links inside a node
are fast. All counts are exchanged at once, so the host waits once for a routing. A rank's sum and a node's are rounded
to the tokens' type; else sums differ by their order alone.
"""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.dispatch.exchange import Exchange, Tag
from megatron_scmoe.dispatch.tokens import AS_THEY_ARE, How
from megatron_scmoe.dispatch.unique import PlacedTokens, WeightsBeside
from megatron_scmoe.mcore.nodes import Nodes
from megatron_scmoe.mcore.unique_rows import NodeCounts, PlacedRows
from megatron_scmoe.overlap.plan import GATHER, SPREAD


class NodeTokens(PlacedTokens):
    """Tokens, a row for each node that has experts of theirs.

    Args:
        moe: the layer whose experts run.
        nodes: that its expert-parallel ranks lie on.
        tag: whose flights they are. The other arguments are those of ``PlacedTokens``.
    """

    def __init__(
        self,
        moe: MoELayer,
        hidden_states: Tensor,
        probs: Tensor,
        *,
        nodes: Nodes,
        chunks: int,
        tag: Tag,
        how: How = AS_THEY_ARE,
    ) -> None:
        places = nodes.across.size()
        super().__init__(moe, hidden_states, probs, places=places, chunks=chunks, how=how)
        self.group, self._inside, self._tag = nodes.across, nodes.inside, tag
        self.counts: NodeCounts = NodeCounts(self._placing[0], self._maps, places, self._check)
        mates, config = nodes.inside.size(), moe.config
        self._spreading = [PlacedRows(mates, fuses=config.moe_permute_fusion) for _ in self._parts]
        experts = probs.shape[1] // moe.token_dispatcher.ep_size
        self._beside_inside = WeightsBeside(probs.dtype, topk=config.moe_router_topk, experts=experts)

    def unpack(self, chunk: int, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What came across is spread inside the node; see ``contracts.Cargo``."""
        rows, weights = super().unpack(chunk, arrived)
        sent, received = self.counts.split_inside(chunk)
        rows, weights = self._spreading[chunk].sort(rows, weights != 0, weights, sum(sent))
        rows, *beside = self._hop(SPREAD, chunk, (rows, *self._beside_inside.pack(weights)), sent, received)
        return rows, self._beside_inside.unpack(beside)

    def collect(self, chunk: int, outputs: Tensor) -> Tensor:
        """What the ranks of the node made of each row that came across is summed here; see ``contracts.Cargo``."""
        sent, received = self.counts.split_inside(chunk)
        (outputs,) = self._hop(GATHER, chunk, (outputs,), received, sent)
        return self._spreading[chunk].sums(outputs)

    def _hop(
        self, name: str, chunk: int, tensors: tuple[Tensor, ...], sent: list[int], received: list[int]
    ) -> tuple[Tensor, ...]:
        """Exchange rows inside the node, and wait; forward and, mirrored, backward."""
        tag = self._tag._replace(name=name, chunk=chunk, quiet=True)
        exchange = Exchange(tag=tag, group=self._inside, blocking=True, apart=self.apart)
        token = exchange.announce(*tensors)
        exchange.launch(sent, received)
        return exchange.finish(token)
