"""The CPU backend: what it replaces, that it puts everything back, and that the stock trainer trains on with it."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from megatron_scmoe.cpu import backend as cpu_backend
from megatron_scmoe.mcore import wheel

_ROOT = Path(__file__).resolve().parents[2]

_MODEL_FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32 --seq-length 8 "
    "--max-position-embeddings 8 --position-embedding-type rope --disable-bias-linear --transformer-impl local "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion "
    "--num-experts 8 --moe-layer-freq [0,1] --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --distributed-backend gloo "
)
_RUN_FLAGS = (
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --train-iters 6 --eval-iters 1 "
    "--eval-interval 4 --log-interval 10 --mock-data --split 90,5,5 --num-workers 0 --tokenizer-type NullTokenizer "
    "--vocab-size 63 --ckpt-format torch_dist --save-interval 3 "
)


# ---- the stock trainer -------------------------------------------------------------------------


def _train(flags: list[str]) -> list[tuple[int, float]]:
    """On a rank: iteration and loss of each step."""
    sys.argv[:] = ["stock.py", *flags]
    cpu_backend.install()
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.enums import ModelType
    from megatron.training import get_args, get_tokenizer, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    losses: list[tuple[int, float]] = []

    def datasets(sizes: list[int], vp_stage: int | None = None) -> Any:
        args = get_args()
        config = GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            split=args.split,
            tokenizer=get_tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()

    def loss_function(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        loss = (output.float().view(-1) * mask.view(-1)).sum()
        num_tokens = mask.sum().to(torch.int)
        if torch.is_grad_enabled():
            losses.append((get_args().curr_iteration, loss.item()))
        return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(loss_function, batch["loss_mask"])

    datasets.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    return losses


def _trained(flags: str) -> list[list[tuple[int, float]]]:
    """Iterations and losses of two ranks."""
    return ranks.run(_train, 2, (_MODEL_FLAGS + _RUN_FLAGS + flags).split(), timeout_s=300)


def test_stock_trainer_resumes_exactly(tmp_path: Path) -> None:
    flags = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    straight = _trained(f"{flags}--save {tmp_path}/checkpoint")
    resumed = _trained(f"{flags}--load {tmp_path}/checkpoint --ckpt-step 3")
    for whole, rest in zip(straight, resumed, strict=True):
        assert len(whole) == 6
        assert [loss for _, loss in rest] == [loss for _, loss in whole[3:]]


# ---- memory -----------------------------------------------------------------------------------

_FAULTS = """
import ctypes, resource, sys, torch
from megatron_scmoe.cpu import backend as cpu_backend
PR_SET_THP_DISABLE = 41  # of linux/prctl.h: with huge pages one fault brings 2 MiB
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
if sys.argv[1] == "kept":
    cpu_backend.keep_freed_memory()
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[10:])[5])  # until a few small blocks lie ready, they keep freed neighbours from being joined
"""


def test_large_tensors_take_the_memory_of_freed_ones():
    def faults(memory: str) -> int:
        done = subprocess.run([sys.executable, "-c", _FAULTS, memory], cwd=_ROOT, capture_output=True, check=True)
        return int(done.stdout)

    assert faults("kept") < 100 < 1000 < faults("given back")


# ---- putting in and taking out -----------------------------------------------------------------


def _python(code: str, tmp_path: Path) -> str:
    """Run code in a fresh interpreter that finds our package and ``tmp_path``; its output."""
    path = os.pathsep.join([str(_ROOT), *(str(_ROOT / "tests" / name) for name in ("cpu", "support")), str(tmp_path)])
    completed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    return completed.stdout.strip()


def replaced_attributes() -> dict[str, Any]:
    """Each target's present value, and whether its owner holds it itself."""
    values: dict[str, Any] = {}
    for target in (target for replacement in cpu_backend.REPLACEMENTS for target in replacement.targets()):
        owner_name, _, attribute = target.rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        values[target] = inspect.getattr_static(owner, attribute)
        values[f"{target} is its owner's own"] = attribute in vars(owner)
    for package in cpu_backend.HIDDEN_PACKAGES:
        values[package] = sys.modules.get(package, "not imported")
    return values


def changed_names(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if before[name] is not after[name]}


def test_uninstall_and_failure_restore_every_attribute_by_identity(tmp_path: Path) -> None:
    code = """
import os
import torch
from megatron_scmoe.cpu import backend as cpu_backend
from test_cpu_backend import changed_names, replaced_attributes
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train as compiled_before_install

before = replaced_attributes()
for _ in range(2):
    cpu_backend.install()
    installed = replaced_attributes()
    cpu_backend.install()
    assert changed_names(installed, replaced_attributes()) == set(), "the second install changed something"
    assert cpu_backend.is_installed() and not torch.cuda.is_available()
    unchanged = set(before) - changed_names(before, installed)
    assert all(name.endswith("is its owner's own") for name in unchanged), unchanged
    compiled_before_install((torch.ones(3), None), torch.ones(3), 0.0)
    assert not torch._dynamo.utils.counters, "a fused function was compiled"
    cpu_backend.uninstall()
    assert not cpu_backend.is_installed()
    assert changed_names(before, replaced_attributes()) == set()
assert torch.compiler.set_stance("default").prev.stance == "default"

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # fails at the very end
try:
    cpu_backend.install()
except RuntimeError as error:
    print(error)
assert not cpu_backend.is_installed()
assert changed_names(before, replaced_attributes()) == set()
"""
    assert "unset PYTORCH_NVML_BASED_CUDA_CHECK" in _python(code, tmp_path)


def test_import_alone_changes_nothing(tmp_path: Path) -> None:
    code = """
import inspect, pkgutil, sys, torch
names = ["torch." + name for name in ("compile", "zeros", "cuda.device_count", "cuda.Stream", "distributed.all_gather")]
before = [pkgutil.resolve_name(name) for name in names]
from megatron_scmoe.cpu import backend as cpu_backend
assert all(value is pkgutil.resolve_name(name) for name, value in zip(names, before))
assert "cuda" not in vars(torch.Tensor)
assert not cpu_backend.is_installed()
loaded = [name for name in sys.modules if name.partition(".")[0] in ("megatron", *cpu_backend.HIDDEN_PACKAGES)]
assert not loaded, loaded
"""
    _python(code, tmp_path)


@pytest.fixture
def not_installed() -> Iterator[None]:
    was_installed = cpu_backend.is_installed()
    cpu_backend.uninstall()
    yield
    if was_installed:
        cpu_backend.install()


def test_refuses_where_cuda_is_available(not_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device_count = torch.cuda.device_count
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="this machine has CUDA"):
        cpu_backend.install()
    assert not cpu_backend.is_installed()
    assert torch.cuda.device_count is device_count


def test_refuses_after_megatron_saw_transformer_engine(not_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    with pytest.raises(RuntimeError, match="transformer_engine visible"):
        cpu_backend.install()
    assert not cpu_backend.is_installed()


def test_transformer_engine_on_the_path_is_hidden(tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("print('transformer_engine was imported')\n")
    assert "was imported" in _python("import transformer_engine", tmp_path)  # the trap works
    code = """
from megatron_scmoe.cpu import backend as cpu_backend
cpu_backend.install()
import megatron.training.training
from megatron.core.utils import get_te_version
from megatron.core.tensor_parallel.random import HAVE_TE
print(HAVE_TE, get_te_version())
"""
    assert _python(code, tmp_path) == "False 0.0.0"


def test_each_replacement_says_why_and_what_it_hides() -> None:
    for replacement in cpu_backend.REPLACEMENTS:
        assert replacement.reason
        assert replacement.hides
    targets = [target for replacement in cpu_backend.REPLACEMENTS for target in replacement.targets()]
    assert len(targets) == len(set(targets))


# ---- single stand-ins ----------------------------------------------------------------------------


@pytest.fixture
def installed() -> Iterator[None]:
    was_installed = cpu_backend.is_installed()
    cpu_backend.install()
    cpu_backend.reset_intercepted_calls()
    yield
    if not was_installed:
        cpu_backend.uninstall()


def test_factories_redirect_and_count_only_the_cuda_device(installed: None) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.tensor([1.0]).device.type == "cpu"
    assert torch.empty(2, device="meta").device.type == "meta"
    assert cpu_backend.intercepted_calls() == {"torch.zeros": 1, "torch.ones": 1}


def test_cuda_generator_functions_act_on_the_one_generator(installed: None) -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), drawn)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), drawn)


def test_rng_tracker_forks_and_restores(installed: None, caplog: pytest.LogCaptureFixture) -> None:
    tracker = importlib.import_module("megatron.core.tensor_parallel.random").CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("a", 11)
    tracker.add("b", 12)
    default = torch.get_rng_state()
    draws = {}
    for turn in range(2):
        for name in "ab":
            with tracker.fork(name):
                draws[name, turn] = torch.rand(3)
            assert torch.equal(torch.get_rng_state(), default)
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(draws["a", 0], torch.rand(3, generator=generator))
    assert torch.equal(draws["a", 1], torch.rand(3, generator=generator))
    assert not torch.equal(draws["a", 0], draws["b", 0])
    assert not caplog.records


def gather_unequal() -> list[list[float]]:
    """On a rank: two rows from rank 0 and three from rank 1, which gloo itself refuses."""
    assert cpu_backend.is_installed()
    rank = torch.distributed.get_rank()
    parts = [torch.zeros(2), torch.zeros(3)]
    torch.distributed.all_gather(parts, torch.full((2 + rank,), rank + 1.0))
    return [part.tolist() for part in parts]


def test_gathers_unequal_shapes() -> None:
    assert ranks.run(gather_unequal, 2) == [[[1.0, 1.0], [2.0, 2.0, 2.0]]] * 2


# ---- the optimizer -------------------------------------------------------------------------------


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (5, 3)]


def _steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def _same(one: list[torch.nn.Parameter], other: list[torch.nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


_HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.mark.parametrize(("adam_w_mode", "stock"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_adam_is_that_of_torch(adam_w_mode: bool, stock: Any) -> None:
    ours, theirs = _parameters(), _parameters()
    _steps(wheel.GroupStepAdam(ours, adam_w_mode=adam_w_mode, **_HYPERPARAMETERS), ours, range(5))
    _steps(stock(theirs, foreach=False, **_HYPERPARAMETERS), theirs, range(5))
    assert _same(ours, theirs)


def test_adam_goes_on_from_that_of_torch() -> None:
    """A stock checkpoint has a step for each parameter, where it is not of the distributed optimizer."""
    theirs = _parameters()
    stock = torch.optim.AdamW(theirs, foreach=False, **_HYPERPARAMETERS)
    _steps(stock, theirs, range(3))
    ours = [torch.nn.Parameter(parameter.detach().clone()) for parameter in theirs]
    resumed = wheel.GroupStepAdam(ours, **_HYPERPARAMETERS)
    resumed.load_state_dict(copy.deepcopy(stock.state_dict()))
    _steps(stock, theirs, range(3, 6))
    _steps(resumed, ours, range(3, 6))
    assert _same(ours, theirs) and [group["step"] for group in resumed.param_groups] == [6]


def _load_as_the_distributed_optimizer_does(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Its load_state_dict in 0.19.2: a step found per parameter becomes one tensor for all parameters."""
    steps = {float(state["step"]) for state in saved["state"].values() if "step" in state}
    if steps:
        step = torch.tensor(steps.pop())
        for state in saved["state"].values():
            state["step"] = step
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("adam", "resumes"), [(wheel.GroupStepAdam, True), (torch.optim.AdamW, False)])
def test_adam_resumes_as_it_would_have_gone_on(adam: Any, resumes: bool) -> None:
    parameters = _parameters()
    optimizer = adam(parameters, **_HYPERPARAMETERS)
    _steps(optimizer, parameters, range(3))
    saved = optimizer.state_dict()
    saved["state"] = {
        key: {name: value.clone() for name, value in state.items()} for key, state in saved["state"].items()
    }
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = adam(copies, **_HYPERPARAMETERS)
    _load_as_the_distributed_optimizer_does(resumed, saved)
    _steps(optimizer, parameters, range(3, 6))
    _steps(resumed, copies, range(3, 6))
    assert _same(parameters, copies) is resumes
    if resumes:
        assert [group["step"] for group in resumed.param_groups] == [6]
