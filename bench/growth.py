"""Does anything grow faster than its work? Time and memory of a small model against six sizes.

    python -m bench.growth --json growth.json       # ten minutes on two cores
    python -m bench.growth --only tokens

Each point is bench's own side of a work in a process of its own. A curve's exponent is its slope
by least squares in log-log: 1 is linear, 2 quadratic. Beside it stands the exponent of the work's
own count of operations (limit.minimal_flops). Time may not grow faster than that, memory not faster
than that or linearly. (Slower is no feat: what a call costs in any case flattens a curve.) Memory
is the process' peak less what it held before the model was loaded.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.__main__ import SIZES
from bench.limit import minimal_flops
from bench.ours import llama_config, own_command, run_other, write_random_model
from config import run_main
from files.disk import read_json, write_text
from files.keys import BadInput
from files.model_folder import parse_args
from files.options import Parser

SHAPE = {"hidden": 256, "blocks": 4, "heads": 4, "kv_heads": 2, "mlp": 704, "vocabulary": 4096}
COUNT, TOLERANCE = 5, 0.15      # calls of a point; what an exponent may lie above another by noise
SWEEPS = {  # name: (work, values); the name is a key of SHAPE, or stands for one of SIZES[work]
    "tokens": ("sft", (64, 128, 256, 512)),
    "batch": ("sft", (8, 16, 32, 64)),
    "blocks": ("sft", (2, 4, 8, 16)),
    "vocabulary": ("sft", (4096, 16384, 32768, 65536)),
    "group": ("grpo", (4, 8, 16, 32)),
    "prompts": ("lens", (64, 128, 256, 512)),
}
SIZE_KEYS = {"batch": "rows", "prompts": "rows"}    # others are called the same


def fit_exponent(x: list[float], y: list[float]) -> float:
    """The slope of log y over log x by least squares. example  x 1, 2, 4; y 3, 12, 48 -> 2"""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure_point(name: str, value: int, shape: dict, count: int) -> dict:
    """{value, seconds, memory_gib, flops} of one size, in a process of its own."""
    work = SWEEPS[name][0]
    sizes, shape = dict(SIZES[work]), dict(shape)
    (shape if name in shape else sizes)[SIZE_KEYS.get(name, name)] = value
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), llama_config(*shape.values()))
        args = parse_args(read_json(Path(folder) / "config.json"), folder)
        command = own_command(work, folder, sizes, count)
        found = json.loads(run_other([sys.executable, *command]).splitlines()[-1])
    return {"value": value, "seconds": found["seconds"],
            # a page at least: what is smaller than the libraries' own need is not seen
            "memory_gib": max(found["peak_gib"] - found["before_gib"], 2 ** -18),
            "flops": minimal_flops(work, args, sizes)}


def judge(name: str, points: list[dict]) -> dict:
    """The curve with its exponents, and whether time and memory keep to their bounds."""
    of = lambda key: fit_exponent([p["value"] for p in points], [p[key] for p in points])
    flops, seconds, gib = of("flops"), of("seconds"), of("memory_gib")
    return {"name": name, "work": SWEEPS[name][0], "points": points, "time_exponent": seconds,
            "memory_exponent": gib, "work_exponent": flops,
            "time_ok": seconds <= flops + TOLERANCE,
            "memory_ok": gib <= max(flops, 1) + TOLERANCE}


def line(curve: dict) -> str:
    """One row: the exponents, and what grows too fast."""
    fast = [what for what in ("time", "memory") if not curve[f"{what}_ok"]]
    verdict = f"{' and '.join(fast)} FASTER than its work" if fast else "not faster than its work"
    values = [p["value"] for p in curve["points"]]
    return (f"{curve['work'] + ' by ' + curve['name']:18} {values[0]:6} - {values[-1]:6}   "
            f"time {curve['time_exponent']:5.2f}   memory {curve['memory_exponent']:5.2f}   "
            f"operations {curve['work_exponent']:5.2f}   {verdict}")


def main(argv: list[str]) -> None:
    parser = Parser(description="How time and memory grow with each size.")
    parser.add_output("--json", "the curves")
    parser.add_argument("--only", action="append", metavar="SIZE", help=", ".join(SWEEPS))
    args = parser.parse_args(argv)
    if wrong := [name for name in args.only or () if name not in SWEEPS]:
        raise BadInput(f"unknown size {', '.join(wrong)}; expected {', '.join(SWEEPS)}")
    curves = []
    for name in dict.fromkeys(args.only or SWEEPS):
        points = [measure_point(name, value, SHAPE, COUNT) for value in SWEEPS[name][1]]
        curves.append(judge(name, points))
        print(line(curves[-1]), flush=True)
    if args.json:
        write_text(Path(args.json), json.dumps({"shape": SHAPE, "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
