"""The one writer of documents: Markdown templates with numbers put in, none of them typed.

templates/study.md and markovian.md are RESULTS.md's two parts, training.md is docs/training.md.
"""
import os
import platform
import statistics
from pathlib import Path

from files.disk import write_text

TEMPLATES = Path(__file__).parent / "templates"
CHAINS_HEADING = "# Results: Markovian training"    # where RESULTS.md's second part begins


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


def write_results(path: Path, study: str | None = None, chains: str | None = None) -> None:
    """Write RESULTS.md: the study, then Markovian training. A part that is not given stays."""
    text = path.read_text() if path.exists() else ""
    old_study, heading, old_chains = text.partition(CHAINS_HEADING)
    study = study or old_study.rstrip("\n") + "\n"
    chains = chains or heading + old_chains
    write_text(path, study + (f"\n{chains}" if chains else ""))
