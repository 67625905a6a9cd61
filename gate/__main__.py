"""Before you train: is there a gap? The base must fail what the instruct model can do.

A training run once taught a 32B base to follow instructions. It already could: on raw prompts it
rambled, the score counted characters, and 81 % became 99 % with p = 2e-12; recounted, 100 % stood
against 99. So here a base is tried in several formats and counts by its *best*; at least two ways
of scoring have to agree, item by item and in their verdict; and the verdict is a file that
`train.py` asks for (`require_gate: FOLDER/gate.json`).

    python -m gate configs/gate_tiny.yaml            # replies, scores, verdict, gate.json
    python -m gate configs/gate_tiny.yaml judge=...  # scores anew, generates nothing anew
    python -m gate --paired runs/gate_tiny:base-raw runs/gate_tiny:base-lines

GO: every scorer finds the gap. NO-GO: every scorer measures a rate that refutes it. AMBIGUOUS: they
disagree, too much is undecided, or too little is there to say. All figures are printed in any case.
"""
import argparse

from config import BadInput, Stopped, run_main
from gate.evaluate import run_gate
from gate.report import compare_folders, print_comparison, print_gate


def main(argv: list[str]) -> None:
    """Exit code 0 for GO, or where there is nothing to decide; else raises Stopped, code 3."""
    parser = argparse.ArgumentParser(
        prog="python -m gate", description="Base against instruct model on a benchmark of "
        "conversations, before a training run.")
    parser.add_argument("config", nargs="?", help="a gate's YAML file, such as "
                        "configs/gate_tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of that file")
    parser.add_argument("--paired", nargs=2, metavar="FOLDER:CONDITION",
                        help="two conditions of finished gates on one benchmark")
    args = parser.parse_args(argv)
    if args.paired:
        print_comparison(" against ".join(args.paired), compare_folders(*args.paired))
        return
    if not args.config:
        raise BadInput("nothing to compare; give a gate's CONFIG, such as configs/gate_tiny.yaml, "
                       "or --paired FOLDER:CONDITION FOLDER:CONDITION")
    report = run_gate(args.config, args.overrides)
    print_gate(report)
    folder = report["config"]["out"]
    print(f"\nwrote {folder}/gate.json, outcomes.jsonl, disagreements.jsonl"
          + (", spotcheck.jsonl" if "judge" in report else ""))
    if report.get("verdict", "GO") != "GO":
        raise Stopped(f"{folder}: {report['verdict']}; do not train on this yet")


if __name__ == "__main__":
    run_main(main)
