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


def read_parts(path: Path, part: int, total: int | None = None) -> list[dict]:
    """A growing file's rows, whole parts of them; the file loses what a kill has torn.

    total    how many rows the file has in the end, if known: its last part may be shorter
    """
    rows = read_json_lines(path)
    if total is None or len(rows) < total:
        rows = rows[:len(rows) // part * part]
    if path.exists():
        write_text(path, json_lines(rows))
    return rows


def append_rows(path: Path, rows: list[dict]) -> list[dict]:
    """Add rows to a file, on the disk before anything is built on them; returns them."""
    append_text(path, json_lines(rows), sync=True)
    return rows


def grow(path: Path, part: int, key: str, wanted: list, make: Callable[[int, int], list[dict]],
         others: str) -> list[dict]:
    """A file's rows, one for each wanted value of row[key]: those it has, and the parts it lacks.

    make     (first, last) -> the rows of wanted[first:last]
    others   what it is where the file's rows are about something else, and what to do
    """
    rows = read_parts(path, part, len(wanted))
    if [row[key] for row in rows] != wanted[:len(rows)]:
        raise BadInput(f"{path} is about {others}")
    while len(rows) < len(wanted):
        first = len(rows)
        rows += append_rows(path, make(first, min(first + part, len(wanted))))
        print(f"  {path.stem:<34}{len(rows):6} of {len(wanted)}", flush=True)
    return rows


def begin_folder(path: Path, about: dict[str, dict], again: str) -> dict:
    """Write `about` as a new folder's record, or return the record of one that was begun alike.

    about    {part: {key: value}}; a part that the record has and `about` does not is not compared
    again    what a user can do about another record
    raises   BadInput where the folder holds something else, or was begun with other values
    """
    folder, about = path.parent, json.loads(json.dumps(about))      # as read back: tuples are lists
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"{folder} holds other files (it has no {path.name}); name a new folder")
        write_text(path, json.dumps(about, indent=1) + "\n")
        return about
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        unlike = [f"{part}.{key} ({key} was {record[part].get(key)}, is {value})"
                  for part in about for key, value in about[part].items()
                  if record[part].get(key) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({error!r}); {again}") from None
    if unlike:
        raise BadInput(f"{folder} was begun with another {', another '.join(unlike)}; put back "
                       f"what it began with, or {again}")
    return record
