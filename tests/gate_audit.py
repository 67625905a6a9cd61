"""What a benchmark can tell apart before any model has seen it: what replies by rule pass.

Who knows everything must pass; who has forgotten the first turn, names whatever was named last,
says nothing, asks back, copies the user, refuses or hedges must not. Who hedges or copies in part
is left undecided, and does not pass either.

    python tests/gate_audit.py gate/benchmark/conversations.jsonl
"""
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from files.keys import BadInput  # noqa: E402
from gate.checks import find, normalise, term_pattern  # noqa: E402
from gate.conversations import SHARES, read_benchmark  # noqa: E402
from gate.drafts import Conversation, load_texts, pool_of, specs_of  # noqa: E402

NUMBERED = re.compile(r"_\d+$")     # "item_3" is an "item"


def values_of(family: dict, slot: str) -> list[str]:
    """All values that a family may put in a slot, for one who has to guess; [] if not known."""
    rows = load_texts()[family["table"]] if "table" in family else []
    known = [row[slot] for row in rows if slot in row]
    return known or pool_of(specs_of(family).get(slot, "").rpartition("+")[2])


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


def named_all(c: Conversation, between: str) -> str:
    """Every value that the user ever gave, in a row."""
    return between.join(dict.fromkeys(map(str, c.slots.values())))


def copied(c: Conversation, t: int, change) -> str:
    """All that the user said so far, each turn changed a little."""
    return " ".join(change(turn.user) for turn in c.turns[:t + 1])


def small(text: str) -> str:
    return text[:1].lower() + text[1:]


def turned_round(text: str) -> str:
    return re.sub(r"\b[Mm]y\b", "your", re.sub(r"\bI\b", "you", text))


ORACLES = {     # name: (reply to turn t, what it may pass: (category, at least, at most))
    "knows everything": (lambda c, t, _: c.turns[t].answer, ("all", 1, 1)),
    "forgot turn 1": (forgetful, ("memory", 0, 0.05)),
    "last named": (last_named, ("all", 0, 0.40)),
    "says nothing": (lambda c, t, _: "", ("all", 0, 0)),
    "does not know": (lambda c, t, _: "I don't know.", ("all", 0, 0)),
    "echo": (lambda c, t, _: c.turns[t].user, ("all", 0, 0)),
    "asks back": (lambda c, t, _: "Which one do you mean?", ("all", 0, 0)),
    "parrot": (lambda c, t, _: " ".join(turn.user for turn in c.turns[:t + 1]), ("all", 0, 0.05)),
    "refuses": (lambda c, t, _: "I'm sorry, I cannot help with that.", ("all", 0, 0.05)),
    "hedges": (lambda c, t, _: f"{c.turns[t].answer.rstrip('.')} or something else.",
               ("all", 0, 0.05)),
}

IN_PART = {     # who names the right thing, and does not answer: for several turns, at most 5 %
    "right, maybe": lambda c, t, _: f"Maybe {small(c.turns[t].answer).rstrip('.')}.",
    "right, not sure": lambda c, t, _: f"{c.turns[t].answer} But I am really not sure.",
    "right?": lambda c, t, _: f"{c.turns[t].answer.rstrip('.')}? I am not sure.",
    "right, perhaps not": lambda c, t, _: f"{c.turns[t].answer.rstrip('.')}, perhaps not.",
    "not know if right": lambda c, t, _: "I don't know whether it is so that "
                                         f"{small(c.turns[t].answer)}",
    "wrong to say": lambda c, t, _: f"It is wrong to say: {c.turns[t].answer}",
    "could be all": lambda c, t, _: f"It could be {named_all(c, ', ')}.",
    "all by comma": lambda c, t, _: f"{named_all(c, ', ')}.",
    "all by and": lambda c, t, _: named_all(c, " and "),
    "all by slash": lambda c, t, _: named_all(c, "/"),
    "all asked": lambda c, t, _: f"{named_all(c, '? ')}?",
    "all, as others'": lambda c, t, _: " ".join(
        f"Your brother says {value}." for value in dict.fromkeys(map(str, c.slots.values()))),
    "right, and no more": lambda c, t, _: "I am not sure how much is left of it. "
                                          f"{c.turns[t].answer}",
    "parrot, less a word": lambda c, t, _: copied(c, t, lambda text: text.partition(" ")[2]),
    "parrot, less 1/8": lambda c, t, _: copied(c, t, lambda text: text[len(text) // 8:]),
    "parrot, opening off": lambda c, t, _: copied(
        c, t, lambda text: re.split(r"(?<=[.!?])\s+", text, maxsplit=1)[-1]),
    "parrot, I as you": lambda c, t, _: copied(c, t, turned_round),
}
ORACLES |= {name: (oracle, ("all", 0, 0.05)) for name, oracle in IN_PART.items()}


def audit(conversations: list[Conversation]) -> dict[str, dict[str, float]]:
    """Each oracle's share of passed conversations by category, "all", and "abstains" of turns."""
    rates, possible = {}, possible_values(conversations)
    several = any(len(c.turns) > 1 for c in conversations)
    for name, (oracle, _) in ORACLES.items():
        if (oracle in (forgetful, last_named) or name in IN_PART) and not several:
            continue        # there is nothing to forget in one turn, nor to copy or choose from
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


def print_audit(path: Path) -> None:
    conversations, digest = read_benchmark(path)
    rates = audit(conversations)
    columns = [*dict.fromkeys(c.category for c in conversations), "all", "abstains"]
    print(f"{path}: {len(conversations)} conversations, sha256 {digest}")
    print(f"{'passed by':20}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rates.items():
        print(f"{name:20}" + "".join(f"{row[column]:>13.1%}" for column in columns))
    if missed := missed_marks(rates):
        raise BadInput(f"{path} does not measure what it should: {'; '.join(missed)}; "
                       "mend the families, or make it with another seed")


if __name__ == "__main__":
    try:
        print_audit(Path(sys.argv[1]))
    except BadInput as error:
        sys.exit(f"error: {error}")
