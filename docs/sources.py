"""Every measured number of README, docs/ and models/ has a source, which docs/numbers.json names.

    python docs/sources.py                       # what has none: page, line, number
    python docs/sources.py --take docs/speed.md  # after measuring anew: that page's numbers

A *figure* is a number in digits that has a unit (%, points, nats, GiB, seconds, times, ...), a
decimal point or an exponent, or stands in an interval's brackets. Numbers joined by a comma, "and",
"to" or "against" share the unit behind the last. Settings count too (a weight of 0.2): their source
says where they are set. Not read: code quotes, command lines, what include.py runs, versions.

numbers.json holds a page's

    measured   {section or "": {command, hardware, seeds}}, in words that the page has too
    tables     {section: {row: {column: cell}}}: the page has the same cells
    prose      [[source, [figure, ...]], ...] in the page's order, tables too if it has none above

and a source is `PAGE` (a table of it has that number and unit, maybe with more digits, or prose of
it that no page is the source of), `PAGE: ROW` (that row), or else
what measured or set it: a command, a file, `once, DATE`, `published, WHERE`.
docs/study.md and its appendix are left to tests/test_study.py, which writes them anew.
"""
import difflib
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "numbers.json"
NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?"
UNIT = (r"(?:%|points?|nats?|[GM]iB|[GM]B|ms|s|seconds?|minutes?|hours?|tok/s|tokens a second|"
        r"GFLOP/s|times)(?!\w)")
FIGURE = re.compile(rf"(?<![\w.,])(?<!\w-)({NUMBER})(?!\.?\d)(?:\s*({UNIT})|"
                    rf"(?=(?:(?:,|,? and| to| against|–)\s*{NUMBER})+\s*({UNIT}))?)")
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/|python |make |git |\. )[^#\n]*", re.M)
CODE = re.compile(r"(?<!`)`(?!`)[^`]*`(?!`)|\]\([^)]*\)|(?:Python|MLX|torch|arXiv) [\d.]+")
INTERVAL = re.compile(r"\[[-+−\d][^]a-z]*\]")
PAGE = re.compile(r"((?:README|docs/\w+|models/[\w/]+)\.md)(?:: (.*))?")


def figures(text: str) -> list[tuple[int, str]]:
    """(line, "97.4 %") of each figure, in order."""
    blank = lambda m: re.sub(r"[^\n]", " ", m[0])
    text = FENCE.sub(lambda m: blank(m) if re.match(r"python|text run", m[1]) else
                     COMMAND.sub(blank, m[0]), text)
    text = CODE.sub(blank, text)
    inside = {i for m in INTERVAL.finditer(text) for i in range(*m.span())}
    found = []
    for m in FIGURE.finditer(text):
        unit = m[2] or m[3] or ""
        if unit or re.search(r"[.e]", m[1]) or m.start() in inside:
            found.append((text.count("\n", 0, m.start()) + 1, f"{m[1]} {unit}".strip()))
    return found


def numbered(names: list[str]) -> list[str]:
    """Each once. example  [a, b, a] -> [a, b, a (2)]"""
    count = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return [name if n == 1 else f"{name} ({n})" for name, n in zip(names, count)]


def tables(text: str) -> dict[tuple[str, str, str], tuple[int, str]]:
    """{(section, row, column): (line, cell)}; a row's name is its first cell, or two where need be."""
    found, section, before = {}, "", Counter()
    for block in re.finditer(r"^#+ (.*)|^\|(?:.*\n)(?:\|.*\n?)+", text, re.M):
        if block[1]:
            section = block[1]
            continue
        before[section] += 1
        name = f"{section} ({before[section]})" if before[section] > 1 else section
        head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                          for line in block[0].splitlines())
        wide = len({cells[0] for cells in rows}) < len(rows)
        names = numbered([" | ".join(cells[:1 + wide]) for cells in rows])
        for n, (row, cells) in enumerate(zip(names, rows), text.count("\n", 0, block.start()) + 3):
            found |= {(name, row, column): (n, cell)
                      for column, cell in zip(numbered(head), cells)}
    return found


def flat(nested: dict) -> dict[tuple[str, str, str], str]:
    return {(section, row, column): cell for section, rows in nested.items()
            for row, cells in rows.items() for column, cell in cells.items()}


def agree(figure: str, other: str) -> bool:
    """Is a figure another one, as it stands or rounded? A sign, or a unit left out, is no matter."""
    (a, unit), (b, its) = ((f.lstrip("+-−").replace(",", "").split(" ", 1) + [""])[:2]
                           for f in (figure, other))
    kind = lambda u: {"s": "second", "tok/s": "tokens a second"}.get(u, u.rstrip("s"))
    digits = len(a.partition(".")[2])
    return (not (unit and its) or kind(unit) == kind(its)) and (
        a == b or "e" not in a + b and f"{float(b):.{digits}f}" == f"{float(a):.{digits}f}")


def pool(numbers: dict, page: str, row: str = "") -> list[str]:
    """The figures of a page's tables, in cells' or columns' units, and of its sourceless prose."""
    entry, found = numbers.get(page, {}), []
    cells = flat(entry["tables"]) if "tables" in entry else {
        at: cell for at, (_, cell) in tables((ROOT / page).read_text()).items()}
    for (_, name, column), cell in cells.items():
        if not row or name == row or name.startswith(f"{row} |"):
            own, unit = [f for _, f in figures(cell)], re.search(rf"(?<!\w){UNIT}", column)
            found += own if any(" " in f for f in own) else [
                f"{n} {unit[0] if unit else ''}".strip() for n in re.findall(NUMBER, cell)]
    return found + [f for source, each in entry.get("prose", []) if not row
                    and not PAGE.fullmatch(source) for f in each]


def has(numbers: dict, source: str, figure: str) -> bool:
    """Does what a source names have that figure? Of what is no page nobody here can tell."""
    named = PAGE.fullmatch(source)
    page, row = named.groups() if named else ("", "")
    if not page:
        return source not in ("", "?")
    return any(agree(figure, other) for other in pool(numbers, page, row or ""))


def check_page(numbers: dict, page: str, text: str) -> list[str]:
    """What is wrong with a page, one line each: page:line, the number, what it should be."""
    entry, wrong = numbers.get(page, {}), []
    words = " ".join(text.split())
    wrong += [f"{page}:1: no longer says {said!r} ({what}); mend numbers.json or the page"
              for of in entry.get("measured", {}).values() for what, said in of.items()
              if " ".join(said.split()) not in words]
    if "tables" in entry:
        shown, taken = tables(text), flat(entry["tables"])
        for at in dict.fromkeys([*shown, *taken]):
            line, cell = shown.get(at, (1, None))
            if cell != taken.get(at):
                wrong.append(f"{page}:{line}: {' / '.join(at)}: the page has {cell!r}, "
                             f"numbers.json {taken.get(at)!r}")
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
    for line, figure, source in paired(figures(text), entry.get("prose", [])):
        if not line:
            wrong.append(f"{page}:1: {figure} ({source}) is gone from the page")
        elif not has(numbers, source, figure):
            wrong.append(f"{page}:{line}: {figure} has no source" if source in ("", "?") else
                         f"{page}:{line}: {figure} is not what {source} has")
    return wrong


def paired(found: list, prose: list, keep: bool = False) -> list[tuple[int, str, str]]:
    """(line, figure, source); line 0: gone; keep: one in another's place takes over its source."""
    known = [(figure, source) for source, each in prose for figure in each]
    match = difflib.SequenceMatcher(None, [f for f, _ in known], [f for _, f in found], False)
    pairs = []
    for kind, a, b, c, d in match.get_opcodes():
        same = kind == "equal" or keep and b - a == d - c
        pairs += [(*found[j], known[a + j - c][1] if same else "") for j in range(c, d)]
        pairs += [(0, *known[i]) for i in range(a, b) if not same]
    return pairs


def take(numbers: dict, page: str, text: str) -> None:
    """Put a page's cells and figures in place of what stood there; known sources stay."""
    entry = numbers.setdefault(page, {})
    if "tables" in entry:
        entry["tables"] = {}
        for (section, row, column), (_, cell) in tables(text).items():
            entry["tables"].setdefault(section, {}).setdefault(row, {})[column] = cell
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
    prose = []
    for line, figure, source in paired(figures(text), entry.get("prose", []), keep=True):
        source = source or (page if "tables" in entry and has(numbers, page, figure) else "?")
        if line and prose and prose[-1][0] == source:
            prose[-1][1].append(figure)
        elif line:
            prose.append([source, [figure]])
    entry["prose"] = prose


def pages() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *sorted(ROOT.glob(
        "docs/*.md")), *sorted(ROOT.glob("models/**/*.md"))) if not path.name.startswith("study")]


def written(x, indent: str = "") -> str:
    """JSON with a table's row, or a source's figures, on a line."""
    if isinstance(x, dict) and any(isinstance(v, dict | list) for v in x.values()):
        rows = [f"{indent} {json.dumps(k, ensure_ascii=False)}: {written(v, indent + ' ')}"
                for k, v in x.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(x, list) and x and isinstance(x[0], list):
        return "[\n" + ",\n".join(f"{indent} {written(v)}" for v in x) + f"\n{indent}]"
    return json.dumps(x, ensure_ascii=False)


if __name__ == "__main__":
    numbers = json.loads(FILE.read_text())
    if sys.argv[1:2] == ["--take"]:
        for page in sys.argv[2:]:
            take(numbers, page, (ROOT / page).read_text())
        FILE.write_text(written(numbers) + "\n")
    wrong = [w for page in pages() for w in check_page(numbers, page, (ROOT / page).read_text())]
    print("\n".join(wrong))
    sys.exit(bool(wrong))
