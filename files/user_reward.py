"""Rewards of GRPO: `correct`, and a user's functions, called with errors that name the prompt.

    def reward(problem, completion): ...                  # -> number, or (number, {part: number})
    def reward(model, tokenizer, problems, completions):  # -> one number a completion

The second form is for rewards that the model itself computes, such as study/self_reward.py's.
What else a row holds is in problem.columns: problem.columns["level"]. Several rewards are added up,
each times its weight: `grpo_reward: [correct, rewards.py:short*0.2]`.

A call may take DEADLINE_S, ten minutes: one that waits for ever would hold a run for a night.
"""
import importlib.util
import inspect
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from config import BadInput
from files.deadline import deadline
from files.disk import one_line
from files.keys import parse_value
from text.arithmetic import grade_reply

DEADLINE_S = 600


def correct(problem, completion) -> bool:
    """Whether the whole completion is the answer and it stopped by itself.

    No partial credit: substrings, lists of numbers and cut completions were each exploited
    somewhere. Of a whole solution the final answer counts, as in validation.
    """
    return grade_reply(problem, completion.text, completion.finished)["correct"]


def load_rewards(entries: tuple[str, ...]) -> list[tuple]:
    """(name, function, weight) of each entry of grpo_reward; raises BadInput."""
    rewards, modules = [], {}
    for entry in entries or [""]:
        place, _, weight = entry.partition("*")
        path, colon, name = place.strip().rpartition(":")
        try:
            weight = parse_value(weight or "1", float)
        except ValueError:
            name = ""
        if not name or not (path.endswith(".py") if colon else name == "correct"):
            raise BadInput(f"grpo_reward = {entry!r}: expected correct, or FILE.py:FUNCTION, and "
                           "behind it perhaps a weight, such as *0.2")
        if name in [other for other, _, _ in rewards]:
            raise BadInput(f"grpo_reward has two rewards named {name}: rename one function")
        rewards.append((name, load_function(path, name, modules) if colon else correct, weight))
    return rewards


def load_function(path: str, name: str, modules: dict):
    """A function of a user's file; modules holds the files that are loaded, each once."""
    try:
        if path not in modules:
            spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            modules[path] = importlib.util.module_from_spec(spec)
            with deadline(DEADLINE_S):
                spec.loader.exec_module(modules[path])
        function = getattr(modules[path], name)
        inspect.signature(function)     # TypeError for what is no function
        return function
    except (Exception, SystemExit) as error:    # a user's file may raise anything, and end us
        raise BadInput(f"grpo_reward = '{path}:{name}' does not load "
                       f"({one_line(repr(error))}); mend the file") from None


def call_rewards(rewards: list[tuple], model, tokenizer, problems: list,
                 completions: list) -> dict[str, np.ndarray]:
    """{"reward": the weighted sum, "reward_NAME": ...} of N completions, (N,) each.

    NAME     of each of several rewards, before its weight, and of the parts that a function tells
    raises   BadInput
    """
    judged = {"reward": np.zeros(len(completions))}
    for name, function, weight in rewards:
        found = call_reward(name, function, model, tokenizer, problems, completions)
        values = np.array([value for value, _ in found])
        judged["reward"] = judged["reward"] + weight * values
        more = {part: np.array([parts[part] for _, parts in found]) for part in found[0][1]}
        more |= {name: values} if len(rewards) > 1 else {}
        for part, value in more.items():
            key = f"reward_{part}"
            if key in {"reward_std", "reward_min", "reward_max", *judged}:   # the first: of the sum
                raise BadInput(f"grpo_reward {name}: metrics.jsonl has another {key}; rename the "
                               "function or its part")
            judged[key] = value
    return judged


def call_reward(name: str, function, model, tokenizer, problems: list,
                completions: list) -> list[tuple[float, dict[str, float]]]:
    """(value, {part: value}) of every completion; raises BadInput."""
    if next(iter(inspect.signature(function).parameters), "") == "model":
        with explained(f"grpo_reward {name}", problems):
            values = function(model, tokenizer, problems, completions)
            return [(finite(value), {}) for value, _ in zip(values, completions, strict=True)]
    found = []
    for problem, completion in zip(problems, completions):
        where = f"prompt {problem.prompt[-80:]!r}, completion {completion.text[:40]!r}"
        with explained(f"grpo_reward {name} on {where}", [problem]):
            result = function(problem, completion)
            value, parts = result if isinstance(result, tuple) else (result, {})
            found.append((finite(value), {part: finite(v) for part, v in parts.items()}))
            if parts.keys() != found[0][1].keys():
                raise ValueError(f"parts {[*parts]}, and of an earlier one {[*found[0][1]]}")
    return found


@contextmanager
def explained(where: str, problems: list):
    """BadInput for whatever a user's function raises."""
    try:
        with deadline(DEADLINE_S):
            yield
    except (Exception, SystemExit) as error:
        columns = sorted({column for problem in problems for column in problem.columns})
        known = f", and the row's own columns are {', '.join(columns) or 'none'}"
        raise BadInput(f"{where} raised {one_line(repr(error))}"
                       f"{known if isinstance(error, KeyError) else ''}; "
                       "mend the function, or the row") from None


def finite(value) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{value}, where a finite number is expected")
    return value
