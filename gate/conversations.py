"""Conversations whose answers lie in what was said before, generated from a file that one can read.

A benchmark is a file of conversations, one a line. Its user turns are fixed, the model's replies
are its own, and each scored turn carries the checks that a right reply passes (checks.py). The text
is in benchmark/families.yaml, the drawing in drafts.py. Most follow-ups of the prior work's draft
could be answered without the conversation: tests/gate_audit.py measures that first, without a
model, on those who know everything, have forgotten the first turn, copy, refuse or hedge.

    python -m gate.conversations make OUT.jsonl n=300 seed=1
    python -m gate.conversations show gate/benchmark/conversations.jsonl n=5
    python tests/gate_audit.py gate/benchmark/conversations.jsonl
"""
import dataclasses
import functools
import itertools
import os
import random
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
from gate.checks import validate_check
from gate.drafts import Conversation, Turn, draft_conversation, load_texts

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


# --- drawing one
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


def make(seed: int = 0, n: int = 200) -> list[Conversation]:
    """n conversations of the four categories, no two alike."""
    seen, conversations = set(), []
    for name, draw in category_draws(seed, n):
        for _ in range(2000):
            c = draw()
            key = str((c.family, sorted(c.slots.items())))
            if key not in seen:
                break
        else:
            raise BadInput(f"n={n}: after {len(seen)} different ones no new one comes; give a "
                           "smaller n")
        seen.add(key)
        conversations.append(dataclasses.replace(c, id=name, seed=seed))
    return conversations


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


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m gate.conversations", description="Draw a benchmark, read one.")
    parser.add_argument("command", choices=("make", "show"))
    parser.add_argument("path", type=Path, help="a benchmark's file")
    parser.add_argument("words", nargs="*", metavar="key=value", help="n= and seed=")
    args = parser.parse_args(argv)
    given, mistakes = read_keys(os.devnull, args.words, {"n": int, "seed": int})
    n, seed = given.get("n"), given.get("seed", 0)
    if mistakes or n == 0 or min(n or 1, seed) < 0:
        raise BadInput("; ".join([*mistakes, f"{args.command} {' '.join(args.words)}: expected n= "
                                  "and seed="]))
    if args.command == "make":
        conversations = make(seed, n or 200)
        write_benchmark(args.path, conversations)
        print(f"{args.path}: {len(conversations)} conversations, seed {seed}")
    else:
        for c in read_benchmark(args.path)[0][:n]:
            print(described(c))


if __name__ == "__main__":
    run_main(main)
