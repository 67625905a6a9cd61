"""Rows as people have them: JSON lines of whichever columns, three files or one, become problems.

    {"prompt", "response"}  {"prompt", "completion"}    as they are, white space too
    {"question", "answer"}                              a line break behind the question
    {"instruction", "input", "output"}                  Alpaca's, with or without an input: the same
    {"messages": [{"role", "content"}, ...]}            a conversation
    {"conversations": [{"from", "value"}, ...]}         ShareGPT's: of system, human and gpt
    {"text"}                                            plain text: every token is a target

Beside them are read "operation", "wording" (a name for a kind of question, which reports tell
apart), "hidden" (of a question to reason about: the prompt without the question) and "letters" (its
options, as "ABCD"). All others reach a user's reward, which may also do without an answer.

A folder holds train.jsonl, valid.jsonl and test.jsonl; a file is a train.jsonl. What is missing is
split off train.jsonl by a hash of each row's prompt. So the rows of one prompt are on one side, and
a row's side depends on nothing but the file: runs of all seeds are judged on the same rows.
"""
from collections.abc import Callable
from functools import partial
from pathlib import Path

from config import BadInput, Config
from files.disk import read_rows
from text.arithmetic import TEXT, Problem, stable_hash

SPLITS = ("train", "valid", "test")
SPLIT_OFF = 500     # the most prompts of a split that is split off; else a tenth
SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}    # ShareGPT's names of roles
# of a plain text so many characters at most are its prompt, where the lens reads and a reply begins
PROMPT_OF_TEXT = 80

# --------------------------------------------------------------------------------------------------
# from columns to prompt and answer


def from_pair(prompt: str, answer: str) -> dict:
    return {"prompt": prompt, "answer": answer}


def from_lines(*texts: str) -> dict:
    return from_pair("".join(f"{text}\n" for text in texts[:-1]), texts[-1])


def from_messages(messages: list[dict]) -> dict:
    """Prompt and answer are the last two; a reply that is not there is ""."""
    from text.chat import check_messages  # jinja2 and templates: conversations alone need it
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") == "user":
        messages = [*messages, {"role": "assistant", "content": ""}]
    check_messages(messages, reply_follows=False)
    pairs = tuple((m["role"], m["content"]) for m in messages)
    return from_pair(pairs[-2][1], pairs[-1][1]) | {"messages": pairs}


def from_sharegpt(turns: list[dict]) -> dict:
    return from_messages([{"role": SPEAKERS.get(turn["from"], turn["from"]),
                           "content": turn["value"]} for turn in turns])


def from_text(text: str) -> dict:
    """The prompt is the first half, or less, up to a space. Training reads the two as one."""
    if len(text) < 2:
        raise ValueError("text must have at least two characters")
    half = min(len(text) // 2, PROMPT_OF_TEXT)
    space = text.rfind(" ", 1, half + 1)
    cut = half if space < 0 else space
    return from_pair(text[:cut], text[cut:])


LAYOUTS: dict[tuple[str, ...], Callable[..., dict]] = {     # the answer's column is the last
    ("messages",): from_messages,
    ("conversations",): from_sharegpt,
    ("prompt", "response"): from_pair,
    ("prompt", "completion"): from_pair,
    ("instruction", "input", "output"): from_lines,
    ("instruction", "output"): from_lines,
    ("question", "answer"): from_lines,
    TEXT: from_text,
}
BESIDE = {"operation": "", "wording": "file", "hidden": "", "letters": ""}
EXPECTED = ("one JSON object a line, with columns "
            f"{' | '.join(', '.join(columns) for columns in LAYOUTS)}, not empty; only where "
            "method grpo has rewards of your own, and not correct, may the answer be left out")


def layout_of(columns: set[str], needs_answer: bool) -> tuple[str, ...]:
    """The first of LAYOUTS whose columns are there; ValueError if there is none.

    A row that needs no answer may lack the last of them: then a prompt goes before a plain text.
    """
    found = [layout for layout in LAYOUTS if columns.issuperset(layout)]
    if not needs_answer and found in ([], [TEXT]):
        asked = [layout for layout in LAYOUTS if layout[1:] and columns.issuperset(layout[:-1])]
        found = asked or found
    if not found:
        raise ValueError(f"it has columns {', '.join(sorted(columns)) or 'none'}")
    return found[0]


def read_problem(row: dict, needs_answer: bool = True) -> Problem:
    """One row; raises ValueError, KeyError, TypeError or AttributeError."""
    # what is empty is not there, such as Alpaca's input
    filled = {column: value for column, value in row.items() if value not in (None, "")}
    layout = layout_of(set(filled), needs_answer)
    for column in {*layout} - {"messages", "conversations"}:
        if not isinstance(filled.get(column, ""), str):
            raise ValueError(f"{column} must be a string")
    found = LAYOUTS[layout](*(filled.get(column, "") for column in layout))
    texts = found | {column: filled.get(column, other) for column, other in BESIDE.items()}
    messages = texts.pop("messages", ())
    for column, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{column} must be a string")
    if not texts["prompt"] or needs_answer and not texts["answer"]:
        raise ValueError("prompt and response must be non-empty strings; a conversation has the "
                         "assistant last")
    columns = {column: value for column, value in row.items() if column not in (*layout, *BESIDE)}
    return Problem(**texts, messages=messages, columns=columns,
                   layout=tuple(column for column in layout if column in filled))


# --------------------------------------------------------------------------------------------------
# from files to splits


def read_problems(path: Path, needs_answer: bool = True) -> list[Problem]:
    """The rows of a file; raises BadInput, which names the first bad lines.

    needs_answer   False: an answer may be missing, and is then ""
    """
    return read_rows(path, partial(read_problem, needs_answer=needs_answer), EXPECTED)


def files_of(data: Path) -> dict[str, Path]:
    """The file of each split that has one."""
    if data.is_file():
        return {"train": data}
    files = {split: data / f"{split}.jsonl" for split in SPLITS}
    return {split: file for split, file in files.items() if file.exists() or split == "train"}


def prompt_of(problem: Problem) -> tuple:
    """What a row is known by: its prompt; of a text all of it.

    Of a conversation all up to the first question: a talk is often given again with one turn more,
    and training reads every reply.
    """
    if problem.messages:
        first = [role for role, _ in problem.messages].index("user")
        return "", problem.messages[:first + 1]
    return problem.prompt + (problem.answer if problem.layout == TEXT else ""), ()


def split_off(problems: list[Problem], missing: list[str], path: Path) -> dict[str, list[Problem]]:
    """Deal rows to train and what is missing: a tenth of their prompts each, by a hash."""
    prompts = sorted({prompt_of(p) for p in problems},
                     key=lambda prompt: (stable_hash(repr(prompt)), prompt))
    if len(prompts) <= len(missing):
        raise BadInput(f"{path} has rows of {len(prompts)} different prompts, too few to split "
                       f"{' and '.join(missing)} off; give more, or a folder with "
                       f"{' and '.join(f'{split}.jsonl' for split in missing)}")
    size = min(SPLIT_OFF, max(1, len(prompts) // 10))
    side = {prompt: missing[n // size] for n, prompt in enumerate(prompts[:size * len(missing)])}
    return {split: [p for p in problems if side.get(prompt_of(p), "train") == split]
            for split in ("train", *missing)}


def read_split(cfg: Config, split: str) -> list[Problem]:
    """The rows of train, valid or test out of cfg.data, a folder or a file; raises BadInput."""
    if not Path(cfg.data).exists():
        raise BadInput(f"data = {cfg.data!r}: expected arithmetic, a file of JSON lines, or a "
                       "folder that holds train.jsonl, valid.jsonl and test.jsonl; "
                       f"`python -m tasks NAME {cfg.data}` writes one; alone it lists the names")
    files = files_of(Path(cfg.data))
    missing = [name for name in SPLITS if name not in files]
    if split in files and (split != "train" or not missing):
        return read_problems(files[split], cfg.needs_answers)
    problems = read_problems(files["train"], cfg.needs_answers)
    return split_off(problems, missing, files["train"])[split]
