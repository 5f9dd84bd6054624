"""How far a long piece of work is, in lines and on a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import progress  # noqa: E402


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the module sees, one for each look."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    return lambda *seconds: monkeypatch.setattr(progress.time, "monotonic", iter(seconds).__next__)


def test_lines_name_rate_and_time_to_go(clock, capsys):
    clock(0.0, 10.0, 11.0, 20.0)
    with progress.progress("encode", 400, in_bytes=False) as advance:
        advance(100)
        advance(10)  # one second later: no line
        advance(90)
    assert capsys.readouterr().err == (
        "encode: 100 of 400 (25%), 10/s, 10 s so far, ETA 30 s\nencode: 200 of 400 (50%), 10/s, 20 s so far, ETA 20 s\n"
    )


def test_what_was_done_before_does_not_count_for_the_rate(clock, capsys):
    clock(0.0, 8.0)
    with progress.progress("convert", 4 << 20, 1 << 20) as advance:
        advance(1 << 20)
    shown = "convert: 2.0 MiB of 4.0 MiB (50%), 128.0 KiB/s, 8 s so far, ETA 16 s\n"
    assert capsys.readouterr().err == shown


def test_where_nobody_can_say_how_much_is_done_the_time_alone_is_shown(clock, capsys):
    clock(0.0, 8.0, 16.0)
    with progress.progress("train", 0) as advance:
        advance(0)
        advance(5)
    assert capsys.readouterr().err == "train: 8 s so far, ETA unknown\ntrain: 16 s so far, ETA unknown\n"


@pytest.mark.parametrize(("arguments", "unit"), [("4096", b"KiB"), ("4096, in_bytes=False", b""), ("0", b"")])
def test_a_terminal_gets_a_bar(arguments, unit):
    """In a process of its own, whose stderr is a terminal."""
    code = f"from progress import progress\nwith progress('convert', {arguments}) as advance: advance(2048)"
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(TOOLS), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0
    os.close(ours)
    assert b"100%" in shown and b"ETA" in shown and unit in shown and (unit or b"KiB" not in shown)


def test_a_large_report_and_a_long_text_say_how_far_they_are_read(tmp_path, monkeypatch, capsys):
    from scoring import inputs
    from test_trace import tool as trace

    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    (tmp_path / "rank00000.jsonl").write_text('{"iteration": 1, "rank": 0, "passes": []}\n' * 3)
    with pytest.raises(trace.UserError, match="has spans"):
        trace.read_report(tmp_path)
    assert capsys.readouterr().err.count("read: ") == 3
    (tmp_path / "a.txt").write_text("one two")
    tokenizer = inputs.Tokenizer("here", 9, 0, lambda text: [1] * len(text.split()))
    for shows in (True, False):
        inputs.read([str(tmp_path / "a.txt")], json_key="", tokenizer=lambda: tokenizer, vocab_size=9, shows=shows)
        said = capsys.readouterr().err
        assert ("read: 7 B of 7 B (100%)" in said and "ETA 0 s" in said) if shows else not said
