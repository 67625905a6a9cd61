"""Conversations whose answers lie in what was said before, generated from a file that one can read.

A benchmark is a file of conversations, one a line; a single question is a conversation of one turn.
Its user turns are fixed, the model's replies are its own, and each scored turn carries the checks
that a right reply passes (checks.py). Most follow-ups of the prior work's draft could be answered
without the conversation, so `audit` measures that first, without a model: oracles answer. One knows
everything and must pass; those that have forgotten the first turn, name whatever was named last,
say nothing, repeat the question or ask back must fail.

    memory        facts told first, asked after asides and next to look-alikes
    preferences   a standing wish that every reply respects, and that is asked back
    continuity    "it", "the second one", "the one after that"
    updates       a plan, changes, and the plan read back: new values in, old ones out, rest kept

The text is in benchmark/families.yaml, the drawing in drafts.py. Other kinds: single instructions
with checkable answers; for the bundled models operations and a held value, where no number pair of
a test conversation is in a training one.

    python -m gate.conversations make OUT.jsonl n=300 seed=1 kind=conversations
    python -m gate.conversations show gate/benchmark/conversations.jsonl 5
    python -m gate.conversations audit gate/benchmark/conversations.jsonl
    python -m gate.conversations make_train FOLDER kind=tiny_turns n=20000 seed=0
"""
import dataclasses
import functools
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import run_main
from files.disk import json_lines, write_text
from files.keys import BadInput, read_keys
from files.run_folder import hash_file
from gate import drafts
from gate.checks import Verdict, check_turn, find, mistake_in, normalise, term_pattern
from gate.drafts import Draft, Turn
from gate.jsonl import read_rows
from text.arithmetic import ASKED, PHRASES, SYMBOLS, compute, pairs_in, split_of

KINDS = ("conversations", "instructions", "tiny_turns", "tiny_operations")
SHARES = {"memory": 60, "preferences": 50, "continuity": 50, "updates": 40}     # of 200


@dataclass(frozen=True)
class Conversation:
    """A benchmark's item; it passes if and only if every scored turn does."""
    id: str
    category: str
    family: str
    difficulty: str
    seed: int
    slots: dict[str, str]
    turns: tuple[Turn, ...]

    def check(self, replies: list[str]) -> list[Verdict | None]:
        """Each turn's verdict on a reply; None where a turn is not scored."""
        return [check_turn(turn.checks, reply, replies[:t]) if turn.scored else None
                for t, (turn, reply) in enumerate(zip(self.turns, replies, strict=True))]


# --- files
def write_benchmark(path: Path, conversations: list[Conversation]) -> None:
    write_text(Path(path), json_lines(map(dataclasses.asdict, conversations)))


def read_benchmark(path: Path) -> tuple[list[Conversation], str]:
    """The conversations of a file and its SHA-256; BadInput names the first bad line."""
    ids = set()

    def read(row: dict) -> Conversation:
        conversation = read_conversation(row)
        if conversation.id in ids:
            raise ValueError(f"id {conversation.id} is there twice")
        ids.add(conversation.id)
        return conversation

    conversations = read_rows(path, read, "a benchmark file, such as `python -m gate.conversations "
                              "make OUT.jsonl` writes: each line a conversation with id, category, "
                              "family, difficulty, seed, slots and turns")
    return conversations, hash_file(path)


def read_conversation(row: dict) -> Conversation:
    """One line's record; raises ValueError, KeyError or TypeError with what is wrong."""
    turns = tuple(Turn(**{**turn, "checks": tuple(turn.get("checks", ()))})
                  for turn in row["turns"])
    if not turns or not all(isinstance(turn.user, str) and turn.user.strip() for turn in turns):
        raise ValueError("every conversation has turns, and every turn a text in user")
    mistakes = [mistake_in(check) for turn in turns for check in turn.checks]
    if any(mistakes):
        raise ValueError(next(filter(None, mistakes)))
    if not any(turn.scored for turn in turns) or any(t.scored and not t.checks for t in turns):
        raise ValueError("at least one turn is scored, and each that is has checks")
    return Conversation(**{**row, "turns": turns})


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


def generate(seed: int = 0, n: int = 200) -> list[Conversation]:
    """The benchmark of a seed: families in turn, two easy and two medium to one hard.

    No two have the same family and values.
    """
    conversations, seen = [], set()
    for category, count in shares_of(n).items():
        rng = random.Random(f"{seed} {category}")
        families = drafts.load_texts()[category]
        families = rng.sample(families, len(families))
        levels = ["easy"] * round(0.4 * count) + ["medium"] * round(0.4 * count)
        levels += ["hard"] * (count - len(levels))
        rng.shuffle(levels)
        for i, level in enumerate(levels):
            family = families[i % len(families)]
            draw = functools.partial(drafts.draft_conversation, category, family, level, rng)
            conversations.append(finish(draw_new(seen, draw, key_of, n), category, i + 1, seed))
    return conversations


def generate_instructions(seed: int = 0, n: int = 100) -> list[Conversation]:
    """Single instructions: categories and their families in turn, no text twice."""
    rng, texts = random.Random(f"{seed} instructions"), drafts.load_texts()["instructions"]
    conversations, seen = [], set()
    for i in range(n):
        category, number = list(texts)[i % len(texts)], i // len(texts)
        family = texts[category][number % len(texts[category])]
        draw = functools.partial(drafts.draft_instruction, family, rng)
        conversations.append(finish(draw_new(seen, draw, key_of, n), category, number + 1, seed))
    return conversations


def key_of(d: Draft) -> tuple[str, str]:
    """What no two conversations of a benchmark share."""
    return d.family["family"], str(sorted(d.slots.items()))


def finish(d: Draft, category: str, number: int, seed: int) -> Conversation:
    """A draft as the benchmark's record; slots that hold lists are not kept."""
    slots = {name: value for name, value in d.slots.items() if isinstance(value, str)}
    return Conversation(f"{category}-{number:03d}", category, f"{category}/{d.family['family']}",
                        d.difficulty, seed, slots, tuple(d.turns))


def draw_new(seen: set, draw: Callable, key: Callable, n: int):
    """Draw until the key is new; BadInput when there seem to be no more."""
    for _ in range(2000):
        item = draw()
        if key(item) not in seen:
            seen.add(key(item))
            return item
    raise BadInput(f"n={n}: after {len(seen)} different ones no new one comes; give a smaller n")


# --- what a model of the bundled size can do: follow a named operation, keep a value over turns
OPERATIONS = ("add", "subtract")    # unseen products are beyond it
FORMS = {op: [form for form in PHRASES[op] if form.startswith((op, "what is"))]
         + [ASKED.replace("SYMBOL", SYMBOLS[op]), f"compute {{a}} {SYMBOLS[op]} {{b}}"]
         for op in OPERATIONS}
START = ("the answer is {v}", "{v} is the answer")
BACK = ("what is the answer", "which is the answer")


def exactly(answer: int, user: str, lag: int = 0, need: str = "") -> Turn:
    """A turn whose reply is a number and nothing else; scored if it needs something."""
    checks = ({"type": "exact", "value": str(answer)},)
    return Turn(user, bool(need), lag, need, str(answer), checks if need else ())


def draft_operation(rng: random.Random, split: str) -> tuple:
    """(category, difficulty, slots, turns) of one instruction, such as "subtract 11 from 68 ="."""
    operation = rng.choice(OPERATIONS)
    a, b = rng.choice(pairs_in(operation, split))
    user = rng.choice(FORMS[operation]).format(a=a, b=b) + " ="     # as its text has it
    answer = compute(operation, a, b)
    return operation, "easy", {"a": str(a), "b": str(b), "result": str(answer)}, [
        exactly(answer, user, 0, f"{a} {SYMBOLS[operation]} {b} is {answer}")]


@functools.cache
def steps_from(value: int, split: str, largest: int = 100) -> list[tuple[str, int]]:
    """The (operation, x) that lead from a value to one in 0..100, by pairs of one split."""
    return [(op, x) for op in OPERATIONS for x in range(1, largest + 1)
            if split_of(value, x) == split and 0 <= compute(op, value, x) <= 100]


def draft_running(rng: random.Random, split: str) -> tuple:
    """A held value all of whose pairs of numbers are of the split."""
    category, difficulty = rng.choice(("hold", "update")), rng.choice(("easy", "medium"))
    while True:
        slots, turns = run_of(category, difficulty, rng, split)
        if all(split_of(*pair) == split for pair in pairs_of(turns)):
            return category, difficulty, slots, turns


def run_of(category: str, difficulty: str, rng: random.Random, split: str) -> tuple[dict, list]:
    """A value, perhaps another in its place, and questions between: (slots, turns).

    hold    "the answer is 23" 23, "what is 3 + 4" 7, "what is the answer" 23
    update  "the answer is 23" 23, "the answer is 45" 45, "what is 3 + 4" 7, "what is the answer" 45
    A medium one has one question more. Nothing is computed with the value: it is only kept.
    """
    plan = {"hold easy": "aside back", "hold medium": "aside aside back",
            "update easy": "change aside back", "update medium": "aside change aside back"}
    value = rng.choice([v for v in range(101) if steps_from(v, split)])
    slots, since = {"start": str(value)}, 0
    turns = [exactly(value, rng.choice(START).format(v=value))]
    for step in plan[f"{category} {difficulty}"].split():
        lag, t = len(turns) - since, len(turns) + 1
        if step == "change":
            value = rng.choice([v for v in range(101)
                                if v != value and split_of(value, v) == split])
            since, slots[f"value_{t}"] = len(turns), str(value)
            turns.append(exactly(value, rng.choice(START).format(v=value)))
        elif step == "aside":
            a = rng.choice([a for a in range(21) if steps_from(a, split, 20)])
            op, b = rng.choice(steps_from(a, split, 20))
            slots |= {f"aside_{t}": str(b)}
            user = ASKED.replace("SYMBOL", SYMBOLS[op]).format(a=a, b=b)
            turns.append(exactly(compute(op, a, b), user))
        else:
            turns.append(exactly(value, rng.choice(BACK), lag, f"the value is {value}"))
    return slots, turns


def pairs_of(turns: list[Turn]) -> list[tuple[int, int]]:
    """The pairs of numbers of a held value: with the next one, in each aside and with its first.

    example  "the answer is 23", "what is 3 + 4", "the answer is 45" -> (3, 4), (23, 3), (23, 45)
    """
    pairs, value = [], int(turns[0].answer)
    for turn in turns[1:]:
        numbers = [int(n) for n in re.findall(r"[0-9]+", turn.user)]
        if len(numbers) == 2:
            pairs += [tuple(numbers), (value, numbers[0])]
        elif numbers:
            pairs.append((value, numbers[0]))
            value = int(turn.answer)
    return pairs


def generate_tiny(kind: str, seed: int = 0, n: int = 200, split: str = "test") -> list:
    """Conversations for the bundled models over one split's pairs, no two alike."""
    draft = {"tiny_operations": draft_operation, "tiny_turns": draft_running}[kind]
    rng, seen, conversations = random.Random(f"{seed} {kind} {split}"), set(), []
    for i in range(n):
        category, difficulty, slots, turns = draw_new(
            seen, lambda: draft(rng, split), lambda item: tuple(t.user for t in item[3]), n)
        conversations.append(Conversation(f"{kind}-{i + 1:03d}", category, f"{kind}/{category}",
                                          difficulty, seed, slots, tuple(turns)))
    return conversations


def make(kind: str, seed: int, n: int | None) -> list[Conversation]:
    """The conversations of a kind; n None: 200, of instructions 100."""
    if kind == "conversations":
        return generate(seed, n or 200)
    if kind == "instructions":
        return generate_instructions(seed, n or 100)
    return generate_tiny(kind, seed, n or 200)


def write_train(folder: Path, kind: str, seed: int, n: int) -> dict[str, int]:
    """train.jsonl (n rows), valid.jsonl and test.jsonl (n / 20 each) of {"messages": [...]}."""
    sizes = {"train": n, "valid": max(1, n // 20), "test": max(1, n // 20)}
    for split, size in sizes.items():
        rows = [{"messages": [{"role": role, "content": text} for turn in c.turns for role, text in
                              (("user", turn.user), ("assistant", turn.answer))]}
                for c in generate_tiny(kind, seed, size, split)]
        write_text(folder / f"{split}.jsonl", json_lines(rows))
    return sizes


# --- oracles: what the benchmark can tell apart before any model has seen it
def possible_values(conversations: list[Conversation]) -> dict[tuple[str, str], list[str]]:
    """All values that a slot may hold, {(family, slot): values}.

    Of a family that is not in families.yaml: those of all these conversations.
    """
    texts, found = drafts.load_texts(), defaultdict(list)
    for c in conversations:
        for slot, value in c.slots.items():
            found[c.family, drafts.base_name(slot)].append(value)
    families = {f"{category}/{family['family']}": family for category in SHARES
                for family in texts[category]}
    return {(name, slot): drafts.values_of(families.get(name, {}), slot) or values
            for (name, slot), values in found.items()}


def forgetful(c: Conversation, t: int, possible: dict[tuple[str, str], list[str]]) -> str:
    """The reply of one who never heard the first turn and otherwise answers correctly.

    It knows the form of the right reply and everything said later. In place of a value that it
    never heard, it guesses a possible one, the right one included.
    """
    rng = random.Random(f"{c.id} {t}")
    heard = normalise(" ".join(turn.user for turn in c.turns[1:t + 1]))
    unheard = {value.casefold(): drafts.base_name(slot) for slot, value in c.slots.items()
               if not find(value, heard)}
    if not unheard:
        return c.turns[t].answer
    names = "|".join(re.escape(v) for v in sorted(unheard, key=len, reverse=True))
    guess = lambda match: rng.choice(possible[c.family, unheard[match[0].casefold()]])
    return re.sub(rf"(?<!\w)(?:{names})(?!\w)", guess, c.turns[t].answer, flags=re.I)


def last_named(c: Conversation, t: int, _=None) -> str:
    """The thing of any kind that the user named last, the question included."""
    said = normalise(" \n".join(turn.user for turn in c.turns[:t + 1]))
    places = {value: max((m.start() for m in term_pattern(value).finditer(said)), default=-1)
              for value in c.slots.values()}
    last = max(places, key=places.get, default="")
    return last if places.get(last, -1) >= 0 else ""


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
    missed = missed_marks(rates)
    if missed:
        raise BadInput(f"{path} does not measure what it should: {'; '.join(missed)}; "
                       "mend the families, or make it with another seed")


def options(words: list[str], **defaults) -> dict:
    """`key=value` words over defaults; raises BadInput."""
    values, mistakes = read_keys(os.devnull, words, {"n": int, "seed": int, "kind": str})
    given = defaults | values
    if (mistakes or given["kind"] not in KINDS or given["n"] == 0
            or min(given["n"] or 1, given["seed"]) < 0):
        raise BadInput("; ".join([*mistakes, f"{' '.join(words)}: expected n=, seed= and "
                                  f"kind={'|'.join(KINDS)}"]))
    return given


def main(argv: list[str]) -> None:
    if len(argv) >= 2 and argv[0] == "make":
        given = options(argv[2:], n=None, seed=0, kind="conversations")
        conversations = make(given["kind"], given["seed"], given["n"])
        write_benchmark(Path(argv[1]), conversations)
        print(f"{argv[1]}: {len(conversations)} {given['kind']}, seed {given['seed']}")
    elif len(argv) >= 2 and argv[0] == "make_train":
        given = options(argv[2:], n=20000, seed=0, kind="tiny_turns")
        if not given["kind"].startswith("tiny"):
            raise BadInput(f"kind={given['kind']}: training rows are made of tiny_turns or "
                           "tiny_operations; the other kinds are for judging only")
        print(f"{argv[1]}: {write_train(Path(argv[1]), given['kind'], given['seed'], given['n'])}")
    elif len(argv) in (2, 3) and argv[0] == "show" and re.fullmatch("[0-9]*", "".join(argv[2:])):
        for c in read_benchmark(Path(argv[1]))[0][:int(argv[2]) if argv[2:] else None]:
            print(described(c))
    elif len(argv) == 2 and argv[0] == "audit":
        print_audit(Path(argv[1]))
    else:
        raise BadInput("expected `python -m gate.conversations make OUT.jsonl [n=] [seed=] "
                       "[kind=]`, `make_train FOLDER [kind=] [n=] [seed=]`, `show FILE [COUNT]` or "
                       f"`audit FILE`, got {' '.join(argv) or 'nothing'}")


if __name__ == "__main__":
    run_main(main)
