"""Scorers against real labels, offline: 5,276 solutions of GSM8K with whether they are right.

The file is example_model_solutions.jsonl of https://github.com/openai/grade-school-math (MIT): four
models' solutions of 1,319 problems. Three checkers of the final answer, and a judge if one is
named, are calibrated as `python -m gate ... labels=` calibrates a gate's scorers.

    python tests/gate_calibration.py FILE [JUDGE [N]]       # JUDGE reads N solutions, 200
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.blas  # noqa: E402, F401  (before mlx)

from gate.checks import check_turn  # noqa: E402
from gate.drafts import Conversation, Turn  # noqa: E402
from gate.evaluate import load_model  # noqa: E402
from gate.judge import LETTERS, calibrate, fill_prompt, judge_locally, load_prompt, verdict_of  # noqa: E402
from report.gate_page import interval  # noqa: E402
from report.stats import corrected_rate, wilson  # noqa: E402
from text.normal import normalise  # noqa: E402

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
NUMBER = r"-?\d+(?:\.\d+)?"


def read_solutions(path: Path) -> list[dict]:
    """[{model, id, question, answer, solution, right}]; the label is the file's own."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        problem = json.loads(line)
        answer = problem["ground_truth"].split("A: ")[-1].replace(",", "").strip()
        rows += [{"model": model, "id": f"{i:04}", "question": problem["question"],
                  "answer": answer, "solution": problem[model]["solution"],
                  "right": problem[model]["is_correct"]} for model in MODELS]
    return rows


def last_number(row: dict) -> bool:
    found = re.findall(NUMBER, normalise(row["solution"]).split("a: ")[-1])
    return bool(found) and float(found[-1]) == float(row["answer"])


def anywhere(row: dict) -> bool:
    """What `recall` does: the answer stands somewhere, in a step or at the end."""
    return check_turn([{"type": "recall", "values": [row["answer"]]}],
                      row["solution"]).verdict == "pass"


CHECKERS = {"last number": last_number, "answer named anywhere": anywhere,
            "5 to 500 characters": lambda row: 5 <= len(row["solution"]) <= 500}


def key(row: dict) -> tuple[str, str]:
    return row["model"], row["id"]


def judged(name: str, rows: list[dict]) -> dict:
    """A local judge's outcomes, {(model, id): passed or None}."""
    model, tokenizer = load_model(name, None)
    template, asked = load_prompt(""), []
    for row in rows:
        turn = Turn(row["question"], True, 0, f"the answer is {row['answer']}", row["answer"])
        one = Conversation(row["id"], "gsm8k", "gsm8k", "", 0, {}, (turn,))
        asked.append(tuple(fill_prompt(template, one, [row["solution"]], 0, LETTERS, swapped)
                           for swapped in (False, True)))
    word = {"pass": True, "fail": False}
    return {key(row): word.get(verdict_of(said, 1.0)) for row, said in zip(
        rows, judge_locally(model, tokenizer, asked, LETTERS))}


def report(name: str, outcomes: dict, labels: dict) -> dict:
    """One scorer's line: the first half of the labels calibrates, the second is corrected."""
    cell = calibrate(outcomes, labels)
    ids = sorted({i for _, i in labels})
    half = set(ids[:len(ids) // 2])
    first = calibrate(outcomes, {k: v for k, v in labels.items() if k[1] in half})
    rest = [k for k in labels if k[1] not in half and outcomes[k] is not None]
    fixed = corrected_rate(sum(outcomes[k] for k in rest), len(rest), first["right"],
                           first["wrong"])
    truth = wilson(sum(labels[k] for k in rest), len(rest))
    passed = wilson(sum(outcomes[k] for k in rest), len(rest))
    print(f"{name:<24}n {cell['n']:<6}kappa {interval(cell)}  sensitivity "
          f"{interval(cell['sensitivity'])}  specificity {interval(cell['specificity'])}\n"
          f"{'':<24}other half: passes {interval(passed)}, corrected {interval(fixed)}, truly "
          f"{truth['value'] or 0:.3f}  {'confirmed' if cell['ok'] else '; '.join(cell['why'][:3])}")
    return cell


def main(argv: list[str]) -> None:
    rows = read_solutions(Path(argv[0]))
    labels = {key(row): row["right"] for row in rows}
    for name, checker in CHECKERS.items():
        report(name, {key(row): checker(row) for row in rows}, labels)
    if argv[1:]:
        some = rows[::max(1, len(rows) // int(argv[2] if argv[2:] else 200))]
        report(f"judge {argv[1]}", judged(argv[1], some), {key(row): row["right"] for row in some})


if __name__ == "__main__":
    main(sys.argv[1:])
