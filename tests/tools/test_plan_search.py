"""tools/plan.py --search: what it finds is the fastest of all there is, by memory that is the dry run's."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import GIB, H100, SMALL, of_flags, plan, run_of
from training import ROOT, with_flags, without_flag

sys.path.insert(0, str(ROOT / "tools"))
from command_line import UserError
from planning import choosing, chosen, dry, probing, recipe, search, space
from planning import settings as plan_settings
from planning.settings import FULL, Form, Layout
from planning.step import predict
from planning.units import units_of


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.lists(st.floats(0.01, 1), min_size=1, max_size=4)), max_size=9
    )
)
def test_a_search_is_as_good_as_trying_all(cases):
    """In the order of all times, with bounds that are true; a layout has two ways, which share its forms."""
    times = {Layout(micro_batch=number + 1): its for number, (_, _, its) in enumerate(cases)}
    shares = {Layout(micro_batch=number + 1): parts for number, (*parts, _) in enumerate(cases)}
    place = lambda layout: replace(layout, recompute=())  # noqa: E731

    def forms(layout):
        return [Form(chunks=number) for number in range(bool(layout.recompute), len(times[place(layout)]), 2)]

    def predict_one(layout, form):
        return times[place(layout)][form.chunks]

    found = search.fastest(
        times,
        search.Space(
            floor=lambda layout: min(shares[layout]) * min(times[layout]),
            ways=lambda layout: [layout, replace(layout, recompute=FULL)],
            bound=lambda layout: max(shares[place(layout)]) * min(times[place(layout)]),
            forms=forms,
            predict=predict_one,
        ),
    )
    assert [seconds for seconds, _, _ in found] == sorted(itertools.chain(*times.values()))


def test_a_search_predicts_what_may_be_next_alone():
    """And a bound that is not true is noticed by the order."""
    predicted = []

    def predict_and_note(layout, form):
        predicted.append(layout)
        return float(layout.micro_batch)

    def found(floor, bound):
        one = search.Space(
            floor=floor, ways=lambda one: [one], bound=bound, forms=lambda _: [Form()], predict=predict_and_note
        )
        return search.fastest([Layout(micro_batch=number) for number in range(1, 9)], one)

    first = next(found(lambda one: one.micro_batch - 0.7, lambda one: one.micro_batch - 0.5))
    assert first[1].micro_batch == 1 and [one.micro_batch for one in predicted] == [1]
    wrong = 10.0
    for floor, bound in ((wrong, 0.0), (0.0, wrong)):
        times = found(
            lambda one, its=floor: its * (one.micro_batch < 3), lambda one, its=bound: its * (one.micro_batch < 3)
        )
        assert [seconds for seconds, _, _ in times][:2] != [1.0, 2.0]


def test_what_is_kept_is_what_flags_mean():
    """Also where they say nothing."""
    kept = plan_settings.kept
    own = kept(["--micro-batch-size", "1"], plan_settings.KEEPABLE)
    assert own == dict.fromkeys(plan_settings.KEEPABLE, "1") | {"position": "pos2"}
    tensor = ["--tensor-model-parallel-size", "2"]
    assert kept(tensor, ["etp"]) == {"etp": "2"}  # Megatron: as tensor parallel as the rest
    assert kept([*tensor, "--expert-tensor-parallel-size", "1"], ["tp", "etp"]) == {"tp": "2", "etp": "1"}
    spans = ["--shortcut-span", "2", "--shortcut-landing", "1"]
    assert kept([*spans, "--shortcut-position", "pos1", "pos1"], ["span", "position"]) == {
        "span": "2",
        "position": "pos1",
    }
    for flags, name in (
        (["--shortcut-position", "pos1", "pos2"], "position"),
        (spans[:2], "span"),
        (["--num-layers-per-virtual-pipeline-stage", "2"], "vp"),
        (["--pipeline-model-parallel-layout", "Et|tL"], "pp"),
        (["--account-for-loss-in-pipeline-split"], "pp"),
        (["--micro-batch-size", "one"], "micro-batch"),
        ([], "micro-batch"),  # Megatron has no default
    ):
        assert kept(flags, ["tp"]) == {"tp": "1"}
        with pytest.raises(UserError):
            kept(flags, [name])
    cut = ["--hybrid-layer-pattern", "ME|ME|ME|ME/*E", "--pipeline-model-parallel-size", "2"]
    assert kept(cut, ["pp", "vp"]) == {"pp": "2", "vp": "2"}


def equal_signs(flags):
    """Each flag with its first value as one word."""
    joined = []
    for word in flags:
        if joined and not word.startswith("--") and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def test_a_search_in_vain_says_why():
    """The commonest of the reasons."""
    dropped = Counter({"refused: this": 3, "refused: that": 1})
    found = choosing.Choices(best=[], layouts=9, fit=5, dropped=dropped)
    assert chosen.none_passes(found).startswith("none of the 4 fastest settings passes; 3 of them: refused: this")
    assert "no form" in chosen.none_passes(replace(found, dropped=Counter()))


def test_a_value_behind_an_equal_sign_is_a_value(tmp_path):
    joined = equal_signs(SMALL)
    assert f"--num-experts={8}" in joined and plan_settings.split_values(joined) == SMALL
    assert plan_settings.split_values(["--a=b=c", "d=e", "--f"]) == ["--a", "b=c", "d=e", "--f"]
    found = tmp_path / "plan.json"
    done = plan(*("--gpus", 8, "--gpu", "H100", "--search", "--top", 1, "--json", found), "--", *joined)
    assert done.returncode == 0, done.stderr
    (best,) = json.loads(found.read_text())["search"]["best"]
    assert not any("=" in word for word in best["flags"]) and best["flags"].count("--expert-model-parallel-size") == 1
    assert best["flags"][best["flags"].index("--expert-model-parallel-size") + 1] != "1"  # experts are seen


# ---- all there is ---------------------------------------------------------------------------------------------------

HYBRID = with_flags(
    without_flag(SMALL, "--num-layers"),
    *("--hybrid-layer-pattern *-*E*E*-*E*E", "--shortcut-position pos1"),
)
LARGE = 1000
"""Steps priced on 16,384 GPUs, at most."""
KEEP = ("tp", "etp", "micro-batch", "position", "span")
SPACES = {
    "layouts and forms": (SMALL, 8, 60.0, ("position", "span")),
    "stages of other sizes": (
        with_flags(SMALL, "--num-layers 10", "--untie-embeddings-and-output-weights"),
        8,
        60.0,
        KEEP,
    ),
    "a pattern": (HYBRID, 4, 60.0, KEEP),
    "what is computed again": (SMALL, 4, 0.27, KEEP),
}


def all_cuts(model, layout):
    """Whatever Megatron takes: for blocks the sizes of the first and last stage, for a pattern any."""
    parts, units = layout.pp * layout.vp, model.units
    if layout.pp == 1 or not (layout.sizes or model.hybrid):
        return [layout.sizes]
    found = [sizes for sizes in itertools.product(range(1, units), repeat=parts) if sum(sizes) == units]
    return [sizes for sizes in found if model.hybrid or len(set(sizes[1:-1])) <= 1]


def searched_and_exhaustive(flags, gpus, memory, keep):
    its = choosing.Chooser(flags, gpus, H100, memory * GIB, keep)
    layouts = list(space.layouts(its.model, gpus))
    found = list(its.in_order(layouts))
    everything = [(), FULL, *space.recomputed(its._modules)]
    places = {replace(one, sizes=sizes) for one in layouts for sizes in all_cuts(its.model, one)}
    tried = {
        (layout, form): its.pricer.step_s(layout, form)
        for place in places
        for again in everything
        for layout in [replace(place, recompute=again)]
        if its._footprints.nbytes(layout) <= its.memory
        for form in space.forms(its.model, layout)
    }
    bounds = [
        (its.pricer.floor_s(layout), its.pricer.bound_s(layout), seconds) for (layout, _), seconds in tried.items()
    ]
    return found, tried, bounds


@pytest.mark.parametrize("name", SPACES)
def test_searching_a_model_is_as_good_as_trying_all(name):
    """The times of all, and of each layout its best; and no bound is above what it bounds."""
    ((found, tried, bounds),) = ranks.run(searched_and_exhaustive, 1, *SPACES[name], distributed=False, timeout_s=500)
    times = [seconds for seconds, _, _ in found]
    assert len(found) > 10 and times == sorted(times)
    assert times[0] == min(tried.values())

    def best(timed):
        places: dict[object, float] = {}
        for (layout, _), seconds in timed:
            place = replace(layout, recompute=(), sizes=())
            places[place] = min(seconds, places.get(place, seconds))
        return places

    assert best(((layout, form), seconds) for seconds, layout, form in found) == best(tried.items())
    assert all(floor <= bound * (1 + 1e-9) and bound <= seconds * (1 + 1e-9) for floor, bound, seconds in bounds)
    assert any(floor < seconds * 0.97 for floor, _, seconds in bounds)  # there is something to bound
    if name == "stages of other sizes":
        assert any(layout.sizes for _, layout, _ in found) and any(not layout.sizes for _, layout, _ in found)
    if name == "what is computed again":
        again = {layout.recompute for _, layout, _ in found}
        assert {FULL, ("core_attn",)} <= again and max(map(len, again)) > 1


def test_a_pattern_is_cut_so_that_the_slowest_part_is_fastest():
    weights = (5.0, 1.0, 1.0, 4.0, 2.0, 2.0)
    for parts in range(1, 7):
        ways = space.cuts(6, parts, weights)
        assert len(set(ways)) == len(ways) and all(sum(way) == 6 and min(way) > 0 for way in ways)
        heaviest = {way: max(sum(part) for part in split(weights, way)) for way in ways}
        assert heaviest[space.balanced(weights, parts)] == min(heaviest.values())
        assert parts in (1, 6) or max(heaviest.values()) > min(heaviest.values())  # negative control
    assert len(space.cuts(20, 5, tuple(range(1, 21)))) == 1  # 3,876 ways


def split(values, sizes):
    ends = [0, *itertools.accumulate(sizes)]
    return [values[first:end] for first, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("units, pp", [(5, 2), (7, 3), (13, 4), (12, 8), (9, 8)])
def test_uneven_stages_are_those_that_megatron_has_flags_for(units, pp):
    found = list(space.uneven(units, pp))
    assert found and len(set(found)) == len(found)
    for sizes in found:
        assert sum(sizes) == units and len(sizes) == pp and min(sizes) > 0 and len(set(sizes[1:-1])) <= 1


def estimated_and_counted(flags, cases):
    its = choosing.Chooser(flags, 16, H100, 60.0 * GIB, ("position", "span"))
    assert its._modules
    results = []
    form = Form(position=its.model.positions[0])
    for layout in cases:
        words = [*its.model.flags, *plan_settings.flags_of(layout, form, its.model)]
        stages = dry.dry_run(words, 16, probing.ENVIRONMENT).stages
        results.append((its._footprints.nbytes(layout), max(stage.total for stage in stages)))
    return results


MEMORY = {
    "blocks": (
        SMALL,
        [
            Layout(ep=8),
            Layout(ep=2, micro_batch=1, recompute=FULL),
            Layout(tp=2, etp=1, ep=4),
            Layout(tp=2, etp=2, ep=2, micro_batch=2),
            Layout(pp=2, ep=4, micro_batch=1),
            Layout(pp=2, vp=2, ep=4),
            Layout(pp=4, tp=2, ep=2, recompute=FULL),
            Layout(ep=2, micro_batch=1, recompute=("core_attn",)),
            Layout(tp=2, etp=2, ep=2, recompute=("core_attn", "mlp", "shared_experts")),
        ],
    ),
    "stages of other sizes": (
        with_flags(SMALL, "--num-layers 10"),
        [Layout(pp=2, ep=4, sizes=(3, 2)), Layout(pp=4, ep=2, sizes=(1, 1, 1, 2)), Layout(pp=2, ep=4, sizes=(1, 4))],
    ),
    "a pattern": (
        HYBRID,
        [
            Layout(ep=8),
            Layout(pp=2, ep=4, sizes=(1, 3)),
            Layout(pp=2, vp=2, ep=4, sizes=(1, 1, 1, 1)),
            Layout(pp=2, tp=2, ep=4, sizes=(3, 1), recompute=FULL),
        ],
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_that_of_the_dry_run(name):
    """Put together from probes, for layouts that are unlike them."""
    flags, cases = MEMORY[name]
    (results,) = ranks.run(estimated_and_counted, 1, flags, cases, distributed=False, timeout_s=500)
    for layout, (estimate, counted) in zip(cases, results, strict=True):
        assert estimate == pytest.approx(counted, rel=0.05), layout
        others = [counted for other, (_, counted) in zip(cases, results, strict=True) if other != layout]
        assert not all(estimate == pytest.approx(other, rel=0.05) for other in others)  # negative control


def work_of_a_large_search(gpus):
    of_recipe, flags = recipe.flags_of("scmoe-8b", ["--global-batch-size", "32768"])
    its = choosing.Chooser(flags, gpus, H100, 72 * GIB)
    layouts = list(space.layouts(its.model, gpus))
    best = list(itertools.islice(its.in_order(layouts), 3))
    return of_recipe, len(layouts), its.pricer.priced, best


def test_a_search_on_16384_gpus_prices_little():
    """Of more layouts than steps; the tool says how many, and how long it took."""
    ((of_recipe, layouts, priced, best),) = ranks.run(
        work_of_a_large_search, 1, 16384, distributed=False, timeout_s=500
    )
    assert of_recipe == 64 and layouts > 2000
    assert len(best) < priced < LARGE, priced


def predicted_by_both(flags, cases):
    its = choosing.Chooser(flags, 16, H100, 60.0 * GIB)
    results = []
    for layout, form in cases:
        words = [*its.model.flags, *plan_settings.flags_of(layout, form, its.model)]
        found = dry.dry_run(words, 16, probing.ENVIRONMENT)
        results.append((its.pricer.step_s(layout, form), predict(run_of(found).workload, H100).step_s))
    return results


POS2 = Form(position="pos2")
BOTH = {
    "blocks": (
        SMALL,
        [
            (Layout(ep=8), POS2),
            (Layout(tp=2, etp=1, ep=4, micro_batch=2), POS2),
            (Layout(tp=2, etp=2, ep=2, recompute=FULL), Form(position="pos2", overlap="adaptive", chunks=4)),
            (Layout(ep=2, recompute=("core_attn", "shared_experts")), POS2),
            (Layout(pp=2, vp=2, ep=4), Form(position="pos1", overlap="off")),
            (Layout(pp=2, ep=4, recompute=FULL), Form(position="pos2", span=2, overlap="adaptive")),
        ],
    ),
    "stages of other sizes": (
        with_flags(SMALL, "--num-layers 10"),
        [(Layout(pp=2, ep=4, sizes=(3, 2)), POS2), (Layout(pp=4, ep=2, sizes=(1, 1, 1, 2)), POS2)],
    ),
    "a pattern": (
        HYBRID,
        [
            (Layout(pp=2, ep=4, sizes=(1, 3)), Form(position="pos1")),
            (Layout(pp=2, tp=2, ep=4, sizes=(3, 1), recompute=FULL), Form(position="pos1", overlap="adaptive")),
        ],
    ),
    "less to send": (
        with_flags(SMALL, "--moe-router-topk 2", "--a2a-unique rank", "--a2a-codec fp8"),
        [(Layout(ep=2), POS2), (Layout(tp=2, etp=2, ep=4), POS2)],
    ),
}


@pytest.mark.parametrize("name", BOTH)
def test_a_search_and_a_plan_are_one_model(name):
    """The search writes into one namespace what the entry script reads of flags: each setting has to arrive."""
    flags, cases = BOTH[name]
    (results,) = ranks.run(predicted_by_both, 1, flags, cases, distributed=False, timeout_s=500)
    for searched, planned in results:
        assert searched == pytest.approx(planned, rel=1e-9)
    assert len({round(planned, 9) for _, planned in results}) == len(cases)  # there is something to get wrong


def test_a_search_is_reported_and_written(tmp_path):
    """The winner as a recipe, which the launcher hands on and the entry script takes."""
    found, mine = tmp_path / "plan.json", tmp_path / "mine.sh"
    words = ["--recipe", "gpt2-moe-small", "--gpus", 16, "--gpu", "H100", "--search", "--top", 2]
    done = plan(*words, "--keep", "position,span", "--json", found, "--write-recipe", mine)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("search: loads Megatron") and "dry run of setting 1 of 2, ETA " in done.stderr
    assert "The fastest of" in done.stdout and f"wrote {mine}" in done.stdout
    kept = json.loads(found.read_text())["search"]
    assert len(kept["table"][2]) == 2 and kept["table"][0] in " ".join(done.stdout.split())
    first, second = kept["best"]
    assert first["step_s"] <= second["step_s"] and first["flags"] != second["flags"]
    assert kept["layouts"] >= kept["fit"] >= 2
    assert (
        kept["not_searched"][0].startswith("uneven stages where the layers divide") and "not searched:" in done.stdout
    )
    assert f"priced {kept['priced']:,} steps; the search took {kept['seconds']:,.1f} s" in done.stdout
    launch = subprocess.run(
        [ROOT / "examples" / "launch.sh", mine], env={"PATH": "/usr/bin:/bin", "DRY_RUN": "flags"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    gpus, *flags = launch.stdout.splitlines()
    assert gpus == "16"
    assert of_flags(flags, 16, step_of) == pytest.approx(of_flags(first["flags"], 16, step_of))


def test_a_pattern_is_written_with_its_cuts(tmp_path):
    """And a shell hands them on as they are."""
    found, mine = tmp_path / "plan.json", tmp_path / "mine.sh"
    flags = with_flags(HYBRID, "--pipeline-model-parallel-size 2")
    words = ["--gpus", 4, "--gpu", "H100", "--search", "--top", 1, "--keep", "pp,micro-batch"]
    done = plan(*words, "--json", found, "--write-recipe", mine, "--", *flags)
    assert done.returncode == 0, done.stderr
    (best,) = json.loads(found.read_text())["search"]["best"]
    pattern = plan_settings.value_of(best["flags"], "--hybrid-layer-pattern")
    assert "|" in pattern and pattern.replace("|", "") == plan_settings.value_of(flags, "--hybrid-layer-pattern")
    assert all(stage.endswith("E") for stage in pattern.split("|"))
    launch = subprocess.run(
        [ROOT / "examples" / "launch.sh", mine], env={"PATH": "/usr/bin:/bin", "DRY_RUN": "flags"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert plan_settings.value_of(launch.stdout.splitlines(), "--hybrid-layer-pattern") == pattern


def step_of(found):
    return predict(run_of(found).workload, H100).step_s


def probed(flags):
    probe = probing.Probe.of(flags, units_of(flags))
    args = probe(1, 1).args
    found, refused = probing.accepted(probe, probing.modules_of(args, probe.units.segments))
    return sorted(found), refused


def test_modules_that_are_not_computed_again_are_named():
    """What the entry script refuses, in its words; and what no dry run can build."""
    ((found, refused),) = ranks.run(probed, 1, SMALL, distributed=False, timeout_s=500)
    assert found == ["core_attn", "mlp", "shared_experts"] and set(refused) == {"moe_act", "layernorm", "moe"}
    assert "it frees the normed tensor" in refused["layernorm"] and "moe_grouped_gemm" in refused["moe_act"]
    ((_, grouped),) = ranks.run(probed, 1, [*SMALL, "--moe-grouped-gemm"], distributed=False, timeout_s=500)
    assert grouped["moe_act"].endswith("nobody knows what it frees") and grouped["moe"] == refused["moe"]
