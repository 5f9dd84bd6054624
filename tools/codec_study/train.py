"""One training of the study: the real entry script, in which arms without a codec, and controls, replace what travels.

    python -m codec_study.train CARGO <flags of pretrain_gpt_scmoe.py>

The controls are here, and no flag of the package, because nobody trains them for their own sake: experts that compute
E(x) + x are the path that the paper's compensation adds, E(c) + (x - c), without any compression.

What was trained with a codec is evaluated at the end without it as well: a mean mixes later tokens in, and who uses a
model has no such tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_scmoe.job.orphans import die_with_parent

if __name__ == "__main__":  # before the slow imports: nobody reads what a study that was killed trains
    die_with_parent()

from torch import Tensor

import pretrain_gpt_scmoe  # before anything that imports Megatron
from codec_study.arms import PACKAGE
from codec_study.record import TOKENS_LOSS
from megatron_scmoe.codec.maker import CargoMaker
from megatron_scmoe.contracts import Cargo
from megatron_scmoe.dispatch.tokens import Tokens

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_layer import MoELayer

type MakeCargo = Callable[..., Cargo]
"""Takes what ``CargoMaker.cargo`` takes, the maker first."""


class PlusInput:
    """A cargo, and to each expert's output for a token the token itself, added at home before the gate weight.

    Args:
        cargo: what travels.
        hidden_states: what the experts read, [..., h], n tokens.
        weights: each token's gate weights, summed over its experts, [n].
    """

    def __init__(self, cargo: Cargo, hidden_states: Tensor, weights: Tensor) -> None:
        self.dispatchers, self.counts, self.apart = cargo.dispatchers, cargo.counts, cargo.apart
        self.group, self.collect, self.forms = cargo.group, cargo.collect, cargo.forms
        self.pack, self.unpack, self.deliver = cargo.pack, cargo.unpack, cargo.deliver
        self._cargo = cargo
        self._inputs = (hidden_states * weights.view(*hidden_states.shape[:-1], 1)).to(hidden_states.dtype)

    def join(self, delivered: list[Tensor]) -> Tensor:
        """See ``Cargo``: sum over the token's experts of p (E(x) + x), with E(c) where centroids travel."""
        return self._cargo.join(delivered) + self._inputs


def tokens(
    _maker: CargoMaker, moe: MoELayer, hidden_states: Tensor, probs: Tensor, routing_map: Tensor, **settings: Any
) -> Cargo:
    """Tokens as they are, whatever the codec of the flags is."""
    return Tokens(moe, hidden_states, probs, routing_map, chunks=settings["chunks"])


def plus_input(make: MakeCargo) -> MakeCargo:
    """What ``make`` makes, and the tokens added to what it brings back."""

    def cargo(
        maker: CargoMaker, moe: MoELayer, hidden_states: Tensor, probs: Tensor, routing_map: Tensor, **settings: Any
    ) -> Cargo:
        weights = (probs * routing_map).sum(dim=-1)
        return PlusInput(make(maker, moe, hidden_states, probs, routing_map, **settings), hidden_states, weights)

    return cargo


CODEC, TOKENS = "codec", "tokens"
CARGOES: dict[str, MakeCargo] = {
    PACKAGE: CargoMaker.cargo,
    CODEC: CargoMaker.cargo,
    TOKENS: tokens,
    f"{CODEC}-plus-input": plus_input(CargoMaker.cargo),
    f"{TOKENS}-plus-input": plus_input(tokens),
}
"""By name: what every group of this process carries."""


class TwoEvaluations:
    """Evaluates every batch of the last step's evaluations twice, first with tokens in the place of centroids.

    Args:
        cargo: that the run is trained with.
        tokens_cargo: the same of tokens.

    Attributes:
        loss_sum, num_tokens: of the evaluations with tokens.
    """

    def __init__(self, cargo: MakeCargo, tokens_cargo: MakeCargo) -> None:
        self._cargo, self._tokens_cargo = cargo, tokens_cargo
        self._forward_step = pretrain_gpt_scmoe.forward_step
        self._sends_tokens = False
        self.loss_sum = self.num_tokens = 0.0

    def cargo(self, *args: Any, **settings: Any) -> Cargo:
        """What travels now."""
        return (self._tokens_cargo if self._sends_tokens else self._cargo)(*args, **settings)

    def forward_step(self, batches: Iterator[dict[str, Tensor]], model: Any, **hooks: Any) -> Any:
        """Stands in for that of the entry script."""
        from megatron.training import get_args  # noqa: PLC0415 - only now: the entry script decides first

        args = get_args()
        if model.training or args.curr_iteration + 1 < args.train_iters:
            return self._forward_step(batches, model, **hooks)
        batch = next(batches)
        self._sends_tokens = True
        output, loss = self._forward_step(iter([dict(batch)]), model, **hooks)
        self._sends_tokens = False
        loss_sum, num_tokens, _ = loss(output)
        self.loss_sum += float(loss_sum)
        self.num_tokens += float(num_tokens)
        return self._forward_step(iter([batch]), model, **hooks)


def main() -> None:
    """Take the cargo from the command line, and train by the rest of it."""
    name = sys.argv.pop(1)
    evaluations = TwoEvaluations(CARGOES[name], CARGOES[name.replace(CODEC, TOKENS)])

    def cargo(*maker_and_routed: Any, **settings: Any) -> Cargo:  # a function, so that it becomes a method
        return evaluations.cargo(*maker_and_routed, **settings)

    CargoMaker.cargo = cargo  # type: ignore[method-assign]
    if name.startswith(CODEC):
        pretrain_gpt_scmoe.forward_step = evaluations.forward_step  # type: ignore[assignment]
    pretrain_gpt_scmoe.main()
    from megatron.training import get_args, get_tensorboard_writer  # noqa: PLC0415 - as above

    if (writer := get_tensorboard_writer()) is not None:
        if evaluations.num_tokens:
            writer.add_scalar(TOKENS_LOSS, evaluations.loss_sum / evaluations.num_tokens, get_args().train_iters)
        writer.close()  # it writes from a thread, which ends with this process


if __name__ == "__main__":
    main()
