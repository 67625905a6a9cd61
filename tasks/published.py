"""Questions to reason about, out of seven published data sets: prompts, checks, splits.

A *question problem* has a prompt that ends where the reasoning begins, the same prompt with the
question hidden, and a gold answer:

    prompt    Solve ... Question: Natalia sold clips to 48 of her friends ... Reasoning:
    hidden    Solve ... Question: <redacted> Reasoning:
    answer    72      (scored as " 72" behind the header "\\nAnswer:")

There is one builder, `chain_prompt`, for training, validation and test: nothing is ever cut to a
length, a prompt that does not fit is an error. The prior work's evaluator cut prompts to 50 tokens,
asked SVAMP without its question, split MathQA's options at the commas inside numbers, dropped ARC's
numbered options, and trained and evaluated MMLU on one split. Here a row is checked when it is
read, and a question that stands in two splits is kept in the one that is judged.

Files: parquet, JSON lines or JSON, from the Hub by name, or out of a folder, which may also be a
data set's own repository; a split that has no file there is carved out of another.
"""
import ast
import csv
import fnmatch
import functools
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pyarrow
from pyarrow import parquet

from config import BadInput
from files.disk import LARGEST_ROWS, one_line, parse_json, read_text
from text.answers import parse_number
from text.arithmetic import Problem, stable_hash
from text.tokenizer import Tokenizer

HIDDEN = "<redacted>"
LETTERS = "ABCDE"
SPLITS = ("train", "valid", "test")


def chain_prompt(instruction: str, question: str) -> str:
    """What the model reads before it reasons; `question` is HIDDEN for the scorer."""
    return f"{instruction}\nQuestion: {question}\nReasoning:"


def make_question(instruction: str, question: str, answer: str, letters: str = "",
                  wording: str = "question") -> Problem:
    """A question problem; wording "continuation" is one whose answer is text, not to be graded."""
    return Problem(chain_prompt(instruction, question), answer, "", wording,
                   hidden=chain_prompt(instruction, HIDDEN), letters=letters)


def question_of(prompt: str) -> str:
    """The question in a chain_prompt."""
    return prompt.partition("\nQuestion: ")[2].removesuffix("\nReasoning:")


# --------------------------------------------------------------------------------------------------
# rows of the published data sets: (question, answer, options); ValueError says what is wrong


def read_gsm8k(row: dict) -> tuple[str, str, list[str]]:
    """{"question", "answer": "... working ... #### 1,080"}; integers, some with commas."""
    working, marker, gold = row["answer"].rpartition("####")
    if not marker:
        raise ValueError("no #### before the gold")
    return row["question"], gold.strip(), []


def read_mmlu(row: dict) -> tuple[str, str, list[str]]:
    """{"question", "subject", "choices": [4 texts], "answer": 0..3, in its repository a letter}"""
    return row["question"], letter(row["answer"], row["choices"], (4,)), row["choices"]


def read_arc(row: dict) -> tuple[str, str, list[str]]:
    """{"question", "choices": {"text", "label"}, "answerKey"}; 3 to 5, labelled A.. or 1.."""
    texts, labels = list(row["choices"]["text"]), list(row["choices"]["label"])
    if len(labels) != len(texts) or row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is not among the labels {labels}")
    return row["question"], letter(labels.index(row["answerKey"]), texts, (3, 4, 5)), texts


def read_aqua(row: dict) -> tuple[str, str, list[str]]:
    """{"question", "options": ["A)21", ...], "correct": "B"}; the options' labels go."""
    if not isinstance(row["options"], list):
        raise ValueError("options is no list")
    texts = [re.sub(r"^\s*[A-Ea-e]\s*\)\s*", "", text) for text in row["options"]]
    return row["question"], letter(row["correct"], texts, (5,)), texts


def read_mathqa(row: dict) -> tuple[str, str, list[str]]:
    """{"Problem", "options": "a ) 38 , b ) 1,000 , c ) ...", "correct": "a"}

    Split at the labels, never at commas: "1,000" is one option. Some rows hold the printed form of
    a list instead, "['a ) 38', 'b ) 1,000', ...]".
    """
    text = row["options"].strip()
    if text.startswith("["):
        text = " , ".join(map(str, ast.literal_eval(text)))
    match = re.fullmatch(r"(?s)\s*a\s*\)" + "".join(
        rf"(.*?)[\s,]{label}\s*\)" for label in "bcde") + "(.*)", text)
    if not match:
        raise ValueError(f"options {text[:60]!r}: expected the labels a ) to e )")
    texts = [piece.strip().rstrip(",").strip() for piece in match.groups()]
    return row["Problem"], letter(row["correct"], texts, (5,)), texts


def read_svamp(row: dict) -> tuple[str, str, list[str]]:
    """{"Body", "Question", "Answer": 145.0}: the body tells, the question asks; both are needed."""
    body, question = row["Body"].strip(), row["Question"].strip()
    if not body or not question:
        raise ValueError("Body or Question is empty")
    gold = parse_number(str(row["Answer"]))
    if gold is None:
        raise ValueError(f"Answer {row['Answer']!r} is no number")
    body += "" if body[-1] in ".?!," else "."
    return f"{body} {question}", str(gold if gold.denominator == 1 else float(gold)), []


def read_wiki(row: dict) -> tuple[str, str, list[str]]:
    """{"id", "title", "text"}: the article; cut_articles makes context and target of it."""
    return row["text"].strip(), "", []


def letter(gold: str | int, options: list[str], counts: tuple[int, ...]) -> str:
    """The gold option's letter, from a letter or a 0-based index; ValueError where out of range."""
    if not isinstance(options, list) or len(options) not in counts:
        count = len(options) if isinstance(options, list) else "no list of"
        raise ValueError(f"{count} options, expected {' or '.join(map(str, counts))}")
    if any(not isinstance(text, str) or not text.strip() for text in options):
        raise ValueError("an option is empty")
    text = str(gold).strip().upper()
    index = gold if isinstance(gold, int) else LETTERS.find(text) if len(text) == 1 else -1
    if isinstance(gold, bool) or not 0 <= index < len(options):
        raise ValueError(f"gold {gold!r} is out of range for {len(options)} options")
    return LETTERS[index]


# --------------------------------------------------------------------------------------------------
# the data sets


@dataclass(frozen=True)
class Source:
    """Where a data set is, and how to ask its questions."""
    repo: str                       # on the Hub, a data set
    files: str                      # which of its files, a pattern
    names: tuple[str, str, str]     # its own names of train, valid, test; "": carved out of train
    sizes: tuple[int, int, int]     # rows of those; 0: not known beforehand, or carved
    instruction: str
    read: Callable[[dict], tuple[str, str, list[str]]]
    revision: str = "main"


SOURCES = {
    "gsm8k": Source(
        "openai/gsm8k", "main/*", ("train", "", "test"), (7473, 0, 1319),
        "Solve the problem. Reason step by step, then give the answer as a number.", read_gsm8k),
    "mmlu": Source(
        "cais/mmlu", "all/*", ("auxiliary_train", "validation", "test"), (99842, 1531, 14042),
        "Answer the multiple-choice question. Reason first, then give the letter of the right "
        "choice.", read_mmlu),
    "arc": Source(
        "allenai/ai2_arc", "ARC-Challenge/*", ("train", "validation", "test"), (1119, 299, 1172),
        "Answer the multiple-choice science question. Reason first, then give the letter of the "
        "right choice.", read_arc),
    "aqua": Source(
        "deepmind/aqua_rat", "raw/*", ("train", "validation", "test"), (97467, 254, 254),
        "Solve the algebra problem. Reason step by step, then give the letter of the right choice.",
        read_aqua),
    "mathqa": Source(
        "allenai/math_qa", "default/*", ("train", "validation", "test"), (29837, 4475, 2985),
        "Solve the word problem. Reason step by step, then give the letter of the right choice.",
        read_mathqa, "refs/convert/parquet"),
    "svamp": Source(
        "ChilleD/SVAMP", "*", ("train", "", "test"), (700, 0, 300),
        "Solve the problem. Reason step by step, then give the answer as a number.", read_svamp),
    "wiki": Source(
        "wikimedia/wikipedia", "20231101.en/train-00000-*", ("train", "", ""), (0, 0, 0),
        "Compress what matters in the text into a few words, from which its continuation can be "
        "told.", read_wiki),
}
NAMES = {   # of a split's files in people's folders and the data sets' own repositories, best first
    "train": ("train", "SVAMP"),                        # SVAMP.json is the whole of it
    "valid": ("validation", "valid", "dev", "*_val"),   # MMLU's *_dev.csv: few-shot examples
    "test": ("test", "*_test"),
}


@functools.cache
def find_files(data: str, own: str) -> dict[str, list[Path]]:
    """The files of each split, perhaps none, out of the folder `own`; where that is "", the Hub's.

    raises   BadInput, which says what to download
    """
    source = SOURCES[data]
    fetch = (f"where there is a network run `.venv/bin/hf download {source.repo} --repo-type "
             f"dataset --revision {source.revision} --include '{source.files}' --local-dir "
             f"data/{data}_files`, then give --from data/{data}_files")
    if own:
        folder = Path(own).expanduser()
        if not folder.is_dir():
            raise BadInput(f"--from {own!r} is no folder; {fetch}")
    else:
        try:
            folder = Path(huggingface_hub.snapshot_download(source.repo, repo_type="dataset",
                                            revision=source.revision, allow_patterns=source.files))
        except Exception as error:  # the Hub's, the HTTP library's, the disk's: all mean the same
            raise BadInput(f"{data}: the Hub did not deliver {source.repo} "
                           f"({one_line(error)[:120]}); {fetch}") from None
    subset = folder / source.files.split("/")[0]
    folder = subset if subset.is_dir() else folder
    # "train-00000-of-00001.parquet", "train/0000.parquet", "train.jsonl"
    names_of = lambda path: {re.split(r"[-.]", part)[0] for part in path.relative_to(folder).parts}
    found = [path for path in sorted(folder.rglob("*"))
             if path.suffix in (".parquet", ".jsonl", ".json", ".csv")]
    files = {split: [] for split in SPLITS}
    for split, name in zip(SPLITS, source.names):
        for wanted in (name, *NAMES[split]) if name or own else ():
            files[split] = files[split] or [
                path for path in found if fnmatch.filter(names_of(path), wanted or split)]
    lacking = [name for split, name in zip(SPLITS, source.names) if name and not files[split]]
    if lacking and not (own and (files["train"] or files["valid"])):    # never carved out of test
        raise BadInput(f"{data}: no {lacking[0]}*.parquet, .jsonl, .json or .csv in {folder}; "
                       f"{fetch}")
    return files


@functools.cache    # says it once
def carve(data: str, own: str) -> tuple[str, dict[str, range], str]:
    """Which split's files serve those without, their buckets of its 100, and this as a sentence."""
    files, sizes = find_files(data, own), SOURCES[data].sizes
    whole = "train" if files["train"] else "valid"
    end = 5 + max(15, 100 * sizes[2] // (sum(sizes) or 1))  # test: 15 %, or as published
    shares = {"valid": range(5), "test": range(5, end), "train": range(end, 100)}
    shares = {split: share for split, share in shares.items() if not files[split]}
    if not shares:
        return whole, shares, ""
    told = "".join(f"{len(share)} % are {split}, " for split, share in shares.items())
    told = (f"of the questions of {', '.join(path.name for path in files[whole])} {told}the rest "
            f"{whole}, by a hash of the question")
    print(f"note: {data}: {told}", file=sys.stderr)
    return whole, shares, told


def read_rows(path: Path) -> list[dict]:
    """All rows of a parquet, JSON-lines, JSON or MMLU's CSV file; BadInput where it is damaged."""
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        text = read_text(path, "data as published", LARGEST_ROWS)
        if path.suffix == ".csv":   # question, choices, letter; no header
            return [{"question": row[0], "choices": row[1:-1], "answer": row[-1]}
                    for row in csv.reader(io.StringIO(text), strict=True) if row]
        if text.lstrip().startswith("["):
            return parse_json(text)
        return [parse_json(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise BadInput(f"could not read {path} ({one_line(error)[:120]}); "
                       "fetch it again") from None


@functools.cache    # of each split its own rows, and those of the splits judged later
def read_questions(data: str, own: str, skip_bad: bool, split: str) -> list[Problem]:
    """Every row of one split's files, checked; BadInput with the first five bad rows."""
    source, problems, bad, total = SOURCES[data], [], [], 0
    for path in find_files(data, own)[split]:
        for number, row in enumerate(read_rows(path), 1):
            total += 1
            try:
                question, answer, options = source.read(row)
                if not isinstance(question, str) or not question.strip():
                    raise ValueError("the question is empty")
                if not options and source.read is not read_wiki and parse_number(answer) is None:
                    raise ValueError(f"the gold {answer!r} is no number")
            except KeyError as error:
                bad.append(f"{path.name} row {number}: no field {error}")
            except (ValueError, TypeError, AttributeError, SyntaxError) as error:
                bad.append(f"{path.name} row {number}: {error}")
            else:
                letters = LETTERS[:len(options)]
                lines = [f"{a}. {text.strip()}" for a, text in zip(letters, options)]
                problems.append(make_question(
                    source.instruction, "\n".join([question.strip(), *lines]), answer, letters))
    if bad and not skip_bad:
        raise BadInput(f"{data}: {len(bad)} bad rows of {total}: {'; '.join(bad[:5])}; "
                       "mend the file, or give --skip-bad to leave them out")
    if bad:
        print(f"note: {data} {split}: {len(bad)} bad rows left out", file=sys.stderr)
    expected = source.sizes[SPLITS.index(split)]
    if expected and total not in (expected, sum(source.sizes)):     # SVAMP.json: its sum
        text = f"{data} {split} has {total} rows, the published one {expected}"
        if not own:
            raise BadInput(f"{text}; the download is incomplete or the data set has changed: fetch "
                           "it again, or give your copy as --from FOLDER")
        print(f"note: {text}", file=sys.stderr)
    return problems


def load_questions(data: str, split: str, own: str = "", skip_bad: bool = False) -> list[Problem]:
    """One split of a published data set, no question of which stands in a split judged later.

    A split without files is carved out of another's by a hash of the question, so that it is the
    same for every seed.
    """
    files, (whole, shares, _) = find_files(data, own), carve(data, own)
    side = lambda same: next((name for name, share in shares.items()
                              if stable_hash(same) % 100 in share), whole)
    file = split if files[split] else whole
    problems = [(identity(p), p) for p in read_questions(data, own, skip_bad, file)]
    if file == whole:
        problems = [(same, p) for same, p in problems if side(same) == split]
    judged = {identity(p) for name in SPLITS[SPLITS.index(split) + 1:] if files[name] and
              name != file for p in read_questions(data, own, skip_bad, name)}
    kept = [p for same, p in problems if same not in judged]
    if len(kept) < len(problems):
        print(f"note: {data} {split}: {len(problems) - len(kept)} questions that also stand in "
              "a split judged later are left out", file=sys.stderr)
    return kept


def identity(problem: Problem) -> str:
    """What two printings of one question share: its words, numbers and signs of arithmetic.

    Options do not count, since other distractors make no other question, unless the question says
    nothing without them ("Which of the following is true?"): then they count in any order.
    """
    question, *options = question_of(problem.prompt).split("\nA. ", 1)
    plain = lambda text: " ".join(re.findall(r"[a-z0-9]+|[-+*/^=<>]", text.casefold()))
    bare = plain(question)
    if options and (re.search(r"\b(following|these)\b", bare) or len(bare.split()) < 6):
        texts = re.split(r"\n[B-E]\. ", options[0])
        bare += " | " + " | ".join(sorted(map(plain, texts)))
    return bare


def cut_article(text: str, tokenizer: Tokenizer, context: int, target: int) -> tuple[str, str]:
    """The first `context` tokens of an article and the next `target`, both ending with a word.

    The prior work cut by characters, in the middle of words. raises  ValueError if it is too short
    """
    ids = tokenizer.encode(text[:12 * (context + target)])     # no word list has longer tokens
    if len(ids) <= context + target:
        raise ValueError("too short")
    begins_word = lambda n: tokenizer.piece(ids[n])[0] in "·⏎"
    split = next(n for n in range(context, 0, -1) if begins_word(n) or n == 1)
    end = next(n for n in range(context + target, 0, -1) if begins_word(n) or n == split + 1)
    head = tokenizer.decode(ids[:split])
    return head, tokenizer.decode(ids[:end])[len(head):]


def cut_articles(articles: list[Problem], tokenizer: Tokenizer, context: int, target: int,
                 count: int) -> list[Problem]:
    """The first `count` long enough, as (context, continuation) problems, scored by log p alone."""
    problems = []
    for article in articles:
        try:
            head, tail = cut_article(question_of(article.prompt), tokenizer, context, target)
        except ValueError:
            continue
        problems.append(make_question(SOURCES["wiki"].instruction, head, tail.strip(),
                                      wording="continuation"))
        if len(problems) == count:
            break
    return problems
