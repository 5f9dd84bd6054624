"""Which codec, when, at what price: that the section has a study's and an ablation's figures, and the document them."""

from __future__ import annotations

import test_ablate_codec as study
from test_ablate_codec import changed, check_refusal, keep, make_result, tool
from training import ROOT

from codec_study import advice, folder  # isort: skip - behind the path that test_ablate_codec adds
from ablation import analysis as ablation  # isort: skip
from codec_study.arms import NONE, NONE_TWO_RANKS, REORDERED, UNIQUE, uncompensated  # isort: skip

DOCUMENT = ROOT / "docs" / "codec.md"
STUDY, TIMES = (ROOT / "docs" / "results" / name for name in ("codec-study", "codec-times"))
"""What the document is made of; step times may be there or not."""


def table(text):
    """Cells of all lines of tables, by the first one of each line; those of a later table are put behind."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(name, []).extend(cells)
    return found


def timed(*points):
    """An ablation of which each point is a share, and seconds and bytes of arms."""
    meta = {"time": "2026-01-02", "commit": "0123abc", "hardware": {"device": "a CPU"}, "repetitions": 3}
    made = []
    for share, arms in points:
        made.append({"wanted_share": share, "arms": []})
        for name, (seconds, sent) in arms.items():
            one = {"arm": {"name": name}, "seconds": {"training": seconds}, "sent_bytes": {"training": sent}}
            made[-1]["arms"].append(one)
    return {"meta": meta, "points": made}


def test_the_document_has_what_the_tool_writes():
    kept = ablation.read(TIMES) if TIMES.exists() else None
    section = advice.section(folder.read(STUDY), kept)
    text = DOCUMENT.read_text()
    assert text.count(advice.BEGIN) == text.count(advice.END) == 1
    assert f"{advice.BEGIN}\n\n{section}\n\n{advice.END}" in text


def test_losses_are_those_of_the_study_and_noise_is_said():
    """Above none by 0.1% and 0.6%, where rounding alone does 0.2% at most."""
    result = changed(make_result(wanted=WANTED), REORDERED, (0.2, -0.1, 0.0))
    lines = table(advice.section(result, None))
    assert [study.median_said(study.goals.Outcome(None, cell)) for cell in lines["rounding alone"][2:]] == [
        "+0.00%",
        "not measured",
        "+0.00%",
    ]
    unique, *others = lines["`--a2a-unique rank`"][2:5]
    assert unique.startswith("+0.10%") and unique.endswith("(noise)")
    assert others == ["one expert a token"] * 2
    lsh, missing, _ = lines["`--a2a-codec lsh`"][2:5]
    assert lsh.startswith("+0.60%") and "noise" not in lsh and missing == "not measured"
    assert lines["none"][2] == "+0.00%"
    one_seed = {**result, "runs": [run for run in result["runs"] if run["arm"] != REORDERED or run["seed"] == 1]}
    less, below = (changed(result, REORDERED, noise) for noise in ((0.05, -0.05, 0.0), (0.02, -0.2, 0.0)))
    for quiet in (less, below, one_seed):
        assert "noise" not in table(advice.section(quiet, None))["`--a2a-unique rank`"][2]
    far = changed(result, UNIQUE, (0.1, 0.1, 2.3))
    assert "noise" not in table(advice.section(far, None))["`--a2a-unique rank`"][2]


WANTED = (NONE, REORDERED, NONE_TWO_RANKS, UNIQUE, uncompensated(6))


def test_bytes_and_steps_are_those_of_the_ablation():
    arms = {
        "top-2": ([2.0, 4.0, 3.0], 1000.0),
        "top-2 unique off": ([1.0, 2.0, 1.5], 800.0),
        "pos2 top-2 unique adaptive chunks": ([0.5, 1.0, 0.75], 700.0),
    }
    faster = {**arms, "top-2 unique off": ([0.5, 1.0, 0.75], 790.0)}
    section = advice.section(make_result(wanted=WANTED), timed((0.6, arms), (0.9, faster)))
    lines = table(section)
    bytes_sent, steps = lines["`--a2a-unique rank`"][1], lines["`--a2a-unique rank`"][5:]
    assert bytes_sent == "0.795 [0.790, 0.800]"
    two, four = "2.00 [2.00, 2.00]", "4.00 [4.00, 4.00]"
    assert steps == [two, "not measured", four, four, "not measured", four]
    assert lines["none"][1] == "1.000" and lines["none"][5] == "1.00 [1.00, 1.00]"
    assert lines["`--a2a-codec lsh --lsh-hashes 12 --lsh-target-rate 0.2`"][1] == "not measured"
    assert "Step times: 2026-01-02, commit 0123abc, a CPU, 3 repetitions." in section
    assert "Step times:" not in advice.section(make_result(wanted=WANTED), None)


def test_arms_of_the_tables_are_those_of_the_tools():
    """A name that no tool knows would be shown as not measured for ever."""
    from ablation.arms import all_arms as timed_arms

    known = {arm.name for arm in timed_arms()}
    for codec in advice.CODECS:
        assert study.by_name(codec.arm)
        assert codec.carries is None or set(advice._arm_names(codec)) <= known


def test_advice_is_written_between_its_marks_alone(tmp_path, capsys):
    result = make_result(("top-2",), WANTED)
    keep(result, tmp_path)
    document = tmp_path / "codec.md"
    document.write_text(f"# Codecs\n\n{advice.BEGIN}\nold\n{advice.END}\n\nBy hand.\n")
    assert tool.main(["--from", str(tmp_path), "--write-advice", str(document)]) == 0
    section = advice.section(folder.read(tmp_path), None)
    assert document.read_text() == f"# Codecs\n\n{advice.BEGIN}\n\n{section}\n\n{advice.END}\n\nBy hand.\n"
    capsys.readouterr()
    document.write_text(advice.END)
    check_refusal(["--from", str(tmp_path), "--write-advice", str(document)], "it lacks the two marks", capsys)
    assert document.read_text() == advice.END
    check_refusal(["--output", "x", "--write-advice", "y"], "--write-advice needs --from DIR", capsys)
    check_refusal(["--encoding-cost", "--write-advice", "y"], "leave one of them out", capsys)


def test_one_document_may_not_be_named_twice(tmp_path, capsys):
    """What one flag writes would be lost to the other."""
    keep(make_result(("top-2",), WANTED), tmp_path)
    document = str(tmp_path / "codec.md")
    both = ["--write-results", document, "--write-advice", document]
    check_refusal(["--from", str(tmp_path), *both], "both write into it; name two files", capsys)
