"""tools/plan.py: what it says is the dry run's, the solver's, or the model of time's; what it finds is the fastest."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import commands
import pytest
import ranks
from training import ROOT, SCMOE, STOCK_SHARED_EXPERT, with_flags, without_flag

TOOL = ROOT / "tools" / "plan.py"
sys.path.insert(0, str(TOOL.parent))
from command_line import UserError  # noqa: E402
from planning import counts, dry, hardware, recipe, report, request, running, whatif  # noqa: E402
from planning import settings as plan_settings  # noqa: E402
from planning.step import predict  # noqa: E402
from planning.workload import Attention, Mlp, Moe, Output, Span  # noqa: E402
from planning.workload import Layout as Sizes  # noqa: E402

GIB = 2**30
BASE = with_flags(
    [*SCMOE, "--bf16"],
    *("--num-layers 8", "--hidden-size 256", "--num-attention-heads 8", "--ffn-hidden-size 1024", "--num-experts 8"),
    *("--moe-ffn-hidden-size 512", "--moe-shared-expert-intermediate-size 512", "--seq-length 512", "--train-iters 1"),
    *("--max-position-embeddings 512", "--vocab-size 4000", "--micro-batch-size 1", "--global-batch-size 16"),
)
MICRO_BATCH = "--micro-batch-size"
EP2 = with_flags(BASE, "--expert-model-parallel-size 2")  # with 1 Core does not tell experts from the rest
DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
H100 = hardware.machine("H100")


def of_flags(flags, gpus, function, *arguments):
    """What ``function`` makes of a dry run; in a process that has imported Megatron."""
    (found,) = ranks.run(on_dry_run, 1, flags, gpus, function, arguments, distributed=False)
    return found


def on_dry_run(flags, gpus, function, arguments):
    return function(dry.dry_run(flags, gpus), *arguments)


def run_of(found):
    from megatron_scmoe.training.arguments import scmoe_config_from_args

    return whatif.Run(found.args, scmoe_config_from_args(found.args), [stage.blocks for stage in found.stages])


# ---- reading --------------------------------------------------------------------------------------------------------


def workload_and_counts(found):
    workload = run_of(found).workload
    held = [(stage.in_the_model.dense, stage.in_the_model.expert) for stage in found.stages]
    return workload, held


FORMS = {
    "scmoe": (EP2, 2),
    "stages": (with_flags(BASE, "--pipeline-model-parallel-size 2", "--expert-model-parallel-size 4"), 8),
    "spans": (with_flags(EP2, "--shortcut-span 2", "--shortcut-landing 1"), 2),
    "stock": (with_flags(STOCK_SHARED_EXPERT, "--bf16", "--expert-model-parallel-size 2"), 2),
    "latent attention": (
        with_flags(
            [*EP2, "--multi-latent-attention"],
            *(
                "--q-lora-rank 64",
                "--kv-lora-rank 32",
                "--qk-head-dim 16",
                "--qk-pos-emb-head-dim 8",
                "--v-head-dim 16",
            ),
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_parameters_add_up(name):
    """Those of the ops that the namespace was read as are those of the modules that the dry run has built."""
    flags, gpus = FORMS[name]
    workload, held = of_flags(flags, gpus, workload_and_counts)
    for stage, (dense, expert) in zip(workload.stages, held, strict=True):
        counted = sum((counts.parameters(op, workload) for op in stage), counts.Parameters())
        assert counted.expert == expert
        assert dense * 0.97 <= counted.dense <= dense, (name, counted, dense)  # norms and biases are not counted
        fewer = replace(workload, hidden=workload.hidden * 15 // 16)  # negative control
        assert sum(counts.parameters(op, fewer).dense for op in stage) < dense * 0.97


def test_ops_of_a_span_are_those_of_its_groups():
    workload, _ = of_flags(*FORMS["spans"], workload_and_counts)
    (stage,) = workload.stages
    spans = [op for op in stage if isinstance(op, Span)]
    assert len(spans) == 2 and isinstance(stage[-1], Output)
    kinds = [type(op).__name__ for op in spans[0].ops]
    assert kinds == ["Attention", "Mlp", "Attention", "Mlp", "GroupEnd"] * 2
    assert len(spans[0].ops) == spans[0].shape.num_ops and len(spans[0].calls) == 2
    assert [call.late for call in spans[0].shape.calls] == [True, False]


def test_a_stock_layer_has_its_shared_expert_with_it():
    workload, _ = of_flags(*FORMS["stock"], workload_and_counts)
    layers = [op for stage in workload.stages for op in stage if not isinstance(op, Attention)]
    assert [type(op) for op in layers[1:-1]] == [Mlp, Moe] * 2
    assert layers[2].shared == Mlp(width=24) and layers[2].top_k == 1


def full_report(found, request):
    run = run_of(found)
    overlaps, what_if = (
        [(one, predict(one.workload, H100)) for one in kind(run)] for kind in (whatif.overlaps, whatif.what_if)
    )
    prediction = predict(run.workload, H100)
    return report.result(
        request, found, H100, usable=H100.hardware.memory, prediction=prediction, overlaps=overlaps, what_if=what_if
    )


def test_what_is_said_is_what_was_found():
    """Parts add up to the step, spans are the solver's, memory is the dry run's; a variant says whether it runs."""
    flags = with_flags(BASE, "--expert-model-parallel-size 8", "--overlap adaptive")
    found = of_flags(flags, 16, full_report, {"gpus": 16, "gpu": "H100"})
    assert sum(found["parts"].values()) == pytest.approx(found["step_s"])
    for stage in found["memory"]:
        parts = ("weights", "gradients", "optimizer", "activations")
        assert sum(stage[name] for name in parts) == stage["total"]
    (span,) = found["spans"]
    assert span["limit_s"] <= span["predicted_s"] * (1 + 1e-9) and span["predicted_s"] <= span["sequential_s"]
    assert found["parts"].get("exposed EP", 0.0) == pytest.approx(span["count"] * span["exposed_s"], rel=1e-6, abs=1e-9)
    by_name = {one["name"]: one for one in found["overlaps"]}
    assert by_name["adaptive"]["step_s"] <= by_name["fixed"]["step_s"] <= by_name["off"]["step_s"] * (1 + 1e-9)
    variants = {one["name"]: one for one in found["what_if"]}
    assert (
        variants["fp8 dispatch"]["flags"] == "--a2a-codec fp8" and "--shortcut none" in variants["no shortcut"]["flags"]
    )
    assert variants["fp8 dispatch"]["a2a_s"] < found["a2a_s"]
    shown = [title for title, _, _ in report.tables(found)]
    assert len(shown) == 5 and f"{found['a2a_share']:.1%}" in shown[0]
    page = report.html(found, "the dry run")
    assert page.count("<svg") == 3 and "the dry run" in page and "http" not in page


def accepted(found):
    return found.args.world_size


STOCK_SHARED = with_flags(
    without_flag(without_flag(BASE, "--shortcut"), "--moe-router-pre-softmax"),
    *("--expert-model-parallel-size 8", "--moe-layer-freq [0,1]*4", "--moe-router-topk 2"),
)
STOCK_TOP_2 = without_flag(STOCK_SHARED, "--moe-shared-expert-intermediate-size")
ROUNDED = ("--a2a-codec fp8", "--fp8-transfers combine-forward")
TRIED = {
    "scmoe": (with_flags(BASE, "--expert-model-parallel-size 8"), 8),
    "rounded and sent once": (with_flags(STOCK_SHARED, *ROUNDED, "--a2a-unique rank"), 3),
    "stock, shared expert": (STOCK_SHARED, 5),
    "stock, top-2": (STOCK_TOP_2, 5),
    "stock, top-2 in each block": (without_flag(STOCK_TOP_2, "--moe-layer-freq"), 3),
}


@pytest.mark.parametrize("name", TRIED)
def test_flags_that_a_variant_names_are_accepted(name):
    """Those of ``runs today with``, each beside the others of the run."""
    flags, least = TRIED[name]
    found = of_flags(flags, 8, full_report, {"gpus": 8, "gpu": "H100"})
    named = [one["flags"] for one in (*found["what_if"], *found["overlaps"]) if one["flags"]]
    assert len(named) >= least, named
    for words in named:
        if words == "--shortcut none":
            continue  # drops flags that are the shortcut's alone
        if "--a2a-codec lsh" in words:
            with pytest.raises(ranks.RankError, match="is up to the data"):
                of_flags([*flags, *words.split()], 8, accepted)
            continue
        assert of_flags([*flags, *words.split()], 8, accepted) == 8, words


SMALL = with_flags([*BASE, *DISTRIBUTED], "--expert-model-parallel-size 1")


# ---- the command ----------------------------------------------------------------------------------------------------


def plan(*words, **environment):
    return commands.run(TOOL, *words, env={"CUDA_DEVICE_MAX_CONNECTIONS": "1", "COLUMNS": "200"} | environment)


def test_the_command_plans(tmp_path):
    found, page = tmp_path / "plan.json", tmp_path / "plan.html"
    words = ["--gpus", 16, "--gpu", "H100", "--network", 100, "--json", found, "--html", page]
    done = plan(*words, "--", *with_flags(BASE, "--expert-model-parallel-size 8"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("Dry run on 16 GPUs")
    kept = json.loads(found.read_text())
    assert kept["machine"]["hardware"]["network"] == 12.5e9 and kept["request"]["gpus"] == 16
    assert kept["units"].startswith("times in seconds, memory and what is on the wire in bytes")
    for words in (
        "constants: published steps",
        "A step:",
        "in sequence where everything waits",
        "On the wire",
        "slots",
        "With other overlaps",
        "fp8 dispatch: with --a2a-codec fp8",
        f"{kept['a2a_share']:.1%}",
    ):
        assert words in done.stdout
    assert page.read_text().startswith("<!DOCTYPE html>") and "DOES NOT FIT" not in done.stdout
    assert kept["fits"] and kept["usable_bytes"] == 0.9 * 80 * GIB and "DOES NOT FIT" not in page.read_text()
    crowded = plan("--gpus", 16, "--gpu", "H100", "--memory", 0.02, "--json", found, "--html", page, *FLAGS)
    assert crowded.returncode == 0 and "DOES NOT FIT: a rank holds" in crowded.stdout
    kept = json.loads(found.read_text())
    assert not kept["fits"] and kept["usable_bytes"] == 0.02 * GIB and "DOES NOT FIT" in page.read_text()


def test_the_command_as_a_user_calls_it():
    """A recipe, by its path; and help."""
    path = ROOT / "examples" / "recipes" / "gpt2-moe-small.sh"
    done = subprocess.run(
        [sys.executable, TOOL, "--recipe", path, "--gpu", "A30-PCIe"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "Dry run on 8 GPUs" in done.stdout and "8 x A30-PCIe" in done.stdout, done.stderr
    shown = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and all(name in shown.stdout for name in hardware.HARDWARE)


def test_who_reads_a_plan_may_end_first(tmp_path):
    """As head does: no word of it, and the files are there."""
    found = tmp_path / "plan.json"
    words = [sys.executable, TOOL, "--gpus", "8", "--gpu", "H100", "--json", found, *FLAGS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tool:
        tool.stdout.close()
        said = tool.stderr.read()
    assert (tool.returncode, said) == (-signal.SIGPIPE, "")
    assert json.loads(found.read_text())["request"]["gpus"] == 8


def test_numbers_of_gpus_that_a_layout_takes():
    """The nearest ones, of all that tensor, context and pipeline ranks, experts' ranks and batch divide."""
    rule = "Megatron's own rule: world size is not divisible by it"
    words = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3 --expert-model-parallel-size 4"
    words += " --expert-tensor-parallel-size 1 --micro-batch-size 2 --global-batch-size 24"
    flags = words.split()
    assert "--gpus 12 or 24, or" in request.gpus_instead(rule, flags, 18)
    assert "--gpus 72, or" in request.gpus_instead(rule, flags, 96) and "or 24" not in request.gpus_instead(
        rule, flags, 1
    )
    for refusal, its, gpus in ((rule, flags, 24), ("another rule", flags, 18), (rule, flags[:-2], 18)):
        assert request.gpus_instead(refusal, its, gpus) == ""


FLAGS = ["--", *BASE]
KEPT = ["--", *SMALL]
REFUSED = {
    "nothing": ([], "there is nothing to plan"),
    "no GPUs": (["--gpu", "H100", *FLAGS], "give --gpus N"),
    "no kind": (["--gpus", 8, *FLAGS], "give --gpu, one of A30-PCIe, A800-NVLink, H100"),
    "two kinds": (["--gpus", 8, "--gpu", "H100", "--machine", "m.json", *FLAGS], "one kind of GPU"),
    "an unknown kind": (["--gpus", 8, "--gpu", "V100", *FLAGS], "V100 is not known: choose one of A30-PCIe"),
    "GPUs that do not divide": (
        ["--gpus", 9, "--gpu", "H100", "--", *with_flags(BASE, "--expert-model-parallel-size 8")],
        "data_parallel_size (9); this layout and batch take --gpus 8 or 16, or give other sizes",
    ),
    "what the entry script refuses": (
        ["--gpus", 8, "--gpu", "H100", *FLAGS, "--moe-every", "3"],
        "pretrain_gpt_scmoe.py refuses: groups must be whole",
    ),
    "a flag that is none": (["--gpus", 8, "--gpu", "H100", *FLAGS, "--no-such-flag"], "unrecognized arguments"),
    "fp32": (["--gpus", 8, "--gpu", "H100", "--", *[w for w in BASE if w != "--bf16"]], "add --bf16"),
    "centroids": (["--gpus", 8, "--gpu", "H100", *FLAGS, "--a2a-codec", "lsh"], "--a2a-codec is lsh in a dry run"),
    "a recipe that is none": (["--recipe", "gpt5", "--gpu", "H100"], "gpt5 is no recipe; use one of"),
    "a machine that is none": (["--gpus", 8, "--machine", __file__, *FLAGS], "write one with --calibrate"),
    "a network that is none": (["--gpus", 8, "--gpu", "H100", "--network", 200, *FLAGS], "invalid choice"),
    "a folder": (["--gpus", 8, "--gpu", "H100", "--json", "/", *FLAGS], "--json / cannot be written: it is a folder"),
    "a recipe without a search": (["--gpus", 8, "--gpu", "H100", "--write-recipe", "x.sh", *FLAGS], "add --search"),
    "a number of settings without a search": (["--gpus", 8, "--gpu", "H100", "--top", "3", *FLAGS], "add --search"),
    "a check and a plan": (["--check", "--json", "x"], "--check is work of its own and has no use for --json"),
    "a check and a search": (["--check", "--search"], "has no use for --search"),
    "a calibration and a check": (["--calibrate", "x", "--check"], "--calibrate is work of its own"),
    "a calibration and a machine": (["--calibrate", "x", "--machine", "m"], "has no use for --machine"),
    "a calibration and flags": (["--calibrate", "x", *FLAGS], "has no use for flags behind --"),
    "a release of a machine": (
        ["--gpus", 8, "--machine", "m", "--release", "1", *FLAGS],
        "--release chooses among",
    ),
    "a network of a machine": (
        ["--gpus", 8, "--machine", "m", "--network", "100", *FLAGS],
        "--network is the port of a --gpu, and a --machine has the rate that was measured",
    ),
    "more memory than there is": (
        ["--gpus", 8, "--gpu", "H100", "--memory", "81", *FLAGS],
        "--memory is 81 GiB and H100 has 80.0 GiB",
    ),
    "one file for two": (
        ["--gpus", 8, "--gpu", "H100", "--json", "x", "--html", "./x", *FLAGS],
        "--json and --html are both x; name two files",
    ),
    "a machine that is written over": (
        ["--gpus", 8, "--machine", "m.json", "--json", "./m.json", *FLAGS],
        "--json m.json cannot be written: it lies in m.json, which is read",
    ),
    "a recipe that is written over": (
        ["--recipe", "scmoe-8b", "--gpu", "H100", "--search", "--write-recipe", "examples/recipes/scmoe-8b.sh"],
        "which is read",
    ),
    "what cannot be kept": (["--gpus", 8, "--gpu", "H100", "--search", "--keep", "dp", *FLAGS], "'dp' is none of tp"),
    "a layout that cannot be kept": (
        ["--gpus", 8, "--gpu", "H100", "--search", "--keep", "pp", *KEPT, "--pipeline-model-parallel-layout=Et|tL"],
        "cannot keep pp beside --pipeline-model-parallel-layout",
    ),
    "no micro-batch to keep": (
        ["--gpus", 8, "--gpu", "H100", "--search", "--keep", "tp,micro-batch", "--", *without_flag(SMALL, MICRO_BATCH)],
        "there is no micro-batch to keep: --micro-batch-size is not set",
    ),
    "a hybrid model of part groups": (
        [
            *("--gpus", 8, "--gpu", "H100", "--search", "--", "--hybrid-layer-pattern", "*E*E*E"),
            *("--moe-share-groups", 2),
        ],
        "--hybrid-layer-pattern has 3 groups and --moe-share-groups is 2; use a multiple",
    ),
    "no layers": (["--gpus", 8, "--gpu", "H100", "--search", "--", "--lr", "1"], "to know --num-layers"),
    "too little memory": (
        ["--gpus", 8, "--gpu", "H100", "--search", "--memory", "0.02", "--", *SMALL],
        "nothing fits into 0.0 GiB of each of 8 GPUs: the nearest of",
    ),
    "a number of GPUs that nothing divides": (
        ["--gpus", 7, "--gpu", "H100", "--search", "--", *SMALL],
        "no layout has 7 GPUs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    words, why = REFUSED[name]
    done = plan(*words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    said = r"((dry runs|search): .*\n)*plan.py: error: .*\n"  # progress, where that takes long
    assert re.fullmatch(said, done.stderr) and why in done.stderr, done.stderr


def test_a_recipe_is_not_written_over_what_it_sources(tmp_path):
    """Directly or not: a shell would source it without end."""
    mine, on_top, other = (tmp_path / name for name in ("mine.sh", "on top.sh", "other.sh"))
    for path, base in ((mine, "scmoe-8b"), (on_top, str(mine))):
        path.write_text(recipe.text("", base, 1, [], {}))
    for target in (mine, on_top, ROOT / "examples" / "recipes" / "scmoe-8b.sh"):
        done = plan("--recipe", on_top, "--gpu", "H100", "--search", "--write-recipe", target)
        assert done.returncode == 2 and f"--write-recipe {target} cannot be written" in done.stderr, done.stderr
    assert other not in recipe.files(str(on_top)) and len(recipe.files(str(on_top))) == 3


def test_a_machine_is_possible():
    good = H100.as_json()
    assert hardware.Machine.from_json(good) == H100
    for name, value in (
        *(("sms", 0), ("sms", 1.5), ("link", 0), ("memory_bandwidth", -1.0), ("network", float("nan"))),
        *(("bf16", float("inf")), ("memory", "80"), ("domain", True), ("fp8", None)),
    ):
        with pytest.raises(ValueError, match=f"{name} of H100 is .*: it has to be a"):
            hardware.Machine.from_json(good | {"hardware": good["hardware"] | {name: value}})
    with pytest.raises(ValueError, match="no machine"):
        hardware.Machine.from_json(good | {"constants": {"gemm": "fast"}})


def test_an_impossible_machine_is_refused_in_a_line(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(H100.as_json()).replace('"sms": 132', '"sms": 0'))
    done = plan("--gpus", 8, "--machine", path, *FLAGS)
    assert (done.returncode, done.stdout) == (2, "") and "sms of H100 is 0" in done.stderr, done.stderr


def test_no_precision_is_priced_that_a_gpu_does_not_have():
    """From the namespace: without Transformer Engine the entry script refuses all of them."""
    fp8, mxfp8 = (Namespace(fp4=None, fp8="hybrid", fp8_recipe=name) for name in ("delayed", "mxfp8"))
    bf16, fp4 = Namespace(fp4=None, fp8=None), Namespace(fp4="e2m1", fp8=None)
    lacking = {
        "A30-PCIe": [fp8, mxfp8, fp4],
        "A800-NVLink": [fp8, mxfp8, fp4],
        "H100": [mxfp8, fp4],
        "H200": [mxfp8, fp4],
    }
    for name, its in hardware.HARDWARE.items():
        for args in (bf16, fp8, mxfp8, fp4):
            if args in lacking.get(name, []):
                flag = "--fp4-format" if args.fp4 else "--fp8-format"
                with pytest.raises(UserError, match=rf"{name} multiplies in no .* TFLOP/s\): drop {flag}"):
                    running.check_precision(args, its)
            else:
                running.check_precision(args, its)


def test_what_the_model_of_time_cannot_price_is_the_users():
    priced = runpy.run_path(str(TOOL))["priced"]
    with (
        pytest.raises(UserError, match="cannot price this: ep x etp x pp is 2, which does not divide 9 GPUs"),
        priced(),
    ):
        Sizes(gpus=9, ep=2)
    with pytest.raises(TypeError), priced():  # a fault of ours stays one
        len(5)


def test_a_check_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("planning.check.PAGE", tmp_path)
    names = ("json", "html", "write_recipe", "calibrate", "recipe", "machine")
    with pytest.raises(UserError, match="--check's .* cannot be written: it is a folder"):
        request.check(Namespace(check=True, **dict.fromkeys(names)))


def test_rates_of_a_cpu_are_not_rounded_away():
    from planning import report

    assert [report._rate(one) for one in (0.01234, 7.25, 99.6, 390.4, 40487.4)] == [
        "0.0123",
        "7.25",
        "99.6",
        "390",
        "40,487",
    ]


def test_user_errors_are_those_of_tools():
    with pytest.raises(UserError, match="is not among the flags"):
        plan_settings.value_of(["--lr", "1"], "--num-layers")
    assert plan_settings.without(["--a", "1", "2", "--b", "--c", "3"], ["--a", "--c"]) == ["--b"]
    assert without_flag(["--a", "1", "--b"], "--a") == plan_settings.without(["--a", "1", "--b"], ["--a"])
