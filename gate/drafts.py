"""How a conversation of the benchmark is drawn: gaps in texts, values, asides, four categories.

`Draft` fills the texts of benchmark/families.yaml. A value is drawn when a text first names it. A
plan such as "aside ask ask" says which turns follow the opening. The prior work's items named in
the question what the answer needed (a follow-up on photosynthesis asked about chlorophyll), so a
draft in which a value is said a second time is thrown away and drawn again.
"""
import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from gate.checks import check_turn, find, normalise

FAMILIES = Path(__file__).parent / "benchmark" / "families.yaml"


@dataclass(frozen=True)
class Turn:
    """What the user says, and what a reply to it must show.

    scored  whether the conversation's verdict depends on it: asides and statements do not count
    lag     how many turns ago that was said which it needs
    need    that, in words, for a judge;  answer: what one who knows everything replies
    """
    user: str
    scored: bool = False
    lag: int = 0
    need: str = ""
    answer: str = ""
    checks: tuple[dict, ...] = ()


# --- drawing values and filling texts
GAP = re.compile(r"\{(?:(a|all|lines|upper|int) )?(\w+)\}")
COMPUTED = {
    "letters": lambda word: str(len(word)),
    "vowels": lambda word: str(len(re.findall("[aeiou]", word))),
    "sorted": sorted, "ascending": lambda items: sorted(items, key=int),
    "reversed": lambda items: items[::-1], "sum": lambda a, b: str(int(a) + int(b)),
    "difference": lambda a, b: str(int(a) - int(b)), "product": lambda a, b: str(int(a) * int(b)),
}


def article(noun: str) -> str:
    """example  "optician" -> "an optician";  "ukulele" -> "a ukulele" """
    vowel = noun[0].lower() in "aeiou" and not noun.startswith(("uk", "uni", "eu"))
    return f"{'an' if vowel else 'a'} {noun}"


SHAPES = {"": str, "a": article, "upper": str.upper, "all": ", ".join, "int": str,
          "lines": lambda items: "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))}


def capitalised(text: str) -> str:
    """A capital at the start of each sentence."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


@functools.cache
def load_texts(path: Path = FAMILIES) -> dict:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)   # the quick one, where it is built
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def table_rows(table) -> list[dict]:
    if isinstance(table, list):
        return table
    return [dict(zip(table["columns"], row)) for row in table["rows"]]


def range_of(spec: str) -> tuple[str, int, int] | None:
    """example  "6..24" -> ("", 6, 24);  "limit+10..40" -> ("limit", 10, 40);  "cities" -> None"""
    match = re.fullmatch(r"(?:(\w+)\+)?(\d+)\.\.(\d+)", spec)
    return match and (match[1] or "", int(match[2]), int(match[3]))


def base_name(slot: str) -> str:
    """example  "item_3" -> "item" """
    return re.sub(r"_\d+$", "", slot)


def values_of(family: dict, name: str) -> list[str]:
    """All values that a family may put in a slot, for one who has to guess; [] if not known."""
    texts, name = load_texts(), base_name(name)
    if "table" in family:
        values = [row[name] for row in table_rows(texts[family["table"]]) if name in row]
        if values:
            return values
    specs = {**family.get("slots", {}), "item": family.get("pool"), "person": family.get("pool"),
             "thing": family.get("other")}
    specs |= {fact: entry["pool"] for fact, entry in family.get("facts", {}).items()}
    spec = specs.get(name) or ""
    if bounds := range_of(spec):
        return [str(n) for n in range(bounds[1], bounds[2] + 1)]
    return texts["pools"].get(spec, [])


class Draft:
    """A conversation in the making: a value is drawn when a text first names it.

    slots   the values so far;  row: the family's line of a table, its lists included
    spare   what remains to be drawn of asides and of a row's lists, so that none comes twice
    """
    def __init__(self, family: dict, texts: dict, rng: random.Random, difficulty: str):
        self.family, self.texts, self.rng, self.difficulty = family, texts, rng, difficulty
        self.slots, self.turns, self.spare, self.state = {}, [], {}, {}
        self.row = dict(rng.choice(table_rows(texts[family["table"]]))) if "table" in family else {}
        self.specs = dict(family.get("slots", {}))
        for name, fact in family.get("facts", {}).items():
            self.specs |= {name: fact["pool"], f"near_{name}": fact["pool"]}

    def next_of(self, name: str, values: list):
        """The next of a list in random order."""
        if name not in self.spare:
            self.spare[name] = self.rng.sample(values, len(values))
        return self.spare[name].pop()

    def draw(self, spec: str):
        """A value by its specification (see the head of families.yaml), not yet in a slot."""
        if bounds := range_of(spec):
            base = int(self.value(bounds[0], {})) if bounds[0] else 0
            pool = [str(base + n) for n in range(bounds[1], bounds[2] + 1)]
        elif match := re.fullmatch(r"=(\w+) (.+)", spec):
            return COMPUTED[match[1]](*(self.value(name, {}) for name in match[2].split()))
        elif match := re.fullmatch(r"(\w+) of (\S+)", spec):
            count = int(match[1] if match[1].isdigit() else self.value(match[1], {}))
            pool = self.texts["pools"].get(match[2]) or [str(n) for n in range(11, 100)]
            return self.rng.sample(pool, count)
        else:
            pool = self.texts["pools"][spec]
        return self.rng.choice([v for v in pool if v not in self.slots.values()])

    def value(self, name: str, local: dict):
        """What fills a gap: a value of this turn alone, of the row, or of a slot."""
        if name in local:
            return local[name]
        if isinstance(self.row.get(name), list):
            local[name] = self.next_of(name, self.row[name])
            return local[name]
        if name not in self.slots:
            self.slots[name] = (self.fill(self.row[name], local) if name in self.row
                                else self.draw(self.specs[name]))
        return self.slots[name]

    def fill(self, template, local: dict):
        """A template, or one inside lists and dictionaries, with its gaps filled.

        "{names}" alone is the whole list, "{int limit}" a number; in a text a list gives one of it.
        """
        if isinstance(template, dict):
            return {key: self.fill(value, local) for key, value in template.items()}
        if isinstance(template, list):
            return [self.fill(value, local) for value in template]
        gap = GAP.fullmatch(template) if isinstance(template, str) else None
        if gap and not gap[1] and isinstance(self.row.get(gap[2]), list) and gap[2] not in local:
            return self.row[gap[2]]
        if gap and gap[1] in (None, "int"):
            value = self.value(gap[2], local)
            return int(value) if gap[1] else value
        if not isinstance(template, str):
            return template
        return GAP.sub(lambda m: SHAPES[m[1] or ""](self.value(m[2], local)), template)

    def pick(self, forms: list[str], local: dict | None = None) -> str:
        return capitalised(self.fill(self.rng.choice(forms), {} if local is None else local))

    def say(self, user: str, answer: str = "I see.") -> None:
        """A turn that is not scored."""
        self.turns.append(Turn(user, answer=answer, checks=({"type": "nonempty"},)))

    def ask(self, user: str, answer: str, need: str, checks: list[dict], since: int = 0) -> None:
        """A scored turn that needs what was said in turn `since` (from 0)."""
        said = normalise(" ".join([turn.user for turn in self.turns] + [user]))
        for check in checks:
            if "wrong" in check:    # only what somebody mentioned, and no name of the right one
                right = [*check["values"], *sum(check.get("aliases", {}).values(), [])]
                check["wrong"] = [w for w in check["wrong"] if w not in right and find(w, said)]
        self.turns.append(Turn(user, True, len(self.turns) - since, need, capitalised(answer),
                               tuple(checks)))

    def aside_row(self) -> dict:
        row = dict(self.next_of("asides", table_rows(self.texts["asides"])))
        self.slots[f"aside_{len(self.turns) + 1}"] = row["thing"]
        return row

    def aside(self) -> None:
        """An unrelated question, which names some other thing."""
        row = self.aside_row()
        lead = self.rng.choice(self.texts["aside_leads"])
        self.say(f"{lead} {row['question']}", self.fill(self.texts["aside_answer"], row))
        self.state["interrupted"] = True


# --- the four categories: how each opens, and its steps
def open_memory(d: Draft) -> None:
    """Two to four facts, and from medium on somebody else's value of one that will be asked."""
    names = d.rng.sample(list(d.family["facts"]), 2 if d.difficulty == "easy" else 3)
    d.state["said"], d.state["asked"] = names, d.rng.sample(names, len(names))
    said = []
    for name in names:
        said.append(d.pick(d.family["facts"][name]["say"]))
        if d.difficulty != "easy" and name == d.state["asked"][0]:
            said.append(d.pick([d.family["facts"][name]["near"]]))
    d.say(" ".join([d.pick(d.family["lead"]), *said]))


def tell_later(d: Draft) -> None:
    """One more fact, and somebody else's value of one from the first turn."""
    name = next(n for n in d.family["facts"] if n not in d.state["said"])
    d.say(" ".join(["One more thing.", d.pick(d.family["facts"][name]["say"]),
                    d.pick([d.family["facts"][d.state["asked"][1]]["near"]])]))
    d.state["asked"][2:] = [name]


def ask_fact(d: Draft, count: int = 1) -> None:
    """One fact, or two at once."""
    names = [d.state["asked"].pop(0) for _ in range(count)]
    facts = [d.family["facts"][name] for name in names]
    user = " ".join(d.pick(fact["ask"]) for fact in facts)
    d.ask(user if count == 1 else f"Two things at once. {user}",
          " ".join(d.pick([fact["answer"]]) for fact in facts),
          "; ".join(d.fill(fact["need"], {}) for fact in facts),
          [{"type": "recall", "values": [d.slots[name]],
            "wrong": [d.slots[f"near_{name}"]] if f"near_{name}" in d.slots else []}
           for name in names])


def open_wish(d: Draft) -> None:
    """A standing wish, and from medium on somebody else's."""
    near = [d.pick(d.family["near"])] if d.difficulty != "easy" else []
    d.say(" ".join([d.pick(d.family["open"]), *near]))
    d.state["next"] = d.rng.randrange(max(1, len(d.family["asks"]) - 1))


def ask_template(d: Draft, ask: dict, lead: str = "") -> None:
    """A scored turn written out in families.yaml: user, answer, need and checks."""
    local = d.aside_row() if ask.get("aside") else {}
    user = d.pick(ask["user"], local)
    if "against" in local:
        d.slots[f"against_{len(d.turns) + 1}"] = local["against"]
    answer, need = d.fill(ask["answer"], local), d.fill(ask.get("need", ""), local)
    d.ask(f"{lead} {user}".strip(), answer, need, d.fill(ask["checks"], local))


def ask_wish(d: Draft) -> None:
    asks = d.family["asks"]
    ask_template(d, asks[d.state["next"] % len(asks)])
    d.state["next"] += 1


def open_topic(d: Draft) -> None:
    """A topic, or four things in an order, or four people with a thing each."""
    if d.family["kind"] == "topic":
        first, *others = d.family["asks"]       # the first is the one that is hardest to guess
        d.state["asks"] = d.rng.sample([first, d.rng.choice(others)], 2)
        d.state["asks"] += [ask for ask in others if ask not in d.state["asks"]]
        return d.say(d.pick(d.family["open"]))
    for kind in ("person", "thing") if d.family["kind"] == "pairs" else ("item",):
        pool = d.texts["pools"][d.family["other" if kind == "thing" else "pool"]]
        d.slots |= {f"{kind}_{i}": v for i, v in enumerate(d.rng.sample(pool, 4), 1)}
    items = [d.fill(d.family.get("pair", "{item}"), {k: d.slots.get(f"{k}_{i}") for k in (
        "person", "thing", "item")}) for i in range(1, 5)]
    joined = d.rng.choice((f"{', '.join(items[:3])} and {items[3]}", "; ".join(items),
                           ", ".join(f"{i}) {item}" for i, item in enumerate(items, 1))))
    d.say(d.pick(d.family["open"], {"items": joined}))


def ask_topic(d: Draft) -> None:
    after_aside = d.state.pop("interrupted", False) or len(d.turns) == 1
    if d.family["kind"] == "topic":
        lead = d.rng.choice(d.texts["back"]) if after_aside and len(d.turns) > 1 else ""
        ask_template(d, d.state["asks"].pop(0), lead)
    else:
        ask_place(d, None if after_aside else d.state["place"])


def ask_place(d: Draft, before: int | None) -> None:
    """One of four by its place; `before`: the place asked in the turn just before, as "that"."""
    kind, forms = "item", d.texts["ask_place"]
    places = [i for i in range(1, 5) if i not in d.state.setdefault("asked", [])]
    place = d.rng.choice(places)
    if d.family["kind"] == "pairs":
        kind, forms = "thing", d.family["ask_other"]
        if before:
            kind, forms, place = "person", d.family["ask_person"], before
    elif before:
        place = d.rng.choice([i for i in places if i in (before - 1, before + 1, 4)] or [4])
        forms = d.texts["ask_next" if place == before + 1 else
                        "ask_previous" if place == before - 1 else "ask_last"]
    d.state["asked"].append(place)
    d.state["place"] = place
    value, local = d.slots[f"{kind}_{place}"], {"ordinal": d.texts["ordinals"][place - 1],
                                                "noun": d.family["noun"]}
    wrong = [d.slots[f"{kind}_{i}"] for i in range(1, 5) if i not in (place, before)]
    d.ask(d.pick(forms, local), d.fill(d.texts["place_answer"], {"value": value}),
          f"{local['ordinal']} {local['noun']} of the list: {value}",
          [{"type": "recall", "values": [value], "wrong": wrong}, {"type": "no_clarify"}])


def open_plan(d: Draft) -> None:
    """Every point of a plan, in any order."""
    facts = d.rng.sample(list(d.family["facts"]), len(d.family["facts"]))
    d.say(" ".join([d.pick(d.family["lead"]),
                    *(d.pick(d.family["facts"][name]["say"]) for name in facts)]))
    d.state |= {"now": {name: d.slots[name] for name in facts}, "old": [], "changed": {}}


def change_plan(d: Draft) -> None:
    """One point gets a new value; a second change may hit the same point again."""
    name = d.rng.choice(list(d.state["now"]))
    value = d.draw(d.family["facts"][name]["pool"])
    changes = d.state["changed"]
    changes[name] = len(d.turns)
    d.slots[f"{name}_{len(d.turns) + 1}"] = value
    d.state["old"].append(d.state["now"][name])
    d.state["now"][name] = value
    change = d.fill(d.rng.choice(d.family["facts"][name]["change"]), {name: value})
    d.say(d.pick(d.texts["changed"], {"change": change}), "Noted.")


def ask_plan(d: Draft, whole: bool) -> None:
    """The plan read back, or one point of it, changed or not."""
    names = list(d.state["now"]) if whole else [d.rng.choice(list(d.state["now"]))]
    now = {name: d.state["now"][name] for name in names}
    local = {"thing": d.family["thing"], "question": d.family["facts"][names[0]]["ask"]}
    told = "; ".join(d.fill(d.family["facts"][n]["change"][0], {n: v}).rstrip(".")
                     for n, v in now.items())
    since = 0 if whole else d.state["changed"].get(names[0], 0)
    d.ask(d.pick(d.texts["restate" if whole else "one"], local), f"As it stands: {told}.",
          f"the {d.family['thing']} now: {told}",
          [{"type": "current", "present": list(now.values()), "superseded": d.state["old"]}], since)


OPENINGS = {"memory": open_memory, "preferences": open_wish, "continuity": open_topic,
            "updates": open_plan}
STEPS: dict[tuple[str, str], Callable[[Draft], None]] = {
    ("memory", "ask"): ask_fact, ("memory", "both"): lambda d: ask_fact(d, 2),
    ("memory", "later"): tell_later, ("preferences", "ask"): ask_wish,
    ("preferences", "recall"): lambda d: ask_template(d, d.family["recall"]),
    ("continuity", "ask"): ask_topic, ("updates", "change"): change_plan,
    ("updates", "restate"): lambda d: ask_plan(d, True),
    ("updates", "one"): lambda d: ask_plan(d, False),
}


def leaks(d: Draft) -> bool:
    """Whether a value is said twice, is part of another, or is said though only the row has it."""
    said = [normalise(turn.user) for turn in d.turns]
    values = {name: value for name, value in d.slots.items() if name not in d.texts["choices"]}
    if any(find(a, normalise(b)) for a in values.values() for b in values.values() if a is not b):
        return True
    for name, value in values.items():
        times = [bool(find(value, text)) for text in said]
        if sum(times) > 1 or any(times[1:]) and name in d.row:
            return True
    return False


def draft_conversation(category: str, family: dict, difficulty: str, rng: random.Random) -> Draft:
    """Draws until no value leaks into a turn that should not have it."""
    while True:
        d = Draft(family, load_texts(), rng, difficulty)
        OPENINGS[category](d)
        for step in rng.choice(d.texts["plans"][category][difficulty]).split():
            (Draft.aside if step == "aside" else STEPS[category, step])(d)
        if not leaks(d):
            return d


def draft_instruction(family: dict, rng: random.Random) -> Draft:
    """One instruction with checks that its own text does not pass."""
    while True:
        d = Draft(family, load_texts(), rng, "easy")
        ask_template(d, family | {"need": family["answer"]})
        if check_turn(d.turns[0].checks, d.turns[0].user).verdict != "pass":
            return d
