"""Runs the unmodified ``megatron.training.pretrain`` on gloo ranks of a machine without a GPU.

Megatron-Core 0.19.2 calls CUDA at a few dozen fixed places. ``REPLACEMENTS`` names each attribute that is set instead,
why, and what a CPU run can therefore NOT show. ``install`` sets them all, ``uninstall`` restores them all, importing
this module does nothing. Only entry points and tests call ``install``, and where CUDA exists it refuses.

No hook sees every operation. A step of one micro-batch through two blocks, one of them MoE with EP=2, makes 49
intercepted calls beside its all-to-alls (53 when it also logs); each further micro-batch adds 32. The thousands of
other operations of a step run as they would without this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import logging
import os
import pkgutil
import sys
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from megatron_scmoe.cpu import gloo
from megatron_scmoe.mcore.wheel import GroupStepAdam, use_shipped_helper

# Megatron takes CUDA-only paths as soon as it can import one of these.
HIDDEN_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h

_calls: Counter[str] = Counter()
_undo: contextlib.ExitStack | None = None  # not None: installed


def is_installed() -> bool:
    """Whether the replacements are in place."""
    return _undo is not None


def intercepted_calls() -> dict[str, int]:
    """Per replaced name, the calls it answered since the last reset."""
    return dict(_calls)


def reset_intercepted_calls() -> None:
    """Start counting from zero."""
    _calls.clear()


def keep_freed_memory() -> None:
    """Let large tensors take the memory of freed ones, as CUDA's caching allocator does; other C libraries stay.

    glibc gives blocks of 32 MiB and more back at once, and every page of a fresh one is a fault: half of the time of a
    gather of that size. It lasts as long as the process does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def install() -> None:
    """Hide CUDA-only packages, import Megatron, apply ``REPLACEMENTS``; a second call changes nothing."""
    global _undo  # noqa: PLW0603 - one process has one torch
    if torch.cuda.is_available():
        raise RuntimeError("cpu_backend: this machine has CUDA; start without cpu_backend.install()")
    if is_installed():
        return
    megatron_is_imported = "megatron.core" in sys.modules
    visible = [name for name in HIDDEN_PACKAGES if _is_visible(name)]
    if megatron_is_imported and visible:
        raise RuntimeError(f"cpu_backend: Megatron was imported with {visible[0]} visible; call install() before it")
    with contextlib.ExitStack() as stack, warnings.catch_warnings():  # undoes everything if anything below fails
        # While it is imported Megatron warns a dozen times on each rank that the packages hidden here are missing.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
        _hide_packages(stack)
        if megatron_is_imported:
            # Its fused functions went through torch.compile already; this makes those run eagerly too.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for replacement in REPLACEMENTS:
            for target in replacement.targets():
                _apply(target, replacement, stack)
        _silence_shared_generator(stack)
        keep_freed_memory()
        if torch.cuda.is_available():
            raise RuntimeError("cpu_backend: unset PYTORCH_NVML_BASED_CUDA_CHECK, it asks the replaced device_count")
        _undo = stack.pop_all()


def uninstall() -> None:
    """Restore every replaced attribute; Megatron stays imported."""
    global _undo  # noqa: PLW0603
    if _undo is not None:
        _undo.close()
        _undo = None


def _is_visible(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _hide_packages(stack: contextlib.ExitStack) -> None:
    for name in HIDDEN_PACKAGES:
        if name in sys.modules:
            stack.callback(sys.modules.__setitem__, name, sys.modules[name])
        else:
            stack.callback(sys.modules.pop, name, None)
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError


def _apply(target: str, replacement: Replacement, stack: contextlib.ExitStack) -> None:
    owner_name, _, attribute = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)  # imports Megatron when its first row comes
    original = inspect.getattr_static(owner, attribute)  # a classmethod stays a classmethod
    stand_in = replacement.make(original)
    if replacement.counted and inspect.isfunction(stand_in):
        stand_in = _counted(stand_in, target)
    if attribute in vars(owner):
        stack.callback(setattr, owner, attribute, original)
    else:
        stack.callback(delattr, owner, attribute)  # it was inherited
    setattr(owner, attribute, stand_in)


def _counted(function: Callable[..., Any], target: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _calls[target] += 1
        return function(*args, **kwargs)

    return counted


def _silence_shared_generator(stack: contextlib.ExitStack) -> None:
    # Megatron warns at each fork that the CPU generator moved. Here that generator is the one it forked.
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    def is_about_something_else(record: logging.LogRecord) -> bool:
        return record.msg != "CPU RNG state changed within GPU RNG context"

    logger.addFilter(is_about_something_else)
    stack.callback(logger.removeFilter, is_about_something_else)


# ---- the stand-ins: each function takes the original and returns what takes its place ---------


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _returning(value: Any) -> Callable[[Any], Any]:
    return lambda _original: lambda *_args, **_kwargs: value


class _InertStream:
    """A ``torch.cuda.Stream``: CPU operations are finished when they return, so there is nothing to wait for."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        _calls["torch.cuda.Stream"] += 1

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _InertEvent | None = None) -> _InertEvent:
        return event or _InertEvent()


class _InertEvent:
    """A ``torch.cuda.Event``. It has no ``elapsed_time``: any number it gave would be a false measurement."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        _calls["torch.cuda.Event"] += 1

    def record(self, _stream: Any = None) -> None: ...

    def wait(self, _stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _factory_on_cpu(original: Any) -> Any:
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        # Only the literal device='cuda' is redirected and counted; every other call passes through unchanged.
        if str(kwargs.get("device")).partition(":")[0] == "cuda":
            _calls[f"torch.{original.__name__}"] += 1
            kwargs["device"] = "cpu"
        return original(*args, **kwargs)

    return functools.update_wrapper(factory, original)


def _returning_self(_original: Any) -> Any:
    return lambda self, *_args, **_kwargs: self


def _eager_compile(_original: Any) -> Any:
    def compile_nothing(model: Any = None, **_kwargs: Any) -> Any:
        return model if model is not None else lambda function: function

    return compile_nothing


def _get_rng_state(_original: Any) -> Any:
    return lambda device=None: torch.default_generator.get_state()


def _set_rng_state(_original: Any) -> Any:
    def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        if graph_safe:
            raise RuntimeError("cpu_backend: CUDA graphs need CUDA; leave --cuda-graph-impl out")
        torch.default_generator.set_state(new_state)

    return set_rng_state


def _manual_seed(_original: Any) -> Any:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


def _keeping_rng_state(original: Any) -> Any:
    def keeping_rng_state(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=()):
            return original(*args, **kwargs)

    return keeping_rng_state


def _without_cuda_in_type_names(original: Any) -> Any:
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


def _all_gather_uneven(original: Any) -> Any:
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


def _full_duplex(_original: Any) -> Any:
    return gloo.all_to_all_single


def _one_lane(original: Any) -> Any:
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


def _numpy_if_asked(_original: Any) -> Any:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy().copy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def _without_cuda_check(original: Any) -> Any:
    return functools.partial(original, allow_no_cuda=True)


# ---- what is replaced -------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """Attributes of one owner that get the same stand-in for the same reason."""

    owner: str
    names: str  # separated by blanks
    make: Callable[[Any], Any]
    reason: str
    hides: str  # what a CPU run cannot show because of it
    counted: bool = True

    def targets(self) -> list[str]:
        """The full dotted names."""
        return [f"{self.owner}.{name}" for name in self.names.split()]


_NO_DRIVER = "raises where there is no driver"
_DEVICE = "a wrong device"
_WAITS = "a missing wait or a race between streams: nothing here overtakes anything"
_GENERATOR = "the CUDA generator whose states Megatron's tracker forks is here the CPU's default one"
_TRACKER = "a mix-up of CPU and CUDA generator: there is one"
_OPTIMIZER = "megatron.core.optimizer"
_MOE = "megatron.core.transformer.moe"
_TYPE_READERS = (
    "optimizer.clip_grad_by_total_norm_fp32 optimizer.Float16OptimizerWithFloat16Params.__init__ "
    "distrib_optimizer.DistributedOptimizer.__init__ "
    "distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups"
)
_NO_DEVICE_PROPERTIES = types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=0)

# In this order: torch first, so that Megatron is imported on top of it. Not here because they work without CUDA:
# empty_cache, memory_allocated and its relatives (0), nvtx, reduce_scatter and coalesced collectives on gloo.
# fmt: off
REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement("torch", "compile", _eager_compile,
                "Megatron's jit_fuser is torch.compile, which would start a C++ compiler at run time",
                "faults of the compiled functions and their rounding"),
    Replacement("torch", "empty ones rand randn tensor zeros", _factory_on_cpu,
                "Megatron calls these factories with the literal device='cuda'", _DEVICE, counted=False),
    Replacement("torch.Tensor", "cuda", _returning_self, _NO_DRIVER, f"{_DEVICE}; that CUDA would have made a copy"),
    Replacement("torch.nn.Module", "cuda", _returning_self, _NO_DRIVER, _DEVICE),
    Replacement("torch.distributed.ProcessGroupGloo", "__init__", _one_lane,
                "gloo would run two collectives of a group at once, and NCCL runs them in the order of their launch",
                "collectives of one group that do not come in the same order on all ranks"),
    Replacement("torch.distributed", "all_to_all_single", _full_duplex,
                "gloo's uses one direction of a link after the other where a rank comes late, NCCL's both at once",
                "what gloo's own all-to-all takes", counted=False),
    Replacement("torch.distributed", "all_gather", _all_gather_uneven,
                "gloo wants equal shapes, expert tensor parallelism gathers unequal ones: broadcasts stand in",
                "the cost of that collective"),
    Replacement("torch.cuda", "device_count", _returning(1),
                "without a device Megatron sets up no model-parallel groups and no RNG tracker", _DEVICE),
    Replacement("torch.cuda", "current_device", _returning(torch.device("cpu")),
                f"{_NO_DRIVER}; Megatron passes the answer on as device=", _DEVICE),
    Replacement("torch.cuda", "set_device", _returning(None), _NO_DRIVER, _DEVICE),
    Replacement("torch.cuda", "synchronize", _returning(None), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "Stream", _constant(_InertStream), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "Event", _constant(_InertEvent), _NO_DRIVER, f"{_WAITS}; GPU times"),
    Replacement("torch.cuda", "current_stream default_stream", _returning(_InertStream()), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "stream", _returning(contextlib.nullcontext()), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "memory_stats", lambda _original: lambda device=None: defaultdict(int),
                "--log-memory-to-tensorboard looks up keys that are missing without a device",
                "every claim about memory: all statistics are 0"),
    Replacement("torch.cuda", "get_device_properties", _returning(_NO_DEVICE_PROPERTIES),
                f"{_NO_DRIVER}; validate_args asks for the architecture when TP > 1", "choices made by architecture"),
    Replacement("torch.cuda", "get_device_capability", _returning((0, 0)),
                f"{_NO_DRIVER}; with (0, 0) --moe-grouped-gemm gets Megatron's own refusal", "grouped GEMM"),
    Replacement("torch.cuda", "get_rng_state random.get_rng_state", _get_rng_state, _GENERATOR, _TRACKER),
    Replacement("torch.cuda", "set_rng_state random.set_rng_state", _set_rng_state, _GENERATOR, _TRACKER),
    Replacement("torch.cuda", "manual_seed", _manual_seed, _GENERATOR, _TRACKER),
    Replacement("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state,
                "it queues the change until CUDA is initialised, that is for ever", _TRACKER),
    Replacement("megatron.training.training", "build_train_valid_test_data_iterators", _keeping_rng_state,
                "loaders draw a seed from the CPU generator, which dropout on a GPU never notices: resume would differ",
                _TRACKER),
    Replacement(_MOE, "moe_utils.maybe_move_tensor_to_cpu token_dispatcher.maybe_move_tensor_to_cpu", _numpy_if_asked,
                "it converts to numpy only what comes from a GPU, and the dispatcher counts on numpy",
                "use of the split sizes before their copy has arrived"),
    Replacement(_OPTIMIZER, _TYPE_READERS, _without_cuda_in_type_names,
                "they compare Tensor.type() with 'torch.cuda.FloatTensor' and the like", _DEVICE, counted=False),
    Replacement(_OPTIMIZER, "Adam distrib_optimizer.Adam", _constant(GroupStepAdam),
                "resume is wrong with torch.optim.AdamW, see GroupStepAdam", "faults and rounding of the fused Adam"),
    Replacement(_OPTIMIZER, "USING_PYTORCH_OPTIMIZER", _constant(False),
                "true means torch.optim.AdamW, false means the Adam above", "nothing: false on a GPU as well"),
    Replacement(_OPTIMIZER, "distrib_optimizer.HAVE_APEX_OR_TE distrib_optimizer.USING_APEX_OPTIMIZER", _constant(True),
                "checkpoint code then reads the step from the parameter group, where GroupStepAdam keeps it",
                "nothing: it is read there on a GPU as well"),
    Replacement("megatron.core.datasets.utils", "compile_helpers", use_shipped_helper,
                "it runs make, and the wheel ships the built helper but no Makefile", "nothing: so on a GPU as well"),
    Replacement("megatron.training.training", "initialize_megatron", _without_cuda_check,
                "it asserts that CUDA is available unless told otherwise", "nothing"),
)
# fmt: on
