"""What a result keeps of the ops of an arm, and how it is read: enough to predict its steps, whatever its chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_scmoe.contracts import RoutedCall, SpanShape
from megatron_scmoe.overlap.solver import CallCosts, PassCosts, SpanCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanOps:
    """One span.

    Attributes:
        shape: its ops and calls.
        costs: of these, by kind of step and number of chunks. Of forward alone nothing runs backward, and the costs
            backward are those forward.
    """

    shape: SpanShape
    costs: Mapping[str, Mapping[int, SpanCosts]]

    def written(self) -> dict[str, Any]:
        """As JSON holds it."""
        told: dict[str, Any] = {"shape": {**asdict(self.shape), "attentions": sorted(self.shape.attentions)}}
        for kind, its in self.costs.items():
            told[kind] = {
                str(chunks): asdict(costs.forward if kind == "forward" else costs) for chunks, costs in its.items()
            }
        return told

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> SpanOps:
        """What :meth:`written` told. Raises KeyError, TypeError, ValueError where that is no such thing."""
        shape = dict(told["shape"])
        shape["calls"] = tuple(RoutedCall(**call) for call in shape["calls"])
        shape["attentions"] = frozenset(shape["attentions"])
        kinds = [name for name in told if name != "shape"]
        return cls(
            shape=SpanShape(**shape),
            costs={kind: {int(chunks): _costs(its, kind) for chunks, its in told[kind].items()} for kind in kinds},
        )


def _costs(told: Mapping[str, Any], kind: str) -> SpanCosts:
    if kind == "forward":
        forward = _pass(told)
        return SpanCosts(forward=forward, backward=forward)
    return SpanCosts(
        forward=_pass(told["forward"]), backward=_pass(told["backward"]), forward_runs=told["forward_runs"]
    )


def _pass(told: Mapping[str, Any]) -> PassCosts:
    return PassCosts(
        ops=tuple(told["ops"]),
        calls=tuple(CallCosts(**call) for call in told["calls"]),
        cores={int(place): seconds for place, seconds in told["cores"].items()},
    )
