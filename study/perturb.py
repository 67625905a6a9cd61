"""What a chain carries: damage it, and see what the answer loses; let other models read it.

Five kinds of damage at 20 to 100 %, in *characters* of the chain's text, after the Markovian paper
(2404.18988): delete (a random choice, the fraction exact), truncate_back and truncate_front (what
is left is the beginning, the end), digits and letters (each digit, each letter or digit, with that
probability by another one). A drop is log p(gold | chain) before minus after, and accuracy before
minus after, on the same problems. Where we differ: before and after are scored by one model
(prior_work.md), by the same path (text encoded anew), a replaced digit is never replaced by itself,
and every draw is seeded.

    python -m study.perturb --ckpt runs/markovian_sums           # how fragile its chains are
    python -m study.perturb --ckpt runs/markovian_sums --compare RUN2  # than another's
    python -m study.perturb --ckpt runs/markovian_sums --judge NAME2   # do others read them?

A run that hides the question should lose more than one that shows it: that difference, paired over
problems, is the *fragility*. A judge scores the run's chains and its base's, question hidden: what
it gains is what the chains tell a reader that was not trained with them.
"""
import json
import random
import string
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import numpy as np

from checkpoint import load_checkpoint
from config import Config, run_main
from files.disk import write_text
from files.keys import BadInput
from files.options import Parser
from lora import adapters_off
from markovian import greedy_answers, greedy_chains, score_chains
from model import Llama
from report import plot
from report.stats import bootstrap_mean, sign_flip
from text.arithmetic import Problem, evenly
from text.questions import Question, encode_question
from text.rows import load_split
from text.tokenizer import Tokenizer

KINDS = ("delete", "truncate_back", "truncate_front", "digits", "letters")
SEVERITIES = (0.2, 0.4, 0.6, 0.8, 1.0)


def perturb(text: str, kind: str, severity: float, rng: random.Random) -> str:
    """Damage a text's characters.

    example  "12 + 7 = 19" truncate_back 0.4 -> "12 + 7 "; digits 1.0 -> none of its digits is left
    """
    n = len(text)
    gone = round(severity * n)
    if kind == "truncate_back":
        return text[:n - gone]
    if kind == "truncate_front":
        return text[gone:]
    if kind == "delete":
        lost = set(rng.sample(range(n), gone))
        return "".join(c for i, c in enumerate(text) if i not in lost)
    pool = string.digits if kind == "digits" else string.ascii_lowercase + string.digits
    hit = string.digits if kind == "digits" else string.ascii_letters + string.digits
    other = lambda c: rng.choice([d for d in pool if d != c.lower()])
    return "".join(other(c) if c in hit and rng.random() < severity else c for c in text)


def measure(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
            questions: list[Question], texts: list[str], cfg: Config) -> dict[str, np.ndarray]:
    """log p(gold | chain), whether the answer is right, whether there is one: (N,) each."""
    chains = [tokenizer.encode_continuation(text) for text in texts]
    graded = greedy_answers(model, tokenizer, problems, questions, chains, cfg)
    return {"reward": score_chains(model, tokenizer, questions, chains),
            "correct": np.array([row["correct"] for row in graded], float),
            "invalid": np.array([row["invalid"] for row in graded], float)}


def chain_texts(model: Llama, tokenizer: Tokenizer, questions: list[Question],
                cfg: Config) -> list[str]:
    """One greedy chain a question, as text with the space it starts with."""
    lead = lambda text: text if text[:1].isspace() or not text else f" {text}"
    return [lead(c.text) for c in greedy_chains(model, tokenizer, questions, cfg)]


def damage_run(ckpt: str | Path, problems_wanted: int) -> dict:
    """Every kind and severity on one run's own chains; `drops` by (kind, severity), (N,) each."""
    model, tokenizer, cfg = load_checkpoint(ckpt)
    check_run(ckpt, cfg)
    problems = evenly(load_split(cfg, "test"), problems_wanted)
    if problems[0].wording == "continuation":
        raise BadInput(f"{ckpt} was trained on continuations of texts, which are not graded")
    questions = [encode_question(p, tokenizer, cfg.markovian, cfg.template) for p in problems]
    texts = chain_texts(model, tokenizer, questions, cfg)
    before, drops = measure(model, tokenizer, problems, questions, texts, cfg), {}
    for kind in KINDS:
        for severity in SEVERITIES:
            rng = random.Random(f"{kind} {severity}")
            damaged = [perturb(text, kind, severity, rng) for text in texts]
            after = measure(model, tokenizer, problems, questions, damaged, cfg)
            drops[kind, severity] = {"reward": before["reward"] - after["reward"],
                                     "correct": before["correct"] - after["correct"],
                                     "invalid": after["invalid"]}
    return {"ckpt": str(ckpt), "cfg": cfg, "model": model, "tokenizer": tokenizer,
            "problems": problems, "questions": questions, "texts": texts, "before": before,
            "drops": drops}


def check_run(ckpt: str | Path, cfg: Config | None) -> None:
    if cfg is None or cfg.method != "markovian":
        raise BadInput(f"{ckpt} is no run of method markovian; expected one that "
                       "`python train.py configs/markovian_sums.yaml` makes")


def summarize_damage(run: dict, other: dict | None) -> list[dict]:
    """Mean drops with bootstrap intervals over problems; paired differences to another run's."""
    rows = []
    for (kind, severity), drop in run["drops"].items():
        row = {"kind": kind, "severity": severity,
               **{f"{key}_drop": bootstrap_mean(drop[key]) for key in ("reward", "correct")},
               "invalid": bootstrap_mean(drop["invalid"])}
        if other:
            theirs = other["drops"][kind, severity]
            row |= {f"other_{key}_drop": bootstrap_mean(theirs[key])
                    for key in ("reward", "correct")}
            for key in ("reward", "correct"):
                difference = drop[key] - theirs[key]
                row[f"{key}_fragility"] = bootstrap_mean(difference) | {"p": sign_flip(difference)}
        rows.append(row)
    return rows


def cross_score(run: dict, judges: list[str]) -> list[dict]:
    """What each judge makes of the run's chains and of its base's: paired gains in nats.

    The question is hidden from every judge, whatever the run was trained with, and each encodes the
    chains' text with its own tokenizer. The first is the run's own base.
    """
    with adapters_off(run["model"]):
        base_texts = chain_texts(run["model"], run["tokenizer"], run["questions"], run["cfg"])
        gains = [gain_of("its own base", run["model"], run["tokenizer"], run, base_texts)]
    for name in judges:
        model, tokenizer, _ = load_checkpoint(name)
        gains.append(gain_of(name, model, tokenizer, run, base_texts))
    return gains


def gain_of(name: str, model: Llama, tokenizer: Tokenizer, run: dict,
            base_texts: list[str]) -> dict:
    problems, cfg = run["problems"], run["cfg"]
    hidden = [encode_question(p, tokenizer, True, cfg.template) for p in problems]
    own = measure(model, tokenizer, problems, hidden, run["texts"], cfg)
    base = measure(model, tokenizer, problems, hidden, base_texts, cfg)
    return {"judge": name, "reward_gain": bootstrap_mean(own["reward"] - base["reward"]),
            "correct_gain": bootstrap_mean(own["correct"] - base["correct"]),
            "correct": float(own["correct"].mean()), "p": sign_flip(own["reward"] - base["reward"])}


def print_report(report: dict) -> None:
    cell = lambda m, times=1: (f"{times * m['value']:6.2f} "
                               f"[{times * m['low']:.2f}, {times * m['high']:.2f}]")
    compared = "compare" in report
    other = f"; other: {report['compare']}" if compared else ""
    print(f"\n{report['ckpt']}: {report['n']} test problems, right "
          f"{100 * report['correct']:.1f} %; drops with 95 % bootstrap intervals{other}")
    print(f"  {'damage':<16}{'%':>4}  {'nats lost':<24}{'points lost':<26}"
          + (f"{'other: nats lost':<24}{'fragility, nats':<26}p" if compared else "no answer, %"))
    for row in report["damage"]:
        line = (f"  {row['kind']:<16}{100 * row['severity']:4.0f}  {cell(row['reward_drop']):<24}"
                f"{cell(row['correct_drop'], 100):<26}")
        if compared:
            line += (f"{cell(row['other_reward_drop']):<24}{cell(row['reward_fragility']):<26}"
                     f"{row['reward_fragility']['p']:.3g}")
        else:
            line += f"{100 * row['invalid']['value']:.1f}"
        print(line)
    print("\n  who reads the chains, question hidden: gain over the base's chains")
    for gain in report["judges"]:
        print(f"  {gain['judge']:<34}{cell(gain['reward_gain'])} nats   "
              f"{cell(gain['correct_gain'], 100)} points   right {100 * gain['correct']:.1f} %")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m study.perturb",
                                     description="Damage a run's chains; let others read them.")
    parser.add_argument("--ckpt", required=True, help="run folder of method markovian")
    parser.add_argument("--compare", metavar="RUN2", help="another such run, the same data")
    parser.add_argument("--judge", action="append", default=[],
                        help="run, model folder or Hub name")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_output("--json", "the report")
    parser.add_output("--png", "a picture of the drops")
    args = parser.parse_args(argv)
    if args.problems < 1:
        raise BadInput(f"--problems {args.problems}: expected at least 1")
    run = damage_run(args.ckpt, args.problems)
    other = damage_run(args.compare, args.problems) if args.compare else None
    if other and [p.prompt for p in other["problems"]] != [p.prompt for p in run["problems"]]:
        raise BadInput(f"{args.compare} was trained on other data than {args.ckpt}, so nothing can "
                       "be paired; expected two runs of the same data")
    report = {"ckpt": run["ckpt"], "n": len(run["problems"]),
              "correct": float(run["before"]["correct"].mean()),
              "reward": bootstrap_mean(run["before"]["reward"]),
              "damage": summarize_damage(run, other), "judges": cross_score(run, args.judge)}
    if other:
        report["compare"] = other["ckpt"]
    print_report(report)
    if args.json:
        write_text(Path(args.json), json.dumps(report, indent=1) + "\n")
    if args.png:
        plot.damage_curves(report, args.png)


if __name__ == "__main__":
    run_main(main)
