"""Keeps docs/lecture.md true: its code comes from the source, its outputs from real runs.

    python docs/include.py        # the code blocks, written anew
    python docs/include.py run    # the outputs too: everything in the page is run again

What a block holds stands behind its three backticks:

    python code FILE NAME [from "TEXT" to "TEXT"][; FILE NAME ...]
                           a function's lines without its docstring, or part of it; several
    python try             what it prints follows as `#> ` lines. All share one session
    text run [lines A-B]   `$ COMMAND` and its output, or some lines of it
    text run-dual [...]    the same for a command that reads runs/dual_reward, after `make run`
"""
import ast
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "lecture.md"
DUAL = "runs/dual_reward"
BLOCK = re.compile(r"^```(?:python|text) (code|try|run-dual|run)\b(.*)\n((?:.*\n)*?)```$", re.M)


def code_of(words: str) -> str:
    """The lines of a function or method, such as "model.py Llama.head"; raises ValueError."""
    file, name, *part = shlex.split(words)
    source = (ROOT / file).read_text()
    node = ast.parse(source)
    for piece in name.split("."):
        found = [n for n in node.body if getattr(n, "name", None) == piece]
        if not found:
            raise ValueError(f"{file} has no {name}; mend docs/lecture.md")
        node = found[0]
    docstring = node.body[0] if ast.get_docstring(node) else None
    drop = range(docstring.lineno, docstring.end_lineno + 1) if docstring else ()
    lines = [line for n, line in enumerate(source.splitlines(), 1)
             if node.lineno <= n <= node.end_lineno and n not in drop]
    if part:
        first = next(i for i, line in enumerate(lines) if part[1] in line)
        last = next(i for i, line in enumerate(lines) if part[3] in line and i >= first)
        lines = lines[first:last + 1]
    return textwrap.dedent("\n".join(lines)) + "\n"


def renewed(page: str, renew) -> str:
    """The page with each block's content replaced by renew(kind, words, content)."""
    def replace(block: re.Match) -> str:
        fence = block[0].split("\n", 1)[0]
        return f"{fence}\n{renew(block[1], block[2].strip(), block[3])}```"
    return BLOCK.sub(replace, page)


def with_code(page: str) -> str:
    """The page with each code block as the source has it."""
    def renew(kind, words, content):
        if kind != "code":
            return content
        first, *others = words.split("; ")
        # a name above each part but the first, which the text names
        named = [f"# ... {shlex.split(part)[1]}\n{code_of(part)}" for part in others]
        return code_of(first) + "".join(named)
    return renewed(page, renew)


def blocks(page: str, kind: str) -> list[tuple[str, str, str]]:
    """(code or command, output on the page, words) of each block of a kind, in order."""
    found = []
    for block in BLOCK.finditer(page):
        lines = block[3].splitlines(keepends=True)
        if block[1] == kind == "try":
            said = [line.removeprefix("#> ") for line in lines if line.startswith("#>")]
            found.append(("".join(line for line in lines if not line.startswith("#>")),
                          "".join(said), ""))
        elif block[1] == kind:
            found.append((lines[0].removeprefix("$ ").strip(), "".join(lines[1:]), block[2]))
    return found


def run_tries(sources: list[str]) -> list[str]:
    """What each prints, all in one process, as if typed one after the other."""
    script = "print('\\0')\n".join(sources)
    done = subprocess.run([sys.executable, "-"], input=script, cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [re.sub(r" +$", "", said, flags=re.M) for said in done.stdout.split("\0\n")]


def run_command(command: str, words: str = "") -> str:
    """What a command prints: `.venv/bin/python` is this Python; words: "lines 1-12" of it."""
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr}")
    lines = [f"{line.rstrip()}\n" for line in done.stdout.splitlines()]
    if words:
        first, last = map(int, words.split()[-1].split("-"))
        lines = lines[first - 1:last]
    return "".join(lines)


def with_outputs(page: str) -> str:
    """The page with everything in it run again; what reads runs/dual_reward, where that is."""
    tries = blocks(page, "try")
    printed = iter(zip(tries, run_tries([code for code, _, _ in tries])))

    def renew(kind, words, content):
        if kind == "try":
            (code, _, _), said = next(printed)
            return code + "".join(f"#> {line}\n" for line in said.splitlines())
        if kind == "run" or kind == "run-dual" and (ROOT / DUAL).is_dir():
            first = content.split("\n", 1)[0]
            return f"{first}\n{run_command(first.removeprefix('$ '), words)}"
        return content
    return renewed(page, renew)


if __name__ == "__main__":
    page = with_code(PAGE.read_text())
    PAGE.write_text(with_outputs(page) if sys.argv[1:] == ["run"] else page)
