"""Rows as people have them: whichever columns, three files or one, become prompts and answers.

    {"prompt", "response"}  {"prompt", "completion"}    as they are, white space too
    {"question", "answer"}                              a line break behind the question
    {"instruction", "input", "output"}                  Alpaca's, with or without an input: the same
    {"messages": [{"role", "content"}, ...]}            a conversation
    {"conversations": [{"from", "value"}, ...]}         ShareGPT's: of system, human and gpt
    {"text"}                                            plain text: every token is a target

A folder holds train.jsonl, valid.jsonl and test.jsonl; a file is a train.jsonl. What is missing is
split off train.jsonl by a hash of each row's prompt. So the rows of one prompt are on one side, and
a row's side depends on nothing but the file: runs of all seeds are judged on the same rows.
"""
from collections.abc import Callable
from pathlib import Path

from config import BadInput
from text.arithmetic import TEXT, stable_hash

SPLITS = ("train", "valid", "test")
SPLIT_OFF = 500     # the most prompts of a split that is split off; else a tenth
SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}    # ShareGPT's names of roles
# of a plain text so many characters at most are its prompt, where the lens reads and a reply begins
PROMPT_OF_TEXT = 80

# --------------------------------------------------------------------------------------------------
# from columns to prompt and answer


def from_pair(prompt: str, answer: str) -> dict:
    return {"prompt": prompt, "answer": answer, "messages": ()}


def from_lines(*texts: str) -> dict:
    return from_pair("".join(f"{text}\n" for text in texts[:-1]), texts[-1])


def from_messages(messages: list[dict]) -> dict:
    """Prompt and answer are the last two."""
    from text.chat import check_messages  # jinja2 and templates: conversations alone need it
    check_messages(messages, reply_follows=False)
    pairs = tuple((m["role"], m["content"]) for m in messages)
    return {"prompt": pairs[-2][1], "answer": pairs[-1][1], "messages": pairs}


def from_sharegpt(turns: list[dict]) -> dict:
    return from_messages([{"role": SPEAKERS.get(turn["from"], turn["from"]),
                           "content": turn["value"]} for turn in turns])


def from_text(text: str) -> dict:
    """The prompt is the first half, or less, up to a space. Training reads the two as one."""
    half = min(len(text) // 2, PROMPT_OF_TEXT)
    space = text.rfind(" ", 1, half + 1)
    cut = half if space < 0 else space
    return from_pair(text[:cut], text[cut:])


LAYOUTS: dict[tuple[str, ...], Callable[..., dict]] = {     # the first whose columns a row has
    ("messages",): from_messages,
    ("conversations",): from_sharegpt,
    ("prompt", "response"): from_pair,
    ("prompt", "completion"): from_pair,
    ("instruction", "input", "output"): from_lines,
    ("instruction", "output"): from_lines,
    ("question", "answer"): from_lines,
    TEXT: from_text,
}
EXPECTED = ("expected one JSON object a line, with columns "
            f"{' | '.join(', '.join(columns) for columns in LAYOUTS)}, not empty")


def read_columns(row: dict) -> dict:
    """{prompt, answer, messages, layout}; raises ValueError, KeyError, TypeError, AttributeError.
    """
    # what is empty is not there, such as Alpaca's input
    filled = {column for column, value in row.items() if value not in (None, "")}
    for layout, read in LAYOUTS.items():
        if filled.issuperset(layout):
            return read(*(row[column] for column in layout)) | {"layout": layout}
    raise ValueError(f"it has columns {', '.join(sorted(filled)) or 'none'}")


# --------------------------------------------------------------------------------------------------
# from files to splits


def files_of(data: Path) -> dict[str, Path]:
    """The file of each split that has one."""
    if data.is_file():
        return {"train": data}
    files = {split: data / f"{split}.jsonl" for split in SPLITS}
    return {split: file for split, file in files.items() if file.exists() or split == "train"}


def prompt_of(row: dict) -> tuple:
    """What a row is known by: all that stands before its last reply; of a text all of it."""
    text = row["prompt"] + (row["answer"] if row["layout"] == TEXT else "")
    return text, row["messages"][:-1]


def split_off(rows: list[dict], missing: list[str], path: Path) -> dict[str, list[dict]]:
    """Deal rows to train and what is missing: a tenth of their prompts each, by a hash."""
    prompts = sorted({prompt_of(row) for row in rows},
                     key=lambda prompt: (stable_hash(repr(prompt)), prompt))
    if len(prompts) <= len(missing):
        raise BadInput(f"{path} has rows of {len(prompts)} different prompts, too few to split "
                       f"{' and '.join(missing)} off; give more, or a folder with "
                       f"{' and '.join(f'{split}.jsonl' for split in missing)}")
    size = min(SPLIT_OFF, max(1, len(prompts) // 10))
    side = {prompt: missing[n // size] for n, prompt in enumerate(prompts[:size * len(missing)])}
    return {split: [row for row in rows if side.get(prompt_of(row), "train") == split]
            for split in ("train", *missing)}


def deal_rows(data: Path, split: str, read: Callable[[Path], list[dict]]) -> list[dict]:
    """The rows of one split, as read(file) gives them."""
    files = files_of(data)
    missing = [name for name in SPLITS if name not in files]
    if split in files and (split != "train" or not missing):
        return read(files[split])
    return split_off(read(files["train"]), missing, files["train"])[split]
