"""What Megatron-Core's wheel lacks, on GPUs and without: a Makefile, and an optimizer of its own.

Where there is CUDA, pretrain_gpt_scmoe.py calls ``mend``; elsewhere the CPU's stand-ins do the same, among much else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def mend() -> None:
    """Set what is missing; imports Megatron. A second call changes nothing."""
    from megatron.core import optimizer  # noqa: PLC0415 - importing this module imports no Megatron
    from megatron.core.datasets import utils  # noqa: PLC0415
    from megatron.core.optimizer import distrib_optimizer  # noqa: PLC0415

    utils.compile_helpers = use_shipped_helper(utils.compile_helpers)
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return  # Transformer Engine's or Apex's, or this has been done
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def use_shipped_helper(original: Callable[[], None]) -> Callable[[], None]:
    """In the place of ``compile_helpers``, which runs make and, where that fails, ends the process.

    The wheel of 0.19.2 has the built helper of datasets but no Makefile; a source tree has the Makefile.
    """

    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


class GroupStepAdam(torch.optim.Optimizer):
    """Adam that counts its steps on the parameter group, as the fused Adams of Transformer Engine and Apex do.

    Without those two Megatron-Core 0.19.2 takes torch.optim.AdamW, whose step is a tensor per parameter. On load its
    distributed optimizer gives ONE such tensor to all n parameters, and from then on each update advances it n times.
    """

    def __init__(self, params: Any, *, adam_w_mode: bool = True, capturable: bool = False, **defaults: Any) -> None:
        if capturable:
            raise ValueError(
                "GroupStepAdam has no CUDA graph; leave --optimizer-cuda-graph out, or install Transformer Engine"
            )
        super().__init__(params, defaults)  # lr, weight_decay, betas, eps
        self.adam_w_mode = adam_w_mode

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; what its AdamW has counted for each parameter becomes the step of the group."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            states = (self.state.get(param, {}) for param in group["params"])
            counted = [int(state.pop("step")) for state in states if "step" in state]
            if counted:
                group.setdefault("step", max(counted))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, operation by operation that of ``torch.optim.AdamW(foreach=False)``."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[param]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(param)
        if self.adam_w_mode:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        else:
            grad = grad.add(param, alpha=group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2 ** group["step"]) ** 0.5).add_(group["eps"])
        param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
