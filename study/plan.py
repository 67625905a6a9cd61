"""A study file: its conditions, what they have in common, its hypotheses; and the runs it asks for.

The file lists conditions (config keys on top of common ones) and hypotheses with their tests.
plan.yaml beside this is the study's own, written before the first run.
"""
from dataclasses import dataclass
from pathlib import Path

import yaml

from config import load_overrides
from files.disk import read_text
from files.keys import BadInput

GIVEN_TO_STUDY = ("seeds", "sweep_seeds", "run_dir")    # words that are not config keys of runs


@dataclass
class Run:
    """One condition with one seed: what to train and where."""
    condition: str
    seed: int
    folder: Path
    words: list[str]        # key=value for config.load_overrides
    trains: bool            # false: the base model, only looked at
    after: Path | None      # the run it starts from


def load_study(path: str | Path, smoke: bool, words: list[str]) -> dict:
    """Read a study file, apply its smoke section and the command line; raises BadInput."""
    try:
        study = yaml.safe_load(read_text(path, "a study file, such as study/plan.yaml", 2 ** 20))
        small = study.pop("smoke", {})
        study["conditions"] = {name: c or {} for name, c in study["conditions"].items()}
    except (RecursionError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a study file ({' '.join(str(error).split())}); "
                       "see study/plan.yaml") from None
    own_dir = study.setdefault("run_dir", f"runs/{Path(path).stem}")
    if smoke:
        study["run_dir"] = f"{own_dir}_smoke"
        kept = small.pop("conditions")
        study["conditions"] = {name: study["conditions"][name] for name in kept}
        study["common"] |= small.pop("common")
        study |= small
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise BadInput(f"command line: expected key=value, got {word!r}")
        if key in ("seeds", "sweep_seeds") and not value.isdigit():
            raise BadInput(f"{word}: expected a whole number")
        if key in GIVEN_TO_STUDY:
            study[key] = int(value) if value.isdigit() else value
        else:
            study["common"][key] = value
    if words and study["run_dir"] == own_dir:
        raise BadInput(f"with keys of your own ({' '.join(words)}) the study needs a folder of its "
                       "own: add run_dir=runs/NAME")
    return study


def as_words(keys: dict) -> list[str]:
    """YAML values as `key=value`. example  {"lora_targets": ["q", "v"]} -> ["lora_targets=q,v"]"""
    text = lambda v: (",".join(map(str, v)) if isinstance(v, list)
                      else str(v).lower() if isinstance(v, bool) else str(v))
    return [f"{key}={text(value)}" for key, value in keys.items()]


def plan(study: dict) -> list[Run]:
    """All runs, seeds outermost: an interrupted study has whole seeds. Checks every config."""
    runs, mistakes = [], []
    for seed in range(1, 1 + max(study["seeds"], study["sweep_seeds"])):
        for name, condition in study["conditions"].items():
            main = condition.get("group") in ("main", "control", "helper")
            last = 1 if name == "base" else study["seeds" if main else "sweep_seeds"]
            if "same_as" in condition or seed > last:
                continue
            folder = Path(study["run_dir"]) / f"{name}_{seed}"
            keys = {**study["common"], **condition.get("set", {}), "seed": seed, "run_dir": folder}
            after = condition.get("after")
            after = Path(study["run_dir"]) / f"{after}_{seed}" if after else None
            if after:
                keys["model"] = after
            if keys.get("full"):    # lora_* keys of `common` do nothing there
                keys = {k: v for k, v in keys.items() if not k.startswith("lora_")}
            try:
                load_overrides(as_words(keys))
            except BadInput as error:
                mistakes.append(f"condition {name}: {error}")
            runs.append(Run(name, seed, folder, as_words(keys), name != "base", after))
    if mistakes:
        raise BadInput("; ".join(dict.fromkeys(mistakes)))
    return runs
