"""Deterministic checks of a reply: pass, fail, or abstain where the words alone do not settle it.

The prior work's rules counted "no chicken" as meat and failed right answers for their length. Here
text is first brought to one form: straight quotes, lower case, numbers as digits. Terms are matched
as whole words. A forbidden term does not count behind a negation ("free of", "-free"). A value that
was replaced may be mentioned as history ("moved from 5 to 7 pm"). What stays unclear abstains.
Length never fails a reply, unless the user asked for so many words.

A check is a dictionary {"type": NAME, ...the function's keywords}, as in a benchmark file. The
words it looks for around a term are in benchmark/words.yaml.
"""
import functools
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from text.normal import normalise

PASS = "pass"
WORDS = {name: rf"\b(?:{'|'.join(words)})\b" for name, words in yaml.safe_load(
    (Path(__file__).parent / "benchmark" / "words.yaml").read_text(encoding="utf-8")).items()}

TURNED = {"i": "you", "me": "you", "we": "you", "us": "you", "my": "your", "our": "your",
          "mine": "yours", "ours": "yours", "am": "are"}


class Verdict(NamedTuple):
    verdict: str    # pass | fail | abstain
    decided: str    # "", or the check and why: "recall:wrong_entity"


# --- where a text names what
@functools.cache
def term_pattern(term: str) -> re.Pattern:
    """A whole word or phrase in normalised text, also in its regular plural, without its article.
    "anchovy" finds "anchovies", "the mill" finds "our mill", "5" neither "15" nor "5.5"."""
    term = re.sub(r"^(?:the|an?) (?=\w)", "", normalise(term).strip())
    words = [re.escape(word) for word in re.split(r"[\s-]+", term) if word]
    body, end = r"[\s-]+".join(words), ""
    if re.search(r"[^\W\d]$", body):
        end = r"(?:'?s|es)?"
        if re.search("[^aeiou]y$", body):
            body, end = body[:-1], r"(?:y|ies|y's)"
    return re.compile(rf"(?<![\w])(?<!\d[.,:]){body}{end}(?!\w)(?![.,:]\d)")


class Hit(NamedTuple):
    """What stands around an occurrence of a term in its sentence."""
    before: str
    after: str


SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")


def find(term: str, reply: str) -> list[Hit]:
    """Every occurrence of a term in a reply that is already normalised."""
    return [Hit(sentence[:m.start()], sentence[m.end():])
            for sentence in SENTENCE_END.split(reply)
            for m in term_pattern(term).finditer(sentence)]


# --- what is said of a hit
NEGATOR = re.compile(rf"{WORDS['negators']}(?! {WORDS['no_denial']}| ,)")     # "No, ..." answers
STAND_IN = re.compile(rf"{WORDS['stand_ins']}\s+(?:\w+\s+)?$")
FREE = re.compile(r"\s*-?\s*(?:free|less)\b|\s+(?:substitute|alternative|replacement)s?\b")
DENIED = re.compile(r"\b(?:not|never|no longer|instead of|rather than|nor)\b(?! only)")
PAST_BEHIND = re.compile(rf"(?:> |, )?(?:\w+ )?{WORDS['past_behind']}")


def near(text: str, words: int, breaks: str, last: bool) -> str:
    """The `words` words of a text next to a hit, up to a word that begins another thought."""
    tokens = re.findall(r"[\w'$]+|[,()>]", text)
    joined = " ".join(tokens[-words:] if last else tokens[:words])
    parts = re.split(breaks, joined) if breaks else [joined]
    return parts[-1] if last else parts[0]


def polarity(hit: Hit) -> str:
    """example  "no chicken", "chicken-free", "vegan chicken" -> negated;  "not only chicken" ->
    plain;  "do not avoid chicken", "chicken is not for everyone" -> unclear"""
    if FREE.match(hit.after) or STAND_IN.search(hit.before):
        return "negated"
    negators = NEGATOR.findall(near(hit.before, 5, WORDS["new_thoughts"], last=True))
    if len(negators) == 1:
        return "negated"
    if negators == ["neither", "nor"]:
        return "negated"
    behind = near(hit.after, 4, WORDS["new_thoughts"], last=False)
    return "unclear" if negators or NEGATOR.search(behind) else "plain"


def denied(hit: Hit) -> bool:
    """Whether a value is named only to say that it is not the one: "not Oslo"."""
    return bool(DENIED.search(near(hit.before, 4, r"[,()]|\bbut\b", last=True)))


def hedged(hit: Hit) -> bool:
    """Whether a value is one of several that are offered: "Oslo, Graz or Lima", "Oslo or so"."""
    return bool(re.match(r"[\s\"')]*(?:\w+ ){0,2}(?:,[^,.;]{1,30})*,?\s*\bor\b"
                         r"(?! (?:more|less|at least (?:that|so|as|you))\b)",
                         hit.after)
                or re.search(r"\bor (?:\w+ ){0,3}$", hit.before))


def doubted(hit: Hit) -> bool:
    """Whether a value is named and not stated: "maybe Oslo", "Oslo? Rome?", "Oslo/Rome", "you said
    Oslo is not your city". "How about Oslo?" offers it."""
    asked = re.match(r"[^\w?]*(?:\w+ ?){0,2}\?", hit.after)
    return bool(re.search(WORDS["doubting"], hit.before)
                or asked and not re.search(WORDS["offering"], hit.before)
                or re.match(r"\s*/|\s*(?:is|was) not\b|.*\b(?:perhaps|maybe) not\b", hit.after)
                or re.search(r"/\s*$", hit.before))


def of_others(hit: Hit) -> bool:
    """Whether a value is told of somebody else than was asked about, in its own clause."""
    return bool(re.search(rf"{WORDS['others']}[^,;:]*$", hit.before)
                or re.match(rf"[^,;:]*\bwhere\b[^,;:]*{WORDS['others']}", hit.after))


def is_list(text: str, asked: int) -> bool:
    """Whether a normalised text is names in a row and no more, and more of them than were asked;
    or one sentence said of more. Not "Friday, no longer Monday", nor "Friday, as you said": there
    something is said."""
    sentences = [s.split() for s in SENTENCE_END.split(text) if s.strip()]
    alike = 3 if len(sentences) == 2 else 2     # words that they begin with
    if len(sentences) > asked and len({tuple(words[:alike]) for words in sentences}) == 1 < len(
            sentences):
        return True
    text = re.sub(rf"^(?:{WORDS['agreeing']}|{WORDS['declining']})\W*", "", text.strip(" ."))
    names = re.split(r"[,;]|\band\b", text)
    return (len(names) > asked and all(len(name.split()) <= 3 for name in names)
            and not re.search(rf"\b(?:you|it|is|are|in th(?:at|is) order)\b|{WORDS['past']}", text))


def refuses(text: str) -> str:
    """"all" of a normalised text's sentences refuse, regret or do not know, "some", or "" """
    sentences = [s for s in SENTENCE_END.split(text) if re.search(r"\w", s)]
    found = [bool(re.search(f"{WORDS['refusing']}|{WORDS['not_knowing']}", s)) for s in sentences]
    return "all" if found and all(found) else "some" if any(found) else ""


def as_history(hit: Hit) -> str:
    """Whether a replaced value is told as the past: "yes", "no", or "unclear" ("from 5 to 7")."""
    before = near(hit.before, 6, r"\b(?:now|is|are|but)\b", last=True)
    behind = near(hit.after, 4, "", last=False)
    if (re.search(WORDS["past"], before) or PAST_BEHIND.match(behind)
            or re.match(r"\s*(?:->|→|=>)", hit.after)):
        return "yes"
    if not re.search(r"\bfrom\b", before) or not behind.startswith("to "):
        return "no"
    return "yes" if re.search(WORDS["changing"], hit.before) else "unclear"


# --- the checks: each returns "pass", or "fail:why", or "abstain:why"
def named(value: str, aliases: dict | None, text: str) -> list[Hit]:
    """Where a text names a value, in any of its names."""
    return [hit for name in [value, *(aliases or {}).get(value, [])] for hit in find(name, text)]


def recall(reply: str, values: Sequence[str], mode: str = "all", aliases: dict | None = None,
           wrong: Sequence[str] = (), either_way: bool = False) -> str:
    """All (or any) of the values are stated, and none of the wrong ones. either_way: also behind a
    "not", since who avoids gluten may be told that there is no gluten in it."""
    text = normalise(reply)
    hits = [[hit for hit in named(value, aliases, text) if either_way or not denied(hit)]
            for value in values]
    sure = [any(not hedged(hit) for hit in each) for each in hits]
    plain = [any(not doubted(hit) for hit in each) for each in hits]
    # "... and your brother lives in Oslo" is no mistake, if the right one is not told that way too
    users = all(any(not of_others(hit) for hit in each) for each in hits)
    mistaken = any(not denied(hit) and not (users and of_others(hit))
                   for value in wrong for hit in named(value, aliases, text))
    wanted = all if mode == "all" else any
    if wanted(map(bool, hits)):
        return ("abstain:right_and_wrong" if mistaken else "fail:hedged" if not wanted(sure)
                else PASS if wanted(plain) else "abstain:doubted")
    return "fail:wrong_entity" if mistaken else "fail:missing"


def forbid(reply: str, lexicon: Sequence[str], allow: Sequence[str] = (),
           literal: bool = False) -> str:
    """None of the lexicon's terms, but in allowed spans or negated (literal: not even negated)."""
    text = normalise(reply)
    for span in allow:
        text = term_pattern(span).sub(" allowed ", text)
    found = {"plain" if literal else polarity(hit) for term in lexicon for hit in find(term, text)}
    if "plain" in found or not literal and refuses(text) == "all":
        return "fail:forbidden" if "plain" in found else "fail:refused"
    unclear = "unclear" in found or not literal and refuses(text)
    return "abstain:unclear" if unclear else PASS


def current(reply: str, present: Sequence[str], superseded: Sequence[str] = (),
            aliases: dict | None = None) -> str:
    """Every value in force is named; one that was replaced at most as history."""
    verdict = recall(reply, present, aliases=aliases)
    if verdict != PASS:
        return verdict
    text = normalise(reply)
    told = {as_history(hit) for value in superseded for hit in named(value, aliases, text)}
    return "fail:superseded" if "no" in told else "abstain:unclear" if "unclear" in told else PASS


def order(reply: str, values: Sequence[str]) -> str:
    """The values in this order; each counts where it first stands."""
    text = normalise(reply)
    found = [term_pattern(value).search(text) for value in values]
    if None in found:
        return "fail:missing"
    if any(map(hedged, find(values[-1], text))):
        return "fail:hedged"
    places = [match.start() for match in found]
    return PASS if places == sorted(places) else "fail:order"


def number(reply: str, op: str, value: float, unit: Sequence[str] = ()) -> str:
    """Numbers with one of the units ("$" may lead), both ends of "20 to 25 minutes": the one is
    the value ("="; of several it abstains), or all are within ("<=", ">="; if there is none it
    abstains)."""
    digits = r"(\d+(?:\.\d+)?)"
    units = "|".join(term_pattern(u).pattern for u in unit if u != "$")
    behind = rf"\s*-?\s*(?:{units})" if units else ""
    patterns = [rf"(?<![\w.]){digits}(?:\s*(?:-|to|or)\s*\$?{digits})?(?![\d]){behind}"]
    if "$" in unit:
        patterns.append(rf"\${digits}(?:\s*(?:-|to|or)\s*\$?{digits})?")
    found = [float(n) for sentence in SENTENCE_END.split(normalise(reply)) for pattern in patterns
             for m in re.finditer(pattern, sentence)
             if not denied(Hit(sentence[:m.start()], "")) and not re.search(
                 r"\b(?:used to be|(?:up|down) from)\s*$", sentence[:m.start()])
             for n in m.groups() if n]
    if op == "=" and value in found:
        return PASS if set(found) == {value} else "abstain:several"
    if op == "=":
        return "fail:number" if found else "fail:missing"
    within = [n <= value if op == "<=" else n >= value for n in found]
    return "abstain:no_number" if not found else PASS if all(within) else "fail:number"


def anchor(reply: str, terms: Sequence[str]) -> str:
    """A term of the topic; its absence is weak evidence, so it is no failure."""
    text = normalise(reply)
    return PASS if any(find(term, text) for term in terms) else "abstain:no_anchor"


def bare(text: str) -> str:
    """Normalised, single spaces, without what encloses it."""
    return " ".join(normalise(text).split()).strip(" .,!?:;\"'()[]")


def exact(reply: str, value: str) -> str:
    """The whole reply but for case, quotes and end marks: "68." is 68, "68 68" is not."""
    return PASS if bare(reply) == bare(value) else "fail:other"


def yes_no(reply: str, value: str) -> str:
    """Which way a reply decides: by its first word, else by what it says can or cannot be."""
    text = normalise(reply)
    opening = re.sub(r"^\W*(?:(?:well|oh|hm+)\b\W*)?", "", text)
    for_it = bool(re.match(WORDS["agreeing"], opening))
    against = bool(re.search(WORDS["speaks_against"], text))
    if re.match(WORDS["declining"], opening):
        for_it, against = False, True
    elif not for_it:
        for_it = bool(re.search(WORDS["speaks_for"] + "(?! not)", text))
    if for_it == against:       # neither, or "yes, ... avoid"
        return "abstain:undecided"
    return PASS if for_it == (value == "yes") else "fail:other_way"


def words(reply: str, count: int, op: str = "=") -> str:
    """So many words (=, <= or >=), for a user who asked for them."""
    n = len(re.findall(r"\w+(?:['\u2019-]\w+)*", reply))
    return PASS if {"=": n == count, "<=": n <= count, ">=": n >= count}[op] else "fail:count"


def items(reply: str, count: int, style: str = "any") -> str:
    """A list of so many items: numbered 1.., or in any style, with bullets too."""
    numbers = [int(n) for n in re.findall(r"^\s*(\d{1,3})[.)]\s*\S", reply, re.M)]
    bullets = re.findall(r"^\s*[-*\u2022]\s+\S", reply, re.M)
    is_list = numbers == list(range(1, count + 1)) or style == "any" and len(bullets) == count
    return PASS if is_list else "fail:count"


def format(reply: str, json: bool = False, keys: dict | None = None, case: str = "",
           starts: str = "", ends: str = "", regex: str = "") -> str:
    """The shape that was asked for: JSON (with keys and values), case upper or lower, first and
    last words, or a regular expression that some of the text matches."""
    text = reply.strip()
    if json and not right_json(text, keys):
        return "fail:json"
    if case and not (text.isupper() if case == "upper" else text.islower()):
        return "fail:case"
    if starts and not re.match(rf"{re.escape(normalise(starts))}(?!\w)", bare(text)):
        return "fail:start"
    if ends and not re.search(rf"(?<!\w){re.escape(bare(ends))}$", bare(text)):
        return "fail:end"
    return PASS if re.search(regex, text) else "fail:form"


def right_json(text: str, keys: dict | None) -> bool:
    """Whether a text is one JSON object or list, in a fence or not, with these keys and values."""
    fenced = re.fullmatch(r"(?s)```(?:json)?\s*(.*?)\s*```", text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    if keys is None:
        return isinstance(value, dict | list)
    return isinstance(value, dict) and value.keys() == keys.keys() and all(
        wanted is None or bare(str(value[key])) == bare(str(wanted))
        for key, wanted in keys.items())


def nonempty(reply: str) -> str:
    return PASS if re.search(r"\w", reply) else "fail:empty"


def no_repeat(reply: str, earlier: Sequence[str] = ()) -> str:
    """No earlier reply again, and at most half of its four-word runs are repetitions."""
    if any(bare(reply) == bare(other) for other in earlier):
        return "fail:said_before"
    tokens = re.findall(r"\w+", normalise(reply))
    runs = [tuple(tokens[i:i + 4]) for i in range(len(tokens) - 3)]
    return "fail:repeats" if runs and len(set(runs)) < len(runs) / 2 else PASS


def no_clarify(reply: str) -> str:
    """Not a short reply (under 25 words) whose one question asks what is meant, nor one that
    leaves it open ("or something else")."""
    text = normalise(reply)
    asked = [s for s in SENTENCE_END.split(text) if s.rstrip(" \"'").endswith("?")]
    short = len(re.findall(r"\w+", text)) < 25
    asks_back = short and len(asked) == 1 and re.search(WORDS["asks_what"], asked[0])
    vague = re.search(r"\bor (?:some\w+ else|whatever)\b", text)
    return "fail:asks_back" if asks_back else "fail:hedged" if vague else PASS


CHECKS = {f.__name__: f for f in (recall, forbid, current, order, number, anchor, exact, yes_no,
                                  words, items, format, nonempty, no_repeat, no_clarify)}


def validate_check(check: dict) -> None:
    """Raises ValueError or TypeError where a check, as written in a file, cannot be made."""
    if not isinstance(check, dict) or check.get("type") not in CHECKS:
        raise ValueError(f"check {check!r}: expected a type out of {', '.join(CHECKS)}")
    keywords = {key: value for key, value in check.items() if key != "type"}
    inspect.signature(CHECKS[check["type"]]).bind("", **keywords)


def tokens_of(text: str) -> list[str]:
    """A text's words, "I" and "my" as "you" and "your": who answers turns them round."""
    return [TURNED.get(word, word) for word in re.findall(r"\w+", normalise(text))]


def is_parrot(reply: str, said: Sequence[str]) -> bool:
    """Whether a reply holds a whole earlier turn of the user's, of eight words or more."""
    words = lambda text: " ".join(re.findall(r"\w+", normalise(text)))
    return any(turn.count(" ") >= 7 and turn in words(reply) for turn in map(words, said))


def is_copied(reply: str, said: Sequence[str]) -> bool:
    """Whether most of a reply's four-word runs, of eight or more, are the user's."""
    mine, *theirs = [{tuple(words[i:i + 4]) for i in range(len(words) - 3)}
                     for words in map(tokens_of, (reply, *said))]
    return len(mine) >= 8 and len(mine & set().union(*theirs)) > len(mine) / 2


def evasion(checks: Sequence[dict], reply: str, said: Sequence[str]) -> str:
    """Why a reply may be no answer whatever it names, or "": it says that it does not know, names
    more than was asked, or is copied. Who is asked for several things may repeat them."""
    asked = sum(len(check.get("values", check.get("present", ()))) for check in checks)
    text = normalise(reply)
    first, *more = SENTENCE_END.split(text)
    sure = " ".join([first, *(s for s in more if not re.search(WORDS["aside"], s))])
    if checks and re.search(WORDS["not_knowing"], sure):
        return "not_knowing"
    return ("list" if asked and is_list(text, asked)
            else "copied" if checks and asked <= 1 and is_copied(reply, said) else "")


def check_turn(checks: Sequence[dict], reply: str, earlier_replies: Sequence[str] = (),
               said: Sequence[str] = ()) -> Verdict:
    """One reply's verdict: fail if any check fails, pass if all pass, else abstain.

    said    the user's earlier turns: who copies one whole has not answered
    """
    if checks and is_parrot(reply, said):
        return Verdict("fail", "parrot")
    unclear = evasion(checks, reply, said)
    for check in checks:
        keywords = {"earlier": earlier_replies} if check["type"] == "no_repeat" else {}
        keywords |= check
        kind = keywords.pop("type")
        verdict, _, why = CHECKS[kind](reply, **keywords).partition(":")
        if verdict == "fail":
            return Verdict("fail", f"{kind}:{why}")
        if verdict == "abstain":
            unclear = unclear or f"{kind}:{why}"
    return Verdict("abstain" if unclear else "pass", unclear)
