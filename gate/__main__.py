"""Before you train: is there a gap? The base must fail what the instruct model can do.

A training run once taught a 32B base to follow instructions. It already could: the score counted
characters, and 81 % became 99 %; recounted, 100 % stood against 99. So a base counts by the *best*
of several formats, two kinds of scorer have to agree, what has to hold is written down before the
first reply, and `train.py` asks for the verdict (`require_gate: FOLDER/gate.json`).

    python -m gate                                   # configs/gate_tiny.yaml
    python -m gate configs/gate_tiny.yaml labels=runs/gate_tiny/spotcheck.jsonl    # signed off
    python -m gate configs/gate_tiny.yaml limit=190 replies=runs/gate_tiny out=runs/gate_more

Read in this order: checks, drafts, conversations (the benchmark), clean (does a prompt reach a base
untouched?), replies, judge, verdict, plan, evaluate; here is what a person reads. self_instruct
writes training data.
"""
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)

from config import run_main
from files.disk import write_text
from files.keys import Stopped
from files.options import Parser
from files.run_folder import UNSIGNED
from gate.evaluate import run_gate
from gate.judge import DRAWN, LEAST_EACH, LEAST_LABELS
from report.gate_page import details, screen


def next_steps(report: dict) -> list[str]:
    """What to do about a verdict."""
    folder, verdict = report["config"]["out"], report.get("verdict")
    if verdict == "GO":
        return [f"train with require_gate: {folder}/gate.json"]
    if verdict == "GO, not signed off":
        return [f"put \"pass\" or \"fail\" for \"human\" in {folder}/spotcheck.jsonl ({DRAWN} "
                f"conversations; {LEAST_LABELS} labels with {LEAST_EACH} of each are the least)",
                f"run it again with labels={folder}/spotcheck.jsonl; unsigned, training needs "
                f"require_gate: {UNSIGNED}{folder}/gate.json"]
    if verdict == "NO-GO":
        refuted = [{r["rule"] for r in rules if r["holds"] == "no"}
                   for rules in report["rules"].values()]
        if all(rule.startswith("alternative") for rule in set.intersection(*refuted)):
            return ["do not train for this: the alternative base can do it, so the gap is this "
                    "base's own; take another task, or a harder benchmark"]
        return ["do not train for this: the base can do it, or the instruct model cannot; take "
                "another task, or a harder benchmark"]
    if verdict is None:
        return ["name an instruct model for a verdict"]
    needed = max((r["needed"] for rules in report["rules"].values() for r in rules
                  if r["needed"] and r["holds"] == "open"), default=0)
    more = []
    if needed > report["benchmark"]["available"]:
        more = [f"ask more: `python -m gate.conversations make FILE n={needed}` draws them"
                if report["benchmark"]["drawn"] else
                f"write more conversations: {needed} are needed, the benchmark has "
                f"{report['benchmark']['available']}"]
    elif needed:
        more = [f"ask more, a second look with limits of half the chance: limit={needed} "
                f"replies={folder} out={folder}_more"]
    return [*more, f"read {folder}/gate.md, three conversations of each condition first",
            "mend what the reasons name, and give another out beside this one: it is another look, "
            "with limits of half the chance"]


def main(argv: list[str]) -> None:
    """Exit code 0 for a GO that people signed, or where there is nothing to decide; else raises
    Stopped, code 3."""
    parser = Parser(prog="python -m gate", description="Base against instruct model on a benchmark "
                    "of conversations, before a training run.")
    parser.add_argument("config", nargs="?", default="configs/gate_tiny.yaml",
                        help="a gate's YAML file: configs/gate_tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of that file")
    args = parser.parse_args(argv)
    report = run_gate(args.config, args.overrides)
    folder = report["config"]["out"]
    write_text(Path(folder) / "gate.md", details(report))
    print(f"{screen(report, next_steps(report))}\n\nwrote {folder}/gate.md, gate.json, plan.json, "
          "outcomes.jsonl, disagreements.jsonl, spotcheck.jsonl")
    if report.get("verdict", "GO") != "GO":
        raise Stopped(f"{folder}: {report['verdict']}; do not train on this yet")


if __name__ == "__main__":
    run_main(main)
