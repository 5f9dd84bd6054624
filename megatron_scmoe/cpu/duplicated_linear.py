"""In the place of Transformer Engine's linear where Core builds it without a spec: as the projections of latent MoE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig


class DuplicatedLinear(Linear):
    """Core's own replacement of ``TELinear``, with what that has more: initial values, and its keys in checkpoints.

    Every tensor-parallel rank has the whole weight. The arguments are those that Core gives to ``TELinear``.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, config=config, init_method=init_method, **kwargs)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()  # of which one rank writes checkpoints
        # As Core's own local linears have it, for the keys that Transformer Engine's has in checkpoints.
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *_args, **_kwargs: state_dict.setdefault(f"{prefix}_extra_state")
        )
        if not config.perform_initialization:
            return
        with torch.no_grad(), get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
            init_method(self.weight)
            if self.bias is not None:
                self.bias.zero_()

    def get_extra_state(self) -> None:
        """Nothing, for which Transformer Engine's linear looks in checkpoints."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore what Transformer Engine's linear has saved."""
