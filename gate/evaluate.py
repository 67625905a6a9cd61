"""The whole of a gate: replies, scores, verdict, each kept as files of one folder.

Scoring is apart from generating: other scorers, judges or thresholds generate nothing anew, and a
run that was broken off goes on behind the last part it wrote.
"""
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)

from checkpoint import load_base, load_checkpoint
from files.disk import append_text, begin_folder, grow, json_lines, read_json_lines, write_text
from files.run_folder import hash_model, provenance
from gate import judge
from gate.clean import check_base
from gate.conversations import Conversation, read_benchmark
from gate.replies import PART, answer, score, summarize_scores, transcript
from gate.verdict import ROLES, GateConfig, comparisons, decide, length_warnings, load_gate

# what replies depend on, beside benchmark and models: other values are another evaluation
GENERATION = ("limit", "max_reply_tokens", "bits")
ANOTHER = "give another out, such as out=runs/gate_again"


# --- the folder, and the models' replies
def begin(cfg: GateConfig, sha: str) -> dict[str, dict]:
    """Make or re-open the folder; the models by role: {role: {name, weights, tokenizer, clean}}.

    raises   BadInput where a base is none or its prompts do not reach it untouched, and where
             benchmark, models or what replies depend on changed since the folder was begun
    """
    models = {}
    about = {key: getattr(cfg, key) for key in GENERATION} | {"SHA-256 of benchmark": sha}
    for role in ROLES:
        name = getattr(cfg, role)
        if not name:
            continue
        models[role] = {"name": name, **hash_model(name)}
        about |= {f"SHA-256 of {role}'s {part}": models[role][part]
                  for part in ("weights", "tokenizer")}
        if role != "instruct":
            models[role]["clean"] = check_base(name)
            models[role]["clean"]["template_applied"] = "chat" in getattr(cfg, f"{role}_templates")
    begin_folder(Path(cfg.out), about, ANOTHER)
    return models


def load_model(name: str, bits: int | None):
    """A run as it was trained, or a model in so many bits; with its tokenizer."""
    if (Path(name) / "config.yaml").exists():
        return load_checkpoint(name)[:2]
    return load_base(name, bits=bits)


def replies_of(cfg: GateConfig, role: str,
               conversations: list[Conversation]) -> dict[str, list[dict]]:
    """One role's replies in each of its formats, {ROLE-TEMPLATE: rows}."""
    load = functools.cache(load_model)      # not before the first missing reply

    def answer_part(template: str, rows: list[dict], n: int) -> list[dict]:
        return answer(*load(getattr(cfg, role), cfg.bits), conversations[len(rows):n], template,
                      cfg.max_reply_tokens)

    replies = {}
    for template in dict.fromkeys(getattr(cfg, f"{role}_templates")):
        path = Path(cfg.out) / f"replies_{role}-{template}.jsonl"
        replies[f"{role}-{template}"] = grow(
            path, PART, "id", [c.id for c in conversations],
            functools.partial(answer_part, template), f"other conversations; {ANOTHER}")
    return replies


# --- the judge's part
def collect_verdicts(cfg: GateConfig, conversations: list[Conversation],
                     replies: dict[str, list[dict]]) -> dict[str, dict[tuple[str, int], str]]:
    """The judge's verdict on each scored turn: {condition: {(id, turn): verdict}}. Kept in
    judge_*.jsonl by a hash of judge, prompt and reply: only what is new is asked."""
    template, letters = judge.load_prompt(cfg.judge_prompt), cfg.judge_letters
    is_endpoint = cfg.judge.startswith("http")
    settings = ([cfg.judge, cfg.judge_model] if is_endpoint
                else [cfg.judge, hash_model(cfg.judge), cfg.bits])
    asked, pairs = {name: {} for name in replies}, {}
    for name, rows in replies.items():
        for c, row in zip(conversations, rows):
            texts = [reply["text"] for reply in row["replies"]]
            for t, turn in enumerate(c.turns):
                if turn.scored:
                    pair = tuple(judge.fill_prompt(template, c, texts, t, letters, swapped)
                                 for swapped in (False, True))
                    stamp = hash_text(repr((settings, pair)))[:24]
                    asked[name][c.id, t], pairs[stamp] = stamp, pair
    path = Path(cfg.out) / f"judge_{hash_text(repr(settings))[:8]}.jsonl"
    known = {row.get("stamp"): row for row in read_json_lines(path)}
    missing = [stamp for stamp in pairs if stamp not in known]
    if missing:
        write_text(path, json_lines(known.values()))    # without what a kill has torn
        prompts = [pairs[stamp] for stamp in missing]
        if is_endpoint:
            verdicts = judge.judge_by_endpoint(cfg.judge, cfg.judge_model, prompts, letters)
        else:
            verdicts = judge.judge_locally(*load_model(cfg.judge, cfg.bits), prompts, letters)
        for stamp, verdict in zip(missing, verdicts):
            known[stamp] = {"stamp": stamp, "judge": cfg.judge, **verdict}
            append_text(path, json_lines([known[stamp]]))   # at once: it may have cost money
    return {name: {turn: judge.verdict_of(known[stamp], cfg.judge_unsure)
                   for turn, stamp in turns.items()} for name, turns in asked.items()}


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def judge_report(cfg: GateConfig, conversations: list[Conversation], replies: dict,
                 outcomes: dict[str, dict], judged: dict) -> dict:
    """Calibration against people, counts of what is no verdict; writes the spot check to label."""
    chats = {(name, c.id): transcript(c, row)
             for name, rows in replies.items() for c, row in zip(conversations, rows)}
    labels = judge.read_labels(cfg.labels, chats) if cfg.labels else {}
    judge.write_spotcheck(Path(cfg.out) / "spotcheck.jsonl", chats)
    flat = {(name, i): passed for name, cell in outcomes.items() for i, passed in cell.items()}
    counts = {name: {v: list(cell.values()).count(v) for v in ("pass", "fail", "unsure", "invalid")}
              for name, cell in judged.items()}
    return {"judge": cfg.judge, "turns": counts, "calibration": judge.calibrate(flat, labels)}


# --- the whole of it
def run_gate(path: str | Path, overrides: list[str] = ()) -> dict:
    """Replies, scores, verdict: writes gate.json and its neighbours, returns its content."""
    cfg = load_gate(path, overrides)
    conversations, sha = read_benchmark(cfg.benchmark)
    conversations = conversations[:cfg.limit]
    models, replies = begin(cfg, sha), {}
    for role in models:
        replies |= replies_of(cfg, role, conversations)     # one model at a time
    judged = collect_verdicts(cfg, conversations, replies) if "judge" in cfg.scorers else {}
    scores = {s: {name: score(conversations, rows, s, judged.get(name))
                  for name, rows in replies.items()} for s in cfg.scorers}
    outcomes = {s: {name: {row["id"]: row["passed"] for row in rows}
                    for name, rows in by_condition.items()} for s, by_condition in scores.items()}
    report = {"benchmark": {"path": cfg.benchmark, "sha256": sha,
                            "conversations": len(conversations)},
              "config": dataclasses.asdict(cfg), "models": models, "versions": provenance()}
    if "judge" in cfg.scorers:
        report["judge"] = judge_report(cfg, conversations, replies, outcomes["judge"], judged)
        if not report["judge"]["calibration"]["ok"]:
            # a judge that people have not confirmed does not head the report: it goes last
            cfg.scorers = (*(s for s in cfg.scorers if s != "judge"), "judge")
    report |= {"scorers": list(cfg.scorers), "conditions": {
        name: {s: summarize_scores(scores[s][name], replies[name]) for s in cfg.scorers}
        for name in replies}}
    if cfg.instruct:
        report |= decide(cfg, outcomes)
    report["paired"] = comparisons(cfg, outcomes[cfg.scorers[0]],
                                   {c.id: c.category for c in conversations},
                                   report.get("chosen", {}))
    report["warnings"] = length_warnings(outcomes, replies)
    write_outcomes(Path(cfg.out), conversations, replies, scores)
    write_text(Path(cfg.out) / "gate.json", json.dumps(report, indent=1) + "\n")
    return report


def write_outcomes(folder: Path, conversations: list[Conversation], replies: dict,
                   scores: dict[str, dict[str, list[dict]]]) -> None:
    """outcomes.jsonl: every conversation's outcome by scorer and condition; disagreements.jsonl."""
    outcomes, apart = [], []
    for k, c in enumerate(conversations):
        cells = {s: {name: rows[k]["passed"] for name, rows in part.items()}
                 for s, part in scores.items()}
        outcomes.append({"id": c.id, "category": c.category, "passed": cells})
        for name, rows in replies.items():
            said = {s: cells[s][name] for s in cells}
            if len(set(said.values())) > 1:
                apart.append({"condition": name, "id": c.id, "passed": said,
                              "why": {s: scores[s][name][k]["why"] for s in scores},
                              "chat": transcript(c, rows[k])})
    write_text(folder / "outcomes.jsonl", json_lines(outcomes))
    write_text(folder / "disagreements.jsonl", json_lines(apart))
