"""Before you train: is there a gap? The base must fail what the instruct model can do.

A training run once taught a 32B base to follow instructions. It already could: the score counted
characters, and 81 % became 99 % with p = 2e-12; recounted, 100 % stood against 99. So here a base
is tried in several formats and counts by its *best*; at least two ways of scoring have to agree,
item by item and in their verdict; and the verdict is a file that `train.py` asks for
(`require_gate: FOLDER/gate.json`).

    python -m gate configs/gate_tiny.yaml            # replies, scores, verdict, gate.json
    python -m gate configs/gate_tiny.yaml judge=...  # scores anew, generates nothing anew
    python -m gate --paired runs/gate_tiny:base-raw runs/gate_tiny:base-lines

Read in this order: checks, drafts, conversations (the benchmark), clean (does a prompt reach a base
untouched?), replies, judge, verdict, evaluate, and here the tables for a person. self_instruct
writes training data.
"""
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)

from config import run_main
from files.disk import NAMES, OBJECT, REQUIRED, TEXT, read_fields, read_json, read_rows
from files.keys import BadInput, Stopped
from files.options import Parser
from gate.evaluate import run_gate
from gate.judge import LEAST_KAPPA, LEAST_LABELS, LEAST_LOW
from gate.verdict import GateConfig, compare, number
from report.stats import percent


def print_gate(report: dict) -> None:
    """Rates by condition and scorer, paired tests, rules, warnings, verdict."""
    about, scorers, conditions = report["benchmark"], report["scorers"], report["conditions"]
    print(f"\n{about['path']}: {about['conversations']} conversations, SHA-256 "
          f"{about['sha256'][:12]}; greedy; 95 % Wilson intervals over decided ones")
    for role, model in report["models"].items():
        clean = model.get("clean")
        state = ("" if not clean else "encoding is clean; -chat applies its own template"
                 if clean["template_applied"] else "prompts reach it untouched")
        print(f"  {role:<12}{model['name']}  weights {model['weights'][:12]}  {state}")
    print(f"\n  {'condition':<20}" + "".join(f"{s:<32}" for s in scorers)
          + "undecided   tokens  cut")
    for name, cells in conditions.items():
        rates = "".join(f"{percent(cells[s]['rate']):<32}" for s in scorers)
        undecided = "/".join(str(cells[s]["undecided"]) for s in scorers)
        first = cells[scorers[0]]
        print(f"  {name:<20}{rates}{undecided:<12}{first['median_tokens']:<8g}"
              f"{100 * first['cut']['value']:.0f} %")
    print(f"\n  by {scorers[0]}:")
    for name, cells in conditions.items():
        parts = (f"{c} {percent(v).strip()}"
                 for c, v in cells[scorers[0]]["by_category"].items())
        print(f"  {name:<20}{'  '.join(parts)}")
    print()
    for pair, test in report["paired"].items():
        print_comparison(pair, test)
    if "judge" in report:
        turns, c = report["judge"]["turns"].values(), report["judge"]["calibration"]
        print(f"  judge {report['judge']['judge']}: {sum(cell['unsure'] for cell in turns)} turns "
              f"unsure, {sum(cell['invalid'] for cell in turns)} without a verdict; against "
              f"people: {c['n']} labels, kappa {number(c['value'])}"
              + (" (trusted)" if c["ok"] else " (not trusted to head a report: "
                 f"{LEAST_LABELS} labels and kappa {LEAST_KAPPA}, surely above {LEAST_LOW}, are "
                 "needed; label spotcheck.jsonl)"))
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    if "verdict" in report:
        print_verdict(report)


def print_comparison(pair: str, test: dict) -> None:
    d = test["difference"]
    if d["value"] is None:
        print(f"  {pair}: no conversation that both decided")
    else:
        print(f"  {pair}: {100 * d['value']:+.1f} points [{100 * d['low']:+.1f}, "
              f"{100 * d['high']:+.1f}], n {test['n']}; only the first {test['only_first']}, only "
              f"the second {test['only_second']}; McNemar p {test['p']:.2g}, h {test['h']:+.2f}")


def print_verdict(report: dict) -> None:
    print(f"\n  {'rule':<36}{'wanted':>8}  " + "".join(f"{s:>14}" for s in report["scorers"]))
    for rules in zip(*(report["rules"][s] for s in report["scorers"])):
        cells = (f"{number(r['value']):>10} {'yes' if r['holds'] else 'NO':<3}" for r in rules)
        print(f"  {rules[0]['rule']:<36}{rules[0]['wanted']:>8g}  {''.join(cells)}")
    chosen = report["chosen"]
    gap = report["paired"][f"{chosen['base']} against {chosen['instruct']}"]
    print(f"  the design: {gap['n']} pairs find a gap just as large as wanted with power "
          f"{gap['design_power']:.3f}")
    for pair, a in report["agreement"].items():
        print(f"  {pair} agree: {number(a['lowest'])} in the condition where they do least, kappa "
              f"{number(a['pooled']['value'])}: {'yes' if a['holds'] else 'NO'}")
    print("\n" + "\n  ".join([report["verdict"], *report["reasons"]]))


REPORT = {"conditions": (OBJECT, REQUIRED), "scorers": (NAMES, REQUIRED),
          "benchmark": (OBJECT, REQUIRED)}
BENCHMARK = {"path": (TEXT, REQUIRED), "sha256": (TEXT, REQUIRED)}
OUTCOME = {"id": (TEXT, REQUIRED), "category": (TEXT, REQUIRED), "passed": (OBJECT, REQUIRED)}


def read_condition(word: str) -> tuple[dict, str, list[dict]]:
    """FOLDER:CONDITION of a finished gate: its report, the condition, outcomes.jsonl's rows."""
    folder, _, condition = word.rpartition(":")
    path = Path(folder or word) / "gate.json"
    report = read_json(path, f"--paired {word} to be FOLDER:CONDITION of a finished evaluation, "
                       "such as runs/gate_tiny:base-raw")
    read_fields(report, REPORT, str(path))
    read_fields(report["benchmark"], BENCHMARK, f"{path}: benchmark")
    if condition not in report["conditions"]:
        raise BadInput(f"{path.parent} has no condition {condition!r}; expected one of "
                       f"{', '.join(report['conditions'])}")

    def read(row: dict) -> dict:
        passed = read_fields(row, OUTCOME, "an outcome")["passed"]
        said = [passed[scorer][condition] for scorer in report["scorers"]]
        if not all(outcome in (True, False, None) for outcome in said):
            raise ValueError("each outcome is true, false or null")
        return row

    return report, condition, read_rows(path.parent / "outcomes.jsonl", read,
                                        "what a finished gate writes; run it again")


def compare_folders(first: str, second: str) -> dict:
    """FOLDER:CONDITION against FOLDER:CONDITION, by the first's heading scorer; raises BadInput."""
    sides = [read_condition(first), read_condition(second)]
    (report, _, rows), (other, _, _) = sides
    if report["benchmark"]["sha256"] != other["benchmark"]["sha256"]:
        raise BadInput(f"{first} and {second} answered different benchmarks "
                       f"({report['benchmark']['path']}, {other['benchmark']['path']}); a paired "
                       "test needs the same conversations: evaluate both on one")
    scorer = report["scorers"][0]
    if scorer not in other["scorers"]:
        raise BadInput(f"{second} was not scored by {scorer}; score both by the same")
    a, b = ({row["id"]: row["passed"][scorer][condition] for row in rows}
            for _, condition, rows in sides)
    return {"scorer": scorer, **compare(a, b, GateConfig(), {r["id"]: r["category"] for r in rows})}


def main(argv: list[str]) -> None:
    """Exit code 0 for GO, or where there is nothing to decide; else raises Stopped, code 3."""
    parser = Parser(prog="python -m gate", description="Base against instruct model on a benchmark "
                    "of conversations, before a training run.")
    parser.add_argument("config", nargs="?", help="a gate's YAML file: configs/gate_tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of that file")
    parser.add_argument("--paired", nargs=2, metavar="FOLDER:CONDITION",
                        help="two conditions of finished gates on one benchmark")
    args = parser.parse_args(argv)
    if args.paired:
        return print_comparison(" against ".join(args.paired), compare_folders(*args.paired))
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
