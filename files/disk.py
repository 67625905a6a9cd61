"""Files that are whole or not there: text and JSON in and out.

A kill or a power cut may come at any moment. So a file is written beside its place, made durable,
and renamed: a reader sees the old one or the new one, never a part. Lines are appended, and a torn
last line is dropped on reading. What comes from outside is held against a declared shape.
"""
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from config import BadInput

SECRETS = re.compile(r"hf_\w{16,}|(?<=[Bb]earer )[^\s'\"]+|(?<=://)[^/@\s]+(?=@)")


def one_line(error: object) -> str:
    """Its text on one line, 200 printable characters, and no token: a server may send it back."""
    text = " ".join(str(error).split())
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "<token>")
    return "".join(c if c.isprintable() else "?" for c in SECRETS.sub("<token>", text))[:200]


def is_file(path: Path) -> bool:
    """A file or a link to one, as all of the Hub's cache is; BadInput where one may not look."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"{path} cannot be read ({error.strerror or one_line(error)}); "
                    "check its permissions and its folder's")


def read_json(path: Path) -> dict:
    """Read a JSON object; raises BadInput naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; expected a folder in the Hub's layout "
                       "(config.json, *.safetensors, tokenizer)") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:   # not JSON, not UTF-8, nested without end
        raise BadInput(f"{path} is not valid JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def replace_file(temporary: Path, path: Path) -> None:
    """Make the bytes durable before the name points at them, or a power cut can empty the file."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a temporary file, then rename: a reader sees the old or the new. Raises BadInput."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        replace_file(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"could not write {path} ({error.strerror}); free some disk space: "
                       "what was saved before is intact") from None


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def check_new(folder: Path) -> None:
    """BadInput unless a folder to write is absent or empty: two models in one would mix."""
    try:
        taken = any(folder.iterdir())
    except FileNotFoundError:
        taken = False
    except OSError:     # a file, or not to be looked into
        taken = True
    if taken:
        raise BadInput(f"{folder} already holds a model or other files; name a new folder")


def append_text(path: Path, text: str, sync: bool = False) -> None:
    """Add text to a file; sync: on the disk before this returns. Raises BadInput."""
    try:
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"could not write {path} ({error.strerror}); free some disk space, then run "
                       "the same command again, which drops a torn last line") from None


def json_lines(rows: Iterable[dict]) -> str:
    """One JSON object a line, other languages' letters as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json_lines(path: Path) -> list[dict]:
    """The rows of a file up to where a kill has torn it; [] if there is none."""
    rows = []
    # bytes: it may be torn within a letter
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
        if not isinstance(rows[-1], dict):
            return rows[:-1]
    return rows


def read_each_line(text: str, read: Callable[[dict], object]) -> tuple[list, list[tuple]]:
    """`read` of every JSON line, and what it refuses: ([result, ...], [(line number, error), ...]).

    read     raises ValueError, KeyError, TypeError or AttributeError. Empty lines are left out
    """
    results, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):     # splitlines would cut at U+2028 too
        if not line.strip():
            continue
        try:
            results.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            bad.append((number, error))
    return results, bad


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


# --------------------------------------------------------------------------------------------------
# what a command that was broken off goes on with: a file that grows by parts of the same rows, so
# that it ends in the same bytes; a folder that says what it was begun with


BEGUN = "begun.json"


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
    """Write down what a new folder is begun with, {what: value}, or compare it with what one was
    begun with: BadInput if that differs, or if the folder holds something else.

    again    what a user can do about another value
    """
    path, about = folder / BEGUN, json.loads(json.dumps(about))     # as read back: tuples are lists
    record = {}
    if path.exists():
        try:
            record = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{path} is damaged ({one_line(error)}); {again}") from None
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} holds other files (it has no {BEGUN}); name a new folder")
    unlike = [f"{what} (was {record[what]}, is {value})" for what, value in about.items()
              if record.get(what, value) != value]
    if unlike:
        raise BadInput(f"{folder} was begun with another {', another '.join(unlike)}; put back "
                       f"what it began with, or {again}")
    write_text(path, json.dumps(record | about, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# what a JSON file from outside may hold


class Kind(NamedTuple):
    """What one value must be: in words for the message, and as a test.

    The tests ask type(), not isinstance: to Python true is a whole number.
    """
    expected: str
    fits: Callable[[object], bool]


def one_of(*choices) -> Kind:
    return Kind(" or ".join(map(json.dumps, choices)),
                lambda v: any(type(v) is type(c) and v == c for c in choices))


REQUIRED = object()     # as a default: the value must be there
COUNT = Kind("a whole number of at least 1", lambda v: type(v) is int and 1 <= v < 2 ** 31)
# float32's range; json reads NaN and Infinity
POSITIVE = Kind("a finite number above 0", lambda v: type(v) in (int, float) and 1e-38 < v < 1e38)
SWITCH = Kind("true or false", lambda v: type(v) is bool)
OBJECT = Kind("an object {...}", lambda v: type(v) is dict)
NAMES = Kind("a list of names, not empty",
             lambda v: type(v) is list and v and all(type(name) is str for name in v))


def read_fields(raw: dict, fields: dict[str, tuple[Kind, object]], where: str) -> dict:
    """The declared values of a JSON object, {name: value}; other names are not looked at.

    fields   {name: (kind, default)}; null counts as absent
    raises   BadInput with every mistake: what was given, what was expected
    """
    values = {name: default if raw.get(name) is None else raw[name]
              for name, (_, default) in fields.items()}
    mistakes = [f"missing {name}, expected {kind.expected}"
                for name, (kind, _) in fields.items() if values[name] is REQUIRED]
    mistakes += [f"{name} = {json.dumps(raw[name])[:80]}, expected {kind.expected}"
                 for name, (kind, _) in fields.items()
                 if raw.get(name) is not None and not kind.fits(raw[name])]
    if mistakes:
        raise BadInput(f"{where}: {'; '.join(mistakes)}")
    return values
