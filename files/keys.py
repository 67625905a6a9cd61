"""What a config may say: its keys' types, choices and ranges. config.py stands on this file.

`key: value` lines and `key=value` words are typed by the field's declaration, by the same function
for file and command line, because plain YAML would read 1e-5 as a string, `on` as true and 010 as
8. Then values and keys that go together are checked, without a model and without reading data.
Mistakes are collected, not raised one by one, and `BadInput` is what every file raises.
"""
import difflib
import math
import os
import types
import typing
from pathlib import Path

import yaml

from files.disk import BadInput, one_line, read_text


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
    # the null device stands for no file: all keys have their defaults
    text = "" if str(path) == os.devnull else read_text(
        path, "a config file (YAML); see configs/ for examples", 2 ** 20)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path} is not valid YAML: "
                       f"{one_line(error) or 'nested too deep'}") from None
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{path}: expected `key: value` lines, got a {node.id}")
    triples = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(part, yaml.ScalarNode) for part in (key, *items)):
            raise BadInput(f"{path}:{line}: {one_line(key.value)[:80]} holds keys of its own; "
                           "all keys are flat, such as lora_rank: 16")
        text = [item.value for item in items] if items != [value] else value.value
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
                mistakes.append(f"{where}: {key} = {str(text)[:80]!r}: expected {error}")
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


# --------------------------------------------------------------------------------------------------
# which values are allowed, and which keys go together

METHODS = ("sft", "dual_reward", "grpo", "markovian")
ON_POLICY = ("grpo", "markovian")     # methods that train on their own samples
BITS = (2, 3, 4, 5, 6, 8)             # what MLX's affine quantisation has
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# keys that only some methods read, by prefix, the longer first: in another method's config they
# would do nothing, so they are refused
METHOD_KEYS = (("class_", ("dual_reward",)), ("answer_", ("dual_reward",)),
               ("mask_", ("sft", "dual_reward")), ("grpo_reward", ("grpo",)), ("grpo_", ON_POLICY),
               ("markovian", ("markovian",)), ("chain_", ("markovian",)))
CHOICES = {
    "method": METHODS, "dtype": ("float32", "bfloat16", "float16"), "bits": BITS,
    "recompute": ("none", "mlp", "block"),
    "lr_schedule": ("cosine", "constant"), "template": ("none", "lines", "plain", "cued", "chat"),
    "data_operations": ("add", "subtract", "multiply", "divide"),
    "data_wordings": ("symbolic", "worded", "asked", "asked_worded", "masked"),
    "lora_targets": LORA_TARGETS,
    "class_position": ("prompt", "answer"),
    "grpo_advantage": ("none", "batch", "group"), "grpo_norm": ("constant", "token", "sequence"),
    "grpo_ratio": ("sampler", "base"), "markovian_scorer": ("actor", "frozen"),
    "chain_extraction": ("anchored", "simple", "anchor", "legacy", "word_boundary"),
}
AT_LEAST = {"data_samples": 0, "steps": 1, "batch_size": 1, "grad_accum_steps": 1,
            "lr_warmup_steps": 0, "weight_decay": 0, "grad_clip": 0, "lora_rank": 1,
            "eval_every_steps": 0, "eval_prompts": 1, "lens_every_steps": 0,
            "save_every_steps": 0, "grpo_group_size": 2, "grpo_clip_low": 0, "grpo_clip_high": 0,
            "grpo_dual_clip": 0, "grpo_kl_weight": 0, "grpo_epochs": 1, "grpo_kl_stop": 0,
            "grpo_std_floor": 0, "markovian_answer_weight": 0, "markovian_ramp_steps": 0,
            "chain_tokens": 1, "max_completion_tokens": 1, "seed": 0, "lr": 0}
# what sizes memory or time; a seed is 64 bits wide, all other numbers are float32 or int32 at last
AT_MOST = {"lora_rank": 4096, "seed": 2 ** 63 - 1, "data_samples": 10 ** 7, "batch_size": 2 ** 20,
           "steps": 10 ** 8, "chain_tokens": 2 ** 20, "max_completion_tokens": 2 ** 20}


def owners_of(key: str) -> tuple[str, ...]:
    """The methods that read a key."""
    for prefix, methods in METHOD_KEYS:
        if key.startswith(prefix):
            return methods
    return METHODS


def validate(cfg, given: set[str]) -> list[str]:
    """The mistakes found without a model: allowed values, ranges, keys of another method."""
    mistakes = []
    for key, allowed in CHOICES.items():
        value = getattr(cfg, key)
        for item in value if isinstance(value, tuple) else [value]:
            if item is not None and item not in allowed:
                mistakes.append(f"{key} = {item!r}: expected one of {', '.join(map(str, allowed))}")
        if value == ():
            mistakes.append(f"{key} is empty: "
                            f"expected one or more of {', '.join(map(str, allowed))}")
    mistakes += [f"{key} = {getattr(cfg, key)}: expected at least {low}"
                 for key, low in AT_LEAST.items() if getattr(cfg, key) < low]
    for key, value in vars(cfg).items():
        if type(value) in (int, float):
            most = AT_MOST.get(key, 3e38 if type(value) is float else 2 ** 31)
            if not abs(value) <= most:      # in this form NaN is refused too
                mistakes.append(f"{key} = {value}: expected at most {most:.10g}")
        if isinstance(value, tuple) and len(set(value)) < len(value):
            mistakes.append(f"{key} = {', '.join(value)}: expected each entry once")
    for key in sorted(given):
        owners = owners_of(key)
        if cfg.method in METHODS and cfg.method not in owners:
            mistakes.append(f"{key} belongs to method {' or '.join(owners)}, and this config has "
                            f"method {cfg.method}; leave {key} out, or take another method")
    if cfg.memory_limit_gib is not None and not 0 < cfg.memory_limit_gib < 2 ** 20:
        mistakes.append(f"memory_limit_gib = {cfg.memory_limit_gib}: expected a number above 0")
    if cfg.lora_alpha <= 0:
        mistakes.append(f"lora_alpha = {cfg.lora_alpha}: expected a number above 0; the update is "
                        "scaled by lora_alpha / lora_rank")
    if not 0 <= cfg.class_weight <= 1:
        mistakes.append(f"class_weight = {cfg.class_weight}: expected a number from 0 to 1")
    if cfg.class_words and len(set(cfg.class_words)) != len(cfg.data_operations):
        mistakes.append(f"class_words = {', '.join(cfg.class_words)}: expected "
                        f"{len(cfg.data_operations)} different words, one for each of "
                        f"{', '.join(cfg.data_operations)}")
    if cfg.batch_size % cfg.grad_accum_steps:
        mistakes.append(f"grad_accum_steps = {cfg.grad_accum_steps} "
                        f"does not divide batch_size = {cfg.batch_size}")
    if cfg.method in ON_POLICY:
        mistakes += validate_on_policy(cfg)
    if cfg.bits and (cfg.full or cfg.from_scratch):
        mistakes.append(f"bits = {cfg.bits} freezes the base weights, "
                        "so full and from_scratch must be false")
    if cfg.from_scratch and not cfg.full:
        mistakes.append("from_scratch: true starts from random weights and needs full: true")
    return mistakes


def validate_on_policy(cfg) -> list[str]:
    """Cross-checks of GRPO and Markovian training."""
    mistakes, multiple = [], cfg.grpo_group_size * cfg.grad_accum_steps
    if cfg.batch_size % multiple:
        mistakes.append(
            f"batch_size = {cfg.batch_size}: expected whole groups of completions, a multiple of "
            f"grpo_group_size * grad_accum_steps = {multiple}")
    if cfg.grpo_temperature <= 0:
        mistakes.append(f"grpo_temperature = {cfg.grpo_temperature}: expected a number above 0")
    if cfg.grpo_clip_low >= 1:
        mistakes.append(f"grpo_clip_low = {cfg.grpo_clip_low}: expected a number below 1; the "
                        "ratio, which is above 0, would never be clipped to 1 - grpo_clip_low")
    if 0 < cfg.grpo_dual_clip <= 1:
        mistakes.append(f"grpo_dual_clip = {cfg.grpo_dual_clip}: expected 0 (none) or a number "
                        "above 1; beyond that ratio negative advantages have no gradient, and "
                        "every update starts at ratio 1")
    if cfg.full and (cfg.grpo_kl_weight > 0 or cfg.grpo_ratio == "base"):
        mistakes.append("grpo_kl_weight and grpo_ratio: base compare with the model whose adapters "
                        "are off, and full: true has none; set grpo_kl_weight: 0, or train LoRA")
    if cfg.method == "markovian" and cfg.full:
        mistakes.append("full: true leaves no frozen model, which method markovian measures "
                        "against; train LoRA")
    if cfg.method == "markovian" and not cfg.grpo_kl_weight and cfg.grpo_ratio == "sampler":
        mistakes.append("grpo_kl_weight = 0: method markovian rewards itself, and nothing but the "
                        "KL term holds it; expected above 0 (or grpo_ratio: base, the drill)")
    if cfg.method == "markovian" and cfg.markovian_answer_weight:
        if cfg.markovian_scorer == "frozen":
            mistakes.append("markovian_scorer: frozen is a reward without a gradient of its own; "
                            "set markovian_answer_weight: 0")
        if cfg.grpo_advantage != "none" and not cfg.grpo_std_floor:
            mistakes.append(f"grpo_advantage = {cfg.grpo_advantage} divides the answer term by "
                            "deviations that may be all but 0; give grpo_std_floor, such as 0.1")
    return mistakes
