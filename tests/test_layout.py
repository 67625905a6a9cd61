"""The repository's own rules: who imports whom, what an import does, a README that stays true."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted(p.name for p in ROOT.glob("*.py"))
LEVELS = [("blas", "config", "answers"),
          ("fastexp", "tokenizer", "hub", "distributed", "parallel"),
          ("losses", "quant", "data"),
          ("model", "checks"), ("lora", "tasks", "drafts"),
          ("generate", "conversations"), ("lens", "grpo", "memory", "clean", "converse"),
          ("markovian", "run_folder", "judge"), ("gate",),
          ("eval",), ("train", "self_instruct"), ("fullsize",), ("bench",), ("growth",)]


def imports_of(name):
    tree = ast.parse((ROOT / name).read_text())
    modules = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    return {m.replace(".", "/") for m in modules} & {name[:-3] for name in [*FILES, *GATE]}


def test_arrows_point_one_way():
    level = {name: i for i, names in enumerate(LEVELS + GATE_LEVELS) for name in names}
    assert {f"{name}.py" for name in level} == {*FILES, *GATE}
    wrong = [(a, b) for a in level for b in imports_of(f"{a}.py") if level[b] >= level[a]]
    assert not wrong


def test_a_wing_stands_alone():
    """Training loads nothing of the gate, and the gate nothing of the studies or benchmarks."""
    others = {"study", "findings", "results", "markovian_results", "probe", "perturb", "tasks",
              "bench", "growth", "fullsize"}
    assert not [(name, other) for name in GATE for other in imports_of(name) & others]
    code = "import sys, train; sys.exit(any(m.split('.')[0] == 'gate' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", [*FILES, *GATE])
def test_file_rules(name):
    """An opening that teaches, no project import inside a function, `import blas` before mlx."""
    source = (ROOT / name).read_text()
    tree = ast.parse(source)
    assert len((ast.get_docstring(tree) or "").split()) >= 12
    inner = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)
             if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not inner
    if name != "blas.py" and "import mlx" in source:
        assert 0 < source.index("\nimport blas") < source.index("import mlx")


def test_report_is_ground_and_the_root_imports_no_study():
    """report/ imports ground alone, study/ no other wing, and no file of the root study/."""
    def top(path):
        nodes = [n for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        return {m.split(".")[0] for m in [*names, *(n.module for n in nodes
                                                    if isinstance(n, ast.ImportFrom))]}
    ours = {p.stem for p in ROOT.glob("*.py")} | {"engine", "files", "report", "study", "gate",
                                                  "bench", "tasks"}
    for path in (ROOT / "report").glob("*.py"):
        assert top(path) & ours <= {"config", "engine", "files", "report"}, path
        assert len(path.read_text().splitlines()) <= 400
    for path in (ROOT / "study").glob("*.py"):
        assert not top(path) & {"gate", "bench"}, path
        assert len((ast.get_docstring(ast.parse(path.read_text())) or "").split()) >= 12, path
    assert not [p for p in ROOT.glob("*.py") if "study" in top(p)]


def test_importing_has_no_effect():
    """No output, no seed, no file: all files imported in a process of their own."""
    modules = [name[:-3] for name in FILES]
    modules += [f"{p.parent.name}.{p.stem}" for folder in ("report", "study")
                for p in (ROOT / folder).glob("*.py")]
    code = f"import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())


def test_readme_line_counts_and_files():
    readme = (ROOT / "README.md").read_text()
    table = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", readme, re.M))
    assert table.keys() == {*FILES, *GATE}
    wrong = {n: len((ROOT / n).read_text().splitlines()) for n, lines in table.items()
             if int(lines) != len((ROOT / n).read_text().splitlines())}
    assert not wrong, f"README's file table is out of date: {wrong}"
    for config in re.findall(r"`(\w+\.yaml)`", readme):
        assert (ROOT / "configs" / config).exists() or config == "config.yaml", config


WINGS = ("tasks", "bench")


def imported(path):
    """The first names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
    return names


def test_wings_are_imported_by_nobody_else():
    """Training must run without them: what a wing makes goes through files."""
    for name in FILES:
        assert not imported(ROOT / name) & set(WINGS), name
    for wing in WINGS:
        for path in (ROOT / wing).rglob("*.py"):
            assert not imported(path) & (set(WINGS) - {wing}), path
            assert len((ast.get_docstring(ast.parse(path.read_text())) or "").split()) >= 12, path
