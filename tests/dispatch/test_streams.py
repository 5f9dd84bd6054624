"""The order of streams on a GPU, checked without one: whole models on two ranks, and faults that have to be found.

Every operation of a step is a kernel of a stand-in of CUDA's streams, every all-to-all one of NCCL's
(``stream_stand_ins.py``), and torch's CUDA sanitizer says what is in no order (``stream_order.py``).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from cases import cases
from models import Case
from stream_order import Fault, Kind
from stream_stand_ins import Event, Stream, Work, checked

from megatron_scmoe.contracts import Launch

EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
RECORDERS = ("megatron_scmoe.overlap.observe", "megatron_scmoe.overlap.recording")


class Run(NamedTuple):
    """What is checked: ``step`` on a model of ``case``."""

    step: str
    case: Case = Case()
    stash: bool = True


class Seen(NamedTuple):
    """What came of it on one rank."""

    num_kernels: int
    streams: set[str]
    faults: list[Fault]

    def words(self) -> str:
        """Each fault once, and how often."""
        return "\n".join(f"{count} x {text}" for text, count in Counter(map(str, self.faults)).most_common())


# ---- what runs on the ranks ---------------------------------------------------------------------------------------


def train(case: Case) -> None:
    """A step with two micro-batches in flight."""
    models.losses_and_gradients(case, num_micro_batches=2)


def launch_aside(case: Case, launch: Launch) -> None:
    """The same, with dispatches launched by the side stream, within or behind the ops at their taps."""
    models.losses_and_gradients(case, num_micro_batches=2, launch=launch)


def evaluate(case: Case) -> None:
    model = models.build(case).eval()
    with torch.no_grad():
        for tokens, labels, positions in models.my_batch(2):
            model(tokens, positions, None, labels=labels)


def record(case: Case, *, sequential: bool = False) -> None:
    """A step as a report asks for it, or, in sequence, as the adaptive overlap measures with."""
    from megatron_scmoe.overlap import observe
    from megatron_scmoe.overlap.costs import passes_of
    from megatron_scmoe.overlap.plan import sequential_plan

    model = models.build(case)
    for layer in model.decoder.layers:
        if sequential and getattr(layer, "span", None) is not None:
            layer.span.plan = sequential_plan(layer.span.shape, case.chunks)
    with observe.recording() as recorded:
        for tokens, labels, positions in models.my_batch(2):
            model(tokens, positions, None, labels=labels).sum().backward()
    assert isinstance(recorded._began.event, Event) and recorded.transfers and passes_of(recorded)


def hold_rate(case: Case) -> None:
    """Steps whose codec is held at a rate, and moved between them."""
    from megatron_scmoe.codec.rate import RateControl, adjust_rates

    model = models.build(case)
    makers = [layer.cargo_maker for layer in model.decoder.layers if hasattr(layer, "cargo_maker")]
    for maker in makers:
        maker.rate_control = RateControl(0.3, case.hashes, case.width)
    for tokens, labels, positions in models.my_batch(2):
        model(tokens, positions, None, labels=labels).sum().backward()
        adjust_rates([maker.rate_control for maker in makers], dist.group.WORLD)


def train_stock(case: Case) -> None:
    """The stock model in as many chunks."""
    import test_pipelined

    test_pipelined.losses_and_gradients("top-2", case.chunks)


STEPS: dict[str, Callable[[Case], None]] = {
    "train": train,
    "launch within": functools.partial(launch_aside, launch=Launch.WITHIN),
    "launch behind": functools.partial(launch_aside, launch=Launch.BEHIND),
    "evaluate": evaluate,
    "record": record,
    "measure": functools.partial(record, sequential=True),
    "hold rate": hold_rate,
    "train stock": train_stock,
}


def seen_on_rank(runs: dict[str, Run], mutant: str = "") -> dict[str, Seen]:
    """Check each of ``runs``, with a fault in the package or without."""
    found = {}
    for name, (step, case, stash) in runs.items():
        with checked(stash=stash, cuda_for=RECORDERS) as order, MUTANTS[mutant]() if mutant else nullcontext():
            try:
                STEPS[step](case)
            except Exception as error:
                error.add_note(f"in case {name!r}")
                raise
        found[name] = Seen(order.num_kernels, set(order.names.values()), order.faults)
    return found


# ---- right ----------------------------------------------------------------------------------------------------------

POS1 = Case(position=("pos1",))
LATE = Case(span=2, landing=1)
FARSKIP = LATE.replace(moe_every=1, position=("farskip",))
DGMOE = Case(shortcut="dgmoe")
LSH = Case(codec="lsh")
LLOYD = LSH.replace(refinement="lloyd", topk=2, hashes=2)
LONGCAT = Case(router="longcat", zero_experts=3, topk=3, combine="add")
UNIQUE = Case(topk=2, unique="rank")
FP8 = Case(
    topk=2, codec="fp8", transfers=("dispatch-forward", "combine-forward", "dispatch-backward", "combine-backward")
)

QUICK = {
    "pos1": Run("train", POS1),
    "pos2": Run("train"),
    "pos3": Run("train", Case(position=("pos3",), topk=2)),
    "farskip": Run("train", FARSKIP),
    "dgmoe": Run("train", DGMOE),
    "late landing": Run("train", LATE),
    "two chunks, bf16": Run("train", Case(chunks=2, dtype=torch.bfloat16)),
    "four chunks": Run("train", Case(chunks=4)),
    "launched behind": Run("launch behind"),
    "launched behind, late landing": Run("launch behind", LATE),
    "launched behind, full recompute": Run("launch behind", Case(recompute="full")),
    "launched within": Run("launch within", POS1),
    "launched within, attention recompute": Run("launch within", POS1.replace(recompute="core_attn")),
    "nothing overlaps": Run("train", Case(overlap="off")),
    "a wire that holds nothing": Run("train", Case(chunks=2), stash=False),
    "full recompute": Run("train", Case(recompute="full")),
    "selective recompute": Run("train", Case(recompute="mlp")),
    "evaluation": Run("evaluate", Case(chunks=2)),
    "capacity": Run("train", Case(topk=2, capacity=1.0)),
    "padded": Run("train", Case(topk=2, capacity=1.0, padded=True)),
    "unique": Run("train", UNIQUE.replace(chunks=2)),
    "unique, evaluation": Run("evaluate", UNIQUE.replace(latent=8)),
    "fp8": Run("train", FP8.replace(chunks=2)),
    "fp8, launched behind": Run("launch behind", FP8.replace(dtype=torch.bfloat16)),
    "lsh": Run("train", LSH.replace(chunks=2)),
    "lsh, lloyd, low rank": Run("train", LLOYD.replace(compensation="lowrank")),
    "lsh, held rate": Run("hold rate", LSH.replace(hashes=4)),
    "lsh, evaluation with centroids": Run("evaluate", LSH.replace(evaluation="centroids")),
    "latents, zero experts": Run("train", LONGCAT.replace(latent=8, chunks=2)),
    "recorded": Run("record", Case(chunks=2)),
    "measured in sequence": Run("measure", Case(chunks=2)),
    "stock in chunks": Run("train stock", Case(chunks=2)),
}
FULL = {
    "every block": Run("train", Case(moe_every=1, position=("pos1",))),
    "every third block": Run("train", Case(moe_every=3, num_groups=1)),
    "farskip, four groups": Run("train", FARSKIP.replace(num_groups=4, span=4)),
    "late landing, dgmoe, chunks": Run("train", LATE.replace(shortcut="dgmoe", landing=3, chunks=2)),
    "late landing, recompute": Run("train", LATE.replace(recompute="full", recompute_blocks=4)),
    "dgmoe, four chunks, bf16": Run("train", DGMOE.replace(chunks=4, dtype=torch.bfloat16)),
    "dgmoe, full recompute": Run("train", DGMOE.replace(recompute="full")),
    "dgmoe, shared": Run("train", DGMOE.replace(share_groups=2)),
    "shared, three groups": Run("train", Case(num_groups=3, share_groups=3, combine="cg2", topk=2)),
    "upstream's norms": Run("train", Case(norms="upstream", combine="add")),
    "attention recompute": Run("train", Case(recompute="core_attn", chunks=2)),
    "shared expert recompute": Run("train", Case(recompute="shared_experts")),
    "prediction layer": Run("train", Case(predictions=1)),
    "launched behind, pos1": Run("launch behind", POS1),
    "launched behind, dgmoe": Run("launch behind", DGMOE),
    "launched within, dgmoe": Run("launch within", DGMOE.replace(position=("pos3",))),
    "launched within, late landing": Run("launch within", POS1.replace(span=2, landing=2)),
    "launched within, full recompute": Run("launch within", POS1.replace(recompute="full")),
    "launched within, chunks": Run("launch within", POS1.replace(chunks=2, expert_slot=("2,3",))),
    "unique, zero experts, bf16": Run("train", LONGCAT.replace(unique="rank", dtype=torch.bfloat16)),
    "unique, apart": Run("train", UNIQUE.replace(weights_apart_above=0.0)),
    "unique, padded": Run("train", UNIQUE.replace(capacity=1.0, padded=True)),
    "unique, full recompute": Run("train", UNIQUE.replace(recompute="full")),
    "unique, a wire that holds nothing": Run("train", UNIQUE, stash=False),
    "unique, measured in sequence": Run("measure", UNIQUE.replace(chunks=2)),
    "fp8, apart": Run("train", FP8.replace(weights_apart_above=0.0)),
    "fp8, unique, a wire that holds nothing": Run("train", FP8.replace(unique="rank"), stash=False),
    "fp8, padded, full recompute": Run("train", FP8.replace(capacity=1.0, padded=True, recompute="full")),
    "bf16 rows": Run("train", FP8.replace(codec="bf16")),
    "lsh, dgmoe": Run("train", LSH.replace(shortcut="dgmoe")),
    "lsh, no compensation, four chunks": Run("train", LSH.replace(compensation="none", chunks=4)),
    "lsh, full recompute": Run("train", LSH.replace(recompute="full")),
    "lsh, bf16, latents": Run("train", LSH.replace(dtype=torch.bfloat16, latent=8)),
    "lsh, capacity, padded": Run("train", LSH.replace(topk=2, capacity=2.0, padded=True)),
    "lsh, held rate, lloyd, chunks": Run("hold rate", LLOYD.replace(hashes=4, chunks=2)),
    "lsh, recorded": Run("record", LSH),
    "lsh, a wire that holds nothing": Run("train", LSH, stash=False),
    "dgmoe, a wire that holds nothing": Run("train", DGMOE.replace(chunks=2), stash=False),
    "dgmoe, evaluation": Run("evaluate", DGMOE),
    "dgmoe, measured in sequence": Run("measure", DGMOE),
    "late landing, measured in sequence": Run("measure", LATE),
    "padded, two chunks": Run("train", Case(topk=2, capacity=1.0, padded=True, chunks=2)),
    "stock in four chunks": Run("train stock", Case(chunks=4)),
}
KINDS = {"quick": QUICK, "full": FULL}


@functools.cache
def outcome(kind: str, mutant: str) -> list[dict[str, Seen]] | ranks.RankError:
    """By rank, of all cases of a kind: one start for all, also where it fails."""
    try:
        return ranks.run(seen_on_rank, 2, KINDS[kind], mutant, layout=EP2, timeout_s=500)
    except ranks.RankError as error:
        return error


def seen(kind: str, name: str, mutant: str = "") -> list[Seen]:
    """By rank, of one case."""
    found = outcome(kind, mutant)
    if isinstance(found, ranks.RankError):
        raise found
    return [of_rank[name] for of_rank in found]


ALL = [(kind, name) for kind, runs in KINDS.items() for name in runs]


@pytest.mark.parametrize(("kind", "name"), cases(ALL, [case for case in ALL if case[0] == "quick"]))
def test_streams_are_in_order(kind, name):
    for found in seen(kind, name):
        assert not found.faults, found.words()
        assert found.num_kernels > 300 and "nccl" in found.streams


# ---- wrong ----------------------------------------------------------------------------------------------------------


@contextmanager
def launches(change: Callable[[Callable[..., Work], Any, Any], Work]) -> Iterator[None]:
    """All-to-alls are launched by ``change``, which gets the launch and its arguments."""
    launch = dist.all_to_all_single
    with mock.patch.object(dist, "all_to_all_single", lambda *args, **options: change(launch, args, options)):
        yield


def in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


def no_wait(*, backward: bool) -> Any:
    def change(launch: Callable[..., Work], args: Any, options: Any) -> Work:
        work = launch(*args, **options)
        if work is not None and in_backward() is backward:  # stock layers block
            work.wait = lambda: True
        return work

    return launches(change)


def freed_at_launch() -> Any:
    from megatron_scmoe.dispatch.exchange import _Leg

    launch = _Leg.launch

    def mutant(leg: Any, *args: Any) -> None:
        launch(leg, *args)
        assert leg._sent is not None
        leg._sent = None

    return mock.patch.object(_Leg, "launch", mutant)


def counts_not_waited_for() -> Any:
    return mock.patch.object(Event, "synchronize", lambda _event: None)


def launch_elsewhere() -> Any:
    stray = torch.cuda.Stream(name="stray")

    def change(launch: Callable[..., Work], args: Any, options: Any) -> Work:
        with torch.cuda.stream(stray):
            return launch(*args, **options)

    return launches(change)


@contextmanager
def wait_elsewhere() -> Iterator[None]:
    """The side stream waits as soon as it has launched, and main for the side stream where it needs what arrived."""
    side = torch.cuda.Stream(name="side")

    def change(launch: Callable[..., Work], args: Any, options: Any) -> Work:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work = launch(*args, **options)
            work.wait()
        work.wait = lambda: torch.cuda.current_stream().wait_stream(side)
        return work

    with launches(change), freed_at_launch():
        yield


def side_stream_waits_for_nothing() -> Any:
    wait = Stream.wait_event
    return mock.patch.object(Stream, "wait_event", lambda one, event: None if one.priority else wait(one, event))


def received_is_not_recorded() -> Any:
    return mock.patch.object(torch.Tensor, "record_stream", lambda _tensor, _stream: None)


def received_is_of_the_main_stream() -> Any:
    new_empty = torch.Tensor.new_empty

    def mutant(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.default_stream()):
            return new_empty(tensor, *args, **options)

    return mock.patch.object(torch.Tensor, "new_empty", mutant)


MUTANTS: dict[str, Callable[[], Any]] = {
    "wait dropped in forward": functools.partial(no_wait, backward=False),
    "wait dropped in backward": functools.partial(no_wait, backward=True),
    "payload freed before the wait": freed_at_launch,
    "counts read before their copy arrived": counts_not_waited_for,
    "launch on the wrong stream": launch_elsewhere,
    "wait on the launching side stream (pytorch 188655)": wait_elsewhere,
    "side stream waits for nothing": side_stream_waits_for_nothing,
    "side stream waits for nothing, within attention": side_stream_waits_for_nothing,
    "what a launch aside receives is not recorded": received_is_not_recorded,
    "what a launch aside receives lies in memory of the main stream's": received_is_of_the_main_stream,
}


class Finding(NamedTuple):
    """What has to be found of a mutant: kinds in forward and backward, and words of every fault of theirs."""

    forward: set[Kind]
    backward: set[Kind]
    words: str
    run: Run = Run("train")


FINDINGS = {
    "wait dropped in forward": Finding({Kind.RACE}, set(), "may overtake all_to_all, which writes on nccl"),
    "wait dropped in backward": Finding(set(), {Kind.RACE}, "may overtake all_to_all, which writes on nccl"),
    "payload freed before the wait": Finding(
        {Kind.MEMORY},
        {Kind.MEMORY},
        "main gets memory that was freed, and may still be used by all_to_all, which reads on nccl",
        Run("train", stash=False),
    ),
    "counts read before their copy arrived": Finding({Kind.HOST}, set(), "what counts copies, and has not waited"),
    "launch on the wrong stream": Finding({Kind.RACE, Kind.MEMORY}, {Kind.RACE, Kind.MEMORY}, "all_to_all, which"),
    "wait on the launching side stream (pytorch 188655)": Finding(
        {Kind.MEMORY},
        {Kind.MEMORY},
        "main gets memory that was freed, and may still be used by all_to_all, which reads on nccl",
    ),
    "side stream waits for nothing": Finding(
        {Kind.RACE}, set(), "all_to_all, which reads on nccl", Run("launch behind")
    ),
    "side stream waits for nothing, within attention": Finding(
        {Kind.RACE}, set(), "all_to_all, which reads on nccl", Run("launch within", POS1)
    ),
    "what a launch aside receives is not recorded": Finding(
        {Kind.MEMORY}, set(), "gets memory that was freed, and may still be used by", Run("launch behind")
    ),
    "what a launch aside receives lies in memory of the main stream's": Finding(
        {Kind.MEMORY}, set(), "main may still use memory, from before it was given to all_to_all", Run("launch behind")
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_fault_is_found(mutant):
    finding = FINDINGS[mutant]
    for of_rank in ranks.run(seen_on_rank, 2, {mutant: finding.run}, mutant, layout=EP2):
        found = of_rank[mutant]
        for backward, kinds in ((False, finding.forward), (True, finding.backward)):
            assert {fault.kind for fault in found.faults if fault.in_backward is backward} == kinds, found.words()
        assert all(finding.words in str(fault) for fault in found.faults), found.words()


@pytest.mark.parametrize(("kind", "name"), cases(ALL, []))
def test_every_case_would_show_it(kind, name):
    """Negative control of each case: without waits in forward it is not in order."""
    for found in seen(kind, name, "wait dropped in forward"):
        assert Kind.RACE in {fault.kind for fault in found.faults}
