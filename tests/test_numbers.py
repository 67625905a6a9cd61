"""Every measured number of README and docs is what docs/numbers.json says, by docs/sources.py.

Then fifteen pages that say something else, each told by page, line and number.
"""
import importlib.util
import json
import re

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("sources", ROOT / "docs" / "sources.py")
sources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sources)
NUMBERS, PAGES = json.loads(sources.FILE.read_text()), sources.pages()


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_what_was_measured(page):
    assert sources.check_page(NUMBERS, page, PAGES[page]) == []


def test_nothing_is_left_out():
    """No page of numbers.json is gone; its pages of measurements have their tables in it."""
    assert set(NUMBERS) == set(PAGES)
    assert len([page for page in NUMBERS if "tables" in NUMBERS[page]]) >= 9
    assert sum(len(each) for of in NUMBERS.values() for _, each in of["prose"]) > 700


@pytest.mark.parametrize("page, old, new, told", [
    ("README.md", "SFT 97.4 %", "SFT 97.9 %", "97.9 %"),                    # a digit in prose
    ("README.md", "99.3 % [98.3, 99.7]", "99.3 % [98.6, 99.7]", "98.6"),    # of a shown output
    ("README.md", "base 64.5 %, SFT 97.4 %", "base 97.4 %, SFT 64.5 %", "97.4 %"),   # exchanged
    ("README.md", "from 81 to 99 %", "from 31 to 99 %", "31 %"),            # unit behind the next
    ("docs/real_models.md", "97.4 % right, GRPO", "97.9 % right, GRPO", "97.9 %"),
    ("docs/real_models.md", "| SFT | 97.4 [93.4, 99.0]", "| SFT | 97.4 [93.9, 99.0]", "93.9"),
    ("docs/real_models.md", "13.5 s and 6.15 GiB", "13.5 ms and 6.15 GiB", "13.5 ms"),  # a unit
    ("docs/markovian.md", "| nats lost | points lost", "| nats lost | nats", "points lost"),
    ("docs/training.md", "-0.7 points", "-0.7 %", "-0.7 %"),
    ("docs/methods.md", "| 86.7 [85.1, 88.2] |", "| 87.6 [85.1, 88.2] |", "87.6"),
    ("docs/log.md", "from 39.0; the chain", "from 38.0; the chain", "38.0"),
    ("docs/usage.md", "in 38 seconds", "in 38 minutes", "38 minutes"),
    ("docs/speed.md", "2.18 times as fast as TRL's in a\nfifth",
     "2.19 times as fast as TRL's in a\nfifth", "2.19 times"),
    ("docs/grpo.md", "## Measured\n", "## Measured\n\nIt is 3.5 times as fast.\n", "3.5 times"),
    ("docs/training.md", "2 cores, x86_64", "8 cores, x86_64", "2 cores, x86_64"),
])
def test_falsifications(page, old, new, told):
    text = PAGES[page]
    assert old in text
    false = text.replace(old, new, 1)
    line = text[:text.index(old)].count("\n") + 1
    wrong = sources.check_page(NUMBERS, page, false)
    near = [w for w in wrong if told in w and w.startswith(f"{page}:") and
            int(w.split(":")[1]) in (1, line, line + 1, line + 2)]
    assert near, wrong


def test_a_stale_number():
    """Training measured anew, its page written and taken: what other pages quote of it is told."""
    numbers = json.loads(json.dumps(NUMBERS))
    row, cell = "dual-reward, LoRA v/o (default)", "99.2 (99.2, 98.7, 99.7) [98.6, 99.5]"
    text = PAGES["docs/training.md"]
    assert f"| {row} | {cell} |" in text
    anew = text.replace(f"| {row} | {cell} |", f"| {row} | 98.1 (98.0, 98.1, 98.2) [97.4, 98.6] |")
    sources.take(numbers, "docs/training.md", anew)
    wrong = sources.check_page(numbers, "docs/methods.md", PAGES["docs/methods.md"])
    assert any(re.fullmatch(r"docs/methods.md:\d+: 99.2( %)? is not what docs/training.md: "
                            rf"{re.escape(row)} has", w) for w in wrong), wrong
    wrong = sources.check_page(numbers, "docs/training.md", anew)     # its own opening, too
    assert any("99.2 %" in w for w in wrong)


def test_take_keeps_what_is_known():
    """Nothing changes where nothing was measured; a new number has no source until one is named."""
    numbers = json.loads(json.dumps(NUMBERS))
    for page, text in PAGES.items():
        sources.take(numbers, page, text)
    assert numbers == NUMBERS
    assert sources.written(numbers) + "\n" == sources.FILE.read_text()
    more = PAGES["docs/grpo.md"] + "\nIt takes 7.25 GiB.\n"
    sources.take(numbers, "docs/grpo.md", more)
    assert sources.check_page(numbers, "docs/grpo.md", more) == [
        f"docs/grpo.md:{more.count(chr(10))}: 7.25 GiB has no source"]


@pytest.mark.parametrize("text, found", [
    ("from 13.2 to\n99.8 % right", [(1, "13.2 %"), (2, "99.8 %")]),
    ("`lr=0.3` and block 4 of Llama-3.2-1B, MLX 0.32.4, seeds 0, 1, 2", []),
    ("p = 3e-157; 1,658 ms; 5 [4, 6]", [(1, "3e-157"), (1, "1,658 ms"), (1, "4"), (1, "6")]),
    ("```\npython train.py lr=0.5   # 2.5 minutes\nloss 0.25\n```", [(2, "2.5 minutes"),
                                                                     (3, "0.25")]),
    ("```python try\nx = 0.5\n```", []),
])
def test_what_a_figure_is(text, found):
    assert sources.figures(text) == found


def test_what_sources_name_is_there():
    """Targets of make, modules, files and tests; and each source is of a known kind."""
    targets = re.findall(r"^([a-z0-9_-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = {source for of in NUMBERS.values() for source, _ in of["prose"]}
    for source in named:
        if made := re.match(r"make ([a-z0-9_-]+)", source):
            assert made[1] in targets, source
        for path in re.findall(r"[\w/]+\.(?:py|yaml|md)\b", source):
            assert (ROOT / path).exists(), source
        for module in re.findall(r"python -m ([\w.]+)", source):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), source
        assert re.match(r"make |python |set: |once, |published, |derived: |arithmetic|the file|"
                        r"tests/\w+\.py|\w+(/\w+)*\.(py|md)", source), source


@pytest.mark.parametrize("page, templates", [
    ("training", ["training"]), ("markovian", ["markovian"]),
    ("real_models", ["smollm2", "smollm2_prior_weight", "smollm2_two_digits", "smollm2_chains"])])
def test_pages_are_what_their_templates_make(page, templates):
    """Only the fields differ: a rerun writes the same prose."""
    texts = [(ROOT / "study" / "templates" / f"{name}.md").read_text() for name in templates]
    fields = re.sub(r"\\\{.*?\\\}", "(?:.|\n)*?", re.escape("\n\n".join(t.strip() for t in texts)))
    page = PAGES[f"docs/{page}.md"].partition("\n## Speed")[0]
    assert re.fullmatch(fields, page[page.find("## SmolLM2-135M"):].strip() if len(texts) > 1
                        else page.strip())
