"""A user's rows: JSON lines of questions or conversations, every mistake named by its line.

    {"prompt": "7 * 8 = ", "response": "56", "operation": "multiply"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Other columns that are read: "wording" (a name for a kind of question, which reports tell apart),
"hidden" (of a question to reason about: the prompt without the question) and "letters" (its
options, such as "ABCD").
"""
from pathlib import Path

from config import BadInput
from files.disk import read_each_line
from text.chat import check_messages

EXPECTED = ('expected {"prompt": "...", "response": "...", "operation": "..."} or '
            '{"messages": [{"role": "user", "content": "..."}, ...]}')


def read_rows(path: Path) -> list[dict]:
    """Rows as {prompt, answer, operation, wording, hidden, letters, messages}.

    messages   of a conversation: (role, content) of all of it; prompt and answer are its last two
    raises     BadInput, which names the first bad lines
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"could not read {path} ({error}); "
                       "a data folder holds train.jsonl, valid.jsonl and test.jsonl") from None
    rows, refused = read_each_line(text, read_row)
    bad = [f"line {number} ({error!r})" for number, error in refused]
    if bad:
        raise BadInput(f"{path}: {len(bad)} bad rows: {', '.join(bad[:5])}; {EXPECTED}")
    return rows


def read_row(row: dict) -> dict:
    """One row; raises ValueError, KeyError or TypeError."""
    messages = ()
    if "messages" in row:
        check_messages(row["messages"], reply_follows=False)
        messages = tuple((m["role"], m["content"]) for m in row["messages"])
        row = {"prompt": messages[-2][1], "response": messages[-1][1]} | row
    found = {"prompt": row["prompt"], "answer": row["response"],
             "operation": row.get("operation", ""), "wording": row.get("wording", "file"),
             "hidden": row.get("hidden", ""), "letters": row.get("letters", "")}
    if not all(isinstance(value, str) for value in found.values()):
        raise ValueError("every value must be a string")
    if not found["prompt"] or not found["answer"]:
        raise ValueError("prompt and response must be non-empty strings")
    return found | {"messages": messages}
