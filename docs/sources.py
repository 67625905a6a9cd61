"""Every measured number of README, docs/ and models/ has a source, which docs/numbers.json names.

    python docs/sources.py                       # what has none: page, line, number
    python docs/sources.py --take docs/speed.md  # after measuring anew: that page's numbers

A *figure* is a number in digits that has a unit (%, points, nats, GiB, seconds, times, ...), a
decimal point or an exponent, or stands in an interval's brackets. Numbers joined by a comma, "and",
"to" or "against" share the unit behind the last. Settings count too (a weight of 0.2): their source
says where. Not read: code quotes, command lines, versions, what include.py and bench.page write.

numbers.json holds a page's

    measured   {section or "": {command, hardware, seeds}}, in words that the page has too
    tables     {section: {row: {column: cell}}}: the page has the same cells
    prose      [[source, [figure, ...]], ...] in the page's order, tables too if it has none above

and a source is `PAGE` (a table of it has that number and unit, maybe with more digits, or prose of
it that no page is the source of), `PAGE: ROW` (that row), `set: FILE` (the file has the number), or
else what measured it: a command, a test, `once, DATE`, `published, WHERE`. docs/study.md and its
appendix are left to tests/test_study.py, which writes them anew.
"""
import difflib
import functools
import json
import re
import sys
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
TABLE = re.compile(r"^#+ (.*)|^\|.*\n(?:\|.*(?:\n|$))+", re.M)
PAGE = re.compile(r"((?:README|docs/\w+|models/[\w/]+)\.md)(?:: (.*))?")


def blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def figures(text: str) -> list[tuple[int, str]]:
    """(line, "97.4 %") of each figure, in order."""
    text = FENCE.sub(lambda m: blank(m) if re.match(r"python|text run|text bench", m[1]) else
                     COMMAND.sub(blank, m[0]), text)
    text = CODE.sub(blank, text)
    inside = {i for m in INTERVAL.finditer(text) for i in range(*m.span())}
    return [(text.count("\n", 0, m.start()) + 1, f"{m[1]} {m[2] or m[3] or ''}".strip())
            for m in FIGURE.finditer(text)
            if m[2] or m[3] or re.search(r"[.e]", m[1]) or m.start() in inside]


def tables(text: str) -> dict[tuple[str, str, str], tuple[int, str]]:
    """{(section, row, column): (line, cell)}; a row is named by one cell, or two where need be."""
    def once(names: list[str]) -> list[str]:     # [a, b, a] -> [a, b, a (2)]
        nth = [names[:i].count(name) + 1 for i, name in enumerate(names)]
        return [name if n == 1 else f"{name} ({n})" for name, n in zip(names, nth)]

    found, heads, blocks = {}, [""], []
    for match in TABLE.finditer(FENCE.sub(blank, text)):
        if match[1]:
            heads.append(match[1])
        else:
            blocks.append((heads[-1], match))
    for section, (_, match) in zip(once([head for head, _ in blocks]), blocks):
        head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                          for line in match[0].splitlines())
        named = 1 + (len({cells[0] for cells in rows}) < len(rows))
        names = once([" | ".join(cells[:named]) for cells in rows])
        first = text.count("\n", 0, match.start()) + 3      # below the head and its rule
        found |= {(section, name, column): (line, cell)
                  for line, (name, cells) in enumerate(zip(names, rows), first)
                  for column, cell in zip(once(head)[named:], cells[named:])}
    return found


def taken(entry: dict) -> dict[tuple[str, str, str], str]:
    return {(section, row, column): cell for section, rows in entry["tables"].items()
            for row, cells in rows.items() for column, cell in cells.items()}


def prose_of(entry: dict, text: str) -> list[tuple[int, str]]:
    """The figures for which the page's tables in numbers.json do not answer."""
    return figures(re.sub(r"^\|.*", "", text, flags=re.M) if "tables" in entry else text)


def agree(figure: str, other: str) -> bool:
    """Is a figure another one, as it stands or rounded? Signs and units left out do not matter."""
    (a, unit), (b, its) = ((f.lstrip("+-−").replace(",", "").split(" ", 1) + [""])[:2]
                           for f in (figure, other))
    digits = len(a.partition(".")[2])
    a, b = float(a), float(b)
    same = a == b or "e" not in figure and f"{b:.{digits}f}" == f"{a:.{digits}f}"
    return same and (not unit or not its or unit[0] == its[0])      # s, seconds


def offered(numbers: dict, source: str) -> list[str] | None:
    """The figures that a source has; None of a command or a date, which are only named."""
    if file := re.fullmatch(r"set: ([\w/]+\.(?:py|yaml))", source):
        held = [float(n.replace(",", "")) for n in re.findall(NUMBER, (ROOT / file[1]).read_text())]
        return [f"{n:g}" for n in held] + [f"{100 * n:g} %" for n in held]
    if not (named := PAGE.fullmatch(source)):
        return None if source != "?" else []
    page, row = named.groups()
    entry = numbers.get(page, {})
    cells = taken(entry) if "tables" in entry else {
        at: cell for at, (_, cell) in tables((ROOT / page).read_text()).items()}
    found = [f for by, each in entry.get("prose", []) if not row and not PAGE.fullmatch(by)
             for f in each]
    for (_, name, column), cell in cells.items():
        if not row or name == row or name.startswith(f"{row} |"):
            own, unit = [f for _, f in figures(cell)], re.search(rf"(?<!\w){UNIT}", column)
            found += own if any(" " in f for f in own) else [
                f"{n} {unit[0] if unit else ''}".strip() for n in re.findall(NUMBER, cell)]
    return found


def paired(found: list, prose: list, keep: bool = False) -> list[tuple[int, str, str]]:
    """(line, figure, source); line 0: gone; keep: one in another's place takes over its source."""
    known = [(figure, source) for source, each in prose for figure in each]
    match = difflib.SequenceMatcher(None, [f for f, _ in known], [f for _, f in found], False)
    pairs = []
    for kind, a, b, c, d in match.get_opcodes():
        same = kind == "equal" or keep and b - a == d - c
        pairs += [(*found[j], known[a + j - c][1] if same else "?") for j in range(c, d)]
        pairs += [(0, *known[i]) for i in range(a, b) if not same]
    return pairs


def check_page(numbers: dict, page: str, text: str) -> list[str]:
    """What is wrong with a page, one line each: page:line, the number, what it should be."""
    entry, words, wrong = numbers.get(page, {}), " ".join(text.split()), []
    wrong += [f"{page}:1: no longer says {said!r}, its {what} in numbers.json"
              for of in entry.get("measured", {}).values() for what, said in of.items()
              if said not in words]
    if "tables" in entry:
        shown, ours = tables(text), taken(entry)
        wrong += [f"{page}:{shown.get(at, [1])[0]}: {' / '.join(at)}: the page has "
                  f"{shown.get(at, [1, None])[1]!r}, numbers.json {ours.get(at)!r}"
                  for at in dict.fromkeys([*shown, *ours])
                  if shown.get(at, [1, None])[1] != ours.get(at)]
    offer = functools.cache(functools.partial(offered, numbers))
    for line, figure, source in paired(prose_of(entry, text), entry.get("prose", [])):
        if not line:
            wrong.append(f"{page}:1: {figure} ({source}) is gone from the page")
        elif offer(source) is not None and not any(agree(figure, f) for f in offer(source)):
            wrong.append(f"{page}:{line}: {figure} has no source" if source == "?" else
                         f"{page}:{line}: {figure} is not what {source} has")
    return wrong


def take(numbers: dict, page: str, text: str) -> None:
    """Put a page's cells and figures in place of what stood there; known sources stay."""
    entry = numbers.setdefault(page, {})
    if "tables" in entry:
        entry["tables"] = {}
        for (section, row, column), (_, cell) in tables(text).items():
            entry["tables"].setdefault(section, {}).setdefault(row, {})[column] = cell
    prose = []
    for line, figure, source in paired(prose_of(entry, text), entry.get("prose", []), keep=True):
        if line and prose and prose[-1][0] == source:
            prose[-1][1].append(figure)
        elif line:
            prose.append([source, [figure]])
    entry["prose"] = prose


def written(x, indent: str = "") -> str:
    """JSON with a table's row, or a source's figures, on a line."""
    if isinstance(x, dict) and any(isinstance(v, dict | list) for v in x.values()):
        rows = [f"{indent} {json.dumps(k, ensure_ascii=False)}: {written(v, indent + ' ')}"
                for k, v in x.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(x, list) and x and isinstance(x[0], list):
        return "[\n" + ",\n".join(f"{indent} {written(v)}" for v in x) + f"\n{indent}]"
    return json.dumps(x, ensure_ascii=False)


def pages() -> dict[str, str]:
    """{page: text} of all that is held here."""
    fetched = ROOT / "models" / "smollm2"       # not ours
    paths = (ROOT / "README.md", *sorted([*ROOT.glob("docs/*.md"), *(
        path for path in ROOT.glob("models/**/*.md") if fetched not in path.parents)]))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths
            if not path.name.startswith("study")}


if __name__ == "__main__":
    numbers, texts = json.loads(FILE.read_text()), pages()
    if sys.argv[1:2] == ["--take"]:
        for page in sys.argv[2:]:
            take(numbers, page, texts[page])
        FILE.write_text(written(numbers) + "\n")
    wrong = [line for page, text in texts.items() for line in check_page(numbers, page, text)]
    print("\n".join(wrong))
    sys.exit(bool(wrong))
