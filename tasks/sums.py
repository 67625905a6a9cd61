"""Sums of many terms, and the chains of thought about them that models/tiny_cot reads.

A sum's side of the split is decided by a hash of its terms in any order, so no order of a test
sum's terms is trained on, whatever the seed.
"""
import itertools
import random

from config import BadInput
from tasks.published import HIDDEN, chain_prompt, make_question
from text.arithmetic import Problem, side_of
from text.questions import HEADER

SUMS = "Add the numbers."


def draw_terms(rng: random.Random, terms: int, largest: int, split: str) -> tuple[int, ...]:
    """Numbers from 1 to `largest` that lie on one side of the split, whatever their order."""
    for _ in range(10000):
        drawn = tuple(rng.randint(1, largest) for _ in range(terms))
        if side_of(drawn) == split:
            return drawn
    raise BadInput(f"--terms {terms} and --largest {largest} leave no sum for the {split} split; "
                   "give more terms, or larger ones")


def sample_sums(split: str, count: int, terms: int, largest: int, shots: int,
                seed: int) -> list[Problem]:
    """Sums of `terms` numbers up to `largest`; those of valid and test are of no seed.

    shots    worked examples in front, of training sums, the same in all rows: what a pretrained
             model needs to see. The hidden prompt shows them too, and hides the question alone
    """
    rng = random.Random(seed if split == "train" else split)
    drawn, seen = [], set()
    for _ in range(20 * count):
        numbers = draw_terms(rng, terms, largest, split)
        # each set of terms is judged once, in one order: there may be few. The repeats of
        # docs/markovian.md's data, which have no shots, stay as published
        terms_drawn = tuple(sorted(numbers))
        if split == "train" or not shots or terms_drawn not in seen:
            drawn.append(numbers)
            seen.add(terms_drawn)
        if len(drawn) == count:
            break
    rng, head = random.Random(f"shots {seed}"), SUMS
    for _ in range(shots):
        worked = draw_terms(rng, terms, largest, "train")
        head += (f"\nQuestion: {' + '.join(map(str, worked))}\nReasoning:"
                 f"{write_chain(worked, 'steps')}{HEADER} {sum(worked)}\n")
    return [make_question(head, " + ".join(map(str, numbers)), str(sum(numbers)))
            for numbers in drawn]


def write_chain(terms: tuple[int, ...], style: str) -> str:
    """A chain of thought: a worked example's, or in one of the bundled model's three styles.

    steps    " 12 + 7 = 19. 19 + 30 = 49.": each sum written out
    running  " 12 + 7 = 19 + 30 = 49": the last number is the answer
    list     " 12 and 7 and 30": all that is needed, the adding left to do
    about    " about 50": the sum rounded to tens, from which it can be told one time in ten
    """
    if style == "list":
        return " " + " and ".join(map(str, terms))
    if style == "about":
        return f" about {(sum(terms) + 5) // 10 * 10}"
    totals = list(itertools.accumulate(terms))
    steps = list(zip(totals, terms[1:], totals[1:]))     # (sum so far, what is added, sum)
    if style == "steps":
        return "".join(f" {before} + {term} = {after}." for before, term, after in steps)
    return f" {terms[0]}" + "".join(f" + {term} = {after}" for _, term, after in steps)


def sample_tiny_cot(count: int, most: int, largest: int, seed: int) -> list[Problem]:
    """The text of models/tiny_cot in four forms; sums of three and more have training terms only.

    sums of two (25 %)      worked out, the first as large as a running sum gets: how to add
    begun (30 %)            a running sum to carry on: how to, but not when to
    chains (20 %)           behind a question of 3 to `most` numbers: half of them
                            roundings, three in ten lists, two in ten running sums, so that the
                            base can do the right thing and mostly does not
    answers (25 %)          behind a chain, the question shown or hidden
    """
    if most < 3:
        raise BadInput(f"--terms {most}: tiny_cot needs at least 3")
    rng, problems = random.Random(seed), []
    styles = ("running", "list", "about")
    for _ in range(count):
        k = most if rng.random() < 0.5 else rng.randint(3, most)
        terms = draw_terms(rng, k, largest, "train")
        form = rng.random()
        if form < 0.25:
            first = rng.randint(1, largest * (most - 1))
            terms = first, rng.randint(1, largest)
        prompt = chain_prompt(SUMS, " + ".join(map(str, terms)))
        if form < 0.25:
            text = write_chain(terms, "running")
        elif form < 0.55:
            begun = write_chain(terms[:rng.randint(2, k - 1)], "running")
            prompt, text = prompt + begun, write_chain(terms, "running").removeprefix(begun)
        elif form < 0.75:
            text = write_chain(terms, rng.choices(styles, weights=(2, 3, 5))[0])
        else:
            shown = prompt if form < 0.875 else chain_prompt(SUMS, HIDDEN)
            style = rng.choices(styles, weights=(5, 2, 3))[0]
            prompt, text = shown + write_chain(terms, style) + HEADER, f" {sum(terms)}"
        problems.append(Problem(prompt, text, "", "corpus"))
    return problems


def held_out_tiny_cot(split: str, count: int, terms: int, largest: int) -> list[Problem]:
    """Running sums begun, to be carried on: whether models/tiny_cot can add at all."""
    rng, problems = random.Random(split), []
    for _ in range(count):
        numbers = draw_terms(rng, terms, largest, split)
        begun = write_chain(numbers[:2], "running")
        problems.append(Problem(chain_prompt(SUMS, " + ".join(map(str, numbers))) + begun,
                                write_chain(numbers, "running").removeprefix(begun), "", "corpus"))
    return problems
