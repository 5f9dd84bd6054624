"""Whether streams are in order, found without a GPU: torch's own CUDA sanitizer, fed by a dispatch mode.

CPU tensors stand for those of a GPU, their storages for its memory, and each operation is a kernel of the current
stream. ``Order`` asks of every one of them what ``torch.cuda._sanitizer`` asks, and two things more:

* Memory. The caching allocator gives a block that was freed to whoever asks next on the stream that it belongs to. So
  other streams' kernels have to be behind the block's stream when they first use it, and before it when it is freed.
* The host. What was copied to it may be read when it has waited for the copy.

Not in the model: streams of Transformer Engine, asynchronous collectives but for the all-to-all (they count as work of
the current stream), record_stream of autograd's engine on gradients between two streams, pinned memory, and how long
anything takes. A host read that waits for the GPU (``item``) is a read of the current stream, and orders nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.cuda import _sanitizer as sanitizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

MAIN = sanitizer.DEFAULT_STREAM_ID
_REUSE = "whatever used its memory before"
_CLEAN_UP_EVERY = 512  # kernels
_NOBODYS_FRAMES = (str(Path(torch.__file__).parent), str(Path(__file__).parent / "stream_"))


class Kind(Enum):
    """What is out of order."""

    RACE = "two kernels, of which one writes"
    MEMORY = "memory that is given to others too early"
    HOST = "a copy that the host reads before it is there"


@dataclass(frozen=True)
class Fault:
    """One thing that may go wrong on a GPU.

    Attributes:
        kind: of it.
        text: who may overtake whom, and where they were launched.
        in_backward: whether a node of autograd's was running.
    """

    kind: Kind
    text: str
    in_backward: bool

    def __str__(self) -> str:
        return f"{self.kind.name}: {self.text}"


@dataclass(slots=True)
class _Block:
    """Memory of one storage.

    Attributes:
        storage: which is dead when nothing holds it any more.
        owner: stream in whose order the allocator gives it away.
        recorded: streams for which the allocator waits by itself.
    """

    storage: StorageWeakRef
    owner: int
    recorded: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Copy:
    """A tensor on the host, which is there when kernel ``number`` of ``stream`` is over."""

    storage: StorageWeakRef
    stream: int
    number: int


class Order:
    """What is behind what: kernels of all streams, memory, and the host.

    Attributes:
        faults: found so far.
        names: of streams by id.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.names: dict[int, str] = {MAIN: "main"}
        self._handler = sanitizer.EventHandler()
        self._blocks: dict[int, _Block] = {}
        self._shared: set[int] = set()  # blocks that other streams than their owners used
        self._copies: dict[int, _Copy] = {}

    @property
    def num_kernels(self) -> int:
        return self._handler.seq_num

    def kernel(
        self,
        operator: str,
        stream: int,
        *,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
        made: Sequence[Tensor] = (),
        host: int | None = None,
    ) -> None:
        """A kernel is launched.

        Args:
            operator: its name.
            stream: that it runs on.
            reads, writes: tensors.
            made: those that were allocated for it, written or not.
            host: the stream that is current for the host, which owns what was allocated; None where it is ``stream``.
        """
        self.free_dead()
        new = {*map(_key, made)}
        inputs = [key for key in map(_key, (*reads, *writes)) if key not in new]
        copies = [self._copies[key] for key in inputs if key in self._copies]
        for copy in copies:
            self._check_copy(copy, operator)
        if copies and len(copies) == len(inputs):  # computed on the host
            for tensor in made:
                self._copies[_key(tensor)] = _Copy(StorageWeakRef(tensor.untyped_storage()), MAIN, 0)
            return
        owner = stream if host is None else host
        for tensor in made:
            self._own(tensor, owner, is_new=True)
        read, written = (self._used(tensors, stream, owner) for tensors in (reads, writes))
        if read or written:
            aliases: dict[int, list[str]] = {key: [] for key in read | written}
            found = self._handler._handle_kernel_launch(stream, read - written, written, set(), operator, aliases)
            self._report(found)

    def copy_to_host(self, tensor: Tensor, stream: int) -> Tensor:
        """A copy of ``tensor`` that is there when ``stream`` has made it; tensors on the host are returned."""
        if _key(tensor) in self._copies:
            return tensor
        self.kernel("copy to the host", stream, reads=[tensor])
        with _disable_current_modes():
            copy = tensor.detach().clone()
        self._copies[_key(copy)] = _Copy(StorageWeakRef(copy.untyped_storage()), stream, self._handler.seq_num)
        return copy

    def host_reads(self, tensor: Tensor, stream: int, operator: str) -> None:
        """The host looks at values: of a copy, or of a tensor for which it waits."""
        if copy := self._copies.get(_key(tensor)):
            self._check_copy(copy, operator)
        else:
            self.kernel(operator, stream, reads=[tensor])

    def arrival_check(self, tensor: Tensor) -> Callable[[str], None]:
        """What is to be called, with a name, when the host looks at the copy ``tensor``."""
        copy = self._copies[_key(tensor)]
        return lambda operator: self._check_copy(copy, operator)

    def record_stream(self, tensor: Tensor, stream: int) -> None:
        """The allocator waits for ``stream`` before it gives the memory of ``tensor`` away."""
        if block := self._blocks.get(_key(tensor)):
            block.recorded.add(stream)

    def record(self, event: int, stream: int) -> None:
        self.free_dead()
        self._handler._handle_event_record(event, stream)

    def wait(self, event: int, stream: int) -> None:
        """``stream`` waits for what ``event`` recorded."""
        self.free_dead()
        self._handler._handle_event_wait(event, stream)

    def host_waits_for_event(self, event: int) -> None:
        self.free_dead()
        self._handler._handle_event_synchronization(event)

    def host_waits_for_stream(self, stream: int) -> None:
        self.free_dead()
        self._handler._handle_stream_synchronization(stream)

    def host_waits_for_all(self) -> None:
        self.free_dead()
        self._handler._handle_device_synchronization()

    def is_known_to_host(self, event: int) -> bool:
        """Whether the host has waited for what ``event`` recorded."""
        recorded = self._handler.syncs.recorded_sync_states.get(event, {})
        return all(self._host_is_behind(stream, number) for stream, number in recorded.items())

    def free_dead(self) -> None:
        """Look which memory was freed; called before whatever comes, so that what comes later does not count."""
        for key in [key for key in self._shared if self._blocks[key].storage.expired()]:
            self._free(key)
        if self._handler.seq_num % _CLEAN_UP_EVERY == 0:  # of one stream alone: nothing to find
            for key in [key for key, block in self._blocks.items() if block.storage.expired()]:
                self._free(key)
            self._copies = {key: copy for key, copy in self._copies.items() if not copy.storage.expired()}

    def _own(self, tensor: Tensor, stream: int, *, is_new: bool) -> None:
        key = _key(tensor)
        if key in self._blocks:
            return
        self._blocks[key] = _Block(StorageWeakRef(tensor.untyped_storage()), stream)
        accesses = self._handler.tensors_accessed
        accesses.create_tensor(key, None)
        self._handler.syncs._ensure_stream_exists(stream)
        before = self._handler.syncs.current_sync_states[stream].get(stream, 0)
        if is_new and before:
            nowhere = traceback.StackSummary()
            access = sanitizer.Access(sanitizer.AccessType.WRITE, before, stream, _REUSE, [], False, nowhere)
            accesses.set_write(key, access)

    def _used(self, tensors: Sequence[Tensor], stream: int, owner: int) -> set[int]:
        used = set()
        for tensor in tensors:
            if tensor.untyped_storage().nbytes() and _key(tensor) not in self._copies:
                self._own(tensor, owner, is_new=False)
                used.add(_key(tensor))
        self._shared |= {key for key in used if self._blocks[key].owner != stream}
        return used

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._shared.discard(key)
        info = self._handler.tensors_accessed.accesses.pop(key)
        waiting = {block.owner, *block.recorded}
        for access in (*info.reads, *([info.write] if info.write else [])):
            is_behind = (
                stream == access.stream or self._handler.syncs.is_ordered_after(stream, access.seq_num, access.stream)
                for stream in waiting
            )
            if not any(is_behind):
                owner = self.names[block.owner]
                self._found(Kind.MEMORY, f"{owner} gets memory that was freed, and may still be used by", access)

    def _host_is_behind(self, stream: int, number: int) -> bool:
        return self._handler.syncs.host_sync_state.get(stream, 0) >= number

    def _check_copy(self, copy: _Copy, operator: str) -> None:
        if not self._host_is_behind(copy.stream, copy.number):
            text = f"the host reads ({operator}) what {self.names[copy.stream]} copies, and has not waited for it"
            self.faults.append(Fault(Kind.HOST, text, _in_backward()))

    def _report(self, found: Sequence[sanitizer.SynchronizationError]) -> None:
        for error in found:
            assert isinstance(error, sanitizer.UnsynchronizedAccessError)
            now, before = error.current_access, error.previous_access
            if before.operator == _REUSE:
                owner = self.names[before.stream]
                self._found(Kind.MEMORY, f"{owner} may still use memory, from before it was given to", now)
            else:
                self._found(Kind.RACE, f"{self._described(now)} may overtake", before)

    def _found(self, kind: Kind, text: str, access: sanitizer.Access) -> None:
        self.faults.append(Fault(kind, f"{text} {self._described(access)}", _in_backward()))

    def _described(self, access: sanitizer.Access) -> str:
        verb = "reads" if access.type is sanitizer.AccessType.READ else "writes"
        frames = [frame for frame in access.stack_trace if not frame.filename.startswith(_NOBODYS_FRAMES)]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{access.operator}, which {verb} on {self.names[access.stream]}{place}"


class Kernels(TorchDispatchMode):
    """Shows every operation to ``order`` as a kernel of the stream that ``current`` returns."""

    def __init__(self, order: Order, current: Callable[[], int]) -> None:
        super().__init__()
        self._order, self._current = order, current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        reads, writes, made = accesses(func, args, kwargs, output)
        self._order.kernel(str(func), self._current(), reads=reads, writes=writes, made=made)
        return output


def accesses(func: Any, args: Any, kwargs: Any, output: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Which tensors an operation reads, which it writes, and which it allocated."""
    reads, writes, seen = [], [], set()
    for argument, value in sanitizer.zip_arguments(func._schema, args, kwargs):
        tensors = _tensors(value)
        seen |= {*map(_key, tensors)}
        if argument.alias_info is None:
            reads += tensors
        elif argument.alias_info.is_write:
            writes += tensors
    outputs = _tensors(output)
    made = [tensor for tensor in outputs if _key(tensor) not in seen]
    name = func._schema.name.split("::")[1]
    if func.namespace == "c10d":  # its schemas do not say what is written
        return [], reads + writes + made, made
    if name.startswith("new_") or name.endswith("_like") or (outputs and not made and not writes):
        reads = []  # the shape alone; and views, whatever their schemas say
    return reads, writes if "empty" in name else writes + made, made


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None
