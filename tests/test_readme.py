"""README's commands: each of the bundled model's runs, small; make's targets are there.

What a command says of a real model is run where that costs seconds; its config is loaded in
test_layout.py. It runs in a folder that looks like the project's, so that a user's runs/ are left
alone.
"""
import re
import shlex

import pytest
from conftest import ROOT, run

README = (ROOT / "README.md").read_text()
# rows of the table "What do you want to do?": (what, bundled model, real model)
ROWS = re.findall(r"^\| ([a-z][^|]+) \| `([^`]+)` \| (?:`([^`]+)`)? ?\|$", README, re.M)
BUNDLED = [command for _, command, _ in ROWS]
REAL = [command for _, _, command in ROWS if command]
SMALL = {"train.py": "steps=2 eval_prompts=4 batch_size=16",
         "study.probe": "--pairs 12",
         "study": "--report --out runs/docs",
         "tasks": "--samples 64 --test 4"}
MAKES = {"sft.yaml": "runs/sft/emergence.html",
         "dual_reward.yaml": "runs/dual_reward/emergence.html",
         "grpo.yaml": "runs/grpo/curves.png",
         "markovian_sums.yaml": "runs/markovian_sums/emergence.html",
         "lens.html": "runs/lens.html", "peft": "runs/peft/adapter_model.safetensors",
         "tasks sums": "runs/sums_data/train.jsonl"}
SAYS = {"eval.py": "operation word top-1", "--compare": "McNemar", "lens.py": "'add', token",
        "study.probe": "decodable", "study.attribution": "minus '22'", "generate.py": "23 + 45 ="}


def words_of(command):
    """The command as run() takes it, made small by what SMALL says of its words."""
    words = shlex.split(command)[1:]        # without `python`
    for name, more in SMALL.items():
        if any(word == name or word.endswith(f"/{name}") for word in words):
            words += shlex.split(more)
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name != "runs" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def test_every_command_of_the_bundled_model(place):
    """Data first, then training, then what reads a run: each ends well and leaves what it says."""
    order = lambda command: ("tasks" not in command, "train.py" not in command)
    commands = sorted((c for c in BUNDLED if c.startswith("python ")), key=order)
    assert len(commands) >= 11 and not (place / "runs").exists()
    for command in commands:
        done = run(*words_of(command), cwd=place, check=0, PYTHONPATH=str(place))
        for name, file in MAKES.items():
            assert name not in command or (place / file).exists(), command
        for name, text in SAYS.items():
            assert name not in command or text in done.stdout, (command, done.stdout[-500:])


def test_real_commands_that_cost_seconds(place, smollm2):
    """The lens on SmolLM2, and the data that `make real` trains on."""
    look, = (c for c in REAL if "lens.py" in c)
    assert "'Paris', token ·Paris" in run(*words_of(look), cwd=place, check=0).stdout
    data, = (c for c in REAL if "few_shot" in c)
    run(*words_of(data), cwd=place, check=0)
    assert (place / "runs" / "one_digit" / "test.jsonl").exists()


def test_targets_of_make():
    """Each `make x` of README is a target, and is documented in the Makefile's list."""
    targets = set(re.findall(r"^([a-z0-9_-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9_-]*)", README, re.M))
    assert {"run", "real", "test", "tour", "smollm2"} <= named <= targets
    assert not [row for row in ROWS if not row[1].startswith(("make ", "python "))]


def test_the_first_screen():
    """One sentence, the command, at most a dozen lines of output, the picture: in 40 lines."""
    lines = README.splitlines()
    assert len(lines) <= 220
    first = lines[:40]
    assert "make run" in first[:8] and lines[2].count(". ") == 0
    assert any(line.startswith("![") for line in first)
    output = README.split("```")[3].strip().splitlines()
    assert 8 <= len(output) <= 12 and output[0].startswith("dual_reward of models/tiny")
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
