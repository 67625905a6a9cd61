"""A gate's config file: what is compared, how it is scored, and what has to hold for a GO.

The thresholds stand in the file before the run, so that nobody moves them to where the result is.
"""
import typing
from dataclasses import dataclass
from pathlib import Path

from config import BITS
from files.keys import BadInput, read_keys
from gate.replies import SCORERS
from text.chat import TEMPLATES

ROLES = ("base", "instruct", "alternative")


@dataclass
class GateConfig:
    """All keys of a gate file, with defaults."""
    base: str = "models/tiny"
    instruct: str = ""              # empty: no verdict, only the figures of the others
    alternative: str = ""           # another base, so that a gap is not one base's quirk
    benchmark: str = "gate/benchmark/conversations.jsonl"
    out: str = ""                   # empty: runs/<name of the config file>
    overwrite: bool = False
    limit: int | None = None        # the first so many conversations of the benchmark
    # formats: raw | lines | plain | cued | chat. A role counts by its best
    base_templates: tuple[str, ...] = ("raw", "plain")
    instruct_templates: tuple[str, ...] = ("plain",)
    alternative_templates: tuple[str, ...] = ("plain",)
    max_reply_tokens: int = 256
    bits: int | None = None         # of all models, the judge too

    # --- scoring: checks | judge | exact | length; the first heads the report
    scorers: tuple[str, ...] = ("checks", "judge")
    judge: str = ""                 # model folder, run, Hub name; or http(s)://HOST/v1
    judge_model: str = ""           # what an endpoint calls it
    judge_prompt: str = ""          # text file; empty: the built-in one
    judge_letters: tuple[str, ...] = ("A", "B")     # a verdict's two tokens
    judge_unsure: float = 1.0       # a margin of fewer nats is undecided. Local judges only
    labels: str = ""                # people's verdicts: spotcheck.jsonl, filled in

    # --- what has to hold
    base_at_most: float = 0.30
    instruct_at_least: float = 0.80
    alternative_at_most: float = 0.40
    p_below: float = 0.01           # exact McNemar
    h_at_least: float = 0.5         # Cohen's h
    agreement_at_least: float = 0.80    # of two scorers, in each condition
    kappa_at_least: float = 0.70    # of two scorers, over all conditions
    undecided_at_most: float = 0.10     # of a condition's conversations


ALLOWED = {
    **{f"{role}_templates": tuple(TEMPLATES) for role in ROLES}, "scorers": SCORERS,
    "bits": (None, *BITS)}
SHARES = ("base_at_most", "instruct_at_least", "alternative_at_most", "p_below",
          "agreement_at_least", "kappa_at_least", "undecided_at_most")


def load_gate(path: str | Path, overrides: list[str]) -> GateConfig:
    """Read a gate file and key=value words; raises BadInput with all mistakes."""
    values, mistakes = read_keys(path, overrides, typing.get_type_hints(GateConfig))
    cfg = GateConfig(**values)
    cfg.out = cfg.out or f"runs/{Path(path).stem}"
    for key, allowed in ALLOWED.items():
        value = getattr(cfg, key)
        given = value if isinstance(value, tuple) else (value,)
        if not given or any(item not in allowed for item in given):
            mistakes.append(f"{key} = {', '.join(map(str, given)) or 'nothing'}: expected any of "
                            f"{', '.join(str(item) for item in allowed if item)}")
    mistakes += [f"{key} = {getattr(cfg, key)}: expected a number from 0 to 1"
                 for key in SHARES if not 0 <= getattr(cfg, key) <= 1]
    mistakes += [f"{key} = {value}: expected at least 1" for key, value in (
        ("limit", cfg.limit), ("max_reply_tokens", cfg.max_reply_tokens))
        if value is not None and value < 1]
    if len(set(cfg.scorers)) < 2:
        mistakes.append(f"scorers = {', '.join(cfg.scorers)}: expected two different ones or more, "
                        "since one alone cannot be seen to measure something else")
    if "judge" in cfg.scorers and not cfg.judge:
        mistakes.append("scorer judge needs judge: a model, or the URL of an endpoint")
    if cfg.judge.startswith("http") and not cfg.judge_model:
        mistakes.append("judge is an endpoint: give judge_model, its name for the model")
    if len(cfg.judge_letters) != 2 or len(set(cfg.judge_letters)) != 2:
        mistakes.append(f"judge_letters = {', '.join(cfg.judge_letters)}: expected two, as A,B")
    if not cfg.base:
        mistakes.append("base is empty: expected the model that training would start from")
    if mistakes:
        raise BadInput("; ".join(mistakes))
    return cfg
