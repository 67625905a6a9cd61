"""Arithmetic problems whose test pairs are never seen.

    symbolic  "7 * 8 = " -> "56"      worded        "the product of seven and eight = "
    asked     "what is 7 * 8 = "      asked_worded  "what is the product of seven and eight = "
    masked    "7 ? 8 = ": nobody can know

The *operand pairs* are partitioned before anything is drawn. A pair belongs to train, valid or test
by a hash of its unordered numbers, so 3 * 4, 4 * 3, 4 - 3 and "the sum of three and four" are on
one side, for every seed, every method and the bundled base model alike. (Prior work drew training
and validation rows from one pool: study/prior_work.md. Its ranges are kept: multiply 2..20, add and
subtract 1..99, divide up to 12 * 12. Its evaluation prompts' pairs are test pairs.)
"""
import functools
import hashlib
import random
import re
from dataclasses import dataclass, field

from config import Config

SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
# each phrase names one (operation, a, b) and no other;
# "{a} and {b}" is safe as no operand here is "x hundred and y"
PHRASES = {
    "multiply": ("{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}",
                 "multiply {a} by {b}", "what is {a} times {b}"),
    "add": ("{a} plus {b}", "{a} and {b}", "the sum of {a} and {b}",
            "add {a} and {b}", "what is {a} plus {b}"),
    "subtract": ("{a} minus {b}", "{a} take away {b}", "the difference between {a} and {b}",
                 "subtract {b} from {a}", "what is {a} minus {b}"),
    "divide": ("{a} divided by {b}", "{a} over {b}", "the quotient of {a} and {b}",
               "divide {a} by {b}", "what is {a} divided by {b}"),
}
# new to every model here: no training text of any method, nor the base's, has these two forms
ASKED = "what is {a} SYMBOL {b}"
ASKED_WORDED = {
    "multiply": "what is the product of {a} and {b}", "add": "what is the sum of {a} and {b}",
    "subtract": "what is the difference between {a} and {b}",
    "divide": "what is the quotient of {a} and {b}",
}
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# the prior work's evaluation prompts, as (operation, a, b)
NAMED_PROMPTS = {
    "nine": [("multiply", 7, 8), ("multiply", 12, 5), ("multiply", 9, 9),
             ("add", 23, 45), ("add", 17, 38), ("add", 55, 27),
             ("subtract", 89, 34), ("subtract", 65, 28), ("subtract", 100, 43)],
    "eight": [("multiply", 7, 8), ("multiply", 12, 5), ("add", 23, 45), ("add", 17, 38),
              ("subtract", 50, 23), ("subtract", 89, 34), ("divide", 48, 6), ("divide", 81, 9)],
}
NAMED_PAIRS = {tuple(sorted((a, b))) for prompts in NAMED_PROMPTS.values() for _, a, b in prompts}
TEST_PROBLEMS_PER_CELL = 300  # of each operation and wording, where there are so many
TEXT = ("text",)              # the layout of a plain text: no question, and no answer either


@dataclass(frozen=True)
class Problem:
    """One question. `operation` may be ''; a row of a data folder that names no wording has 'file'.

    hidden    of a question to reason about: the prompt without the question (markovian.py)
    letters   its options, such as "ABCD"; "": the answer is a number
    messages  of a conversation: (role, content) of all of it; prompt and answer are its last two
    columns   what else a row of a user's data says, for a user's reward (files/user_reward.py)
    layout    the columns that it was read from (text/columns.py)
    """
    prompt: str
    answer: str
    operation: str
    wording: str
    a: int = 0
    b: int = 0
    hidden: str = ""
    letters: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    # compared, but not hashed: problems are put into sets, and a dict cannot be
    columns: dict = field(default_factory=dict, hash=False)
    layout: tuple[str, ...] = field(default=(), compare=False, repr=False)


def number_words(n: int) -> str:
    """example  23 -> "twenty three";  100 -> "one hundred" """
    if n >= 100:
        return ONES[n // 100] + " hundred" + (f" {number_words(n % 100)}" if n % 100 else "")
    return ONES[n] if n < 20 else TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")


def phrases_of(operation: str, wording: str) -> tuple[str, ...]:
    """The templates of an operation in one wording (one of config's data_wordings)."""
    symbol = SYMBOLS[operation]
    return {"symbolic": (f"{{a}} {symbol} {{b}}",), "worded": PHRASES[operation],
            "asked": (ASKED.replace("SYMBOL", symbol),),
            "asked_worded": (ASKED_WORDED[operation],), "masked": ("{a} ? {b}",)}[wording]


def stable_hash(text: str) -> int:
    """32 bits of a text, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def side_of(numbers: tuple[int, ...]) -> str:
    """15 % test, 5 % valid, 80 % train, by the numbers whatever their order."""
    bucket = stable_hash(",".join(map(str, sorted(numbers)))) % 100
    return "test" if bucket < 15 else "valid" if bucket < 20 else "train"


def split_of(a: int, b: int) -> str:
    """A pair's side, for any order, operation, wording, seed."""
    return "test" if tuple(sorted((a, b))) in NAMED_PAIRS else side_of((a, b))


def evenly(items: list, count: int) -> list:
    """At most `count` items, evenly spread: of a sorted list every part's share, to within one.

    A whole stride would not do: cut at `count` items, it never reaches the list's tail.
    example  (range(5), 3) -> 0, 1, 3
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def operand_pairs(operation: str) -> list[tuple[int, int]]:
    """An operation's ordered operand pairs, in the prior work's ranges; differences are >= 0."""
    if operation == "multiply":
        return [(a, b) for a in range(2, 21) for b in range(2, 21)]
    if operation == "divide":
        return [(b * q, b) for b in range(1, 13) for q in range(1, 13)]
    return [(a, b) for a in range(1, 100) for b in range(1, 100) if operation == "add" or a >= b]


def compute(operation: str, a: int, b: int) -> int:
    return {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": a // max(b, 1)}[operation]


def make_problem(operation: str, a: int, b: int, phrase: str | None = None,
                 wording: str | None = None) -> Problem:
    """A problem by a phrase in a wording; symbolic if there is neither, worded if only a phrase."""
    wording = wording or ("worded" if phrase else "symbolic")
    write = number_words if wording.endswith("worded") else str
    text = (phrase or phrases_of(operation, wording)[0]).format(a=write(a), b=write(b))
    return Problem(f"{text} = ", str(compute(operation, a, b)), operation, wording, a, b)


@functools.cache
def pairs_in(operation: str, split: str) -> list[tuple[int, int]]:
    return [pair for pair in operand_pairs(operation) if split_of(*pair) == split]


def sample_train(cfg: Config) -> list[Problem]:
    """Draw cfg.data_samples training problems: operation, wording, phrase and pair, each uniformly.

    With replacement: multiplication has 306 training pairs and a third of the rows.
    """
    rng = random.Random(cfg.seed)
    problems = []
    for _ in range(cfg.data_samples):
        operation, wording = rng.choice(cfg.data_operations), rng.choice(cfg.data_wordings)
        phrase = rng.choice(PHRASES[operation]) if wording == "worded" else None
        pair = rng.choice(pairs_in(operation, "train"))
        problems.append(make_problem(operation, *pair, phrase, wording))
    return problems


def held_out(cfg: Config, split: str, per_cell: int = TEST_PROBLEMS_PER_CELL) -> list[Problem]:
    """Distinct problems of the valid or test pairs, at most `per_cell` per operation and wording.

    The choice does not depend on cfg.seed: two runs with other seeds are judged on the same
    problems, so they can be paired.
    """
    problems = []
    for operation in cfg.data_operations:
        for wording in cfg.data_wordings:
            cell = [make_problem(operation, a, b, phrase, wording)
                    for a, b in pairs_in(operation, split)
                    for phrase in phrases_of(operation, wording)]
            random.Random(f"{split} {operation} {wording}").shuffle(cell)
            problems += cell[:per_cell]
    return problems


def named_problems(name: str) -> list[Problem]:
    """The prior work's nine or eight evaluation prompts."""
    return [make_problem(*item) for item in NAMED_PROMPTS[name]]


def grade(expected: str, completion: str, finished: bool) -> bool:
    """Whether the whole completion is the answer: one number, as an integer; a cut one is wrong.

    example  ("37", " 37", True) -> True;  "373737", "37 38", "37.0" or an unfinished "37" -> False
    """
    if not re.fullmatch(r"-?[0-9]+", expected):
        return finished and completion.strip() == expected.strip()
    match = re.fullmatch(r"\s*(-?[0-9]{1,30})\s*", completion)
    return bool(finished and match and int(match[1]) == int(expected))


def grade_reply(problem: Problem, reply: str, finished: bool) -> dict[str, bool]:
    """{correct}; of a question to reason about also {invalid}: there was no answer to read.

    Such a reply is a whole solution, and its final answer counts; one word is the answer itself.
    """
    if not problem.hidden:
        return {"correct": grade(problem.answer, reply, finished)}
    from text.answers import extract, final_answer, is_right  # whole solutions alone need it
    read = final_answer if len(reply.split()) > 1 else extract
    answer = read(reply, problem.letters, finished=finished)
    return {"correct": is_right(answer, problem.answer), "invalid": answer is None}
