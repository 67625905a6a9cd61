"""Files that are whole or not there: text and JSON in and out.

A kill or a power cut may come at any moment. So a file is written beside its place, made durable,
and renamed: a reader sees the old one or the new one, never a part. Lines are appended, and a torn
last line is dropped on reading. A target that is a link, a pipe or a device is refused: writing
would change something else, or wait for ever.

What comes from outside is read in one way: a regular file of bounded size, UTF-8, JSON whose
nesting is bounded, whose texts are text and, in rows, whose numbers are finite. Settings are held
against a declared shape, {field: (kind, default)}, and all mistakes are said at once.
"""
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

SECRETS = re.compile(
    r"hf_\w{16,}|sk-[\w-]{16,}|(?<=[Bb]earer )[^\s'\"]+|(?<=://)[^/@\s]+(?=@)")
KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY")
LARGEST = 2 ** 26       # bytes of settings; tokenizers, the longest such files, have 2 ** 25
LARGEST_ROWS = 2 ** 33  # of data: rows are read as a whole
DEEPEST = 64            # objects within objects


class BadInput(ValueError):
    """Something the user can mend: says what was given, what was expected, where, and the fix."""


def scrub(text: object) -> str:
    """On one line, printable, without a token: what a user pasted, or a server sent back."""
    text = " ".join(str(text).split())
    for name in KEYS:
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "<token>")
    return "".join(c if c.isprintable() else "?" for c in SECRETS.sub("<token>", text))


def one_line(error: object) -> str:
    """A foreign error in a message: its first 200 characters."""
    return scrub(error)[:200]


# --------------------------------------------------------------------------------------------------
# in


def is_file(path: Path) -> bool:
    """A file or a link to one, as all of the Hub's cache is; BadInput where one may not look."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):     # a null byte in a name
        return False
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"{str(path)[:400]} cannot be read ({error.strerror or one_line(error)}); "
                    "check its permissions and its folder's")


def read_data(path: str | Path, expected: str, largest: int = LARGEST) -> bytes:
    """A file from outside, or what a link to one leads to; raises BadInput."""
    try:
        # or opening a pipe would wait until somebody writes to it
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise BadInput(f"{path} is a folder, a pipe or a device; expected {expected}")
            # one byte more than it says: a file of the kernel's says 0, and may have no end
            data = file.read(about.st_size + 1) if about.st_size <= largest else b""
        if about.st_size > largest or len(data) > about.st_size:
            raise BadInput(f"{path} has more than {min(largest, about.st_size)} bytes; "
                           f"expected {expected}")
        return data
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; expected {expected}") from None
    except (OSError, ValueError, MemoryError) as error:
        if isinstance(error, BadInput):
            raise
        why = getattr(error, "strerror", None) or one_line(error) or "it does not fit the memory"
        raise BadInput(f"{path} cannot be read ({why}); expected {expected}") from None


def read_text(path: str | Path, expected: str, largest: int = LARGEST) -> str:
    try:
        return read_data(path, expected, largest).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 ({one_line(error)}); expected {expected}") from None


def parse_json(text: str, finite: bool = True) -> object:
    """A JSON value; ValueError where numbers are not finite, texts no text, or it nests too deep.

    Python's own reader takes NaN, 1e999 and half an emoji, which is valid JSON and no text.
    finite   False: NaN and infinity too, in ours (a guard's first best) or where a shape is said
    """
    number = finite_number if finite else float
    try:
        value = json.loads(text, parse_constant=number, parse_float=number)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if text.count("{") + text.count("[") > DEEPEST:     # most texts have fewer
        check_depth(value)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()     # UnicodeEncodeError is a ValueError
    return value


def check_depth(value: object) -> None:
    """ValueError where a JSON value nests more than DEEPEST deep; level by level, no recursion."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return
        level = [v for outer in level
                 for v in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(f"nested more than {DEEPEST} deep")


def finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def read_json(path: Path, expected: str = "a folder in the Hub's layout (config.json, "
              "*.safetensors, tokenizer)") -> dict:
    """Read a JSON object; raises BadInput naming the file."""
    text = read_text(path, expected)
    try:
        value = parse_json(text, finite=False)
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({one_line(error)}); expected {expected}, "
                       "whole: fetch or write it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json_lines(path: Path) -> list[dict]:
    """The rows of a file of ours up to where a kill has torn it; [] if there is none."""
    if not os.path.lexists(path):
        return []
    check_target(path)      # it is written on
    rows = []
    # bytes: it may be torn within a letter
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
        if not isinstance(rows[-1], dict):
            return rows[:-1]
    return rows


def read_rows(path: str | Path, read: Callable[[dict], object], expected: str) -> list:
    """`read` of each line's object; BadInput names the lines that it refuses.

    read     raises ValueError, KeyError, TypeError or AttributeError. Empty lines are left out
    """
    rows, bad = [], []
    # splitlines would cut at U+2028 too
    for number, line in enumerate(read_text(path, expected, LARGEST_ROWS).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, no object")
            rows.append(read(row))
        except ValueError as error:
            bad.append(f"line {number} ({scrub(error)[:400]})")
        except (KeyError, TypeError, AttributeError) as error:
            bad.append(f"line {number} ({one_line(repr(error))})")
    if bad:
        raise BadInput(f"{path}: {len(bad)} bad rows: {', '.join(bad[:5])}"
                       f"{' ...' if bad[5:] else ''}; expected {expected}")
    if not rows:
        raise BadInput(f"{path} is empty; expected {expected}")
    return rows


# --------------------------------------------------------------------------------------------------
# out


def check_target(path: str | Path, is_folder: bool = False) -> None:
    """BadInput unless a file (folder) may be written there: there is none yet, or one, no link."""
    kind, is_kind = ("folder", stat.S_ISDIR) if is_folder else ("file", stat.S_ISREG)
    try:
        if is_kind(os.lstat(path).st_mode):
            return
        why = f"what lies there is no {kind}, but perhaps a link, a pipe or a device"
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:      # a part of the path is no folder, or a link's loop
        why = getattr(error, "strerror", None) or one_line(error)
    raise BadInput(f"{path} cannot be written ({why}); give the name of a new {kind}")


def replace_file(temporary: Path, path: Path) -> None:
    """Make the bytes durable before the name points at them, or a power cut can empty the file."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a temporary file, then rename: a reader sees the old or the new. Raises BadInput."""
    check_target(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)   # made anew: a link there would be written through
        with open(temporary, "xb") as file:
            file.write(data)
        replace_file(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"could not write {path} ({error.strerror}); free some disk space: "
                       "what was saved before is intact") from None


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def check_new(folder: Path) -> None:
    """BadInput unless a folder to write is absent or empty: two models in one would mix."""
    check_target(folder, is_folder=True)
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
    check_target(path)
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


class Steady:
    """A stream under which a closed pipe or a full disk ends no training."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.attempt(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, do: Callable, *words):
        try:
            return do(*words)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())      # what waits in the buffer goes there too
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError) and self is sys.stdout:
                print(f"note: what is printed is lost ({error.strerror})", file=sys.stderr)


def steady_output() -> None:
    """Make printing safe: streams that are closed, that break, or that lack a letter."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:     # or the next file to be opened would be printed into
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):      # "?" where its encoding lacks a letter
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream if isinstance(stream, Steady) else Steady(stream))


def check_words(words: list[str]) -> list[str]:
    """A command's words; BadInput where one is no text: bytes that are not UTF-8."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise BadInput(f"{word[:80]!a} is not UTF-8; give it in that encoding") from None
    return words


def describe(error: Exception) -> str:
    """A command's last line about what the user can mend; raises all else again."""
    text = scrub(error)
    out = isinstance(error, MemoryError) or re.search(
        r"allocate|bad_alloc|out of memory|can't start new thread", text, re.I)
    if not out and not isinstance(error, BadInput):
        raise error
    return text if not out or isinstance(error, BadInput) else (
        f"the memory is used up ({text[:200] or 'no more to be had'}); free some, raise the limit "
        "(ulimit -v), or take a smaller model or batch")


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
    if [row.get(key) for row in rows] != wanted[:len(rows)]:
        raise BadInput(f"{path} is about {others}")
    write_text(path, json_lines(rows))      # without what a kill has torn
    bar = tqdm(desc=path.stem, initial=len(rows), total=len(wanted), disable=None)
    while len(rows) < len(wanted):
        more = make(rows, min(len(rows) + part, len(wanted)))
        if not more:
            break
        append_text(path, json_lines(more), sync=True)
        rows += more
        bar.update(len(more))
    bar.close()
    return rows


def begin_folder(folder: Path, about: dict[str, object], again: str, name: str = BEGUN) -> None:
    """Write down what a new folder is begun with, {what: value}, or compare it with what one was
    begun with: BadInput if that differs, or if the folder holds something else.

    again    what a user can do about another value
    """
    path, about = folder / name, json.loads(json.dumps(about))     # as read back: tuples are lists
    check_target(folder, is_folder=True)
    record = {}
    if os.path.lexists(path):
        record = read_json(path, f"what {folder} was begun with; {again}")
    elif folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} holds other files (it has no {name}); name a new folder")
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


def one_of(*choices, expected: str = "") -> Kind:
    return Kind(expected or " or ".join(map(json.dumps, choices)),
                lambda v: any(type(v) is type(c) and v == c for c in choices))


def whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number of at least {low}, at most {high}",
                lambda v: type(v) is int and low <= v <= high)


def list_of(kind: Kind) -> Kind:
    return Kind(f"a list of which each is {kind.expected}",
                lambda v: type(v) is list and all(map(kind.fits, v)))


REQUIRED = object()     # as a default: the value must be there
COUNT = Kind("a whole number of at least 1", lambda v: type(v) is int and 1 <= v < 2 ** 31)
# what sizes memory and time is bounded, far above every model there is
LAYERS, RANK, WIDTH = whole(1, 4096), whole(1, 4096), whole(1, 2 ** 22)
# float32's range; whole numbers as MLX takes them
POSITIVE = Kind("a finite number above 0", lambda v: (
    type(v) is float and 1e-38 < v < 1e38 or COUNT.fits(v)))
SWITCH = Kind("true or false", lambda v: type(v) is bool)
TEXT = Kind("a text", lambda v: type(v) is str)
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
    mistakes += [f"{name} = {one_line(json.dumps(raw[name]))[:80]}, expected {kind.expected}"
                 for name, (kind, _) in fields.items()
                 if raw.get(name) is not None and not kind.fits(raw[name])]
    if mistakes:
        raise BadInput(f"{where}: {'; '.join(mistakes)}")
    return values
