"""Questions to reason about: seven published data sets and sums, each with its prompt and checks.

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

    python tasks.py                                   # the list
    python tasks.py show data=gsm8k data_folder=...   # sizes, and a few problems of each split

Files: parquet, JSON lines or JSON, from the Hub by name, or from data_folder=FOLDER.
"""
import ast
import functools
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pyarrow
from pyarrow import parquet

from answers import parse_number
from config import BadInput, Config, load_overrides, run_main
from data import (
    Problem,
    held_out,
    read_jsonl,
    sample_tiny_corpus,
    sample_train,
    side_of,
    stable_hash,
)
from hub import one_line
from tokenizer import Tokenizer, load_tokenizer

HIDDEN = "<redacted>"
HEADER = "\nAnswer:"        # ends at the colon, and answers start with their space
LETTERS = "ABCDE"
SPLITS = ("train", "valid", "test")
TEST_SUMS = 600             # problems of the valid and test splits of sums
TEST_WIKI = 1024            # articles of those of wiki


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
    """{"question", "subject", "choices": [4 texts], "answer": 0..3}"""
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
    """{"id", "title", "text"}: the article; load_wiki cuts it into context and target."""
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
SUMS = "Add the numbers."
NAMES = ("arithmetic", "tiny_corpus", "sums", "sums_corpus", *SOURCES)
OTHER_NAMES = {"valid": ("validation", "valid", "dev")}     # of a split, in people's own folders
SHARES = {"valid": range(5), "test": range(5, 20)}          # buckets of what is carved from train


def find_files(data: str, data_folder: str, split: str) -> list[Path]:
    """The data files of one split, from data_folder or the Hub; BadInput says what to download."""
    source = SOURCES[data]
    name = source.names[SPLITS.index(split)]
    fetch = (f"where there is a network run `.venv/bin/hf download {source.repo} --repo-type "
             f"dataset --revision {source.revision} --include '{source.files}' --local-dir "
             f"data/{data}`, then give data_folder=data/{data}")
    if data_folder:
        folder = Path(data_folder).expanduser()
        if not folder.is_dir():
            raise BadInput(f"data_folder = {data_folder!r} is no folder; {fetch}")
    else:
        try:
            folder = Path(huggingface_hub.snapshot_download(source.repo, repo_type="dataset",
                                            revision=source.revision, allow_patterns=source.files))
        except Exception as error:  # the Hub's, the HTTP library's, the disk's: all mean the same
            raise BadInput(f"data = {data}: the Hub did not deliver {source.repo} "
                           f"({one_line(error)[:120]}); {fetch}") from None
    subset = folder / source.files.split("/")[0]
    folder = subset if subset.is_dir() else folder
    # "train-00000-of-00001.parquet", "train/0000.parquet", "train.jsonl"
    names_of = lambda path: {re.split(r"[-.]", part)[0] for part in path.relative_to(folder).parts}
    found = [path for path in sorted(folder.rglob("*"))
             if path.suffix in (".parquet", ".jsonl", ".json")]
    for wanted in (name, *OTHER_NAMES.get(split, (split,))):    # MMLU has both validation and dev
        if files := [path for path in found if wanted in names_of(path)]:
            break
    if not files:
        raise BadInput(f"data = {data}: no {name or split}*.parquet, .jsonl or .json in {folder}; "
                       f"{fetch}")
    return files


def read_rows(path: Path) -> list[dict]:
    """All rows of a parquet, JSON-lines or JSON file; raises BadInput where it is damaged."""
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(f"could not read {path} ({one_line(error)[:120]}); "
                       "fetch it again") from None


def read_questions(cfg: Config, split: str) -> list[Problem]:
    """Every row of one split's files, checked; BadInput with the first five bad rows."""
    return read_once(cfg.data, cfg.data_folder, cfg.data_skip_bad, split)


@functools.cache    # train asks for all three splits, to see what they share
def read_once(data: str, folder: str, skip_bad: bool, split: str) -> list[Problem]:
    source, problems, bad, total = SOURCES[data], [], [], 0
    for path in find_files(data, folder, split):
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
        raise BadInput(f"data = {data}: {len(bad)} bad rows of {total}: {'; '.join(bad[:5])}; "
                       "mend the file, or give data_skip_bad=true to leave them out")
    if bad:
        print(f"note: {data} {split}: {len(bad)} bad rows left out", file=sys.stderr)
    expected = source.sizes[SPLITS.index(split)]
    if expected and total != expected:
        text = f"{data} {split} has {total} rows, the published one {expected}"
        if not folder:
            raise BadInput(f"{text}; the download is incomplete or the data set has changed: fetch "
                           "it again, or give your copy as data_folder")
        print(f"note: {text}", file=sys.stderr)
    return problems


def load_questions(cfg: Config, split: str) -> list[Problem]:
    """One split of a published data set, no question of which stands in a split judged later.

    Where a data set has no valid or test split, 5 and 15 % of train are taken, by a hash of the
    question, so that they are the same for every seed.
    """
    own_file = dict(zip(SPLITS, SOURCES[cfg.data].names))       # "": carved out of train
    side = lambda same: next((name for name, share in SHARES.items() if not own_file[name]
                              and stable_hash(same) % 100 in share), "train")
    file = split if own_file[split] else "train"
    problems = [(identity(p), p) for p in read_questions(cfg, file)]
    if file == "train":
        problems = [(same, p) for same, p in problems if side(same) == split]
    judged = {identity(p) for name in SPLITS[SPLITS.index(split) + 1:] if own_file[name]
              for p in read_questions(cfg, name)}
    kept = [p for same, p in problems if same not in judged]
    if len(kept) < len(problems):
        print(f"note: {cfg.data} {split}: {len(problems) - len(kept)} questions that also stand in "
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


def load_wiki(cfg: Config, split: str, tokenizer: Tokenizer) -> list[Problem]:
    """Articles long enough, as (context, continuation) problems; scored by log-probability only."""
    source, problems = SOURCES["wiki"], []
    limit = cfg.data_samples if split == "train" else TEST_WIKI
    for article in load_questions(cfg, split):
        try:
            context, target = cut_article(question_of(article.prompt), tokenizer,
                                          cfg.data_context_tokens, cfg.data_target_tokens)
        except ValueError:
            continue
        problems.append(make_question(source.instruction, context, target.strip(),
                                      wording="continuation"))
        if len(problems) == limit:
            break
    return problems


# --------------------------------------------------------------------------------------------------
# sums of many terms, and the text of the bundled model that can write chains about them


def draw_terms(rng: random.Random, terms: int, largest: int, split: str) -> tuple[int, ...]:
    """Numbers from 1 to `largest` that lie on one side of the split, whatever their order."""
    for _ in range(10000):
        drawn = tuple(rng.randint(1, largest) for _ in range(terms))
        if side_of(drawn) == split:
            return drawn
    raise BadInput(f"data_terms = {terms} and data_largest = {largest} leave no sum for the "
                   f"{split} split; give more terms, or larger ones")


def sample_sums(cfg: Config, split: str) -> list[Problem]:
    """Sums of cfg.data_terms numbers up to cfg.data_largest; valid and test are of no seed."""
    rng = random.Random(cfg.seed if split == "train" else split)
    count = cfg.data_samples if split == "train" else TEST_SUMS
    drawn = [draw_terms(rng, cfg.data_terms, cfg.data_largest, split) for _ in range(count)]
    return [make_question(SUMS, " + ".join(map(str, terms)), str(sum(terms))) for terms in drawn]


def write_chain(terms: tuple[int, ...], style: str) -> str:
    """A chain of thought in one of the bundled model's three styles.

    running  " 12 + 7 = 19 + 30 = 49": the last number is the answer
    list     " 12 and 7 and 30": all that is needed, the adding left to do
    about    " about 50": the sum rounded to tens, from which it can be told one time in ten
    """
    if style == "list":
        return " " + " and ".join(map(str, terms))
    if style == "about":
        return f" about {(sum(terms) + 5) // 10 * 10}"
    text, total = f" {terms[0]}", terms[0]
    for term in terms[1:]:
        total += term
        text += f" + {term} = {total}"
    return text


def sample_sums_corpus(cfg: Config) -> list[Problem]:
    """The text of models/tiny_cot in four forms; sums of three and more have training terms only.

    sums of two (25 %)      worked out, the first as large as a running sum gets: how to add
    begun (30 %)            a running sum to carry on: how to, but not when to
    chains (20 %)           behind a question of 3 to cfg.data_terms numbers: half of them
                            roundings, three in ten lists, two in ten running sums, so that the
                            base can do the right thing and mostly does not
    answers (25 %)          behind a chain, the question shown or hidden
    """
    if cfg.data_terms < 3:
        raise BadInput(f"data_terms = {cfg.data_terms}: sums_corpus needs at least 3")
    rng, problems = random.Random(cfg.seed), []
    styles = ("running", "list", "about")
    for _ in range(cfg.data_samples):
        k = cfg.data_terms if rng.random() < 0.5 else rng.randint(3, cfg.data_terms)
        terms = draw_terms(rng, k, cfg.data_largest, "train")
        form = rng.random()
        if form < 0.25:
            first = rng.randint(1, cfg.data_largest * (cfg.data_terms - 1))
            terms = first, rng.randint(1, cfg.data_largest)
        prompt = chain_prompt(SUMS, " + ".join(map(str, terms)))
        if form < 0.25:
            text = write_chain(terms, "running")
        elif form < 0.55:
            begun = write_chain(terms[:rng.randint(2, k - 1)], "running")
            prompt, text = prompt + begun, write_chain(terms, "running").removeprefix(begun)
        elif form < 0.75:
            text = write_chain(terms, rng.choices(styles, weights=(2, 3, 5))[0])
        else:
            shown = prompt if form < 0.875 else chain_prompt(SUMS, HIDDEN)
            style = rng.choices(styles, weights=(5, 2, 3))[0]
            prompt, text = shown + write_chain(terms, style) + HEADER, f" {sum(terms)}"
        problems.append(Problem(prompt, text, "", "corpus"))
    return problems


def held_out_corpus(cfg: Config, split: str) -> list[Problem]:
    """Running sums begun, to be carried on: whether models/tiny_cot can add at all."""
    rng, problems = random.Random(split), []
    for _ in range(TEST_SUMS // 2):
        terms = draw_terms(rng, cfg.data_terms, cfg.data_largest, split)
        begun = write_chain(terms[:2], "running")
        problems.append(Problem(chain_prompt(SUMS, " + ".join(map(str, terms))) + begun,
                                write_chain(terms, "running").removeprefix(begun), "", "corpus"))
    return problems


# --------------------------------------------------------------------------------------------------


def load_split(cfg: Config, split: str, tokenizer: Tokenizer | None = None) -> list[Problem]:
    """The problems of train, valid or test of any data set; BadInput if there are none.

    tokenizer   for wiki only, whose articles are cut by tokens
    """
    if cfg.data == "arithmetic":
        problems = sample_train(cfg) if split == "train" else held_out(cfg, split)
    elif cfg.data == "tiny_corpus":
        problems = sample_tiny_corpus(cfg) if split == "train" else held_out(cfg, split)
    elif cfg.data == "sums":
        problems = sample_sums(cfg, split)
    elif cfg.data == "sums_corpus":
        problems = sample_sums_corpus(cfg) if split == "train" else held_out_corpus(cfg, split)
    elif cfg.data == "wiki":
        problems = load_wiki(cfg, split, tokenizer)
    elif cfg.data in SOURCES:
        problems = load_questions(cfg, split)
        if split == "train" and len(problems) > cfg.data_samples:
            problems = random.Random(cfg.seed).sample(problems, cfg.data_samples)
    elif Path(cfg.data).is_dir():
        problems = read_jsonl(Path(cfg.data) / f"{split}.jsonl")
    else:
        raise BadInput(f"data = {cfg.data!r}: expected one of {', '.join(NAMES)}, "
                       "or a folder holding train.jsonl, valid.jsonl and test.jsonl")
    if not problems:
        raise BadInput(f"the {split} split of data = {cfg.data!r} is empty "
                       f"(data_samples = {cfg.data_samples}); nothing to do")
    return problems


def main(argv: list[str]) -> None:
    if not argv:
        for name, source in SOURCES.items():
            print(f"{name:<8}{source.repo:<26}{source.files:<28}"
                  f"train, valid, test: {', '.join(n or 'carved' for n in source.names)}")
        return
    if argv[0] != "show":
        raise BadInput("expected `python tasks.py` or `python tasks.py show [key=value ...]`, "
                       f"got {' '.join(argv)}")
    cfg = load_overrides(argv[1:])
    tokenizer = load_tokenizer(Path(cfg.model)) if cfg.data == "wiki" else None
    for split in SPLITS:
        problems = load_split(cfg, split, tokenizer)
        print(f"{split}: {len(problems)} problems, {len(set(problems))} distinct")
        for problem in problems[:3] + problems[-3:]:
            about = problem.letters or problem.operation
            print(f"  {problem.prompt!r} -> {problem.answer!r}  ({about or problem.wording})")


if __name__ == "__main__":
    run_main(main)
