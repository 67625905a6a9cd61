"""The lecture is true: its code is the source's, its outputs come again, its numbers are published.

docs/include.py writes both; here nothing is written.
"""
import importlib.util
import json
import re

import pytest
from conftest import ROOT, run

from config import load_config

LINK = re.compile(r"(?<!\w)\[[^\]\n]*\]\(([^)#:]+)\)")      # and no edit[tap](resid)
PAGE = (ROOT / "docs" / "lecture.md").read_text()


@pytest.fixture(scope="module")
def include():
    spec = importlib.util.spec_from_file_location("include", ROOT / "docs" / "include.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alike(said, shown):
    """The same words; numbers within 2 of their last digit, which another machine may move."""
    number = r"[-+]?\d+(?:\.\d+)?"
    if re.sub(number, "#", said) != re.sub(number, "#", shown):
        return False
    for one, other in zip(re.findall(number, said), re.findall(number, shown)):
        digits = len(other.partition(".")[2])
        if abs(float(one) - float(other)) > 2.5 * 10.0 ** -digits:
            return False
    return True


def test_code_is_the_source(include):
    assert include.with_code(PAGE) == PAGE, "docs/lecture.md is out of date: `make lecture`"
    assert len(include.blocks(PAGE, "code")) >= 11
    stale = PAGE.replace("resid = edit[tap](resid)", "resid = edit[tap]", 1)
    assert include.with_code(stale) == PAGE


def test_what_the_blocks_print(include):
    """All of the page's Python in one process, in order, as a reader types it."""
    tries = include.blocks(PAGE, "try")
    assert len(tries) >= 9
    for (code, shown, _), said in zip(tries, include.run_tries([code for code, _, _ in tries])):
        assert alike(said, shown), f"{code}\nprints\n{said}\nand not\n{shown}"


def test_commands_print_what_is_shown(include):
    """The lens on the bundled base in full."""
    found = include.blocks(PAGE, "run")
    assert found
    for command, shown, words in found:
        said = include.run_command(command, words)
        assert alike(said, shown), f"{command}\nprints\n{said}\nand not\n{shown}"


def test_commands_on_a_trained_run(include, tmp_path):
    """The page's training for 2 steps, then its lens: the same table, with other numbers."""
    folder = tmp_path / "dual"
    assert "train.py configs/dual_reward.yaml\n" in PAGE
    run("train.py", "configs/dual_reward.yaml", "steps=2", "eval_prompts=4", "batch_size=4",
        f"run_dir={folder}", check=0)
    assert json.loads((folder / "report.json").read_text())["config"]["method"] == "dual_reward"
    (command, shown, words), = include.blocks(PAGE, "run-dual")
    said = include.run_command(command.replace(include.DUAL, str(folder)), words)
    assert [line.split()[0] for line in said.splitlines()] == [
        line.split()[0] for line in shown.splitlines()]
    for config in re.findall(r"train\.py (configs/\w+\.yaml)", PAGE):
        load_config(ROOT / config)


def test_numbers_are_those_of_the_documents():
    """Each measured figure of the prose stands, with its words, in the document that has it."""
    pages = {name: (ROOT / name).read_text() for name in
             ("docs/training.md", "docs/methods.md", "docs/first_study.md",
              "models/tiny/README.md")}
    for name, figure, source in (
            ("docs/first_study.md", "`subtract 31 31 31", "`subtract 31 31 31"),
            ("docs/first_study.md", "0.0 % right; without the error 97.6",
             "| dual-reward | 8 | 97.6 ["),
            ("docs/training.md", "86.7 %, and 96.4 after 1,500 steps", "| 86.7 (83.0"),
            ("docs/training.md", "86.7 %, and 96.4 after 1,500 steps", "| 96.4 (97.3"),
            ("docs/training.md", "SFT ends at 99.8 %", "| SFT, LoRA q/k/v/o | 99.8 ("),
            ("docs/training.md", "dual-reward ends at 99.2", "LoRA v/o (default) | 99.2 ("),
            ("docs/training.md", "from 81.3 to 98.7 % in 52 seconds",
             "| GRPO, LoRA q/k/v/o, 6,400 problems | 98.7 ("),
            ("docs/training.md", "0.0, 0.2, 0.2 % right", "| the published error | 2 | 0.2 ["),
            ("docs/training.md", "guards on, 42 to 59", "| right loss, guards on | 1 | 59.3 ["),
            ("docs/methods.md", "from 13.2 to 99.8 % right", "| base | 13.2 ["),
            ("docs/methods.md", "4.2 % if the chain", "| 99.8 [99.1, 100.0] | 4.2 |"),
            ("docs/first_study.md", "8.0 % of the base's text", "8.0 % of the"),
            ("models/tiny/README.md", "at block 4 with 74 %", "at block 4 with 74 %"),
            ("docs/first_study.md", "the second up to block 5",
             "| base | 0–7 | 0–5 | none | 0–7 |")):
        assert figure in PAGE.replace("\n", " "), figure
        assert source in pages[name], f"{name} no longer says {source!r}"


def test_numbers_of_the_log():
    """Decimals of a line that names a document stand there; each line has a date and a number."""
    lines = [line for line in (ROOT / "docs" / "log.md").read_text().splitlines()
             if line.startswith("- ")]
    assert 40 <= len(lines) <= 70
    for line in lines:
        date, rest = re.fullmatch(r"- (\d{4}-\d\d-\d\d) (.*)", line).groups()
        assert "2026-11-20" <= date and re.search(r"\d|half|third|quarter|[Ee]ight", rest), line
        links = LINK.findall(rest)
        text = "".join((ROOT / "docs" / link).read_text() for link in links)
        missing = [n for n in re.findall(r"(?<![\d.])\d+\.\d+", rest) if links and n not in text]
        assert not missing, f"{missing} of {line!r} not in {links}"


def test_a_reader_finds_everything():
    """Its length, eleven sections with a picture or a drawing, all exercises, all links."""
    assert len(PAGE.splitlines()) <= 350
    sections = re.split(r"^## ", PAGE, flags=re.M)[1:]
    assert len(sections) == 11
    for section in sections:
        assert "```python code " in section, section[:40]
        assert re.search("```(python try|text run)", section), section[:40]
        assert "![" in section or "\n```\n" in section, section[:40]      # a picture, or one drawn
    assert set(map(int, re.findall(r"\(exercise (\d+)\)", PAGE))) == set(range(1, 13))
    for page in (ROOT / "docs" / "lecture.md", ROOT / "docs" / "log.md",
                 ROOT / "exercises" / "README.md"):
        for link in LINK.findall(page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
