#!/usr/bin/env python3
"""Measure what LSH-MoE costs in quality: train the same small GPT with each codec, and with the control that is fair.

Flow: check the request -> make the data, unless --data names some -> train what is not trained yet, a child process and
a core for each run -> write JSON, CSV and an HTML report, print a table. The parts are in codec_study/.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import atomic
import provenance
from ablation import analysis as ablation
from codec_study import cost, folder
from codec_study.about import ABOUT, EPILOG
from codec_study.analysis import rows
from codec_study.arms import MODELS, SIZES, Arm, Run, Settings, all_arms
from codec_study.jobs import Command, Jobs, training_command
from command_line import exit_code, positive, stoppable, stopped_by
from studies import kept
from studies.request import Section, StudyParser

MOST = 1 << 16
"""Of sequences, or of tokens of an expert: a training holds them in memory."""
OF_TRAININGS = (
    *("output", "data", "models", "arms", "seeds", "iterations", "eval_every", "eval_sequences"),
    *("tokens_per_expert", "jobs"),
)
"""Options that ``--from`` would ignore."""
OF_SHOWING = ("write_results", "write_advice", "step_times")
"""Options that belong to ``--from``."""


def make_parser() -> StudyParser:
    """The command line."""
    parser = StudyParser("ablate_codec.py", None, ABOUT, EPILOG)
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder for runs and results; a second call goes on in it")
    data = "what tools/preprocess_data.py wrote (default: the standard library, made in OUTPUT/data)"
    add("--data", type=Path, metavar="DIR", help=data)
    add("--models", default=",".join(MODELS), metavar="NAME,...", help="of %(default)s (default all)")
    add("--arms", default="", metavar="NAME,...", help="arms to train; --list-arms prints them (default all)")
    for name, default, what in (
        ("seeds", 3, "trainings of each arm"),
        ("iterations", 1000, "steps of a training"),
        ("eval-every", 100, "steps between two evaluations; --iterations is a multiple of it"),
        ("eval-sequences", 320, "held-back sequences of 256 tokens of each evaluation, a multiple of the batch"),
        ("tokens-per-expert", 1024, "mean tokens of an expert in a step, on which the rate depends; sets the batch"),
        ("jobs", len(os.sched_getaffinity(0)), "ranks of trainings at once; the default is the number of cores"),
    ):
        add(f"--{name}", type=positive, default=default, metavar="N", help=f"{what} (default %(default)s)")
    parser.add_shared(section="the figures, and which goals they reach,")
    advice = "with --from: write which codec to use, when, and at what price between the marks in this Markdown file; "
    advice += "step times and bytes are those of --step-times"
    add("--write-advice", type=Path, metavar="FILE", help=advice)
    times = "with --from: a result of tools/ablate_overlap.py, whose step times make wall time of steps"
    add("--step-times", type=Path, metavar="DIR", help=times)
    encoding = "time hashing, centroids and residuals beside an expert MLP on the same 8192 x 1024 rows, and end; "
    encoding += "with --output DIR keep the times there, where --from judges them"
    add("--encoding-cost", action="store_true", help=encoding)
    return parser


def check_request(parser: StudyParser, args: argparse.Namespace) -> tuple[list[str], list[Arm], Settings]:
    """Refuse before anything starts; returns models, arms and settings."""
    models = _chosen(parser, "--models", args.models, list(MODELS), "give some of " + ", ".join(MODELS))
    arms = all_arms()
    names = _chosen(parser, "--arms", args.arms, [arm.name for arm in arms], "--list-arms prints them")
    packages = ("jinja2", "matplotlib", "rich", "tensorboard", "torch", "megatron")
    parser.check_measuring(args, packages, example="a folder, such as --output study")
    _check_folder(parser, args.output)
    if args.iterations % args.eval_every:
        parser.error(f"--iterations {args.iterations} is no multiple of --eval-every {args.eval_every}; make it one")
    for flag, most in {
        "jobs": 4 * len(os.sched_getaffinity(0)),
        "eval_sequences": MOST,
        "tokens_per_expert": MOST,
    }.items():
        if getattr(args, flag) > most:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} needs more than a machine has; use {most}")
    settings = Settings(args.iterations, args.eval_every, args.eval_sequences, args.tokens_per_expert)
    chosen = [arm for arm in arms if arm.name in names]
    for arm in chosen if args.arms else ():
        if not any(arm.fits(model) for model in models):
            parser.error(
                f"the arm {arm.name!a} is one of models whose tokens have {arm.topk} experts; add --models top-2"
            )
    for arm in chosen:
        unit, what = arm.share.as_integer_ratio()[1], f"of which the arm {arm.name!a} trains a part"
        _check_multiple(parser, "--eval-every", args.eval_every, unit, what)
    for model in models:
        per_sequence, what = MODELS[model].tokens_per_expert, f"what one sequence gives an expert of {model}"
        _check_multiple(parser, "--tokens-per-expert", args.tokens_per_expert, per_sequence, what)
        ranks, what = max(arm.ranks for arm in chosen), f"what a sequence on each rank gives an expert of {model}"
        _check_multiple(parser, "--tokens-per-expert", args.tokens_per_expert, ranks * per_sequence, what)
        _check_multiple(parser, "--eval-sequences", args.eval_sequences, settings.batch(model), f"the batch of {model}")
    if args.data is not None and not (args.data / folder.MANIFEST).is_file():
        parser.error(f"--data {str(args.data)!a} has no {folder.MANIFEST}; make it with tools/preprocess_data.py")
    return models, chosen, settings


def _check_folder(parser: StudyParser, output: Path) -> None:
    if reason := atomic.obstacle_of_folder(output):
        parser.error(f"--output {str(output)!a} cannot be written: {reason}; name another folder")


def _make_folder(parser: StudyParser, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # what does not show before it is tried
        parser.error(f"--output {str(output)!a} cannot be made: {error.strerror}; name another folder")


def _encoding(parser: StudyParser, kept: Path) -> cost.Cost | None:
    """What encoding costs, as an earlier call has left it in the folder ``kept``."""
    fix = "remove it, or measure anew with --encoding-cost"
    return parser.read(f"{str(kept / cost.FILE)!a}", lambda: cost.read(kept), fix)


def _chosen(parser: StudyParser, flag: str, text: str, known: list[str], fix: str) -> list[str]:
    """The words of ``text``, each of which is known; all that are known for none."""
    chosen = [word.strip() for word in text.split(",") if word.strip()]
    for word in chosen:
        if word not in known:
            parser.error(f"{flag} has {word[:60]!a}, which is unknown; {fix}")
    return chosen or known


def _check_multiple(parser: StudyParser, flag: str, value: int, unit: int, what: str) -> None:
    if value % unit:
        parser.error(f"{flag} {value} is no multiple of {unit}, {what}; use {max(value // unit, 1) * unit}")


def study(parser: StudyParser, args: argparse.Namespace, command: Command | None = None) -> int:
    """Train what is not trained yet and write the results; ``command`` takes the place of the real training."""
    models, arms, settings = check_request(parser, args)
    encoding = _encoding(parser, args.output)
    earlier = f"--output {str(args.output)!a}"
    fix = "restore that file, remove it if it is a run's, or name another folder"
    parser.read(earlier, lambda: folder.results(args.output), fix, words=300)
    meta = provenance.provenance()
    _make_folder(parser, args.output)
    data = args.data.resolve() if args.data else folder.made_data(args.output.resolve() / "data")
    shared = {**asdict(settings), "data": folder.described_data(data)}
    if difference := parser.read(earlier, lambda: folder.settings_difference(args.output, shared), fix, words=300):
        parser.error(f"{earlier} holds runs of {difference}; give the old value, or another folder")
    # All arms of a seed before the next seed: what is there after a while can be compared.
    seeds = range(1, args.seeds + 1)
    runs = [Run(model, arm, seed) for seed in seeds for model in models for arm in arms if arm.fits(model)]
    origin = {"commit": meta["commit"], "changed_files": meta["changed_files"], "processor": provenance.processor()}
    command = command or training_command(settings, data)
    jobs = Jobs(args.output.resolve() / folder.RUNS, settings, command, origin=origin, say=_say)
    try:
        failed = jobs.train(runs, args.jobs)
    finally:  # what there is, after ^C too
        write(args.output, {**meta, **shared, "sizes": SIZES}, folder.results(args.output), encoding)
    if failed:
        _say(f"ablate_codec.py: {len(failed)} of {len(runs)} trainings failed: {', '.join(run.name for run in failed)}")
    return 1 if failed else 0


def write(output: Path, meta: dict[str, Any], results: list[dict[str, Any]], encoding: cost.Cost | None) -> None:
    """Write what all calls have trained into ``output``, where anything is."""
    from codec_study.render import write_results  # noqa: PLC0415 - draws pictures, for which a refusal need not wait

    if results:
        seeds = min(len(row.seeds) for row in rows(results))  # of the arm that has fewest
        commits = sorted({result["commit"] for result in results})
        meta = {**meta, "seeds": seeds, "commits_of_runs": commits}
        write_results(output, {"meta": meta, "runs": results, "encoding": encoding})


def show_again(parser: StudyParser, args: argparse.Namespace) -> None:
    """Print the tables of an earlier call, write its report anew and, if asked for, its section of a document."""
    from codec_study import advice, goals, render, wall_time  # noqa: PLC0415 - as above

    for flag in OF_TRAININGS:
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--from trains nothing and shows all that there is; leave --{flag.replace('_', '-')} out")
    beside: dict[str, Any] = {"encoding": _encoding(parser, args.source)}
    timed = None
    if args.step_times is not None:
        flag = f"--step-times {str(args.step_times)!a}"
        beside["step_times"] = parser.read(flag, lambda: wall_time.read(args.step_times))
        timed = ablation.read(args.step_times)
    advised = partial(advice.section, timed=timed)
    parser.write_again(
        args,
        read=lambda source: {**folder.read(source), **beside},
        sections=[
            Section("--write-results", args.write_results, (goals.BEGIN, goals.END), render.markdown),
            Section("--write-advice", args.write_advice, (advice.BEGIN, advice.END), advised),
        ],
        html=render.html,
        table=render.print_table,
    )


def time_encoding(parser: StudyParser, args: argparse.Namespace) -> None:
    """Print what encoding costs, and keep it in ``--output`` if given."""
    shows = {"--from": "source", **{f"--{name.replace('_', '-')}": name for name in OF_SHOWING}}
    for flag, name in shows.items():
        if getattr(args, name) is not None:
            parser.error(f"--encoding-cost measures and {flag} shows; leave one of them out")
    if args.output is not None:
        _check_folder(parser, args.output)
        _make_folder(parser, args.output)
    from codec_study import encoding  # noqa: PLC0415 - imports torch, which the others need not wait for

    measured = encoding.cost_of_encoding(repetitions=7)
    _say(cost.described(measured))
    if args.output is not None:
        kept.write(args.output / cost.FILE, measured)


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list_arms:
        print("\n".join(arm.name for arm in all_arms()))
        return 0
    if args.encoding_cost:
        return exit_code("ablate_codec.py", lambda: time_encoding(parser, args))
    if args.source is not None:
        return exit_code("ablate_codec.py", lambda: show_again(parser, args))
    return exit_code("ablate_codec.py", lambda: _stoppable_study(parser, args))


def _stoppable_study(parser: StudyParser, args: argparse.Namespace) -> int:
    with stoppable((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), once=False):
        try:
            return study(parser, args)
        except KeyboardInterrupt as interrupt:
            number = stopped_by(interrupt)
            _say(f"ablate_codec.py: stopped by {number.name}; the same command goes on from here")
            return 128 + number


if __name__ == "__main__":
    sys.exit(main())
