"""Every mistake in a config is named, all at once, in one line; and every key does something."""
import dataclasses
import re

import pytest
from conftest import ROOT, assert_one_clear_line, run

from config import Config, load_config, resolved
from files.keys import BadInput, parse_value, write_keys


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"
    return write


def test_precedence_and_types(write):
    path = write("lr: 1e-5\nsteps: 010\nlora_targets: [q, v]\nfull: false\ndtype: null\n")
    cfg = load_config(path, ["steps=7", "model=a=b"])
    assert (cfg.lr, cfg.steps, cfg.lora_targets) == (1e-5, 7, ("q", "v"))
    assert (cfg.dtype, cfg.model) == (None, "a=b")
    assert cfg.run_dir == "runs/c" and cfg.batch_size == Config().batch_size
    cfg = load_config(write("data_wordings: symbolic, worded"))
    assert cfg.data_wordings == ("symbolic", "worded")
    assert parse_value("12", float) == 12.0 and parse_value("null", int | None) is None


@pytest.mark.parametrize("text, words", [
    ("stesp: 10", ("c.yaml:1", "unknown key 'stesp'", "did you mean steps?")),
    ("lora_foo: 10", ("unknown key 'lora_foo'", "lora_rank", "lora_alpha")),
    ("steps: 5\nsteps: 6", ("c.yaml:2", "'steps' given twice", "c.yaml:1")),
    ("steps: 1.5", ("steps = '1.5'", "a whole number")),
    ("lr: fast", ("lr = 'fast'", "a finite number")),
    ("full: yes", ("full = 'yes'", "true or false")),
    ("steps: [1, 2]", ("steps", "a single int")),
    ("lora_targets: [q, z]", ("lora_targets = 'z'", "q, k, v, o, gate, up, down")),
    ("lora_targets: []", ("lora_targets is empty",)),
    ("method: ppo", ("method = 'ppo'", "sft, dual_reward")),
    ("method: sft\nclass_weight: 0.5",
     ("class_weight belongs to method dual_reward", "this config has method sft")),
    ("method: dual_reward\nclass_words: [one, two]",
     ("class_words = one, two", "3 different words", "add, subtract, multiply")),
    ("method: dual_reward\nclass_weight: 1.5", ("class_weight = 1.5", "from 0 to 1")),
    ("steps: 0", ("steps = 0", "at least 1")),
    ("lr: nan", ("lr = 'nan'", "a finite number")),
    ("lora_alpha: inf", ("lora_alpha = 'inf'", "a finite number")),
    ("lora_alpha: 0", ("lora_alpha = 0.0", "above 0")),
    ("lora_alpha: -16", ("lora_alpha = -16.0", "above 0")),
    ("lora_targets: [q, q]", ("lora_targets = q, q", "each entry once")),
    ("data_operations: [add, add]", ("data_operations = add, add", "each entry once")),
    ("data_wordings: symbolic, worded, symbolic", ("data_wordings = symbolic", "each entry once")),
    # as many different words as operations, yet one of them twice
    ("method: dual_reward\ndata_operations: [add, divide]\nclass_words: [a, a, b]",
     ("class_words = a, a, b", "each entry once")),
    ("method: grpo\ngrpo_dual_clip: 0.5", ("grpo_dual_clip = 0.5", "0 (none)", "above 1")),
    ("method: grpo\ngrpo_dual_clip: 1", ("grpo_dual_clip = 1.0", "0 (none)", "above 1")),
    ("method: markovian\ngrpo_clip_low: 1", ("grpo_clip_low = 1.0", "below 1")),
    ("batch_size: 8\ngrad_accum_steps: 3", ("does not divide",)),
    ("bits: 4\nfull: true", ("bits = 4",)),
    ("from_scratch: true", ("needs full: true",)),
    ("lora:\n  rank: 4", ("c.yaml:1", "flat")),
    ("- a\n- b", ("key: value", "sequence")),
    ("a: [", ("not valid YAML",)),
])
def test_mistakes(write, text, words):
    with pytest.raises(BadInput) as error:
        load_config(write(text))
    assert all(word in str(error.value) for word in words), error.value


def test_what_borders_on_a_mistake_loads(write):
    path = write("method: grpo\ngrpo_dual_clip: 0\ngrpo_clip_low: 0.99\nlora_alpha: 1e-3")
    assert load_config(path).grpo_dual_clip == 0
    assert load_config(path, ["grpo_dual_clip=1.01"]).grpo_dual_clip == 1.01


def test_all_mistakes_at_once_on_one_line(write):
    path = write("stesp: 10\nlr: fast\nbatch: 3\n")
    assert_one_clear_line(run("train.py", path, "sede=1", "steps"), "stesp", "lr = 'fast'",
                          "batch", "sede", "expected key=value, got 'steps'")
    assert_one_clear_line(run("train.py", "no/such.yaml"),
                          "no/such.yaml is missing; expected a config file")
    assert_one_clear_line(run("train.py"), "python train.py CONFIG.yaml")


TRAINING = sorted(p for p in (ROOT / "configs").glob("*.yaml")
                  if p.stem != "study" and not p.stem.startswith("gate_"))


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_shipped_configs_load_and_round_trip(path, tmp_path):
    cfg = load_config(path)
    assert path.read_text().startswith("# ") and len(path.read_text().splitlines()) <= 30
    (tmp_path / "again.yaml").write_text(write_keys(resolved(cfg)))
    assert resolved(load_config(tmp_path / "again.yaml")) == resolved(cfg)


def test_overwrite_is_a_command_and_not_stored():
    assert "overwrite" not in resolved(Config(overwrite=True))
    assert "class_weight" not in resolved(Config(method="sft"))
    assert "class_weight" in resolved(Config(method="dual_reward"))


def test_every_key_is_read_somewhere():
    files = [p for folder in (".", "engine", "files", "text", "report")
             for p in ROOT.glob(f"{folder}/*.py")]
    own = (ROOT / "config.py").read_text().replace("self.", "cfg.").splitlines()
    source = "".join(p.read_text() for p in files if p.name != "config.py") + "".join(
        line for line in own if "cfg." in line)
    names = [f.name for f in dataclasses.fields(Config)]
    unread = [name for name in names if not re.search(rf"cfg\.{name}\b", source)]
    assert not unread
