"""Hostile input: every mistake is one clear line and exit code 2, in time, and nothing is touched.

    python tests/hostile.py                 # all cases, by class (`make hostile`)
    python tests/hostile.py 150 --seed 1    # a sample of them
    python tests/hostile.py --only peft     # those whose name it finds; each one's line too

Cases are made by rule, not by hand: each field of each file with each wrong value, each file with
each damage, each path as directory, pipe, link, device or socket, each key with each wrong word.
A case keeps the promise if the command ends before its deadline, with exit code 2, one line that
starts with "error:" and no traceback, or where its input is valid after all ("either") with code 0;
if what lies outside the case's folder is as before, and so is the folder, but for the run's own.

Each command is a process of its own, forked from one that has imported everything and has computed
nothing: MLX's threads would not survive a fork. Cases about interpreters that start or pipes that
close run `python ...` as a user does.
"""
import argparse
import atexit
import collections
import fnmatch
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

# before engine.blas, which else has MLX start its thread at once: no fork would have it
import mlx.core  # noqa: F401

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# of one case, on a busy machine; most take a tenth of a second
DEADLINE_S = float(os.environ.get("HOSTILE_DEADLINE_S", 60))
SECRET = "sk-hostile0123456789abcdef"
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    kind: str           # what the counts are by
    name: str
    make: Callable      # (Place) -> the command's words, after putting its files there
    expected: str = "refused"       # or "either": valid, or a matter of taste; "accepted"
    fresh: bool = False             # a new interpreter, and words for a shell


@dataclass(frozen=True)
class Place:
    """Where a case lives: the command's own folder, one beside it to be left alone, fixtures."""
    folder: Path
    outside: Path
    fixtures: Path

    def copy(self, name: str, new_name: str = "") -> Path:
        """A fixture's folder or file, as a copy in the case's folder."""
        source, target = self.fixtures / name, self.folder / (new_name or name)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        return target


# --------------------------------------------------------------------------------------------------
# what is wrong with a value, a file, a path

VALUES = {"null": None, "text": "many", "digits": "7", "negative": -1, "zero": 0, "large": 2 ** 30,
          "huge": 10 ** 30, "fraction": 1.5, "nan": NAN, "inf": INF, "true": True, "list": [1],
          "object": {"a": 1}, "surrogate": "\ud800"}
MISSING = object()
# of each kind of field the values that are right; null and missing are, where it has a default
RIGHT = {"count": (), "positive": ("fraction", "large", "huge"), "switch": ("true",),
         "ids": ("zero", "list"), "text": ("text", "digits"), "names": (), "object": ("object",),
         "length": ("large",)}


def field_cases(kind: str, make: Callable, fields: dict[str, tuple[str, bool]],
                values: dict = VALUES) -> Iterator[Case]:
    """Each field with each wrong value.

    make     (place, field, value) -> words; value MISSING: the field is not there
    fields   {name: (its kind in RIGHT, is it required?)}
    """
    for field, (type_, required) in fields.items():
        for name, value in {"missing": MISSING, **values}.items():
            optional = name in ("missing", "null") and not required
            expected = "either" if optional or name in RIGHT[type_] else "refused"
            yield Case(kind, f"{kind} {field} {name}",
                       functools.partial(make, field=field, value=value), expected)


def change_json(path: Path, field: str, value, line: int | None = None) -> None:
    """Set a field of a JSON file, a.b for a field of a field; line: of a file of JSON lines."""
    lines = path.read_text().split("\n") if line is not None else [path.read_text()]
    whole = json.loads(lines[line or 0])
    *outer, last = [int(part) if part.lstrip("-").isdigit() else part
                    for part in field.split(".")]
    inner = functools.reduce(lambda found, part: found[part], outer, whole)
    if value is MISSING:
        inner.pop(last, None) if isinstance(inner, dict) else inner.__delitem__(last)
    else:
        inner[last] = value
    lines[line or 0] = json.dumps(whole)
    path.write_text("\n".join(lines))


CONTENTS = {
    "empty": b"", "binary": bytes(range(256)) * 8, "zeros": bytes(4096), "latin": b"\xe9\xff{}",
    "list": b"[1, 2]", "text": b'"text"', "number": b"12", "null": b"null",
    "deep list": b"[" * 100_000, "deep object": b'{"a":' * 100_000,
    "deep whole": b'{"a":' * 900 + b"1" + b"}" * 900,
    "long number": b'{"a": ' + b"9" * 10_000 + b"}", "nan": b'{"a": NaN}', "inf": b'{"a": 1e999}',
    "surrogate": rb'{"a": "\ud800"}', "utf-16": '{"a": 1}'.encode("utf-16")}
PATHS = ("directory", "pipe", "loop", "zero device", "socket", "dangling", "missing", "sparse")


def damage(path: Path, how: str, outside: Path) -> None:
    """Put something else in a file's place; what a link leads to lies outside."""
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if how in CONTENTS:
        path.write_bytes(CONTENTS[how])
    elif how == "half":
        path.write_bytes(content[:len(content) // 2])
    elif how == "directory":
        path.mkdir()
    elif how == "full directory":
        path.mkdir()
        (path / "kept.txt").write_text("kept\n")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "zero device":
        path.symlink_to("/dev/zero")
    elif how == "socket":
        here = os.getcwd()      # a socket's name is short
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif how == "dangling":
        path.symlink_to(outside / "nothing_here")
    elif how == "sparse":       # 64 GiB that take no room
        with open(path, "wb") as file:
            file.truncate(2 ** 36)
    elif how == "link":
        path.symlink_to(outside / "kept.txt")
    elif how == "device":       # our own null device: as root a rename would replace the machine's
        os.mknod(outside / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.symlink_to(outside / "device")
    elif how == "true device":
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    elif how == "below a file":
        path.write_text("kept\n")
    else:
        assert how == "missing", how


def file_cases(kind: str, make: Callable, file: str, either: tuple[str, ...] = (),
               hows: tuple[str, ...] = (*CONTENTS, "half", *PATHS)) -> Iterator[Case]:
    """A file with each damage. make  (place) -> words; the file is damaged after that.

    either   the damages of which a file of this kind may be valid. In an object NaN may stand under
             a name that nobody reads
    """
    if file.endswith(".json"):
        either += "nan", "inf"

    def make_damaged(place: Place, how: str) -> list[str]:
        words = make(place)
        damage(place.folder / file, how, place.outside)
        return words

    for how in hows:
        yield Case(kind, f"{kind} {file} {how}", functools.partial(make_damaged, how=how),
                   "either" if how in either else "refused")


# --------------------------------------------------------------------------------------------------
# commands, each on fixtures that are right

LOOK = ["lens", "--prompt", "7 * 8 = ", "--ckpt"]
TRAIN = {"model": "model", "data": "rows.jsonl", "run_dir": "run", "steps": 2, "batch_size": 4,
         "lora_rank": 2, "eval_prompts": 2, "save_every_steps": 1, "eval_every_steps": 1,
         "lens_every_steps": 2}
METHOD_KEYS = {
    "dual_reward": {"method": "dual_reward"},
    "grpo": {"method": "grpo", "grpo_group_size": 2},
    "markovian": {"method": "markovian", "grpo_group_size": 2, "chain_tokens": 2, "data": "sums",
                  "max_completion_tokens": 4}}


def look_at(place: Place, model: str = "model") -> list[str]:
    place.copy(model)
    return [*LOOK, model]


def chat_with(place: Place) -> list[str]:
    place.copy("chat")
    return ["lens", "--ckpt", "chat", "--prompt", "7", "--template", "chat"]


def look_with_adapter(place: Place, adapter: str) -> list[str]:
    place.copy("model")
    place.copy(adapter)
    return [*LOOK, "model", "--adapter", adapter]


def train_with(place: Place, *words: str, **keys) -> list[str]:
    """A training run of two steps; words as on the command line, keys in the file."""
    keys = TRAIN | keys
    place.copy("model")
    place.copy("sums" if keys["data"] == "sums" else "rows.jsonl")
    (place.folder / "c.yaml").write_text("".join(f"{k}: {v}\n" for k, v in keys.items()))
    return ["train", "c.yaml", *words]


def continue_run(place: Place, finished: bool = False) -> list[str]:
    """The same command on a run of two steps that has not written its report; or has."""
    words = train_with(place)
    place.copy("run")
    if not finished:
        (place.folder / "run" / "report.json").unlink()
    return words


def look_at_run(place: Place) -> list[str]:
    place.copy("model")
    place.copy("run")
    return [*LOOK, "run"]


def gate_with(place: Place, *words: str) -> list[str]:
    """A gate whose replies are there already: deciding anew generates nothing."""
    for name in ("model", "gate", "talks.jsonl", "gate.yaml"):
        place.copy(name)
    return ["gate", "gate.yaml", *words]


def train_behind_gate(place: Place) -> list[str]:
    place.copy("gate")
    change_json(place.folder / "gate" / "gate.json", "verdict", "GO")
    return train_with(place, require_gate="gate/gate.json")


# --------------------------------------------------------------------------------------------------
# the classes

MODEL_FIELDS = {
    **{name: ("count", True) for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                          "num_attention_heads", "vocab_size")},
    "num_key_value_heads": ("count", True), "head_dim": ("count", False),
    "max_position_embeddings": ("length", False), "rms_norm_eps": ("positive", False),
    "rope_theta": ("positive", False), "rope_scaling": ("names", False),
    "attention_bias": ("switch", False), "mlp_bias": ("switch", False),
    "tie_word_embeddings": ("switch", False), "hidden_act": ("names", False),
    "model_type": ("names", True)}
MLX_FIELDS = {
    "fine_tune_type": ("names", False), "num_layers": ("names", False),
    "lora_parameters": ("names", True), "lora_parameters.rank": ("count", True),
    "lora_parameters.scale": ("positive", True), "lora_parameters.keys": ("names", False),
    "model": ("text", False), "base_fingerprint": ("names", False)}
PEFT_FIELDS = {
    "peft_type": ("names", True), "r": ("count", True), "lora_alpha": ("positive", True),
    "target_modules": ("names", True), "bias": ("names", False), "use_rslora": ("switch", False),
    "layers_to_transform": ("ids", False), "init_lora_weights": ("switch", False),
    "base_model_name_or_path": ("text", False), "use_dora": ("names", False)}
# the values of which a field's default, or what it is at any rate, may be one
ALSO_RIGHT = {"records step zero": "either",
              "num_layers negative": "either", "num_layers large": "either",
              "rope_scaling object": "either", "eos_token digits": "either",
              "chat_template text": "either", "chat_template digits": "either"}


def with_json(place: Place, field: str, value, words: Callable, file: str,
              line: int | None = None) -> list[str]:
    found = words(place)
    change_json(place.folder / file, field, value, line)
    return found


def json_cases() -> Iterator[Case]:
    """Fields of the files that come with models and adapters."""
    of = lambda words, file, line=None: functools.partial(
        with_json, words=words, file=file, line=line)
    yield from field_cases("config.json", of(look_at, "model/config.json"), MODEL_FIELDS)
    chat = "chat/tokenizer_config.json"
    yield from field_cases("tokenizer_config.json", of(chat_with, chat), {
        "eos_token": ("names", False), "bos_token": ("text", False),
        "add_bos_token": ("switch", False), "legacy": ("switch", False),
        "chat_template": ("names", False)})
    yield from field_cases("generation_config.json", of(
        chat_with, "chat/generation_config.json"), {"eos_token_id": ("ids", False)})
    for name, fields in (("mlx", MLX_FIELDS), ("peft", PEFT_FIELDS)):
        words = functools.partial(look_with_adapter, adapter=name)
        yield from field_cases(name, of(words, f"{name}/adapter_config.json"), fields)
    yield from field_cases("records", of(continue_run, "run/metrics.jsonl", 0),
                           {"step": ("names", True)})
    yield from field_cases("gate.json", of(train_behind_gate, "gate/gate.json"), {
        "verdict": ("names", True), "models": ("names", True), "models.base": ("names", True),
        "models.base.weights": ("names", True), "reasons": ("names", False)})


ROWS = {    # a row of each layout; the columns that are tried
    "prompt": ({"prompt": "7 * 8 = ", "response": "56"}, ("prompt", "response")),
    "question": ({"question": "7 * 8", "answer": "56"}, ("question", "answer")),
    "alpaca": ({"instruction": "multiply", "input": "7 8", "output": "56"},
               ("instruction", "output")),
    "text": ({"text": "7 * 8 = 56"}, ("text",)),
    "messages": ({"messages": [{"role": "user", "content": "7 * 8"},
                               {"role": "assistant", "content": "56"}]},
                 ("messages", "messages.0", "messages.0.role", "messages.0.content",
                  "messages.1.content")),
    "sharegpt": ({"conversations": [{"from": "human", "value": "7 * 8"},
                                    {"from": "gpt", "value": "56"}]},
                 ("conversations", "conversations.0.from", "conversations.0.value"))}
ROW_VALUES = {name: VALUES[name] for name in ("null", "negative", "true", "nan", "list", "object",
                                              "surrogate")} | {"empty": ""}


def data_cases() -> Iterator[Case]:
    """Rows of a user's data, of which the second is wrong."""
    def make(place: Place, field: str, value, row: dict) -> list[str]:
        words = train_with(place, template="plain" if len(row) == 1 and "text" not in row
                           else "none")
        rows = [json.loads(json.dumps(row).replace("7", str(n))) for n in range(10, 30)]
        path = place.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        change_json(path, field, value, 1)
        return words

    for layout, (row, columns) in ROWS.items():
        yield from field_cases(f"row {layout}", functools.partial(make, row=row),
                               {column: ("names", True) for column in columns}, ROW_VALUES)
    beside = {name: ("names", False) for name in ("operation", "wording", "hidden", "letters")}
    yield from field_cases("row beside", functools.partial(make, row=ROWS["prompt"][0]), beside,
                           {k: v for k, v in ROW_VALUES.items() if k != "empty"})
    yield from field_cases("row own", functools.partial(make, row=ROWS["prompt"][0]),
                           {"own": ("text", False)}, {k: VALUES[k] for k in ("nan", "surrogate")})


BENCHMARK_FIELDS = ("id", "category", "turns", "turns.-1", "turns.-1.user", "turns.-1.scored",
                    "turns.-1.checks", "turns.-1.answer", "turns.-1.checks.0.type")


def gate_rows() -> Iterator[Case]:
    """Rows of a benchmark, of people's labels, of what a gate itself has written."""
    benchmark = functools.partial(with_json, words=gate_with, file="talks.jsonl", line=1)
    yield from field_cases("benchmark", benchmark,
                           {name: ("names", True) for name in BENCHMARK_FIELDS},
                           {k: v for k, v in ROW_VALUES.items()
                            if k not in ("true", "empty")})

    def labels(place: Place, field: str, value) -> list[str]:
        words = gate_with(place, "labels=labels.jsonl")
        row = json.loads((place.folder / "gate" / "spotcheck.jsonl").read_text().split("\n")[0])
        row["human"] = "pass"
        (place.folder / "labels.jsonl").write_text(json.dumps(row) + "\n")
        change_json(place.folder / "labels.jsonl", field, value, 0)
        return words

    yield from field_cases("labels", labels, {"key": ("names", True)}, ROW_VALUES)
    yield from field_cases("labels", labels, {"human": ("names", False)}, ROW_VALUES)


def damaged_files() -> Iterator[Case]:
    """Each file that a command reads, with each damage."""
    optional = ("missing", "dangling")
    yield from file_cases("file", look_at, "model/config.json")
    for file, either in (("tokenizer_config.json", optional), ("generation_config.json", optional),
                         ("tokenizer.model", ()),
                         ("chat_template.jinja", (*optional, *CONTENTS, "half"))):
        yield from file_cases("file", chat_with, f"chat/{file}", either)
    yield from file_cases("file", look_at, "model/model.safetensors")
    yield from file_cases("file", look_at, "model/model.safetensors.index.json", optional)
    yield from file_cases("file", look_at, "model/tokenizer.json", (
        *optional, *CONTENTS, "half", "sparse"))
    for adapter in ("mlx", "peft"):
        words = functools.partial(look_with_adapter, adapter=adapter)
        yield from file_cases("file", words, f"{adapter}/adapter_config.json")
    yield from file_cases("file", functools.partial(look_with_adapter, adapter="mlx"),
                          "mlx/adapters.safetensors")
    # an empty config is one of defaults, and so is `null`; all else has no key
    yield from file_cases("file", train_with, "c.yaml", ("empty", "null"))
    yield from file_cases("file", train_with, "rows.jsonl", ("half",))
    yield from file_cases("file", train_behind_gate, "gate/gate.json")
    yield from file_cases("file", look_at_run, "run/config.yaml", ("empty", "null", "half"))
    yield from file_cases("file", look_at_run, "run/adapter_config.json", optional)
    yield from file_cases("continue", continue_run, "run/config.yaml")
    yield from file_cases("continue", continue_run, "run/state.safetensors", ("missing",))
    yield from file_cases("continue", continue_run, "run/metrics.jsonl")
    finished = functools.partial(continue_run, finished=True)
    yield from file_cases("continue", finished, "run/report.json", ("missing", "dangling"))
    yield from file_cases("file", gate_with, "gate.yaml", ("half",))
    yield from file_cases("file", gate_with, "talks.jsonl")
    yield from file_cases("file", gate_with, "gate/plan.json", ("deep whole", "latin"))
    yield from file_cases("file", gate_with, "gate/replies_base-raw.jsonl", (
        *CONTENTS, "half", "missing"))


WORDS = {int: ("many", "1.5", "-7", "nan", "[1, 2]", "9" * 40, "true"),
         float: ("many", "nan", "inf", "-inf", "-1", "1e999", "[1.0]", "1e39"),
         bool: ("yes", "1", "''", "null", "[true]"), str: ("nonsense", "[a, b]", "\x07"),
         tuple: ("nonsense", "[]", "[q, q]", "{a: 1}")}
FREE = ("model", "run_dir", "data", "require_gate")     # names of places: see path_cases
# words that a key may have: at all, or where it means "as much as there is"
WORDS_RIGHT = {("lr", "1e39"), ("weight_decay", "1e39"), ("class_words", "[]")}


def key_words(key: str, type_) -> tuple[str, ...]:
    inner = [t for t in typing.get_args(type_) if t is not type(None)]
    if typing.get_origin(type_) is tuple:
        return WORDS[tuple]
    return WORDS[inner[0] if inner else type_]


def key_cases() -> Iterator[Case]:
    """Each key of a run's config and of a gate's with each wrong word: in the file, and behind."""
    from config import Config, owners_of
    from gate.verdict import GateConfig
    n = 0
    for key, type_ in typing.get_type_hints(Config).items():
        for word in () if key in FREE else key_words(key, type_):
            owner = next((m for m in METHOD_KEYS if m in owners_of(key)), "") if (
                "sft" not in owners_of(key)) else ""
            keys, n = METHOD_KEYS.get(owner, {}), n + 1
            # huge counts may be counted; nan, a fraction or a list is never a number of anything
            right = (key, word) in WORDS_RIGHT or word in ("9" * 40, "1e39")
            if n % 2 or word == "{a: 1}":
                make = functools.partial(train_with, **keys | {key: word})
                if word == "\x07":
                    continue
            else:
                make = lambda place, keys=keys, key=key, word=word: train_with(
                    place, f"{key}={word}", **{k: v for k, v in keys.items() if k != key})
            yield Case("key", f"key {key}={word!r} in the {'file' if n % 2 else 'words'}", make,
                       "either" if right else "refused")
    for key, type_ in typing.get_type_hints(GateConfig).items():
        for word in key_words(key, type_):
            # what is no model's name, no file; a number of any size may be a limit
            right = word == "9" * 40 or key in ("out", "judge_prompt", "labels", "judge",
                                                "judge_model", "benchmark")
            right |= key.endswith(("unsure", "at_least")) and word in ("1e39", "-1")
            yield Case("gate key", f"gate key {key}={word!r}",
                       lambda place, key=key, word=word: gate_with(place, f"{key}={word}"),
                       "either" if right else "refused")


OPTIONS = {     # of generate, unless it says so
    "--max-tokens": ("-1", "0", "many", "1.5", "nan", "9" * 40),
    "--temperature": ("-1", "nan", "inf", "many"), "--top-k": ("-1", "1.5", "many"),
    "--top-p": ("0", "2", "nan", "-1", "many"), "--seed": ("many", "1.5"),
    "--template": ("nonsense", ""), "--ckpt": ("", "nothing", "../..", "/dev/zero", "~nobody/x",
                                               "a" * 5000, "\x00", "-", "a/b@", "a/b@../..", ".")}


def option_cases() -> Iterator[Case]:
    for option, words in OPTIONS.items():
        for word in words:
            def make(place: Place, option=option, word=word) -> list[str]:
                place.copy("model")
                right = {"--ckpt": "model", "--prompt": "1"} | {option: word}
                return ["generate", *(part for pair in right.items() for part in pair)]
            yield Case("option", f"option {option} {word[:20]!r}", make,
                       "either" if word == "9" * 40 else "refused")
    for seed in (2 ** 31, 2 ** 63, 2 ** 64, 10 ** 30, -1, -2 ** 70):
        def make_seed(place: Place, seed=seed) -> list[str]:
            place.copy("model")
            return ["generate", "--ckpt", "model", "--prompt", "1", "--temperature", "1",
                    "--max-tokens", "2", f"--seed={seed}"]
        yield Case("option", f"option seed {seed}", make_seed, "either")
    for name, words in {
            "prompt surrogate": ["lens", "--ckpt", "model", "--prompt", "\udcff"],
            "prompt empty": ["lens", "--ckpt", "model", "--prompt", ""],
            "prompt long": ["generate", "--ckpt", "model", "--prompt", "7 " * 50_000],
            "words unknown": [*LOOK, "model", "--words", "antidisestablishmentarianism"],
            "words surrogate": [*LOOK, "model", "--words", "\udcff"],
            "no config": ["train"], "config twice": ["train", "c.yaml", "d.yaml"],
            "unknown key": ["train", "c.yaml", "learning_rate=1"],
            "unknown option": [*LOOK, "model", "--nonsense"],
            "eval override": ["eval", "--ckpt", "model", "nonsense=1"],
            "eval two adapters": ["eval", "--ckpt", "model", "--adapter", "model"],
            "export no adapter": ["lora", "--ckpt", "model", "--out", "out"],
            "export format": ["lora", "--ckpt", "model", "--out", "out", "--format", "gguf"],
            "gate nothing": ["gate", "nothing.yaml"], "study nothing": ["study", "nothing.yaml"],
            "tasks unknown": ["tasks", "nonsense", "out"]}.items():
        yield Case("option", f"option {name}", lambda place, words=words: (
            train_with(place), [*words])[1])


TARGETS = ("directory", "full directory", "pipe", "link", "loop", "dangling", "device",
           "true device", "socket", "below a file")


def target_cases() -> Iterator[Case]:
    """What a command is to write, where something else lies already."""
    def make(place: Place, how: str, words: list[str], path: str) -> list[str]:
        train_with(place)
        place.copy("run")
        place.copy("gate")
        place.copy("talks.jsonl")
        place.copy("gate.yaml")
        damage(place.folder / path, how, place.outside)
        target = f"{path}/x" if how == "below a file" else path
        return [word.replace("TARGET", target) for word in words]

    commands = {
        "lens --json": [*LOOK, "model", "--json", "TARGET"],
        "lens --html": [*LOOK, "model", "--html", "TARGET"],
        "lens --png": [*LOOK, "model", "--png", "TARGET"],
        "eval --json": ["eval", "--ckpt", "run", "--json", "TARGET"],
        "lora --out": ["lora", "--ckpt", "run", "--out", "TARGET"],
        "train run_dir": ["train", "c.yaml", "run_dir=TARGET"],
        "gate out": ["gate", "gate.yaml", "out=TARGET"]}
    for name, words in commands.items():
        for how in TARGETS:
            # an empty folder is what these three may be given
            right = how == "directory" and words[-1].endswith("=TARGET") or (
                how == "directory" and name == "lora --out")
            yield Case("target", f"target {name} {how}", functools.partial(
                make, how=how, words=words, path="target"), "either" if right else "refused")
    for file in (".lock", "metrics.jsonl", "state.safetensors", "report.json", "config.yaml",
                 "adapters.safetensors", "best"):
        for how in ("pipe", "link", "loop", "dangling", "true device", "socket"):
            def make_inside(place: Place, file=file, how=how) -> list[str]:
                words = continue_run(place)
                damage(place.folder / "run" / file, how, place.outside)
                return words
            yield Case("target", f"target run/{file} {how}", make_inside)
    for name in ("run", "best"):    # a folder that is a link: its files would be made elsewhere
        def make_link(place: Place, name=name) -> list[str]:
            words = continue_run(place)
            path = place.folder / ("run" if name == "run" else "run/best")
            shutil.rmtree(path, ignore_errors=True)
            path.symlink_to(place.outside)
            return words
        yield Case("target", f"target {name} is a link outside", make_link)


TEMPLATES = {
    "lipsum": "{{ lipsum(n=100000000) }}", "power": "{{ 9 ** (9 ** 9) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
             "{% endfor %}{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 9999999999 }}", "list": "{{ (range(99999)|list) * 99999 }}",
    "center": "{{ 'a'|center(99999999999) }}", "format": "{{ '%99999999999d' % 1 }}",
    "format 2": "{{ '{:99999999999}'.format(1) }}",
    "doubling": "{% set ns = namespace(a='a') %}{% for i in range(99) %}"
                "{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "join": "{{ range(99999)|join('a' * 99999) }}",
    "output": "{% for i in range(99999) %}{{ messages[0]['content'] * 999 }}{% endfor %}",
    "include": "{% include '/etc/passwd' %}", "import": "{% import 'os' as os %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ lipsum.__globals__['os'].system('touch ../outside/escaped') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch ../outside/escaped') }}",
    "raise": "{{ raise_exception('no') }}", "nothing": "", "once too often":
    "{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "unclosed": "{% for %}",
    "undefined": "{{ nothing.at.all }}", "division": "{{ 1 // 0 }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"}


def template_cases() -> Iterator[Case]:
    for name, template in TEMPLATES.items():
        def make(place: Place, template=template) -> list[str]:
            words = chat_with(place)
            (place.folder / "chat" / "chat_template.jinja").write_text(template)
            return words
        yield Case("template", f"template {name}", make)


REWARDS = {
    "exit": "import sys\ndef f(p, c): sys.exit(0)",
    "exit text": "def f(p, c): raise SystemExit('x')",
    "exit on load": "raise SystemExit", "os loop": "def f(p, c):\n    while True: pass",
    "sleep": "import time\ndef f(p, c): time.sleep(9999)",
    "load loop": "while True: pass", "interrupt": "def f(p, c): raise KeyboardInterrupt",
    "nan": "def f(p, c): return float('nan')", "inf": "def f(p, c): return float('inf')",
    "text": "def f(p, c): return 'many'", "none": "def f(p, c): return None",
    "list": "def f(p, c): return [1]", "raise": "def f(p, c): return p.columns['nothing']",
    "syntax": "def f(p, c:", "no function": "f = 7", "other name": "def g(p, c): return 1",
    "no arguments": "def f(): return 1", "recursion": "def f(p, c): return f(p, c)",
    "memory": "def f(p, c): return len('a' * 10 ** 14)",
    "model": "def f(model, tokenizer, problems, completions): return [1.0]",
    "parts": "def f(p, c): return 1, {'std': 1}", "part nan": "def f(p, c): return 1, {'a': 1e999}",
    "huge": "def f(p, c): return 1e300", "long": "def f(p, c): return 10 ** 400"}


def reward_cases() -> Iterator[Case]:
    for name, text in REWARDS.items():
        def make(place: Place, text=text) -> list[str]:
            (place.folder / "reward.py").write_text(text + "\n")
            return train_with(place, **METHOD_KEYS["grpo"], grpo_reward="reward.py:f")
        yield Case("reward", f"reward {name}", make, {
            "huge": "either", "interrupt": "interrupted"}.get(name, "refused"))
    for entry in ("nonsense", "reward.py", "nothing.py:f", "reward.py:f*nan", "reward.py:f*many",
                  "correct*inf", ".:f", "reward.py:f*1e999", "correct, correct"):
        def make_entry(place: Place, entry=entry) -> list[str]:
            (place.folder / "reward.py").write_text("def f(p, c): return 1\n")
            return train_with(place, **METHOD_KEYS["grpo"], grpo_reward=entry)
        yield Case("reward", f"reward entry {entry}", make_entry)


# --- a judge behind HTTP, in a process of its own
RIGHT_ANSWER = json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()
SERVERS = ("500", "404 with secret", "drip", "slow headers", "endless", "not json", "wrong shape",
           "list", "deep", "redirect", "redirect loop", "closed", "utf-16", "no server",
           "address", "retry after", "status line", "surrogate")


def serve(how: str, outside: Path, ready) -> None:
    """Answer every request in a hostile way; a key that comes to the wrong host leaves a file."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            key = self.headers.get("Authorization", "")
            if self.headers["Host"].startswith("localhost"):    # was called by its number
                if SECRET in key:
                    (outside / "leaked").write_text(key)
                return self.answer(200, RIGHT_ANSWER)
            port = self.server.server_port
            if how == "404 with secret":
                return self.answer(404, f'{{"error": "no model; your {key}"}}'.encode())
            if how == "drip":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.5)
            if how == "slow headers":
                time.sleep(9999)
            if how == "endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(b" " * 2 ** 20)
            if how.startswith("redirect"):
                host = "127.0.0.1" if how == "redirect loop" else "localhost"
                return self.answer(307, b"", {"Location": f"http://{host}:{port}/v1"})
            if how == "closed":
                return self.connection.close()
            if how == "status line":
                return self.wfile.write(b"nonsense\r\n\r\n")
            if how == "retry after":
                return self.answer(429, b"slow down", {"Retry-After": "9999999"})
            body = {"500": b"broken", "not json": b"A", "wrong shape": b'{"choices": [{}]}',
                    "list": b"[1]", "deep": b"[" * 100_000, "utf-16": "A".encode("utf-16"),
                    "surrogate": rb'{"choices": [{"message": {"content": "\ud800"}}]}'}[how]
            self.answer(500 if how == "500" else 200, body)

        def answer(self, code, body, headers=()):
            self.send_response(code)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)    # what it says of those that hang up
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    os.write(ready, str(server.server_port).encode())
    server.serve_forever()


def judge_cases() -> Iterator[Case]:
    for how in SERVERS:
        def make(place: Place, how=how) -> list[str]:
            url = {"no server": "http://127.0.0.1:9/v1", "address": "http://host:port/v1"}.get(how)
            if url is None:
                receive, send = os.pipe()
                pid = os.fork()
                if pid == 0:
                    os.close(receive)
                    serve(how, place.outside, send)
                SERVING.append(pid)
                url = f"http://127.0.0.1:{os.read(receive, 9).decode()}/v1"
            return gate_with(place, "scorers=checks,judge", f"judge={url}", "judge_model=m",
                             "replies=gate", "out=new")
        # what says nothing that can be read is counted as no verdict
        silent = how in ("not json", "wrong shape", "list", "deep", "utf-16", "surrogate")
        yield Case("judge", f"judge {how}", make, "either" if silent else "refused")


SERVING = []        # processes to end behind a case


# --- chains, silence, secrets
def other_cases() -> Iterator[Case]:
    def chain(place: Place, model: str, command: list[str]) -> list[str]:
        look_at_run(place)
        config = place.folder / "run" / "config.yaml"
        text = "".join(f"model: {model}\n" if line.startswith("model:") else line
                       for line in config.read_text().splitlines(keepends=True))
        config.write_text(text)
        shutil.copytree(place.folder / "run", place.folder / "run2")
        return command

    for name, model in (("itself", "run"), ("itself by a path", "./run/../run"), ("two", "run2")):
        for command in ([*LOOK, "run"], ["eval", "--ckpt", "run"], ["gate", "run"],
                        ["lora", "--ckpt", "run", "--out", "out"]):
            yield Case("chain", f"chain {name} {command[0]}", functools.partial(
                chain, model=model, command=command if command[0] != "gate" else [*LOOK, "run2"]))

    def nan_model(place: Place, what: str, command: str) -> list[str]:
        place.copy(f"nan_{what}")
        place.copy("model")
        target = ["--ckpt", "nan_model"] if what == "model" else [
            "--ckpt", "model", "--adapter", "nan_adapter"]
        return {"lens": ["lens", "--prompt", "7", *target],
                "generate": ["generate", "--prompt", "7", *target],
                "eval": ["eval", *target, "data_operations=add"]}[command]

    for what in ("model", "adapter"):
        for command in ("lens", "generate", "eval"):
            yield Case("silence", f"silence nan {what} {command}", functools.partial(
                nan_model, what=what, command=command))

    def lost_lines(place: Place, kept: int) -> list[str]:
        words = continue_run(place, finished=True)
        path = place.folder / "run" / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
        return words

    for kept in (0, 1, 2):
        yield Case("silence", f"silence {kept} lines of metrics.jsonl", functools.partial(
            lost_lines, kept=kept))

    def elsewhere(place: Place, command: list[str]) -> list[str]:
        look_at_run(place)
        (place.folder / "deep").mkdir()
        return ["cd deep", *command]

    yield Case("silence", "silence relative model", functools.partial(
        elsewhere, command=["lens", "--prompt", "7", "--ckpt", "../run"]), "accepted")

    token = "hf_" + "Abc123" * 6
    for name, words in {
            "ckpt": [*LOOK, token], "ckpt name": [*LOOK, f"user/{token}"],
            "train": ["train", "c.yaml", f"model={token}"],
            "url": [*LOOK, f"https://user:{SECRET}@huggingface.co/a/b"],
            "run_dir": ["train", f"{token}.yaml"],
            "key": ["train", "c.yaml", f"{token}=1"],
            "words": ["train", "c.yaml", token],
            "seed": ["train", "c.yaml", f"seed={token}"],
            "data": ["train", "c.yaml", f"data={token}"],
            "lens": [*LOOK, "model", "--json", f"{token}/x/y", "--adapter", token]}.items():
        yield Case("secret", f"secret {name}", lambda place, words=words: (
            train_with(place), words)[1])


def fresh_cases() -> Iterator[Case]:
    """Interpreters that start, pipes that close: `python ...` in a shell."""
    def make(place: Place, line: str) -> list[str]:
        train_with(place)
        for name in ("run", "gate.yaml", "talks.jsonl"):
            place.copy(name)
        return [line]

    def fresh(name: str, line: str, expected: str) -> Case:
        return Case("process", f"process {name}", functools.partial(make, line=line), expected,
                    fresh=True)

    lens, train = "$PY $ROOT/lens.py --ckpt model --prompt 7", "$PY $ROOT/train.py c.yaml"
    for name, command in {"lens": lens, "train": train, "eval": "$PY $ROOT/eval.py --ckpt run",
                          "generate": "$PY $ROOT/generate.py --ckpt model --prompt 7",
                          "lora": "$PY $ROOT/lora.py --ckpt run --out out",
                          "gate": "$PY -m gate gate.yaml"}.items():
        for wait in (0.5, 1.5):
            yield fresh(f"{name} interrupted at {wait} s",
                        f"{command} & sleep {wait}; kill -INT $! 2>/dev/null; wait $!",
                        "interrupted")
    yield fresh("lens | head", f"{lens} | head -c 1", "accepted")
    yield fresh("lens closed stdout", f"{lens} >&-", "either")
    yield fresh("lens full stdout", f"{lens} > /dev/full", "quiet")
    yield fresh("lens ascii", f"PYTHONIOENCODING=ascii {lens}", "accepted")
    yield fresh("lens latin", f"PYTHONIOENCODING=latin-1 LC_ALL=C {lens}", "accepted")
    yield fresh("train | head", f"{train} 2>/dev/null | head -c 1; test -f run/report.json",
                "accepted")
    again = f"{train} run_dir=new"
    yield fresh("train closed stdout", f"{again} >&- 2>/dev/null; test -f new/report.json",
                "accepted")
    yield fresh("train full stdout", f"{again} >/dev/full 2>/dev/null; test -f new/report.json",
                "accepted")
    yield fresh("train | head anew",
                f"{again} 2>/dev/null | head -c 1 >/dev/null; test -f new/report.json", "accepted")
    yield fresh("train ascii", f"PYTHONIOENCODING=ascii {again} 2>/dev/null", "accepted")
    for limit in (600_000, 1_000_000, 1_500_000):
        yield fresh(f"lens with {limit} KiB", f"ulimit -v {limit}; {lens}", "either")
        yield fresh(f"train with {limit} KiB", f"ulimit -v {limit}; {again}", "either")


def all_cases() -> list[Case]:
    cases = [case for make in (json_cases, data_cases, gate_rows, damaged_files, key_cases,
                               option_cases, target_cases, template_cases, reward_cases,
                               judge_cases, other_cases, fresh_cases) for case in make()]
    cases = [replace(case, expected=next((e for name, e in ALSO_RIGHT.items()
                                          if case.name.endswith(name)), case.expected))
             for case in cases]
    assert len({case.name for case in cases}) == len(cases), "two cases of one name"
    return cases


# --------------------------------------------------------------------------------------------------
# what the cases stand on: right folders and files, made once by the project's own commands


def make_fixtures(folder: Path) -> None:
    """In a process of its own: it computes, and what is forked from it afterwards would hang."""
    import mlx.core as mx
    from conftest import CHAT, TINY, adapted, small_config, small_model, write_model
    from mlx.utils import tree_flatten

    from files.adapters import about_adapter, adapter_arrays, mlx_files, peft_files
    from files.model_folder import save_safetensors, write_files
    from gate.conversations import read_benchmark, write_benchmark
    os.chdir(folder)
    write_model(folder / "model", small_config(), TINY)
    shutil.copytree("model", "chat")
    (folder / "chat" / "chat_template.jinja").write_text(CHAT)
    (folder / "chat" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "chat" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    model = adapted(small_model())
    about = about_adapter(model, "model")
    write_files(folder / "mlx", mlx_files(adapter_arrays(model), about))
    write_files(folder / "peft", peft_files(adapter_arrays(model), about))
    # every number is finite, and no logit is
    huge = {name: array + 1e38 for name, array in adapter_arrays(model).items()}
    write_files(folder / "nan_adapter", mlx_files(huge, about))
    shutil.copytree("model", "nan_model")
    arrays = {name: array * 1e38 if "proj" in name else array
              for name, array in tree_flatten(small_model().parameters())}
    save_safetensors(folder / "nan_model" / "model.safetensors", arrays)
    rows = [{"prompt": f"{a} * {b} = ", "response": str(a * b), "operation": "multiply"}
            for a in range(2, 8) for b in range(2, 8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import train
    from tasks.__main__ import write_task
    write_task("sums", folder / "sums", samples=30, test=4, terms=3)
    (folder / "c.yaml").write_text("".join(f"{k}: {v}\n" for k, v in TRAIN.items()))
    train.main(["c.yaml"])
    talks = read_benchmark(ROOT / "gate" / "benchmark" / "tiny_operations.jsonl")[0]
    write_benchmark(folder / "talks.jsonl", talks[:4])
    (folder / "gate.yaml").write_text(
        "base: model\nbenchmark: talks.jsonl\nout: gate\nbase_templates: [raw, lines]\n"
        "shots: 1\nmax_reply_tokens: 4\nscorers: [checks, length]\n")
    from gate.__main__ import main as gate
    gate(["gate.yaml"])
    del mx


def warm() -> dict[str, Callable]:
    """Import all that the commands do, and compute nothing."""
    import checkpoint
    import eval
    import gate.__main__
    import generate
    import grpo
    import guard
    import lens
    import markovian
    import report.lens_view
    import report.plot
    import study.__main__
    import tasks.__main__
    import text.chat
    import train
    assert grpo and guard and markovian and report.lens_view and report.plot and text.chat
    return {"train": train.main, "lens": lens.main, "eval": eval.main, "generate": generate.main,
            "lora": checkpoint.main, "gate": gate.__main__.main, "study": study.__main__.main,
            "tasks": tasks.__main__.main}


# --------------------------------------------------------------------------------------------------
# one case


def snapshot(folder: Path, without: tuple[str, ...] = ()) -> dict[str, tuple]:
    """What lies in a folder: kinds, sizes, times of change, where links lead."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders
                      if not any(fnmatch.fnmatch(name, pattern) for pattern in without)]
        for name in (*folders, *files):
            path = os.path.join(place, name)
            about = os.lstat(path)
            is_folder = stat.S_ISDIR(about.st_mode)
            found[os.path.relpath(path, folder)] = (
                about.st_mode, about.st_ino,
                None if is_folder else (about.st_size, about.st_mtime_ns),
                os.readlink(path) if stat.S_ISLNK(about.st_mode) else "")
    return found


# a project's own folders that others write to while this runs: the real model may just be fetched
NOT_OURS = (".git", ".venv", ".venv-bench", "runs", "__pycache__", ".pytest_cache", ".ruff_cache",
            "smollm2", ".smollm2.*.tmp")
# a refused command may leave these of its own: a run that was begun, and what it says of it
OWN = ("run/", "new/", "gate/", "target/", "runs/", "outside_runs", "out/", "deep/")


def environment(place: Place) -> dict[str, str]:
    return {**os.environ, "HOME": str(place.folder),
            "OPENAI_API_KEY": SECRET, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "PY": sys.executable, "ROOT": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1"}


def run_forked(words: list[str], place: Place, mains: dict, out: Path) -> None:
    """In the child: the command as its own process would run it. Does not return."""
    code = 70
    try:
        os.setsid()
        for number, path, how in ((0, os.devnull, os.O_RDONLY),
                                  (1, out / "stdout", os.O_WRONLY | os.O_CREAT),
                                  (2, out / "stderr", os.O_WRONLY | os.O_CREAT)):
            file = os.open(path, how)
            os.dup2(file, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 30, 2 ** 30))
        resource.setrlimit(resource.RLIMIT_AS, (2 ** 33, 2 ** 33))     # the machine is not ours
        os.environ.update(environment(place))
        tempfile.tempdir = None
        os.chdir(place.folder)
        from config import run_main
        from files import endpoint, user_reward
        user_reward.DEADLINE_S = endpoint.REQUEST_S = 3
        if words[0].startswith("cd "):
            os.chdir(words.pop(0)[3:])
        sys.argv = words
        run_main(mains[words[0]])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def end(pid: int, group: bool = True) -> None:
    try:
        (os.killpg if group else os.kill)(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def wait_for(pid: int, deadline: float) -> int | None:
    """The exit code, negative of a signal; None where the process had to be killed."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            end(pid)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def judge_case(case: Case, code: int | None, stdout: str, stderr: str, changes: list[str],
               own: list[str]) -> str:
    """"" if the promise is kept, else what is broken: hang, traceback, crash, accepted, ..."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines()
             if line.strip() and not line.startswith(("note: ", "warning: "))]
    if code is None:
        return "hang"
    if changes:
        return f"touched {', '.join(changes[:3])}"
    if SECRET in stdout + stderr or "hf_Abc123" in stdout + stderr:
        return "leak"
    if "Traceback" in stderr or "Exception ignored" in stderr:
        return "traceback"
    if code < 0:
        return f"crash by signal {-code}"
    if case.expected == "interrupted":      # 0: it was done before
        return "" if code in (130, 0) and not lines else f"exit code {code}: {lines[:1]}"
    if case.expected == "quiet":
        return "" if len(lines) <= 1 else "several lines"
    if code == 0 or code == 3 and case.expected == "either":
        return "" if case.expected in ("accepted", "either") else "accepted"
    if code != 2:
        return f"exit code {code}"
    if case.expected == "accepted":
        return "refused"
    errors = [line for line in lines if line.startswith("error: ")]
    bars = [line for line in lines if "it/s" in line or "step/s" in line or "s/step" in line]
    if len(errors) != 1 or len(lines) - len(bars) > 1:
        return "not one line"
    if not errors[0].isprintable() or len(errors[0]) > 2500:
        return "not a clear line"
    if own:
        return f"left {', '.join(own[:3])}"
    return ""


def run_case(case: Case, fixtures: Path, mains: dict) -> tuple[str, str, float]:
    """(what is broken, what was said, seconds)."""
    base = Path(tempfile.mkdtemp(prefix="hostile-"))
    place = Place(base / "case", base / "outside", fixtures)
    for folder in (place.folder, place.outside, base / "out"):
        folder.mkdir()
    (place.outside / "kept.txt").write_text("kept\n")
    said = base / "out" / "stdout", base / "out" / "stderr"
    try:
        words = case.make(place)
        before, witness = snapshot(place.folder), snapshot(place.outside)
        project = snapshot(ROOT, NOT_OURS)
        start = time.monotonic()
        if case.fresh:
            with open(said[0], "w") as out, open(said[1], "w") as err:
                pid = subprocess.Popen(["bash", "-c", words[0]], cwd=place.folder, stdout=out,
                                       stderr=err, stdin=subprocess.DEVNULL, env=environment(place),
                                       start_new_session=True).pid
        else:
            pid = os.fork()
            if pid == 0:
                run_forked(words, place, mains, base / "out")
        code = wait_for(pid, start + DEADLINE_S)
        seconds = time.monotonic() - start
        end(pid)        # what it has left behind, of its own group
        stdout, stderr = (path.read_text(errors="replace") if path.exists() else ""
                          for path in said)
        changed = lambda old, new: sorted(
            name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        changes = [*changed(witness, snapshot(place.outside)),
                   *changed(project, snapshot(ROOT, NOT_OURS))]
        own = [name for name in changed(before, snapshot(place.folder))
               if not f"{name}/".startswith(OWN)]
        return judge_case(case, code, stdout, stderr, changes, own), stderr, seconds
    finally:
        while SERVING:
            pid = SERVING.pop()
            end(pid, group=False)
            os.waitpid(pid, 0)
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def prepared(kept: Path | None = None) -> Iterator[tuple[Path, dict]]:
    """Fixtures, made in a process of their own, and the commands, warm. kept: made before."""
    if kept and (kept / "gate" / "gate.json").exists():
        yield kept, warm()
        return
    fixtures = kept or Path(tempfile.mkdtemp(prefix="hostile-fixtures-"))
    fixtures.mkdir(parents=True, exist_ok=True)
    code = "import sys, hostile, pathlib; hostile.make_fixtures(pathlib.Path(sys.argv[1]))"
    try:
        done = subprocess.run([sys.executable, "-c", code, str(fixtures)], text=True,
                              capture_output=True,
                              env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
        assert done.returncode == 0, done.stderr
        yield fixtures, warm()
    finally:
        if not kept:
            shutil.rmtree(fixtures, ignore_errors=True)


def sample(n: int, seed: int) -> list[Case]:
    """n cases, of each class as many as its share, at least one; the same for one seed."""
    rng, by_kind = random.Random(seed), collections.defaultdict(list)
    for case in all_cases():
        by_kind[case.kind].append(case)
    drawn = [rng.choice(cases) for cases in by_kind.values()]
    rest = [case for case in all_cases() if case.name not in {c.name for c in drawn}]
    return drawn + rng.sample(rest, n - len(drawn))


def main() -> int:
    parser = argparse.ArgumentParser(description="Try hostile inputs; exit code 1 if any is not "
                                     "answered by one clear line.")
    parser.add_argument("n", nargs="?", type=int, help="a sample of so many; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="cases whose name this pattern finds; their lines are shown")
    parser.add_argument("--fixtures", type=Path, help="a folder to keep them in: made once")
    args = parser.parse_args()
    cases = sample(args.n, args.seed) if args.n else all_cases()
    cases = [case for case in cases if not args.only or re.search(args.only, case.name)]
    counts, kept, broken = collections.Counter(), collections.Counter(), []
    start = time.monotonic()
    with prepared(args.fixtures) as (fixtures, mains):
        for case in cases:
            why, said, seconds = run_case(case, fixtures, mains)
            counts[case.kind] += 1
            kept[case.kind] += not why
            if why or args.only:
                line = (said.strip().splitlines() or [""])[-1][:300]
                print(f"{case.name!r}: {why or 'kept'} ({seconds:.1f} s) {line}", flush=True)
                broken += [why.split(" ")[0]] if why else []
    print(f"\n{'class':<26}{'cases':>8}{'kept':>8}")
    for kind, n in counts.items():
        print(f"{kind:<26}{n:>8}{kept[kind]:>8}")
    print(f"{'all':<26}{counts.total():>8}{kept.total():>8}   "
          f"in {time.monotonic() - start:.0f} s; broken: "
          f"{', '.join(f'{n} {why}' for why, n in collections.Counter(broken).most_common())}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
