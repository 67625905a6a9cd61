"""The notebook docs/tour.ipynb: it runs, in time, and what it says holds of the outputs it shows.

    python tests/test_tour.py       run it anew and write its outputs into it (`make tour`)
"""
import base64
import importlib.util
import os
import re
import resource
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"
ready = importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel")
if not ready and not os.environ.get("CI"):
    pytest.skip("no nbclient with ipykernel; `make test` installs requirements-dev.txt",
                allow_module_level=True)
import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402


def execute(folder: Path):
    """The notebook with the outputs of a run in `folder`, as if it lay there."""
    notebook = nbformat.read(TOUR, as_version=4)
    client = NotebookClient(notebook, timeout=1800, coalesce_streams=True, record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


def texts_of(notebook) -> str:
    return "\n".join(output.text for cell in notebook.cells if cell.cell_type == "code"
                     for output in cell.outputs if output.output_type == "stream")


def check_claims(notebook):
    """What the prose says, by the printed numbers; and no cell without its outputs."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert all(cell.outputs for cell in cells[1:])      # the first only imports
    text = texts_of(notebook)
    # no block of the base says "add"; after training block 4 does
    base, trained = re.findall(r"^'add', token .*$", text, re.M)
    probs = [[float(p) for p in re.findall(r"(?:embed|L\d) (\d\.\d\d)", line)]
             for line in (base, trained)]
    assert len(probs[0]) == 9 and max(probs[0]) < 0.1 and probs[1][5] > 0.8
    seen = [(int(step), float(valid), float(top)) for step, valid, top in re.findall(
        r"step +(\d+) .* valid +([\d.]+) % +word top-1 at L4 +([\d.]+) %", text)]
    assert [step for step, _, _ in seen] == list(range(25, 301, 25))
    assert all(top > 99 for step, _, top in seen if step >= 50)
    accuracy = [float(p) for p in re.findall(r"differences right +([\d.]+) %", text)]
    assert min(valid for _, valid, _ in seen) < accuracy[0] < 85 < 95 < accuracy[1]
    turned = [tuple(map(int, row)) for row in re.findall(r"after L\d +(\d+) +(\d+)$", text, re.M)]
    assert len(turned) == 8 and 50 < turned[0][0] < 85
    assert all(direction <= 2 for direction, _ in turned[3:])
    assert all(noise <= 2 for _, noise in turned)


def test_the_outputs_that_are_committed():
    """They are there, small, of no machine in particular, and bear the prose out."""
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    check_claims(notebook)
    assert TOUR.stat().st_size < 100_000
    assert not re.search(r"/(home|root|Users|tmp|work)/", TOUR.read_text())
    picture, = (output.data["image/png"] for cell in notebook.cells if cell.cell_type == "code"
                for output in cell.outputs if output.output_type == "display_data")
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    for link in re.findall(r"\]\(([^)#:]+)\)", TOUR.read_text()):
        assert (TOUR.parent / link).exists(), link


def test_it_runs_in_three_minutes(tmp_path):
    """In a folder that looks like the project's, but for runs/: a user's own are left alone."""
    for path in ROOT.iterdir():
        if path.name != "runs" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    check_claims(execute(tmp_path))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of computing: what else runs on the machine does not count
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert (tmp_path / "runs" / "tour" / "emergence.html").exists() and seconds < 180


if __name__ == "__main__":
    nbformat.write(execute(TOUR.parent), TOUR)
