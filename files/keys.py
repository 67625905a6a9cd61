"""`key: value` lines and `key=value` words, typed by a declaration: no key is guessed.

Values are parsed by the field's type, by the same function for file and command line, because plain
YAML would read 1e-5 as a string, `on` as true and 010 as 8. Mistakes are collected, not raised one
by one, and `BadInput` is what every file raises. config.py stands on this file.
"""
import difflib
import math
import types
import typing
from pathlib import Path

import yaml


class BadInput(ValueError):
    """Something the user can mend: says what was given, what was expected, where, and the fix."""


class Stopped(RuntimeError):
    """The run stopped (exit code 3): the message names step and reason."""


class Collapsed(Stopped):
    """The guard gave up on a policy (guard.py); the best weights are back in place."""


def parse_value(text, kind) -> object:
    """Parse one scalar or comma list by the field's type; raises ValueError with what was expected.

    example  ("1e-5", float) -> 1e-05;  ("q,v", tuple[str, ...]) -> ("q", "v");
             ("null", int | None) -> None
    """
    if typing.get_origin(kind) is types.UnionType:
        inner = next(k for k in typing.get_args(kind) if k is not type(None))
        return None if text in ("null", "none", "") else parse_value(text, inner)
    if typing.get_origin(kind) is tuple:
        items = text if isinstance(text, list) else text.strip("[]").split(",")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if not isinstance(text, str):
        raise ValueError(f"a single {kind.__name__}")
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError    # nan would pass every check of a range
        return value
    except ValueError:
        expected = {"int": "a whole number", "float": "a finite number"}
        raise ValueError(expected[kind.__name__]) from None


def read_yaml(path: Path) -> list[tuple[str, object, int]]:
    """The file's (key, text, line) triples: scalars stay text, `parse_value` alone types them."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise BadInput(f"no config file {path}; see configs/ for examples") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder; a config file (YAML) was expected") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{path}: expected `key: value` lines, got a {node.id}")
    triples = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            raise BadInput(f"{path}:{line}: {key.value} holds keys of its own; "
                           "all keys are flat, such as lora_rank: 16")
        items = isinstance(value, yaml.SequenceNode)
        text = [item.value for item in value.value] if items else value.value
        triples.append((key.value, text, line))
    return triples


def explain_unknown(key: str, names: list[str]) -> str:
    """Say which key was probably meant, or which share its prefix."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    family = [n for n in names if n.split("_")[0] == key.split("_")[0]]
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(family or names)}"
    return f"unknown key {key!r}; {hint}"


def read_keys(path: str | Path, overrides: list[str], kinds: dict[str, type],
              ) -> tuple[dict[str, object], list[str]]:
    """A YAML file's keys, `key=value` words on top, typed by kinds; and the mistakes in them."""
    path = Path(path)
    given = [(key, text, f"{path}:{line}") for key, text, line in read_yaml(path)]
    mistakes, seen = [], {}
    for word in overrides:
        key, equals, text = word.partition("=")  # at the first '=': values may hold others
        if not equals:
            mistakes.append(f"command line: expected key=value, got {word!r}")
        else:
            given.append((key, text, f"command line {word!r}"))
    values = {}
    for key, text, where in given:
        source = "command line" if where.startswith("command") else "file"
        if key not in kinds:
            mistakes.append(f"{where}: {explain_unknown(key, list(kinds))}")
        elif (key, source) in seen:
            mistakes.append(f"{where}: key {key!r} given twice (first at {seen[key, source]})")
        else:
            seen[key, source] = where
            try:
                values[key] = parse_value(text, kinds[key])
            except ValueError as error:
                mistakes.append(f"{where}: {key} = {text!r}: expected {error}")
    return values, mistakes


def write_keys(values: dict[str, object]) -> str:
    """YAML text that `read_keys` reads back to equal values."""
    lines = []
    for key, value in values.items():
        if value is None:
            text = "null"
        elif isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, tuple):
            text = f"[{', '.join(value)}]"
        else:
            text = yaml.safe_dump(value).split("\n")[0]
        lines.append(f"{key}: {text}\n")
    return "".join(lines)
