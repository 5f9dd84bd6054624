"""Runs the unmodified `megatron.training.pretrain` on gloo ranks without an accelerator."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import pkgutil
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Megatron tries to import these and takes CUDA-only paths once it finds one of them.
HIDDEN_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")

_ABSENT = object()
_calls: Counter[str] = Counter()
_undo_steps: list[Callable[[], None]] = []


class GroupStepAdam(torch.optim.Optimizer):
    """Adam whose step count lives on the parameter group, as in the fused Adams of TE and Apex.

    Stock 0.19.2 falls back to torch.optim.AdamW, whose step is one tensor per parameter. On load the
    distributed optimizer hands ONE such tensor to all of them, so N parameters add N per step.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("GroupStepAdam runs on the CPU; leave --optimizer-cuda-graph out")
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, operation by operation that of torch.optim.AdamW(foreach=False)."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad, (beta1, beta2) = self.state[param], param.grad, group["betas"]
        assert grad is not None
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if self.adam_w_mode:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        else:
            grad = grad.add(param, alpha=group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root_correction2 = (1 - beta2 ** group["step"]) ** 0.5
        denominator = (state["exp_avg_sq"].sqrt() / root_correction2).add_(group["eps"])
        step_size = group["lr"] / (1 - beta1 ** group["step"])
        param.addcdiv_(state["exp_avg"], denominator, value=-step_size)


class _InertStream:
    """Stands for torch.cuda.Stream: CPU kernels finish before they return, so nothing is to be awaited."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        _calls["torch.cuda.Stream"] += 1

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return _InertEvent() if event is None else event

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class _InertEvent:
    """Stands for torch.cuda.Event. It has no elapsed_time: a duration of zero would be a lie."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        _calls["torch.cuda.Event"] += 1

    def record(self, _stream: Any = None) -> None: ...

    def wait(self, _stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@dataclass(frozen=True)
class Replacement:
    """One attribute that `install` sets. `make` gets the original and returns what stands for it."""

    target: str
    make: Callable[[Any], Any]
    reason: str
    hides: str


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _returning(value: Any) -> Callable[[Any], Any]:
    return lambda _original: lambda *_args, **_kwargs: value


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _factory_on_cpu(original: Any) -> Any:
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            _calls[f"torch.{original.__name__} on cuda"] += 1
            kwargs["device"] = "cpu"
        return original(*args, **kwargs)

    return factory


def _without_cuda_type_names(original: Any) -> Any:
    """The same function, its constants 'torch.cuda.FloatTensor' and the like without `cuda.`.

    Wrapping Tensor.type would lie to all of torch (torch.distributed reads it) once per parameter and step.
    """

    def renamed(constant: Any) -> Any:
        if isinstance(constant, str):
            return constant.replace("torch.cuda.", "torch.")
        return tuple(map(renamed, constant)) if isinstance(constant, tuple) else constant

    function = getattr(original, "__func__", original)
    constants = tuple(map(renamed, function.__code__.co_consts))
    if constants == function.__code__.co_consts:
        raise RuntimeError(f"cpu_backend: {function.__qualname__} names no torch.cuda type; is this Megatron-Core 0.19.2?")
    copy = types.FunctionType(
        function.__code__.replace(co_consts=constants),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return classmethod(copy) if isinstance(original, classmethod) else copy


def _same_object(_original: Any) -> Any:
    return lambda self, *_args, **_kwargs: self


def _eager_compile(_original: Any) -> Any:
    def compile_nothing(model: Any = None, **_kwargs: Any) -> Any:
        return (lambda function: function) if model is None else model

    return compile_nothing


def _get_rng_state(_original: Any) -> Any:
    return lambda device=None: torch.default_generator.get_state()


def _set_rng_state(_original: Any) -> Any:
    def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        if graph_safe:
            raise RuntimeError("cpu_backend: CUDA-graph-safe RNG states need a CUDA device")
        torch.default_generator.set_state(new_state)

    return set_rng_state


def _manual_seed(_original: Any) -> Any:
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


def _drop_one_warning(original: Any) -> Any:
    def warning(message: str, *args: Any, **kwargs: Any) -> None:
        if message != "CPU RNG state changed within GPU RNG context":
            original(message, *args, **kwargs)

    return warning


def _all_gather_uneven(original: Any) -> Any:
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        # Every rank passes the same list of shapes, so all ranks take the same branch.
        if len({part.shape for part in tensor_list}) == 1:
            return original(tensor_list, tensor, group, async_op)
        if async_op:
            raise RuntimeError("cpu_backend: uneven all_gather is emulated for async_op=False only")
        own_rank = torch.distributed.get_rank(group)
        for rank, part in enumerate(tensor_list):
            if rank == own_rank:
                part.copy_(tensor)
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return None

    return all_gather


def _numpy_if_asked(_original: Any) -> Any:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def _use_shipped_helper(original: Any) -> Any:
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


def _without_cuda(original: Any) -> Any:
    return functools.partial(original, allow_no_cuda=True)


def _keeping_rng_state(original: Any) -> Any:
    def keeping_rng_state(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=()):
            return original(*args, **kwargs)

    return keeping_rng_state


REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement("torch.compile", _eager_compile, "jit_fuser compiles; eager is exact and starts at once", "graph breaks"),
    Replacement("torch.cuda.device_count", _returning(1), "no device, no model-parallel groups", ""),
    Replacement("torch.cuda.current_device", _returning(torch.device("cpu")), "used as device=", ""),
    Replacement("torch.cuda.set_device", _returning(None), "raises without a driver", ""),
    Replacement("torch.cuda.synchronize", _returning(None), "raises without a driver", "missing waits"),
    Replacement("torch.cuda.Stream", _constant(_InertStream), "raises without a driver", "missing waits"),
    Replacement("torch.cuda.Event", _constant(_InertEvent), "record raises without a driver", "missing waits"),
    Replacement("torch.cuda.current_stream", _returning(_InertStream()), "raises", "missing waits"),
    Replacement("torch.cuda.default_stream", _returning(_InertStream()), "raises", "missing waits"),
    Replacement("torch.cuda.stream", _returning(contextlib.nullcontext()), "raises", "missing waits"),
    Replacement("torch.cuda.memory_stats", _returning(defaultdict(int)), "empty", "memory"),
    Replacement("torch.cuda.get_rng_state", _get_rng_state, "one generator", "tracker"),
    Replacement("torch.cuda.random.get_rng_state", _get_rng_state, "one generator", "tracker"),
    Replacement("torch.cuda.set_rng_state", _set_rng_state, "one generator", "tracker"),
    Replacement("torch.cuda.manual_seed", _manual_seed, "one generator", "tracker"),
    Replacement("torch.Tensor.cuda", _same_object, "stay", "aliasing"),
    Replacement("torch.nn.Module.cuda", _same_object, "stay", ""),
    *(
        Replacement(f"torch.{name}", _factory_on_cpu, "device='cuda'", "")
        for name in ("tensor", "zeros", "ones", "empty", "rand", "randn")
    ),
    Replacement("torch.distributed.all_gather", _all_gather_uneven, "gloo wants equal shapes", ""),
    Replacement("megatron.core.tensor_parallel.random._set_cuda_rng_state", _set_rng_state, "one generator", ""),
    Replacement("megatron.core.datasets.utils.compile_helpers", _use_shipped_helper, "no Makefile", ""),
    Replacement("megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu", _numpy_if_asked, "", ""),
    Replacement("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", _numpy_if_asked, "", ""),
    *(
        Replacement(f"megatron.core.optimizer.{name}", _without_cuda_type_names, "", "")
        for name in (
            "optimizer.clip_grad_by_total_norm_fp32",
            "optimizer.Float16OptimizerWithFloat16Params.__init__",
            "distrib_optimizer.DistributedOptimizer.__init__",
            "distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups",
        )
    ),
    Replacement("megatron.core.optimizer.Adam", _constant(GroupStepAdam), "", ""),
    Replacement("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", _constant(False), "", ""),
    Replacement("megatron.core.optimizer.distrib_optimizer.Adam", _constant(GroupStepAdam), "", ""),
    Replacement("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", _constant(True), "", ""),
    Replacement("megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER", _constant(True), "", ""),
    Replacement("megatron.training.training.build_train_valid_test_data_iterators", _keeping_rng_state, "", ""),
    Replacement("megatron.training.training.initialize_megatron", _without_cuda, "asserts CUDA", ""),
)


def is_installed() -> bool:
    return bool(_undo_steps)


def intercepted_calls() -> dict[str, int]:
    """How often each replacement was called since the last reset."""
    return dict(_calls)


def reset_intercepted_calls() -> None:
    _calls.clear()


def install() -> None:
    """Hides CUDA-only packages, imports Megatron and applies REPLACEMENTS; twice is the same as once."""
    if torch.cuda.is_available():
        raise RuntimeError("cpu_backend: CUDA is available here; run without cpu_backend.install()")
    if is_installed():
        return
    _hide_packages()
    for replacement in REPLACEMENTS:
        _apply(replacement)


def uninstall() -> None:
    while _undo_steps:
        _undo_steps.pop()()


def _hide_packages() -> None:
    for name in HIDDEN_PACKAGES:
        previous = sys.modules.get(name, _ABSENT)
        sys.modules[name] = None  # type: ignore[assignment]
        if previous is _ABSENT:
            _undo_steps.append(functools.partial(sys.modules.pop, name))
        else:
            _undo_steps.append(functools.partial(sys.modules.__setitem__, name, previous))


def _apply(replacement: Replacement) -> None:
    owner_name, _, attribute = replacement.target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original = inspect.getattr_static(owner, attribute)
    stand_in = replacement.make(original)
    if inspect.isfunction(stand_in) and replacement.make not in (_factory_on_cpu, _without_cuda_type_names):
        stand_in = _counted(stand_in, replacement.target)
    if attribute in vars(owner):
        _undo_steps.append(functools.partial(setattr, owner, attribute, original))
    else:
        _undo_steps.append(functools.partial(delattr, owner, attribute))
    setattr(owner, attribute, stand_in)


def _counted(function: Callable[..., Any], target: str) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        _calls[target] += 1
        return function(*args, **kwargs)

    return counted
