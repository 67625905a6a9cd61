"""Conversations whose answers lie in what was said before, generated from a file that one can read.

A benchmark is a file of conversations, one a line. Its user turns are fixed, the model's replies
are its own, and each scored turn carries the checks that a right reply passes (checks.py). The text
is in benchmark/families.yaml, the drawing in drafts.py. Most follow-ups of the prior work's draft
could be answered without the conversation, so `audit` measures that first, without a model: the
oracle that knows everything must pass, those that have forgotten the first turn, name whatever was
named last, say nothing, repeat the question or ask back must fail.

    python -m gate.conversations make OUT.jsonl n=300 seed=1 kind=conversations
    python -m gate.conversations show gate/benchmark/conversations.jsonl n=5
    python -m gate.conversations audit gate/benchmark/conversations.jsonl
    python -m gate.conversations make_train FOLDER kind=tiny_turns n=20000 seed=0
"""
import dataclasses
import functools
import itertools
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from config import run_main
from files.disk import (
    OBJECT,
    REQUIRED,
    SWITCH,
    TEXT,
    json_lines,
    list_of,
    read_fields,
    read_rows,
    write_text,
)
from files.keys import BadInput, read_keys
from files.options import Parser
from files.run_folder import hash_file
from gate.checks import find, normalise, term_pattern, validate_check
from gate.drafts import Conversation, Turn, draft_conversation, load_texts, values_of
from text.arithmetic import SYMBOLS, compute, split_of

KINDS = ("conversations", "tiny_turns")
SHARES = {"memory": 60, "preferences": 50, "continuity": 50, "updates": 40}     # of 200


# --- files
ROW = {"id": (TEXT, REQUIRED), "category": (TEXT, REQUIRED), "family": (TEXT, REQUIRED),
       "difficulty": (TEXT, REQUIRED), "slots": (OBJECT, REQUIRED),
       "turns": (list_of(OBJECT), REQUIRED)}
TURN = {"user": (TEXT, REQUIRED), "scored": (SWITCH, False), "need": (TEXT, ""),
        "answer": (TEXT, ""), "checks": (list_of(OBJECT), [])}


def read_benchmark(path: Path) -> tuple[list[Conversation], str]:
    """The conversations of a file and its SHA-256; BadInput names the first bad line."""
    ids = set()

    def read(row: dict) -> Conversation:
        read_fields(row, ROW, "a conversation")
        for turn in row["turns"]:
            read_fields(turn, TURN, "a turn")
        turns = tuple(Turn(**{**turn, "checks": tuple(turn.get("checks", ()))})
                      for turn in row["turns"])
        if not turns or not all(turn.user.strip() for turn in turns):
            raise ValueError("every conversation has turns, and every turn a text in user")
        for check in itertools.chain.from_iterable(turn.checks for turn in turns):
            validate_check(check)
        if not any(turn.scored for turn in turns) or any(t.scored and not t.checks for t in turns):
            raise ValueError("at least one turn is scored, and each that is has checks")
        conversation = Conversation(**{**row, "turns": turns})
        if conversation.id in ids:
            raise ValueError(f"id {conversation.id} is there twice")
        ids.add(conversation.id)
        return conversation

    return read_rows(path, read, "a benchmark file, such as `python -m gate.conversations make "
                     "OUT.jsonl` writes: each line a conversation with id, category, family, "
                     "difficulty, seed, slots and turns"), hash_file(path)


def write_benchmark(path: Path, conversations: list[Conversation]) -> None:
    write_text(Path(path), json_lines(map(dataclasses.asdict, conversations)))


# --- the kinds
def shares_of(n: int) -> dict[str, int]:
    """The categories' sizes: 300 is 75 each, another n as 60/50/50/40 of 200, largest rests up."""
    if n < 40:
        raise BadInput(f"n={n}: expected at least 40 conversations, ten a category or so; "
                       "give n=40 or more")
    if n == 300:
        return dict.fromkeys(SHARES, 75)
    sizes = {category: n * share // 200 for category, share in SHARES.items()}
    for category in sorted(SHARES, key=lambda c: -(n * SHARES[c] % 200))[:n - sum(sizes.values())]:
        sizes[category] += 1
    return sizes


def category_draws(seed: int, n: int) -> Iterator[tuple[str, Callable]]:
    """(id, draw) by category: families in turn, two easy and two medium to one hard."""
    for category, count in shares_of(n).items():
        rng = random.Random(f"{seed} {category}")
        families = load_texts()[category]
        families = rng.sample(families, len(families))
        levels = ["easy"] * round(0.4 * count) + ["medium"] * round(0.4 * count)
        levels += ["hard"] * (count - len(levels))
        rng.shuffle(levels)
        for i, level in enumerate(levels):
            yield f"{category}-{i + 1:03d}", functools.partial(
                draft_conversation, category, families[i % len(families)], level, rng)


def tiny_draws(seed: int, n: int, split: str) -> Iterator[tuple[str, Callable]]:
    rng = random.Random(f"{seed} tiny_turns {split}")
    for i in range(n):
        yield f"tiny_turns-{i + 1:03d}", functools.partial(draft_held, rng, split)


def make(kind: str, seed: int = 0, n: int = 200, split: str = "test") -> list[Conversation]:
    """n conversations of a kind, no two alike; split: of tiny_turns, the side of its numbers."""
    is_tiny = kind == "tiny_turns"
    draws = tiny_draws(seed, n, split) if is_tiny else category_draws(seed, n)
    seen, conversations = set(), []
    for name, draw in draws:
        for _ in range(2000):
            c = draw()
            key = str(c.turns if is_tiny else (c.family, sorted(c.slots.items())))
            if key not in seen:
                break
        else:
            raise BadInput(f"n={n}: after {len(seen)} different ones no new one comes; give a "
                           "smaller n")
        seen.add(key)
        conversations.append(dataclasses.replace(c, id=name, seed=seed))
    return conversations


# --- what a model of the bundled size can do: keep a value over turns. No pair of numbers of a test
# conversation is in a training one
START = ("the answer is {v}", "{v} is the answer")
BACK = ("what is the answer", "which is the answer")
HELD = {("hold", "easy"): "aside back", ("hold", "medium"): "aside aside back",
        ("update", "easy"): "change aside back", ("update", "medium"): "aside change aside back"}


def exactly(answer: int, user: str, lag: int = 0, need: str = "") -> Turn:
    """A turn whose reply is a number and nothing else; scored if it needs something."""
    checks = ({"type": "exact", "value": str(answer)},)
    return Turn(user, bool(need), lag, need, str(answer), checks if need else ())


@functools.cache
def steps_from(value: int, split: str, largest: int = 100) -> list[tuple[str, int]]:
    """The (operation, x) that lead from a value to one in 0..100, by pairs of one split."""
    return [(op, x) for op in ("add", "subtract") for x in range(1, largest + 1)
            if split_of(value, x) == split and 0 <= compute(op, value, x) <= 100]


def draft_held(rng: random.Random, split: str) -> Conversation:
    """A value that is kept, perhaps another in its place, and questions between.

    hold    "the answer is 23" 23, "what is 3 + 4" 7, "what is the answer" 23
    update  "the answer is 23" 23, "the answer is 45" 45, "what is 3 + 4" 7, "what is the answer" 45
    """
    category, difficulty = rng.choice(("hold", "update")), rng.choice(("easy", "medium"))
    while True:
        value = rng.choice([v for v in range(101) if steps_from(v, split)])
        slots, since, beside = {"start": str(value)}, 1, []
        turns = [exactly(value, rng.choice(START).format(v=value))]
        for t, step in enumerate(HELD[category, difficulty].split(), 2):
            if step == "change":
                value = rng.choice([v for v in range(101)
                                    if v != value and split_of(value, v) == split])
                since, slots[f"value_{t}"] = t, str(value)
                turns.append(exactly(value, rng.choice(START).format(v=value)))
            elif step == "aside":
                a = rng.choice([a for a in range(21) if steps_from(a, split, 20)])
                op, b = rng.choice(steps_from(a, split, 20))
                slots[f"aside_{t}"] = str(b)
                beside.append((value, a))
                turns.append(exactly(compute(op, a, b), f"what is {a} {SYMBOLS[op]} {b}"))
            else:
                turns.append(exactly(value, rng.choice(BACK), t - since, f"the value is {value}"))
        if all(split_of(*pair) == split for pair in beside):    # all others are by their draw
            return Conversation("", category, f"tiny_turns/{category}", difficulty, 0, slots,
                                tuple(turns))


def write_train(folder: Path, seed: int, n: int) -> dict[str, int]:
    """train.jsonl (n rows), valid.jsonl and test.jsonl (n / 20 each) of {"messages": [...]}."""
    sizes = {"train": n, "valid": max(1, n // 20), "test": max(1, n // 20)}
    for split, size in sizes.items():
        rows = [{"messages": [{"role": role, "content": text} for turn in c.turns for role, text in
                              (("user", turn.user), ("assistant", turn.answer))]}
                for c in make("tiny_turns", seed, size, split)]
        write_text(folder / f"{split}.jsonl", json_lines(rows))
    return sizes


# --- oracles: what the benchmark can tell apart before any model has seen it
NUMBERED = re.compile(r"_\d+$")     # "item_3" is an "item"


def possible_values(conversations: list[Conversation]) -> dict[tuple[str, str], list[str]]:
    """All values that a slot may hold, {(family, slot): values}; those of all these conversations
    where the family is not in families.yaml."""
    texts, found = load_texts(), defaultdict(list)
    for c in conversations:
        for slot, value in c.slots.items():
            found[c.family, NUMBERED.sub("", slot)].append(value)
    families = {f"{category}/{family['family']}": family for category in SHARES
                for family in texts[category]}
    return {(name, slot): values_of(families.get(name, {}), slot) or values
            for (name, slot), values in found.items()}


def forgetful(c: Conversation, t: int, possible: dict[tuple[str, str], list[str]]) -> str:
    """The reply of one who knows its form and all that was said but for the first turn: in place
    of a value that it never heard, it guesses a possible one, the right one included."""
    rng = random.Random(f"{c.id} {t}")
    heard = normalise(" ".join(turn.user for turn in c.turns[1:t + 1]))
    unheard = {value.casefold(): NUMBERED.sub("", slot) for slot, value in c.slots.items()
               if not find(value, heard)}
    if not unheard:
        return c.turns[t].answer
    names = "|".join(re.escape(v) for v in sorted(unheard, key=len, reverse=True))
    guess = lambda match: rng.choice(possible[c.family, unheard[match[0].casefold()]])
    return re.sub(rf"(?<!\w)(?:{names})(?!\w)", guess, c.turns[t].answer, flags=re.I)


def last_named(c: Conversation, t: int, _=None) -> str:
    """The thing of any kind that the user named last, the question included."""
    said = normalise(" \n".join(turn.user for turn in c.turns[:t + 1]))
    places = [(max((m.start() for m in term_pattern(value).finditer(said)), default=-1), value)
              for value in c.slots.values()]
    place, value = max(places, key=lambda pair: pair[0], default=(-1, ""))
    return value if place >= 0 else ""


ORACLES = {     # name: (reply to turn t, what it may pass: (category, at least, at most))
    "knows everything": (lambda c, t, _: c.turns[t].answer, ("all", 1, 1)),
    "forgot turn 1": (forgetful, ("memory", 0, 0.05)),
    "last named": (last_named, ("all", 0, 0.40)),
    "says nothing": (lambda c, t, _: "", ("all", 0, 0)),
    "does not know": (lambda c, t, _: "I don't know.", ("all", 0, 0)),
    "echo": (lambda c, t, _: c.turns[t].user, ("all", 0, 0)),
    "asks back": (lambda c, t, _: "Which one do you mean?", ("all", 0, 0)),
}


def audit(conversations: list[Conversation]) -> dict[str, dict[str, float]]:
    """Each oracle's share of passed conversations by category, "all", and "abstains" of turns."""
    rates, possible = {}, possible_values(conversations)
    several = any(len(c.turns) > 1 for c in conversations)
    for name, (oracle, _) in ORACLES.items():
        if oracle in (forgetful, last_named) and not several:
            continue        # there is nothing to forget in one turn
        passed, verdicts = defaultdict(list), []
        for c in conversations:
            found = [v.verdict for v in c.check([oracle(c, t, possible)
                                                 for t in range(len(c.turns))]) if v]
            for key in (c.category, "all"):
                passed[key].append(set(found) <= {"pass"})
            verdicts += found
        rates[name] = {key: sum(oks) / len(oks) for key, oks in passed.items()}
        rates[name]["abstains"] = verdicts.count("abstain") / len(verdicts)
    return rates


def missed_marks(rates: dict[str, dict[str, float]]) -> list[str]:
    """The oracles that pass too much or too little, in words."""
    missed = []
    for name, (_, (category, low, high)) in ORACLES.items():
        rate = rates.get(name, {}).get(category)
        if rate is not None and not low <= rate <= high:
            missed.append(f"{name}: {rate:.1%} of {category}, expected {low:.0%} to {high:.0%}")
    return missed


# --- the command line
def described(c: Conversation) -> str:
    """A conversation as plain text, for a person to read and sign off."""
    lines = [f"=== {c.id}  {c.family}  {c.difficulty}"]
    for turn in c.turns:
        lines.append(f"User:   {turn.user}")
        if turn.scored:
            lines += [f"  needs:  {turn.need}  (lag {turn.lag})", f"  right:  {turn.answer}"]
            lines += [f"  check:  {str(check)[:200]}" for check in turn.checks]
    return "\n".join(line.replace("\n", " / ") for line in lines) + "\n"


def print_audit(path: Path) -> None:
    conversations, digest = read_benchmark(path)
    rates = audit(conversations)
    columns = [*dict.fromkeys(c.category for c in conversations), "all", "abstains"]
    print(f"{path}: {len(conversations)} conversations, sha256 {digest}")
    print(f"{'passed by':18}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rates.items():
        print(f"{name:18}" + "".join(f"{row[column]:>13.1%}" for column in columns))
    if missed := missed_marks(rates):
        raise BadInput(f"{path} does not measure what it should: {'; '.join(missed)}; "
                       "mend the families, or make it with another seed")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m gate.conversations",
                    description="Draw a benchmark or training rows, read one, audit one.")
    parser.add_argument("command", choices=("make", "show", "audit", "make_train"))
    parser.add_argument("path", type=Path, help="a benchmark's file; of make_train a folder")
    parser.add_argument("words", nargs="*", metavar="key=value",
                        help=f"n=, seed= and kind={'|'.join(KINDS)}")
    args = parser.parse_args(argv)
    kinds = KINDS[1:] if args.command == "make_train" else KINDS
    given, mistakes = read_keys(os.devnull, args.words, {"n": int, "seed": int, "kind": str})
    n, seed, kind = given.get("n"), given.get("seed", 0), given.get("kind", kinds[0])
    if mistakes or kind not in kinds or n == 0 or min(n or 1, seed) < 0:
        raise BadInput("; ".join([*mistakes, f"{args.command} {' '.join(args.words)}: expected n=, "
                                  f"seed= and kind={'|'.join(kinds)}"]))
    if args.command == "make":
        conversations = make(kind, seed, n or 200)
        write_benchmark(args.path, conversations)
        print(f"{args.path}: {len(conversations)} {kind}, seed {seed}")
    elif args.command == "make_train":
        print(f"{args.path}: {write_train(args.path, seed, n or 20000)}")
    elif args.command == "show":
        for c in read_benchmark(args.path)[0][:n]:
            print(described(c))
    else:
        print_audit(args.path)


if __name__ == "__main__":
    run_main(main)
