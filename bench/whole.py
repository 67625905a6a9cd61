"""What a user waits for: train.py from the command to its last line, and which part takes how long.

    python -m bench.whole                                               # what `make run` does
    python -m bench.whole configs/smollm2_dual_reward.yaml --json whole.json    # and `make real`

Told from outside, by when its lines come and by its own record of each step, so that nothing in the
training loop is there to be measured.

    start     imports, weights, data: up to the first line
    steps     gradients and updates, by metrics.jsonl
    looks     validation, lens and saves on the way
    report    the model and its base on all test problems, pictures, pages
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.ours import ROOT
from config import run_main
from files.disk import read_json_lines, write_text
from files.keys import BadInput
from files.options import Parser

PARTS = ("start", "steps", "looks", "report")


def time_whole(config: str, words: list[str] = ()) -> dict[str, float]:
    """{each of PARTS, "whole"} in seconds of one run in a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", config, *words, f"run_dir={folder}/run"]
        begin, first, testing, line = time.perf_counter(), None, None, "no message"
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"})
        for line in process.stdout:
            first = first or time.perf_counter()
            if line.startswith("testing on all"):
                testing = time.perf_counter()
        if process.wait() or not testing:
            raise BadInput(f"train.py {config} did not finish: {line.strip()}")
        end = time.perf_counter()
        steps = sum(row["seconds"] for row in read_json_lines(Path(folder, "run", "metrics.jsonl"))
                    if "grad_norm" in row)
    return {"start": first - begin, "steps": steps, "looks": testing - first - steps,
            "report": end - testing, "whole": end - begin}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.whole", description="A user's whole wait, by part.")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml|key=value")
    parser.add_output("--json", "the seconds")
    args = parser.parse_args(argv)
    files = [word for word in args.words if "=" not in word]
    found = time_whole(files[0] if files else "configs/dual_reward.yaml",
                       [word for word in args.words if "=" in word])
    for part in PARTS:
        print(f"{part:<8}{found[part]:8.1f} s {100 * found[part] / found['whole']:6.1f} %")
    print(f"whole   {found['whole']:8.1f} s")
    if args.json:
        write_text(Path(args.json), json.dumps(found) + "\n")


if __name__ == "__main__":
    run_main(main)
