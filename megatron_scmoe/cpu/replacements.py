"""Which attributes are replaced where there is no CUDA, why, and what a CPU run can therefore NOT show."""

from __future__ import annotations

import contextlib
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_scmoe.cpu import state_space
from megatron_scmoe.cpu.stand_ins import (
    InertEvent,
    InertStream,
    all_gather_uneven,
    constant,
    duplicated_linear,
    eager_compile,
    factory_on_cpu,
    full_duplex,
    get_rng_state,
    keeping_rng_state,
    manual_seed,
    numpy_if_asked,
    one_lane,
    returning,
    returning_self,
    sequence_parallel_norm,
    set_rng_state,
    without_cuda_check,
    without_cuda_in_type_names,
)
from megatron_scmoe.mcore.wheel import GroupStepAdam, use_shipped_helper


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
_MAMBA = "megatron.core.ssm.mamba_mixer"
_KERNELS = "mamba_ssm's are Triton kernels; these are in plain torch"
_ROUNDING = "faults, rounding and time of mamba_ssm's kernels; that they keep what came before the gate for backward"
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
    Replacement("torch", "compile", eager_compile,
                "Megatron's jit_fuser is torch.compile, which would start a C++ compiler at run time",
                "faults of the compiled functions and their rounding"),
    Replacement("torch", "empty ones rand randn tensor zeros", factory_on_cpu,
                "Megatron calls these factories with the literal device='cuda', or pins memory, which takes a driver",
                f"{_DEVICE}; copies that overtake what they copy", counted=False),
    Replacement("torch.Tensor", "cuda", returning_self, _NO_DRIVER, f"{_DEVICE}; that CUDA would have made a copy"),
    Replacement("torch.Tensor", "record_stream", returning(None), "raises for memory that no GPU has", _WAITS),
    Replacement("torch.nn.Module", "cuda", returning_self, _NO_DRIVER, _DEVICE),
    Replacement("torch.distributed.ProcessGroupGloo", "__init__", one_lane,
                "gloo would run two collectives of a group at once, and NCCL runs them in the order of their launch",
                "collectives of one group that do not come in the same order on all ranks"),
    Replacement("torch.distributed", "all_to_all_single", full_duplex,
                "gloo's uses one direction of a link after the other where a rank comes late, NCCL's both at once",
                "what gloo's own all-to-all takes", counted=False),
    Replacement("torch.distributed", "all_gather", all_gather_uneven,
                "gloo wants equal shapes, expert tensor parallelism gathers unequal ones: broadcasts stand in",
                "the cost of that collective"),
    Replacement("torch.cuda", "device_count", returning(1),
                "without a device Megatron sets up no model-parallel groups and no RNG tracker", _DEVICE),
    Replacement("torch.cuda", "current_device", returning(torch.device("cpu")),
                f"{_NO_DRIVER}; Megatron passes the answer on as device=", _DEVICE),
    Replacement("torch.cuda", "set_device", returning(None), _NO_DRIVER, _DEVICE),
    Replacement("torch.cuda", "synchronize", returning(None), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "Stream", constant(InertStream), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "Event", constant(InertEvent), _NO_DRIVER, f"{_WAITS}; GPU times"),
    Replacement("torch.cuda", "current_stream default_stream", returning(InertStream()), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "stream", returning(contextlib.nullcontext()), _NO_DRIVER, _WAITS),
    Replacement("torch.cuda", "memory_stats", lambda _original: lambda device=None: defaultdict(int),
                "--log-memory-to-tensorboard looks up keys that are missing without a device",
                "every claim about memory: all statistics are 0"),
    Replacement("torch.cuda", "get_device_properties", returning(_NO_DEVICE_PROPERTIES),
                f"{_NO_DRIVER}; validate_args asks for the architecture when TP > 1", "choices made by architecture"),
    Replacement("torch.cuda", "get_device_capability", returning((0, 0)),
                f"{_NO_DRIVER}; with (0, 0) --moe-grouped-gemm gets Megatron's own refusal", "grouped GEMM"),
    Replacement("torch.cuda", "get_rng_state random.get_rng_state", get_rng_state, _GENERATOR, _TRACKER),
    Replacement("torch.cuda", "set_rng_state random.set_rng_state", set_rng_state, _GENERATOR, _TRACKER),
    Replacement("torch.cuda", "manual_seed", manual_seed, _GENERATOR, _TRACKER),
    Replacement("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", set_rng_state,
                "it queues the change until CUDA is initialised, that is for ever", _TRACKER),
    Replacement("megatron.training.training", "build_train_valid_test_data_iterators", keeping_rng_state,
                "loaders draw a seed from the CPU generator, which dropout on a GPU never notices: resume would differ",
                _TRACKER),
    Replacement(_MOE, "moe_utils.maybe_move_tensor_to_cpu token_dispatcher.maybe_move_tensor_to_cpu", numpy_if_asked,
                "it converts to numpy only what comes from a GPU, and the dispatcher counts on numpy",
                "use of the split sizes before their copy has arrived"),
    Replacement(_MOE, "moe_layer.TELinear", duplicated_linear,
                "Core builds the projections of --moe-latent-size from it, whatever the spec is",
                "faults of Transformer Engine's linear", counted=False),
    Replacement(_MOE, "moe_layer.HAVE_TE", constant(True), "it asserts that there is the linear above", "nothing"),
    Replacement(_OPTIMIZER, _TYPE_READERS, without_cuda_in_type_names,
                "they compare Tensor.type() with 'torch.cuda.FloatTensor' and the like", _DEVICE, counted=False),
    Replacement(_OPTIMIZER, "Adam distrib_optimizer.Adam", constant(GroupStepAdam),
                "resume is wrong with torch.optim.AdamW, see GroupStepAdam", "faults and rounding of the fused Adam"),
    Replacement(_OPTIMIZER, "USING_PYTORCH_OPTIMIZER", constant(False),
                "true means torch.optim.AdamW, false means the Adam above", "nothing: false on a GPU as well"),
    Replacement(_OPTIMIZER, "distrib_optimizer.HAVE_APEX_OR_TE distrib_optimizer.USING_APEX_OPTIMIZER", constant(True),
                "checkpoint code then reads the step from the parameter group, where GroupStepAdam keeps it",
                "nothing: it is read there on a GPU as well"),
    Replacement("megatron.core.models.hybrid.hybrid_block", "TENorm", sequence_parallel_norm,
                "the final norm of a hybrid model is Transformer Engine's whatever the other layers are",
                "faults and rounding of Transformer Engine's norm"),
    Replacement("megatron.core.datasets.utils", "compile_helpers", use_shipped_helper,
                "it runs make, and the wheel ships the built helper but no Makefile", "nothing: so on a GPU as well"),
    Replacement(_MAMBA, "HAVE_MAMBA_SSM MAMBA_HAS_STATE_DTYPE", constant(True),
                "without the package, which needs CUDA, it builds no Mamba layer", "that mamba_ssm is missing or old"),
    Replacement(_MAMBA, "mamba_split_conv1d_scan_combined", constant(state_space.split_conv1d_scan_combined),
                _KERNELS, _ROUNDING),
    Replacement(_MAMBA, "mamba_chunk_scan_combined", constant(state_space.chunk_scan_combined), _KERNELS, _ROUNDING),
    Replacement(_MAMBA, "ExtendedRMSNorm", constant(state_space.GatedRMSNorm), _KERNELS, _ROUNDING),
    Replacement(_MAMBA, "_check_mamba_sequence_packing_support", returning((False, state_space.NO_PACKING)),
                "it asks for the versions of packages that are not there", "packed sequences in Mamba layers"),
    Replacement("megatron.training.training", "initialize_megatron", without_cuda_check,
                "it asserts that CUDA is available unless told otherwise", "nothing"),
)
# fmt: on
