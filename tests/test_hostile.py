"""A sample of tests/hostile.py's inputs, and that its judgement tells a kept promise from a broken.

The commands are forked from a process that has computed nothing, so it is not this one.
"""
import json
import os
import signal
import time

import hostile
import pytest
from conftest import ROOT, run

from config import BadInput, load_overrides
from files.deadline import deadline
from files.disk import parse_json
from files.run_folder import check_free, open_run
from text import sandbox


def test_there_are_enough():
    cases = hostile.all_cases()
    assert len(cases) >= 600
    assert f"{len(cases):,} hostile inputs" in (ROOT / "README.md").read_text()
    drawn = hostile.sample(150, 0)
    assert {case.kind for case in drawn} == {case.kind for case in cases}
    assert [case.name for case in drawn] == [case.name for case in hostile.sample(150, 0)]
    assert {case.name for case in drawn} != {case.name for case in hostile.sample(150, 1)}


def test_a_sample():
    """Each of 150 inputs: one clear line and exit code 2 in time, nothing touched; or valid."""
    run("tests/hostile.py", 150, "--seed", 0, check=0)


LINE = "error: lora_rank = 0: expected at least 1\n"


@pytest.mark.parametrize("why, code, stderr, changes, own", [
    ("", 2, LINE, [], []), ("hang", None, "", [], []), ("accepted", 0, "", [], []),
    ("exit code 1", 1, LINE, [], []), ("crash by signal 11", -11, "", [], []),
    ("traceback", 1, "Traceback (most recent call last):\n", [], []),
    ("not one line", 2, LINE + "and more\n", [], []), ("not one line", 2, "", [], []),
    ("not a clear line", 2, "error: \x1b[1mlora\n", [], []),
    ("leak", 2, f"error: {hostile.SECRET}\n", [], []),
    ("touched kept.txt", 2, LINE, ["kept.txt"], []), ("left x.json", 2, LINE, [], ["x.json"])])
def test_what_is_broken(why, code, stderr, changes, own):
    case = hostile.Case("kind", "name", lambda place: [])
    assert hostile.judge_case(case, code, "", stderr, changes, own) == why


@pytest.mark.parametrize("text, said", [
    ('{"a": NaN}', "NaN"), ('{"a": 1e999}', "1e999"), ('{"a": -Infinity}', "Infinity"),
    (r'{"a": "\ud800"}', "surrogates"), ("[" * 100_000, "nested"),
    ("[" * 65 + "]" * 65, "nested more than 64"), ("9" * 10_000, "digits")])
def test_json_that_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_json_that_is_read():
    deepest = "[" * 64 + "]" * 64
    for text in (deepest, r'"\ud83d\ude00"', '"{{{{[[[["' + " " * 9, "[" + "[1]," * 99 + "[1]]"):
        assert parse_json(text) == json.loads(text)


def test_a_lock_that_is_a_link_is_left_alone(tmp_path):
    kept, run_dir = tmp_path / "kept.txt", tmp_path / "run"
    run_dir.mkdir()
    kept.write_text("kept\n")
    (run_dir / "config.yaml").write_text("steps: 1\n")
    for place in (run_dir / ".lock", run_dir / "metrics.jsonl"):
        place.symlink_to(kept)
        with pytest.raises(BadInput, match=f"{place.name} cannot be written"):
            check_free(str(run_dir))
        place.unlink()
    os.link(kept, run_dir / ".lock")    # no link to be seen: what it holds is not a lock's
    cfg = load_overrides([f"run_dir={run_dir}", "overwrite=true"])
    with pytest.raises(BadInput, match="no lock of a run"), open_run(cfg, {}, {}, True):
        pass
    assert kept.read_text() == "kept\n"


def test_deadline():
    with pytest.raises(TimeoutError, match="more than 0.05 s"), deadline(0.05):
        while True:
            try:
                time.sleep(0.01)
            except Exception:   # what a user's function may do
                pass
    with deadline(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_dead_sandbox_is_replaced():
    """After a template that takes all time, and one that takes all memory."""
    for template in ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
                     "{% endfor %}", "{{ 'a' * 9999999999 }}"):
        with pytest.raises(ValueError, match="it took more than"):
            sandbox.render(template)
        assert sandbox.render("{{ a }}", a="text") == "text"
