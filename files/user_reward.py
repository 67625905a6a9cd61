"""A user's reward function: FILE.py:FUNCTION, loaded and called with errors that name the prompt.

    def reward(problem, completion): ...                  # -> number, or (number, {part: number})
    def reward(model, tokenizer, problems, completions):  # -> one number a completion

The second form is for rewards that the model itself computes, such as study/self_reward.py's.
"""
import importlib.util
import inspect
import math
from pathlib import Path

import numpy as np

from config import BadInput


def load_reward(name: str):
    """The function that FILE.py:FUNCTION names; None for `correct`. raises  BadInput"""
    if name == "correct":
        return None
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise BadInput(f"grpo_reward = {name!r}: expected correct, or FILE.py:FUNCTION")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # a user's file may raise anything
        raise BadInput(f"grpo_reward = {name!r} does not load ({error!r})") from None


def call_reward(reward, model, tokenizer, problems: list, completions: list) -> dict:
    """{"reward": (N,), "reward_PART": (N,), ...} of N completions; raises BadInput."""
    if next(iter(inspect.signature(reward).parameters), "") == "model":
        rewards = np.asarray(reward(model, tokenizer, problems, completions), float)
        return {"reward": rewards}
    scored = [call_one(reward, problem, completion)
              for problem, completion in zip(problems, completions)]
    judged = {"reward": np.array([value for value, _ in scored])}
    for name in scored[0][1]:
        judged[f"reward_{name}"] = np.array([parts[name] for _, parts in scored])
    return judged


def call_one(reward, problem, completion) -> tuple[float, dict[str, float]]:
    """Raises BadInput where the function raises, or returns what is no number."""
    where = f"grpo_reward on prompt {problem.prompt!r}, completion {completion.text[:40]!r}"
    try:
        result = reward(problem, completion)
        value, parts = result if isinstance(result, tuple) else (result, {})
        value = float(value)
    except Exception as error:  # a user's function may raise anything
        raise BadInput(f"{where} raised {error!r}; mend the function") from None
    if not math.isfinite(value):
        raise BadInput(f"{where} returned {value}; expected a finite number")
    return value, {name: float(part) for name, part in parts.items()}
