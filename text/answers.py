"""From what a model wrote to the answer it gave: one default, and the prior methods by name.

A grader is part of every accuracy. The prior work's took the first "A" of "a cat" for option A, the
number behind an "=" that stood lines below the answer, and could never match a gold of "1,080"; a
completion without an answer counted as a wrong one and was not told apart. Its four methods are
here exactly as they were, so that old numbers can be compared. Ours is the default:

    anchored       only the first line behind the answer's header counts, and of it the first
                   sentence. Numbers are compared as numbers: 1,080 = 1080.0, and 2.5 is not 2.
                   Letters are capitals that stand alone. Two answers are no answer.
    simple         number: behind the last "=" of the whole text, the first integer
    anchor         number: behind "answer is", else behind an "=", else the first integer
    legacy         letter: the first of A to E in the upper-cased text ("The answer is D" -> E)
    word_boundary  letter: the first isolated one of the upper-cased text ("a cat" -> A)

(Completions end at a line break here, so of the prior protocols only the reading is theirs.)
`extract` returns None where there is no answer: wrong, and counted apart as invalid. It reads what
stands behind an answer's header; `final_answer` finds the header in a whole solution first.
"""
import re
from fractions import Fraction

NUMBER_METHODS = ("anchored", "simple", "anchor")
LETTER_METHODS = ("anchored", "legacy", "word_boundary")

# a word that is a number: sign, currency, digits plain or in groups of three, decimals, exponent,
# fraction, then a unit
NUMBER = re.compile(r"([-+]?)[$€£]?([-+]?)"
                    r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})?(\.[0-9]{1,40})?"
                    r"(?:[eE]([-+]?[0-9]{1,2}))?(?:/([0-9]{1,9}))?(?:%|[A-Za-z°]*)")
FRACTION = re.compile(r"\\d?frac\{([0-9]+)\}\{([0-9]+)\}")
# in front of an answer, as data sets and chat models write it; "A:" only where it opens a line
HEADER = re.compile(r"^[ \t*]*A:|####|\\boxed(?=\{)|(?i:\bthe (?:\w+ )?answer is\b|\banswer\**:)",
                    re.MULTILINE)
BOX = re.compile(r"\{((?:[^{}]|\{[^{}]*\})*)\}")
# between digits a star is a product and an underscore no decoration either
DECORATION = re.compile(r"\\(?:boxed|text|mathrm)|[\\`{}\[\]~]|(?<!\w)[*_]+|[*_]+(?!\w)")


def first_sentence(text: str) -> str:
    """The first line with text in it, up to the first full stop that a space follows."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.split(r"(?<=[.!?;])(?<!e\.g\.)(?<!i\.e\.)\s", line, maxsplit=1)[0]


def parse_number(text: str) -> Fraction | None:
    """The one number of a text, or None where there is none, a second one, or a word half digits.

    example  "1,080" -> 1080;  "-$2.50" -> -5/2;  "3/4" -> 3/4;  "18 dollars" -> 18;
             "12-5", "18 or 19", "x2", "3:30", "" -> None
    """
    values = set()
    for word in re.sub(r"^\s*-\s+", "-", text).split():
        word = word.strip("\"'()<>#:;!?,$~").rstrip(".")
        if re.search("[0-9]", word):
            match = NUMBER.fullmatch(word)
            if not match or not (match[3] or match[4]) or match[6] and not int(match[6]):
                return None
            sign, minus, whole, part, exponent, below = match.groups()
            value = Fraction(f"{(whole or '0').replace(',', '')}{part or ''}e{exponent or 0}")
            values.add(value / int(below or 1) * (-1 if "-" in (sign, minus) else 1))
    return values.pop() if len(values) == 1 else None


def anchored_number(text: str, finished: bool) -> Fraction | None:
    """The one number of the first sentence; behind its last "=" where it holds an equation.

    None where there are two numbers, or where the text was cut while the number could still grow.
    """
    plain = FRACTION.sub(r" \1/\2", text.replace("\N{MINUS SIGN}", "-"))
    sentence = DECORATION.sub("", first_sentence(plain))
    if not finished and re.search(r"[0-9][0-9,./]*$", text) and len(text.splitlines()) == 1:
        return None
    return parse_number(sentence.rpartition("=")[2])


def anchored_letter(text: str, letters: str) -> str | None:
    """The one capital of the first sentence that stands alone and is one of the item's letters.

    "A cat": an A that a lower-case word follows is an article. "I'd", "A's": no letter that has an
    apostrophe. "B) 12", "B because ...", "the answer is B": what leads, counts.
    """
    straight = first_sentence(text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    sentence = DECORATION.sub("", straight)
    head = re.match(rf"\(?([{letters}])(?:[).:](?!\w)|\s+(?:because|since|as)\b)", sentence)
    led = re.search(rf"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*)\(?([{letters}])\)?"
                    rf"(?=\W*$|\s+(?:because|since|as)\b|[.:])", sentence)
    if head or led:
        return (head or led)[1]
    alone = re.finditer(rf"(?<![\w'&-])([{letters}])(?![\w'&-])(\s+(?!(?:or|and)\b)[a-z])?",
                        sentence)
    found = {m[1] for m in alone if not (m[1] == "A" and m[2])}
    return found.pop() if len(found) == 1 else None


# --------------------------------------------------------------------------------------------------
# the prior methods


def simple_number(text: str) -> str | None:
    """Behind the last "=" if there is one; commas dropped; the first integer."""
    match = re.search(r"-?[0-9]+", text.rpartition("=")[2].replace(",", ""))
    return str(int(match[0])) if match else None


def anchor_number(text: str) -> str | None:
    """The first "answer is 18"; else of the pieces behind each "=" the last with an integer."""
    text = text.replace(",", "")
    led = re.search(r"(?:(?:final|correct)\s+)?answer\s*(?:is|=|:)?\s*(-?[0-9]+)", text, re.I)
    if led:
        return str(int(led[1]))
    for piece in reversed(text.split("=")[1:]):
        if match := re.search(r"-?[0-9]+", piece):
            return str(int(match[0]))
    match = re.search(r"-?[0-9]+", text)
    return str(int(match[0])) if match else None


def legacy_letter(text: str, letters: str) -> str | None:
    match = re.search(f"[{letters}]", text.upper())
    return match[0] if match else None


def word_letter(text: str, letters: str) -> str | None:
    match = re.search(rf"\b([{letters}])\b", text.upper())
    return match[1] if match else None


def prior_form(text: str) -> str:
    """The prior comparison: equal strings but for boxes, $, backslashes and spaces. Commas stay."""
    return re.sub(r"[$\\\s]", "", re.sub(r"\\boxed\{([^{}]*)\}", r"\1", text))


# --------------------------------------------------------------------------------------------------


def extract(text: str, letters: str = "", method: str = "anchored",
            finished: bool = True) -> str | Fraction | None:
    """The answer in a completion, or None.

    letters  the item's option letters, such as "ABCD"; empty: the answer is a number
    method   anchored, or one of the prior ones
    """
    if letters:
        return {"anchored": anchored_letter, "legacy": legacy_letter,
                "word_boundary": word_letter}[method](text, letters)
    if method == "anchored":
        return anchored_number(text, finished)
    return {"simple": simple_number, "anchor": anchor_number}[method](text)


def final_answer(text: str, letters: str = "", finished: bool = True) -> str | Fraction | None:
    """The answer of a whole solution: what `anchored` reads behind its last HEADER; None without.

    example  "9 * 2 = 18\\nA: 18" -> 18;  "so \\\\boxed{18} eggs in 2 days" -> 18;  "18" -> None
    """
    headers = list(HEADER.finditer(text))
    if not headers:
        return None
    behind = text[headers[-1].end():].lstrip()
    box = BOX.match(behind)     # closed: not even an unfinished text goes on in it
    return extract(box[1] if box else behind, letters, finished=finished or box is not None)


def is_right(answer: str | Fraction | None, gold: str) -> bool:
    """Whether an extracted answer is the gold one: as numbers, as letters, or as prior strings."""
    if isinstance(answer, Fraction):
        return answer == parse_number(gold)
    return answer is not None and prior_form(answer) == prior_form(gold)
