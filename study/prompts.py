"""Which prompts a model is asked, so that the operands say nothing of the operation.

*Matched* prompts: the same operand pairs under every operation. Elsewhere operands tell: products
of numbers to 20, differences that are never negative, so that 81 % of the labels follow from two
bits of the operands alone. Two kinds of data have them: the bundled models' arithmetic, and
problems behind worked examples (tasks/few_shot.py), for a model that was not trained on arithmetic.
"""
import random
import re
from dataclasses import dataclass, replace

import numpy as np

from config import BadInput, Config
from text.arithmetic import SYMBOLS, Problem, compute, held_out, make_problem, phrases_of, split_of
from text.rows import load_split
from text.tokenizer import Tokenizer

LAST_LINE = re.compile(r"(\d+) (\S) (\d+) = $")


@dataclass
class Matched:
    """Matched prompts: rows pair-major, the C operations of a pair in a row."""
    problems: list[Problem]
    prompts: list[list[int]]
    labels: np.ndarray          # (N,) index of the operation
    classes: int                # C
    splits: np.ndarray          # (N,) train, valid or test: the pair's

    def by_pair(self, values: np.ndarray) -> np.ndarray:
        """Means over each pair's rows, (N,) -> (N / C,): the unit that is drawn in a bootstrap."""
        return np.asarray(values, np.float64).reshape(-1, self.classes).mean(1)


def operations_of(cfg: Config) -> list[str]:
    """The operations that are told apart, divide not among them."""
    return [o for o in cfg.data_operations if o != "divide"]


def matched_problems(cfg: Config, split: str, pairs: int, wording: str) -> list[Problem]:
    """At most `pairs` operand pairs a >= b of a split under every operation, each pair's in a row.

    Products beyond the trained range are for asking which operation it is, not what it gives.
    wording  as text.arithmetic's; behind worked examples symbolic or masked
    """
    if cfg.data != "arithmetic":
        return matched_few_shot(cfg, split, pairs, wording)
    chosen = [(a, b) for a in range(2, 100) for b in range(2, a + 1) if split_of(a, b) == split]
    rng = random.Random(f"matched {split}")
    rng.shuffle(chosen)
    problems = []
    for a, b in chosen[:pairs]:
        which = rng.randrange(5)    # one phrase for all operations of a pair
        for operation in operations_of(cfg):
            phrases = phrases_of(operation, wording)
            phrase = phrases[which % len(phrases)]
            problems.append(make_problem(operation, a, b, phrase, wording))
    return problems


def matched_few_shot(cfg: Config, split: str, pairs: int, wording: str) -> list[Problem]:
    """The same behind the worked examples of the folder's own rows.

    raises  BadInput where a row is no equation behind examples
    """
    head, chosen = "", {}
    for problem in load_split(cfg, split):
        found = LAST_LINE.search(problem.prompt)
        if not found or not problem.operation:
            raise BadInput(f"the {split} split of {cfg.data} holds {problem.prompt[-40:]!r}; "
                           "expected rows of `python -m tasks few_shot`, such as '7 + 1 = '")
        head, (a, b) = problem.prompt[:found.start()], map(int, found.group(1, 3))
        chosen[max(a, b), min(a, b)] = problem
    order = sorted(chosen)
    random.Random(f"matched {split}").shuffle(order)
    problems = []
    for a, b in order[:pairs]:
        for operation in operations_of(cfg):
            symbol = "?" if wording == "masked" else SYMBOLS[operation]
            line = f"{a} {symbol} {b} = "
            problems.append(replace(chosen[a, b], prompt=head + line, operation=operation,
                                    answer=str(compute(operation, a, b)), a=a, b=b))
    return problems


def make_matched(cfg: Config, tokenizer: Tokenizer, pairs: int) -> Matched:
    """`pairs` operand pairs of train and of test, a third as many of valid, or all there are."""
    problems, splits = [], []
    for split, count in (("train", pairs), ("valid", max(pairs // 3, 1)), ("test", pairs)):
        found = matched_problems(cfg, split, count, "symbolic")
        problems += found
        splits += [split] * len(found)
    operations = operations_of(cfg)
    return Matched(problems, [tokenizer.encode_prompt(p.prompt) for p in problems],
                   np.array([operations.index(p.operation) for p in problems]), len(operations),
                   np.array(splits))


def masked_prompts(cfg: Config, tokenizer: Tokenizer, pairs: int) -> list[list[int]]:
    """Test pairs' prompts with the operator masked, "7 ? 8 = ": nobody can know which it is."""
    problems = matched_problems(cfg, "test", pairs, "masked")
    # a pair's are the same text
    return [tokenizer.encode_prompt(text) for text in dict.fromkeys(p.prompt for p in problems)]


def swap_operations(cfg: Config) -> tuple[str, ...]:
    """Among which operations one is swapped for another: those that the models can learn."""
    return ("add", "subtract") if cfg.data == "arithmetic" else tuple(operations_of(cfg))


def swap_splits(cfg: Config) -> tuple[str, ...]:
    """Which pairs' prompts are swapped. Few have results of one digit: then all, whatever their
    split, for a swap asks what a model does and not whether it generalises."""
    return ("test",) if cfg.data == "arithmetic" else ("test", "valid", "train")


def judged(cfg: Config, count: int) -> list[Problem]:
    """What accuracy and the lens' series are read on: unseen pairs, at most `count` a cell."""
    if cfg.data != "arithmetic":
        return load_split(cfg, "test")
    return held_out(replace(cfg, data_wordings=("symbolic",)), "test", count)
