"""The one writer of documents: Markdown templates with numbers put in, none of them typed."""
import os
import platform
import statistics
from pathlib import Path
from string import Formatter

TEMPLATES = Path(__file__).parent / "templates"


def fields(template: str) -> set[str]:
    """The names in braces of a template."""
    text = (TEMPLATES / f"{template}.md").read_text()
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def fill(template: str, **fields) -> str:
    return (TEMPLATES / f"{template}.md").read_text().format(**fields)


def table(header: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def seeds_text(values: list[float], factor: float = 100, digits: int = 1) -> str:
    """The mean and each seed's. example  [.912, .93, .92] -> '92.1 (91.2, 93.0, 92.0)' """
    mean, *each = (f"{factor * v:.{digits}f}" for v in (statistics.mean(values), *values))
    return f"{mean} ({', '.join(each)})"


def cores_text() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
