#!/usr/bin/env python3
"""Write docs/launches.md: kernels, copies and host waits of a group, beside Megatron's own MoE layer.

    python tests/support/launches.py

Counted on the CPU by torch's profiler: an ATen operation with a kernel of its own that is neither a view nor an
allocation is one that a GPU would be given, but for those that CUDA fuses or cuts otherwise. Host waits are
``Event.synchronize``, which the CPU's stand-ins have; values read, ``item``. One rank of two, of which the other does
not exist.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "gpu")]

import device
import models
import torch
import torch.distributed as dist
import wire
from models import Case
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_scmoe.contracts import Launch
from megatron_scmoe.overlap import observe
from megatron_scmoe.overlap.plan import ENCODE, ROUTE, START_DISPATCH, WAIT

DOCUMENT = ROOT / "docs" / "launches.md"
STOCK = "Megatron's two blocks"
BEHIND, WITHIN = "scmoe, launched behind the op", "scmoe at pos1, launched within attention"
LAUNCHES = {BEHIND: Launch.BEHIND, WITHIN: Launch.WITHIN}
CASES = {
    STOCK: Case(combine="add", num_groups=1),
    "scmoe": Case(combine="add", num_groups=1),
    BEHIND: Case(combine="add", num_groups=1),
    "scmoe at pos1": Case(combine="add", num_groups=1, position=("pos1",)),
    WITHIN: Case(combine="add", num_groups=1, position=("pos1",)),
    "scmoe, no overlap": Case(combine="add", num_groups=1, overlap="off"),
    "scmoe, two chunks": Case(combine="add", num_groups=1, chunks=2),
    "scmoe, four chunks": Case(combine="add", num_groups=1, chunks=4),
    "scmoe, lsh": Case(combine="add", num_groups=1, codec="lsh"),
    "scmoe, top-2": Case(combine="add", num_groups=1, topk=2),
    "scmoe, top-2, unique": Case(combine="add", num_groups=1, topk=2, unique="rank"),
    "scmoe, top-2, fp8": Case(combine="add", num_groups=1, topk=2, codec="fp8"),
    "dgmoe": Case(shortcut="dgmoe", num_groups=1),
}
# Nothing that a GPU would be given: views, allocations, questions.
NO_KERNEL = [
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "transpose",
    "t",
    "permute",
    "expand",
    "expand_as",
    "as_strided",
    "slice",
    "select",
    "narrow",
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsqueeze",
    "unsqueeze_",
    "squeeze",
    "detach",
    "detach_",
    "alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "resize_",
    "unbind",
    "view_as",
    "flatten",
    "ravel",
    "contiguous",
    "to",
    "lift_fresh",
    "set_",
    "result_type",
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "broadcast_tensors",
    "unflatten",
    "movedim",
    "resolve_conj",
    "resolve_neg",
    "is_same_size",
    "new_zeros",
    "zeros",
]
COLLECTIVE = "all-to-all"

HEAD = """\
# Kernels, copies and host waits

Written by `make docs` (`tests/support/launches.py`); do not edit. What the host launches for one group of two blocks,
beside Megatron's own two blocks with the same parameters (the local spec, top-1, two ranks), counted by torch's
profiler on the CPU: operations that are neither views nor allocations. A GPU cuts some of them otherwise; nothing here
is a time, and nothing of it has run on a GPU. Embedding, output layer and loss count in every row alike. "more" is
more than Megatron's; `dgmoe` has two routed calls, and no shared expert.

Host waits are waits for an event, `Event.synchronize`: one for the counts of each routing, whatever its chunks. Those
"before dense" come between the tap and the launch of the dense operation behind it, and leave a GPU idle behind them.
Core waits once a layer for its counts. Values read, by `item`, are those beyond Megatron's, which compares states of
the CPU's generator so.

"""


@dataclass(frozen=True)
class Count:
    """Of one pass, forward or backward."""

    kernels: int
    copies: int
    collectives: int
    waits: int
    waits_before_dense: int
    values_read: int


@contextmanager
def counted_waits(recorded: observe.Recording) -> Iterator[list[str]]:
    """Behind which mark but WAIT each ``Event.synchronize`` came, of CUDA or of stand-ins, which wait for nothing."""
    behind: list[str] = []
    event = torch.cuda.Event
    original = event.synchronize

    def synchronize(self: object) -> None:
        behind.append(next((step[0] for step, _ in reversed(recorded._lane) if step and step[0] != WAIT), ""))
        original(self)

    event.synchronize = synchronize
    try:
        yield behind
    finally:
        event.synchronize = original


@functools.cache
def has_kernel(operator: str) -> bool:
    """Whether an operator has a kernel of its own, and is not put together from others."""
    overloads = [name for name in torch._C._dispatch_get_all_op_names() if name.partition(".")[0] == operator]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") for name in overloads)


def fills_nothing(event: FunctionEvent) -> bool:
    """Whether a new tensor without elements is filled: that between the halves of an exchange."""
    return event.name in ("aten::zero_", "aten::fill_") and 0 in (event.input_shapes[0] or ())


def launches(events: list[FunctionEvent]) -> Counter[str]:
    """Names of operations that reach a GPU, of a profile; what a collective does inside is one of its own."""
    found: Counter[str] = Counter()

    def visit(event: FunctionEvent) -> bool:
        """Whether ``event`` or one that it calls was counted."""
        if event.name == COLLECTIVE or event.name.startswith("c10d::"):
            found[COLLECTIVE] += 1
            return True
        name = event.name.removeprefix("aten::")
        counts = name != event.name and name not in NO_KERNEL and not fills_nothing(event)
        if counts and has_kernel(event.name):  # what it calls are scalars that it turns into tensors, and the like
            found[name] += 1
            return True
        below = [visit(child) for child in event.cpu_children]
        if counts and not any(below):
            found[name] += 1
        return counts or any(below)

    for event in events:
        if event.cpu_parent is None:
            visit(event)
    return found


def launched(run: Callable[[], Tensor | None]) -> tuple[Tensor | None, Counter[str], int]:
    """What ``run`` returns, what it launched, and how many values it read."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        result = run()
    values = sum(event.name == "aten::_local_scalar_dense" for event in seen.events())
    return result, launches(list(seen.events())), values


def waited(run: Callable[[], Tensor | None]) -> tuple[Tensor | None, list[str]]:
    """What ``run`` returns, and the mark behind which each host wait came; whoever records launches more."""
    with observe.recording() as recorded, counted_waits(recorded) as behind:
        result = run()
    return result, behind


def count(names: Counter[str], values: int, behind: list[str]) -> Count:
    """Put together what two runs of a pass have shown."""
    names = names.copy()
    collectives, copies = names.pop(COLLECTIVE, 0), names.pop("copy_", 0)
    before_dense = sum(name in (ROUTE, ENCODE, START_DISPATCH) for name in behind)
    return Count(names.total(), copies, collectives, len(behind), before_dense, values)


def counts_of(name: str) -> tuple[Count, Count]:
    """Of a forward and of its backward, of the model of one case."""
    case = CASES[name]
    model = stock(case) if name == STOCK else models.build(case)
    if name in LAUNCHES:
        models.launch_at(model, LAUNCHES[name])
    ((tokens, labels, positions),) = models.my_batch()

    def forward() -> Tensor:
        return model(tokens, positions, None, labels=labels).sum()

    prompt = wire.Wire(0, spoils=False)

    def all_to_all_single(*args: object, **kwargs: object) -> object:
        with record_function(COLLECTIVE):
            return prompt.all_to_all_single(*args, **kwargs)

    original, dist.all_to_all_single = dist.all_to_all_single, all_to_all_single
    try:
        forward().backward()  # what is made once has been made
        loss, *there = launched(forward)
        _, *back = launched(loss.backward)
        loss, waits_there = waited(forward)
        _, waits_back = waited(loss.backward)
    finally:
        dist.all_to_all_single = original
    return count(*there, waits_there), count(*back, waits_back)


def stock(case: Case) -> torch.nn.Module:
    """Megatron's own model of the same sizes."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    config = GPTModelConfig(
        transformer=models.transformer_config(case),
        vocab_size=models.VOCAB_SIZE,
        seq_length=models.SEQ_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).to(models.DEVICE)


def all_counts() -> dict[str, tuple[Count, Count]]:
    """Of every case."""
    device.prepare()
    torch.use_deterministic_algorithms(False)  # which fills every new tensor
    with device.fake_ranks(2):
        return {name: counts_of(name) for name in CASES}


def document(counts: dict[str, tuple[Count, Count]]) -> str:
    """The head and a table for each direction."""
    text = HEAD
    for number, direction in enumerate(("forward", "backward")):
        rows = ["| | kernels | more | copies | more | collectives | host waits | before dense | values read |"]
        rows.append("|---" * 9 + "|")
        core = counts[STOCK][number]
        for name, both in counts.items():
            one = both[number]
            more = one.kernels - core.kernels, one.copies - core.copies, one.values_read - core.values_read
            rows.append(
                f"| {name} | {one.kernels} | {more[0]:+} | {one.copies} | {more[1]:+} | {one.collectives} | {one.waits}"
                f" | {one.waits_before_dense} | {more[2]:+} |"
            )
        text += "\n".join([f"## {direction.capitalize()}", "", *rows, "", ""])
    return text.rstrip() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(all_counts()))
    print(f"wrote {DOCUMENT}")
