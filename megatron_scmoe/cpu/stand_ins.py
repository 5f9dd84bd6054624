"""What takes the place of CUDA where there is none: each function takes the original and returns its stand-in."""

from __future__ import annotations

import functools
import os
import types
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from megatron_scmoe.cpu import gloo

calls: Counter[str] = Counter()
"""Per replaced name, the calls that a stand-in answered."""


def counted(function: Callable[..., Any], target: str) -> Callable[..., Any]:
    """``function``, whose calls are counted as those of ``target``."""

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[target] += 1
        return function(*args, **kwargs)

    return counting


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def returning(value: Any) -> Callable[[Any], Any]:
    return lambda _original: lambda *_args, **_kwargs: value


class InertStream:
    """A ``torch.cuda.Stream``: CPU operations are finished when they return, so there is nothing to wait for."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        calls["torch.cuda.Stream"] += 1

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: InertEvent | None = None) -> InertEvent:
        return event or InertEvent()


class InertEvent:
    """A ``torch.cuda.Event``. It has no ``elapsed_time``: any number it gave would be a false measurement."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        calls["torch.cuda.Event"] += 1

    def record(self, _stream: Any = None) -> None: ...

    def wait(self, _stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def factory_on_cpu(original: Any) -> Any:
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        # Only the literal device='cuda' and pinned memory are redirected and counted; other calls pass unchanged.
        if str(kwargs.get("device")).partition(":")[0] == "cuda":
            calls[f"torch.{original.__name__}"] += 1
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory") is True:
            del kwargs["pin_memory"]
            calls[f"torch.{original.__name__}"] += 1
        return original(*args, **kwargs)

    return functools.update_wrapper(factory, original)


def returning_self(_original: Any) -> Any:
    return lambda self, *_args, **_kwargs: self


def sequence_parallel_norm(_original: Any) -> Any:
    from megatron_scmoe.mcore.norm import SequenceParallelNorm  # noqa: PLC0415 - torch first, then Megatron

    return SequenceParallelNorm


def duplicated_linear(_original: Any) -> Any:
    from megatron_scmoe.cpu.duplicated_linear import DuplicatedLinear  # noqa: PLC0415 - torch first, then Megatron

    return DuplicatedLinear


def eager_compile(_original: Any) -> Any:
    def compile_nothing(model: Any = None, **_kwargs: Any) -> Any:
        return model if model is not None else lambda function: function

    return compile_nothing


def get_rng_state(_original: Any) -> Any:
    return lambda device=None: torch.default_generator.get_state()


def set_rng_state(_original: Any) -> Any:
    def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        if graph_safe:
            raise RuntimeError("cpu_backend: CUDA graphs need CUDA; leave --cuda-graph-impl out")
        torch.default_generator.set_state(new_state)

    return set_rng_state


def manual_seed(_original: Any) -> Any:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


def keeping_rng_state(original: Any) -> Any:
    def keeping_rng_state(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=()):
            return original(*args, **kwargs)

    return keeping_rng_state


def without_cuda_in_type_names(original: Any) -> Any:
    """The same function with 'torch.FloatTensor' for 'torch.cuda.FloatTensor' among its constants.

    A replaced ``Tensor.type`` would mislead torch.distributed, which reads it too, and be called for every gradient.
    """

    def renamed(constant: Any) -> Any:
        if isinstance(constant, str):
            return constant.replace("torch.cuda.", "torch.")
        return tuple(map(renamed, constant)) if isinstance(constant, tuple) else constant

    function = original.__func__ if isinstance(original, classmethod) else original
    code = function.__code__
    constants = tuple(map(renamed, code.co_consts))
    if constants == code.co_consts:
        raise RuntimeError(f"cpu_backend: {function.__qualname__} is not that of Megatron-Core 0.19.2")
    copy = types.FunctionType(
        code.replace(co_consts=constants),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__
    return classmethod(copy) if isinstance(original, classmethod) else copy


def all_gather_uneven(original: Any) -> Any:
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        # Every rank passes the same list of shapes, so all ranks take the same branch.
        if len({part.shape for part in tensor_list}) == 1:
            return original(tensor_list, tensor, group, async_op)
        if async_op:
            raise RuntimeError("cpu_backend: an all_gather of unequal shapes cannot be asynchronous on gloo")
        tensor_list[torch.distributed.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return None

    return all_gather


def full_duplex(_original: Any) -> Any:
    return gloo.all_to_all_single


def one_lane(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(  # noqa: N807 - it takes the place of a constructor
        self: Any, store: Any, rank: int, size: int, timeout: timedelta = timedelta(minutes=30)
    ) -> None:
        backend: Any = torch.distributed.ProcessGroupGloo
        options = backend._Options()
        options._timeout = timeout
        options._threads = 1
        names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        options._devices = [backend.create_device(interface=name) for name in names] or [
            backend.create_default_device()
        ]
        original(self, store, rank, size, options)

    return __init__


def numpy_if_asked(_original: Any) -> Any:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy().copy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def without_cuda_check(original: Any) -> Any:
    return functools.partial(original, allow_no_cuda=True)
