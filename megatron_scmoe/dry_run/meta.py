"""A model that runs forward without data: tensors have shapes alone, and every expert gets its even share of tokens.

Parameters and activations lie on torch's meta device. What a forward pass decides by their values is which expert gets
which token; its counts say how many rows travel. So routers hand on a real map, of balanced experts, in the place of
the one that they cannot compute; whatever follows from it (counts, splits) is computed as always.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

META = torch.device("meta")


class ShapesOnly(TorchDispatchMode):
    """Gives new tensors data only where they are integers: counts, indices. Collectives of those without carry nothing.

    (``torch.device("meta")`` would not know the factories that the CPU backend wraps.)
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, on the meta device where not all of its tensors have data."""
        kwargs = kwargs or {}
        has_data = {not tensor.is_meta for tensor in _tensors((*args, *kwargs.values()))}
        if not has_data and any(argument.name == "device" for argument in func._schema.arguments):
            made = func(*args, **{**kwargs, "device": META})
            return made if made.is_floating_point() else func(*args, **{**kwargs, "device": "cpu"})
        if False not in has_data:
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is torch.ops.aten.masked_select.default and not args[1].is_meta:
            return args[0].new_empty(int(args[1].sum()))
        if True in has_data:
            if func._schema.is_mutable and not args[0].is_meta:
                return args[0]  # a counter, whose value nobody reads here
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
        return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments of an operation, which nests them in lists at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Whatever is built and run here takes no memory to speak of."""

    def all_to_all_single(*_args: Any, **_kwargs: Any) -> FakeWork:
        return FakeWork()

    with (
        replaced(torch.cuda, "current_device", lambda: META),
        replaced(torch.distributed, "all_to_all_single", all_to_all_single),
        ShapesOnly(),
    ):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner``'s attribute ``name`` is ``value`` in here."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def balanced_map(num_tokens: int, rows_per_expert: Tensor) -> Tensor:
    """Which expert gets which token, bool, [tokens, experts]: each expert as many as ``rows_per_expert`` says.

    Tokens are dealt out in turn, so that each gets as many experts as the others, or one more.
    """
    expert = torch.arange(len(rows_per_expert)).repeat_interleave(rows_per_expert)
    routing_map = torch.zeros(num_tokens, len(rows_per_expert), dtype=torch.bool)
    routing_map[torch.arange(len(expert)) % num_tokens, expert] = True
    return routing_map


def balance(model: torch.nn.Module) -> None:
    """Let every router of ``model`` hand on a balanced map."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(_hand_on_balanced_map)


def _hand_on_balanced_map(router: TopKRouter, _inputs: tuple[Any, ...], routing: Any) -> Any:
    """``routing``, a tuple that begins with weights and map, with another map."""
    probs, config = routing[0], router.config
    num_tokens, num_experts = probs.shape
    if config.moe_pad_expert_input_to_capacity:
        capacity = get_capacity(
            num_tokens=num_tokens * router.topk,
            num_experts=num_experts,
            capacity_factor=config.moe_expert_capacity_factor,
        )
        rows = torch.full((num_experts,), min(capacity, num_tokens))
    else:
        # Of all that the router chooses among, zero experts included, their even share.
        num_rows = num_tokens * router.topk * num_experts // config.num_moe_experts
        rows = torch.full((num_experts,), num_rows // num_experts)
        rows[: num_rows % num_experts] += 1
    balanced = balanced_map(num_tokens, rows)
    if hasattr(routing, "_replace"):
        changes = {"routing_map": balanced, "chosen": balanced}
        return routing._replace(**{name: value for name, value in changes.items() if name in routing._fields})
    return (probs, balanced, *routing[2:])


class SavedForBackward:
    """Counts what autograd keeps of a forward pass: the storages of saved tensors, each once.

    Args:
        model: whose parameters and buffers do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._storages: dict[int, Any] = {}
        self._standing = {_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}

    @property
    def nbytes(self) -> int:
        """That have been kept so far."""
        return sum(storage.nbytes() for storage in self._storages.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved in here."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        if _identity(tensor) not in self._standing:
            self._storages[_identity(tensor)] = tensor.untyped_storage()  # kept: its number is not given away again
        return tensor


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        sequence, batch, heads, _ = query.shape
        output = query.new_empty(sequence, batch, heads, value.shape[-1])
        log_sum_exp = query.new_empty(batch, heads, sequence, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output


class FlashAttention(torch.nn.Module):
    """In the place of core attention: keeps for backward what flash attention keeps, and computes nothing.

    The local spec's own attention keeps all scores, [b, heads, s, s]; Transformer Engine's does not. The arguments are
    those of Core's attention.
    """

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Shapes [s, b, heads, dim] each; returns [s, b, heads * dim of values]."""
        return _Flash.apply(query, key, value).flatten(2)
