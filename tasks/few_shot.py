"""Sums, differences and products behind worked examples, for a model that was not trained on them.

    2 + 3 = 5
    9 - 6 = 3
    3 * 2 = 6
    7 + 1 =

A pretrained base goes on in prose behind "7 + 1 = " alone; behind a few examples (*shots*) it knows
what is asked for. One digit: operands and results from 0 to 9, about 150 problems in all. Two
digits: operands from 1 to 99 (factors from 2 to 20), results from 10 to 99.

Unordered operand pairs are dealt into four folds before anything is drawn: fold k's test pairs are
the k-th quarter, so that over the four folds each problem is tested once, by a model that has never
trained on its pair. The shots are of training pairs, the same in all rows.
"""
import random

from config import BadInput
from text.arithmetic import SYMBOLS, Problem, compute

OPERATIONS = ("add", "subtract", "multiply")
FOLDS = 4
WORDINGS = {1: "one_digit", 2: "two_digit"}


def problems_of(digits: int) -> list[tuple[str, int, int]]:
    """All (operation, a, b) whose result has so many digits."""
    low, high = (0, 9) if digits == 1 else (1, 99)
    smallest, largest = (0, 9) if digits == 1 else (10, 99)
    found = []
    for operation in OPERATIONS:
        factors = operation == "multiply" and digits == 2
        numbers = range(2, 21) if factors else range(low, high + 1)
        found += [(operation, a, b) for a in numbers for b in numbers
                  if smallest <= compute(operation, a, b) <= largest]
    return found


def side_of_pair(digits: int, fold: int) -> dict[tuple[int, int], str]:
    """{(smaller, larger): train | valid | test}: a quarter is tested, a sixth of the rest valid."""
    pairs = sorted({(min(a, b), max(a, b)) for _, a, b in problems_of(digits)})
    random.Random("few_shot").shuffle(pairs)        # of no seed: every run is judged alike
    test = set(pairs[fold::FOLDS])
    valid = set([pair for pair in pairs if pair not in test][::6])
    return {pair: "test" if pair in test else "valid" if pair in valid else "train"
            for pair in pairs}


def equation(operation: str, a: int, b: int) -> str:
    return f"{a} {SYMBOLS[operation]} {b} = "


def sample_few_shot(split: str, count: int, shots: int, digits: int, fold: int,
                    seed: int) -> list[Problem]:
    """At most a third of count distinct problems of each operation behind the shots.

    Of valid and test the choice is of no seed. raises  BadInput
    """
    if digits not in WORDINGS:
        raise BadInput(f"--digits {digits}: expected 1 or 2, the digits of a result")
    if fold >= FOLDS:
        raise BadInput(f"--fold {fold}: expected 0 to {FOLDS - 1}")
    sides = side_of_pair(digits, fold)
    on_side = {side: [item for item in problems_of(digits)
                      if sides[min(item[1:]), max(item[1:])] == side]
               for side in ("train", split)}
    rng = random.Random(f"shots {seed}")
    by_operation = [[item for item in on_side["train"] if item[0] == operation]
                    for operation in OPERATIONS]
    for items in by_operation:
        rng.shuffle(items)
    # one of each operation in turn
    worked = [item for three in zip(*by_operation) for item in three][:shots]
    if len(worked) < shots:
        raise BadInput(f"--shots {shots}: there are {len(on_side['train'])} training problems of "
                       f"--digits {digits}, a third of each operation; give fewer shots")
    head = "".join(f"{equation(*item)}{compute(*item)}\n" for item in worked)
    rng = random.Random(f"{split} {seed}" if split == "train" else split)
    problems = []
    for operation in OPERATIONS:
        cell = [item for item in on_side[split] if item[0] == operation]
        rng.shuffle(cell)
        cell = cell[:count // len(OPERATIONS)]
        problems += [Problem(head + equation(*item), str(compute(*item)), operation,
                             WORDINGS[digits], *item[1:]) for item in cell]
    return problems
