"""How a conversation of the benchmark is drawn: gaps in texts, values, asides, four categories.

`Draft` fills the texts of benchmark/families.yaml. A value is drawn when a text first names it. A
plan such as "aside ask ask" names the steps that follow the opening: methods of the category. The
prior work's items named in the question what the answer needed (a follow-up on photosynthesis asked
about chlorophyll), so a draft in which a value is said a second time is thrown away.
"""
import functools
import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from gate.checks import Verdict, check_turn, find, normalise

FAMILIES = Path(__file__).parent / "benchmark" / "families.yaml"
GAP = re.compile(r"\{(?:(a|int) )?(\w+)\}")


@dataclass(frozen=True)
class Turn:
    """What the user says, and what a reply to it must show."""
    user: str
    scored: bool = False    # asides and statements do not count
    lag: int = 0            # how many turns ago that was said which it needs
    need: str = ""          # that, in words, for a judge
    answer: str = ""        # what one who knows everything replies
    checks: tuple[dict, ...] = ()


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
        said = [turn.user for turn in self.turns]
        return [check_turn(turn.checks, reply, replies[:t], said[:t]) if turn.scored else None
                for t, (turn, reply) in enumerate(zip(self.turns, replies, strict=True))]


# --- values and texts
@functools.cache
def load_texts() -> dict:
    """families.yaml, its tables {columns, rows} as lists of {column: value}."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)   # the quick one, where it is built
    texts = yaml.load(FAMILIES.read_text(encoding="utf-8"), Loader=loader)
    for name, table in texts.items():
        if isinstance(table, dict) and "columns" in table:
            texts[name] = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return texts


def pool_of(spec: str, above: int = 0) -> list[str]:
    """example  "cities" -> the pool of that name;  "6..9" -> 6, 7, 8, 9;  anything else -> []"""
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", spec):
        return [str(above + n) for n in range(int(match[1]), int(match[2]) + 1)]
    return load_texts()["pools"].get(spec, [])


def specs_of(family: dict) -> dict[str, str]:
    """What each slot of a family is drawn from: {slot: a pool's name, or a range}."""
    pool = family.get("pool", "")
    specs = {"item": pool, "person": pool, "thing": family.get("other", "")}
    for name, fact in family.get("facts", {}).items():
        specs |= {name: fact["pool"], f"near_{name}": fact["pool"]}
    return specs | family.get("slots", {})


def article(noun: str) -> str:
    """example  "optician" -> "an optician";  "ukulele" -> "a ukulele" """
    vowel = noun[0].lower() in "aeiou" and not noun.startswith(("uk", "uni", "eu"))
    return f"{'an' if vowel else 'a'} {noun}"


def capitalised(text: str) -> str:
    """A capital at the start of each sentence."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


class Draft:
    """A conversation in the making: a value is drawn when a text first names it."""
    def __init__(self, family: dict, rng: random.Random, difficulty: str):
        self.family, self.rng, self.difficulty = family, rng, difficulty
        self.texts, self.specs, self.turns = load_texts(), specs_of(family), []
        self.slots, self.local = {}, {}     # the values so far; those of the turn at hand alone
        self.spare = {}     # what is left of asides and of a row's lists, so that none comes twice
        # the family's line of a table, its lists included
        self.row = dict(rng.choice(self.texts[family["table"]])) if "table" in family else {}

    def next_of(self, name: str, values: list):
        """The next of a list in random order."""
        if name not in self.spare:
            self.spare[name] = self.rng.sample(values, len(values))
        return self.spare[name].pop()

    def draw(self, spec: str) -> str:
        """A value that is in no slot yet; "limit+10..40": by 10 to 40 above the slot limit's."""
        lower, _, pool = spec.rpartition("+")
        values = pool_of(pool, above=int(self.value(lower)) if lower else 0)
        return self.rng.choice([v for v in values if v not in self.slots.values()])

    def value(self, name: str) -> str:
        """What fills a gap: a value of this turn alone, of the row, or of a slot."""
        if name not in self.local and isinstance(self.row.get(name), list):
            self.local[name] = self.next_of(name, self.row[name])
        if name in self.local:
            return self.local[name]
        if name not in self.slots:
            self.slots[name] = (self.fill(self.row[name]) if name in self.row
                                else self.draw(self.specs[name]))
        return self.slots[name]

    def fill(self, template):
        """A template, or one inside lists and dictionaries, with its gaps filled: "{a job}" with
        its article. "{names}" alone is a row's whole list, "{int limit}" a number."""
        if isinstance(template, dict):
            return {key: self.fill(value) for key, value in template.items()}
        if isinstance(template, list):
            return [self.fill(value) for value in template]
        if not isinstance(template, str):
            return template
        if gap := GAP.fullmatch(template):
            values = self.local.get(gap[2], self.row.get(gap[2]))
            if gap[1] == "int":
                return int(self.value(gap[2]))
            if not gap[1] and isinstance(values, list):
                return values
        return GAP.sub(lambda gap: article(self.value(gap[2])) if gap[1] else self.value(gap[2]),
                       template)

    def pick(self, forms: list[str], **local: str) -> str:
        """One of the forms, filled."""
        self.local |= local
        return capitalised(self.fill(self.rng.choice(forms)))

    def say(self, *texts: str, answer: str = "I see.") -> None:
        """A turn that is not scored."""
        self.turns.append(Turn(" ".join(texts), answer=answer, checks=({"type": "nonempty"},)))
        self.local = {}

    def ask_that(self, user: str, answer: str, need: str, checks: list[dict],
                 since: int = 0) -> None:
        """A scored turn that needs what was said in turn `since` (from 0)."""
        said = normalise(" ".join([turn.user for turn in self.turns] + [user]))
        for check in checks:
            if "wrong" in check:    # only what somebody mentioned, and no name of the right one
                right = [*check["values"], *sum(check.get("aliases", {}).values(), [])]
                check["wrong"] = [w for w in check["wrong"]
                                  if w and w not in right and find(w, said)]
        self.turns.append(Turn(user, True, len(self.turns) - since, need, capitalised(answer),
                               tuple(checks)))
        self.local = {}

    def ask_template(self, ask: dict, lead: str = "") -> None:
        """A scored turn written out in families.yaml: user, answer, need and checks."""
        if ask.get("aside"):
            self.take_aside()
        user = self.pick(ask["user"])
        if "against" in self.local:
            self.slots[f"against_{len(self.turns) + 1}"] = self.local["against"]
        answer, need = self.fill(ask["answer"]), self.fill(ask["need"])
        self.ask_that(f"{lead} {user}".strip(), answer, need, self.fill(ask["checks"]))

    def take_aside(self) -> None:
        """An unrelated question, which names some other thing: {question, thing, key}."""
        self.local = dict(self.next_of("asides", self.texts["asides"]))
        self.slots[f"aside_{len(self.turns) + 1}"] = self.local["thing"]

    def aside(self) -> None:
        self.take_aside()
        self.say(self.rng.choice(self.texts["aside_leads"]), self.local["question"],
                 answer=self.fill(self.texts["aside_answer"]))

    def leaks(self) -> bool:
        """Whether a value is said twice or is part of another, or the row's is said too late."""
        said = [normalise(turn.user) for turn in self.turns]
        values = {name: v for name, v in self.slots.items() if name not in self.texts["choices"]}
        if any(find(a, normalise(b)) for a in values.values() for b in values.values()
               if a is not b):
            return True
        for name, value in values.items():
            times = [t for t, text in enumerate(said) if find(value, text)]
            if len(times) > 1 or name in self.row and times not in ([], [0]):
                return True
        return False


# --- the four categories: how each opens, and the steps that its plans name
class Memory(Draft):
    """Facts told first, asked after asides and next to look-alikes."""
    def open(self) -> None:
        facts, easy = self.family["facts"], self.difficulty == "easy"
        self.said = self.rng.sample(list(facts), 2 if easy else 3)
        self.asked = self.rng.sample(self.said, len(self.said))
        texts = []
        for name in self.said:
            texts.append(self.pick(facts[name]["say"]))
            if name == self.asked[0] and not easy:      # somebody else's value of the same
                texts.append(self.pick([facts[name]["near"]]))
        self.say(self.pick(self.family["lead"]), *texts)

    def later(self) -> None:
        """One more fact, and somebody else's value of one from the first turn."""
        facts = self.family["facts"]
        name = next(n for n in facts if n not in self.said)
        self.say("One more thing.", self.pick(facts[name]["say"]),
                 self.pick([facts[self.asked[1]]["near"]]))
        self.asked[2:] = [name]

    def ask(self, count: int = 1) -> None:
        names = [self.asked.pop(0) for _ in range(count)]
        facts = [self.family["facts"][name] for name in names]
        user = " ".join(self.pick(fact["ask"]) for fact in facts)
        checks = [{"type": "recall", "values": [self.slots[name]],
                   "wrong": [self.slots.get(f"near_{name}")]} for name in names]
        self.ask_that(user if count == 1 else f"Two things at once. {user}",
                      " ".join(self.pick([fact["answer"]]) for fact in facts),
                      "; ".join(self.fill(fact["need"]) for fact in facts), checks)

    def both(self) -> None:
        self.ask(2)


class Preferences(Draft):
    """A standing wish that every reply respects, and that is asked back."""
    def open(self) -> None:
        near = [self.pick(self.family["near"])] if self.difficulty != "easy" else []
        self.say(self.pick(self.family["open"]), *near)     # near: somebody else's wish
        asks = self.family["asks"]
        first = self.rng.randrange(max(1, len(asks) - 1))
        self.asks = itertools.cycle(asks[first:] + asks[:first])

    def ask(self) -> None:
        self.ask_template(next(self.asks))

    def recall(self) -> None:
        self.ask_template(self.family["recall"])


class Continuity(Draft):
    """"It", "the second one", "the one after that": of a topic, or of four in an order."""
    def open(self) -> None:
        family = self.family
        if family["kind"] == "topic":
            first, *others = family["asks"]     # the first is the one that is hardest to guess
            self.asks = self.rng.sample([first, self.rng.choice(others)], 2)
            self.asks += [ask for ask in others if ask not in self.asks]
            return self.say(self.pick(family["open"]))
        four, self.places = [{}, {}, {}, {}], [1, 2, 3, 4]
        for kind in ("person", "thing") if family["kind"] == "pairs" else ("item",):
            for i, value in enumerate(self.rng.sample(pool_of(self.specs[kind]), 4)):
                four[i][kind] = self.slots[f"{kind}_{i + 1}"] = value
        items = [family.get("pair", "{item}").format(**names) for names in four]
        joined = self.rng.choice((f"{', '.join(items[:3])} and {items[3]}", "; ".join(items),
                                  ", ".join(f"{i}) {item}" for i, item in enumerate(items, 1))))
        self.say(self.pick(family["open"], items=joined))

    def ask(self) -> None:
        interrupted = not self.turns[-1].scored     # by the opening, or by an aside
        if self.family["kind"] != "topic":
            return self.ask_place(None if interrupted else self.place)
        lead = self.rng.choice(self.texts["back"]) if interrupted and len(self.turns) > 1 else ""
        self.ask_template(self.asks.pop(0), lead)

    def ask_place(self, before: int | None) -> None:
        """One of four by its place; `before`: the place asked just before, which is "that"."""
        kind, forms, place = "item", self.texts["ask_place"], self.rng.choice(self.places)
        if self.family["kind"] == "pairs" and before:
            kind, forms, place = "person", self.family["ask_person"], before
        elif self.family["kind"] == "pairs":
            kind, forms = "thing", self.family["ask_other"]
        elif before:
            beside = [i for i in self.places if i in (before - 1, before + 1, 4)]
            place = self.rng.choice(beside or [4])
            forms = self.texts["ask_next" if place == before + 1 else
                               "ask_previous" if place == before - 1 else "ask_last"]
        self.place, self.places = place, [i for i in self.places if i != place]
        value = self.slots[f"{kind}_{place}"]
        wrong = [self.slots[f"{kind}_{i}"] for i in range(1, 5) if i not in (place, before)]
        ordinal, noun = self.texts["ordinals"][place - 1], self.family["noun"]
        self.ask_that(self.pick(forms, ordinal=ordinal, noun=noun, value=value),
                      self.fill(self.texts["place_answer"]),
                      f"{ordinal} {noun} of the list: {value}",
                      [{"type": "recall", "values": [value], "wrong": wrong},
                       {"type": "no_clarify"}])


class Updates(Draft):
    """A plan, changes, and the plan read back: new values in, old ones out, the rest kept."""
    def open(self) -> None:
        facts = self.family["facts"]
        names = self.rng.sample(list(facts), len(facts))
        self.say(self.pick(self.family["lead"]), *(self.pick(facts[n]["say"]) for n in names))
        self.now, self.old, self.changed = {n: self.slots[n] for n in names}, [], {}

    def change(self) -> None:
        """One point gets a new value; a second change may hit the same point again."""
        name = self.rng.choice(list(self.now))
        fact = self.family["facts"][name]
        self.old.append(self.now[name])
        self.changed[name] = len(self.turns)
        self.now[name] = self.slots[f"{name}_{len(self.turns) + 1}"] = self.draw(fact["pool"])
        self.local = {name: self.now[name]}
        change = self.fill(self.rng.choice(fact["change"]))
        self.say(self.pick(self.texts["changed"], change=change), answer="Noted.")

    def restate(self) -> None:
        self.ask(list(self.now), "restate", 0)

    def one(self) -> None:
        """One point, changed or not."""
        name = self.rng.choice(list(self.now))
        self.ask([name], "one", self.changed.get(name, 0))

    def ask(self, names: list[str], forms: str, since: int) -> None:
        facts, thing = self.family["facts"], self.family["thing"]
        self.local = {name: self.now[name] for name in names}
        told = "; ".join(self.fill(facts[name]["change"][0]).rstrip(".") for name in names)
        user = self.pick(self.texts[forms], thing=thing, question=facts[names[0]]["ask"])
        self.ask_that(user, f"As it stands: {told}.", f"the {thing} now: {told}",
                      [{"type": "current", "present": [self.now[name] for name in names],
                        "superseded": self.old}], since)


def draft_conversation(category: str, family: dict, difficulty: str,
                       rng: random.Random) -> Conversation:
    """Draws until no value leaks into a turn that should not have it."""
    kind = {"memory": Memory, "preferences": Preferences, "continuity": Continuity,
            "updates": Updates}[category]
    while True:
        d = kind(family, rng, difficulty)
        d.open()
        for step in rng.choice(d.texts["plans"][category][difficulty]).split():
            getattr(d, step)()
        if not d.leaks():
            return Conversation("", category, f"{category}/{family['family']}", difficulty, 0,
                                d.slots, tuple(d.turns))
