"""A sample of tests/hostile.py's inputs, and that its judgement tells a kept promise from a broken.

The commands are forked from a process that has computed nothing, so it is not this one.
"""
import hostile
import pytest
from conftest import ROOT, run


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
