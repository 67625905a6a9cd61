"""Rows in JSONL files: read what a person wrote, grow what a command writes, go on with a folder.

A file of replies, or a step of self_instruct, only grows, and always by parts of the same rows. A
command that was broken off drops what is no whole part and goes on behind it, so it ends in the
same bytes as one that ran through.
"""
import json
from collections.abc import Callable
from pathlib import Path

from files.disk import append_text, json_lines, read_each_line, read_json_lines, write_text
from files.keys import BadInput
from files.provenance import read_report

BEGUN = "begun.json"    # what a folder was begun with


def read_text(path: str | Path, expected: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read ({error}); expected {expected}") from None


def read_rows(path: str | Path, read: Callable[[dict], object], expected: str) -> list:
    """`read` of each line's object; BadInput names the lines that it refuses (ValueError)."""
    rows, refused = read_each_line(read_text(path, expected), read)
    bad = [f"{path}:{number}: {str(error)[:200]}" for number, error in refused]
    if bad:
        raise BadInput(f"{'; '.join(bad[:4])}{' ...' if bad[4:] else ''}; {len(bad)} bad lines, "
                       f"expected {expected}")
    if not rows:
        raise BadInput(f"{path} holds no rows; expected {expected}")
    return rows


def grow(path: Path, part: int, key: str, wanted: list,
         make: Callable[[list[dict], int], list[dict]], others: str) -> list[dict]:
    """A file's rows, one for each wanted value of row[key]: those it has, and the parts it lacks.

    make     (the rows so far, n) -> those that follow, up to n; [] ends the file sooner
    others   what it is where the file's rows are about something else, and what to do
    """
    rows = read_json_lines(path)
    if len(rows) < len(wanted):
        rows = rows[:len(rows) // part * part]
    if [row[key] for row in rows] != wanted[:len(rows)]:
        raise BadInput(f"{path} is about {others}")
    write_text(path, json_lines(rows))      # without what a kill has torn
    while len(rows) < len(wanted):
        more = make(rows, min(len(rows) + part, len(wanted)))
        if not more:
            break
        append_text(path, json_lines(more), sync=True)
        rows += more
        print(f"  {path.stem:<34}{len(rows):6} of {len(wanted)}", flush=True)
    return rows


def begin_folder(folder: Path, about: dict[str, object], again: str) -> None:
    """Write down what a new folder is begun with, or compare it with what one was begun with.

    about    {what: value}; what the folder's record lacks is added to it
    again    what a user can do about another value
    raises   BadInput where the folder holds something else, or was begun with other values
    """
    path, about = folder / BEGUN, json.loads(json.dumps(about))     # as read back: tuples are lists
    record = {}
    if path.exists():
        record = read_report(path, again)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} holds other files (it has no {BEGUN}); name a new folder")
    unlike = [f"{what} (was {record[what]}, is {value})" for what, value in about.items()
              if record.get(what, value) != value]
    if unlike:
        raise BadInput(f"{folder} was begun with another {', another '.join(unlike)}; put back "
                       f"what it began with, or {again}")
    write_text(path, json.dumps(record | about, indent=1) + "\n")
