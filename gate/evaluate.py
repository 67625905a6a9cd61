"""The whole of a gate: replies, scores, verdict, each kept as files of one folder.

Scoring is apart from generating: other scorers, judges or thresholds generate nothing anew, and a
run that was broken off goes on behind the last part it wrote.
"""
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)

from checkpoint import load_base, load_checkpoint
from files.disk import append_text, json_lines, read_json_lines, write_text
from files.keys import BadInput
from files.run_folder import hash_model, provenance
from gate import judge
from gate.clean import check_base
from gate.conversations import Conversation, read_benchmark
from gate.jsonl import begin_folder, grow
from gate.replies import PART, answer, score, summarize_scores, transcript
from gate.settings import ROLES, GateConfig, load_gate
from gate.verdict import comparisons, decide, length_warnings

# what replies depend on: other values of these are another evaluation
GENERATION = ("limit", "max_reply_tokens", "bits")
START_OVER = "give another out, or overwrite=true to answer everything again"


# --- the folder
def open_evaluation(cfg: GateConfig, sha: str) -> dict:
    """Make or re-open the folder; returns its record: {generation, benchmark, models}.

    raises   BadInput where the benchmark or what replies depend on changed since its first run
    """
    folder, path = Path(cfg.out), Path(cfg.out) / "record.json"
    about = {"generation": {key: getattr(cfg, key) for key in GENERATION}}
    if cfg.overwrite and path.exists():
        for old in folder.glob("*.json*"):
            if old.name not in ("record.json", "spotcheck.jsonl"):  # people may have labelled it
                old.unlink()
        write_text(path, json.dumps(about, indent=1) + "\n")
    record = begin_folder(path, about, START_OVER)
    begun = record.setdefault("benchmark", {"path": cfg.benchmark, "sha256": sha})["sha256"]
    if begun != sha:
        raise BadInput(f"benchmark {cfg.benchmark} changed since {folder} was begun (SHA-256 "
                       f"{begun[:12]}, now {sha[:12]}): its replies answer other questions; "
                       f"put the file back, {START_OVER}")
    record.setdefault("models", {})
    return record


def identify_models(cfg: GateConfig, record: dict) -> list[str]:
    """The roles that have a model, whose hashes go into the record; BadInput before any answers."""
    roles = [role for role in ROLES if getattr(cfg, role)]
    for role in roles:
        name = getattr(cfg, role)
        hashes = hash_model(name)
        known = record["models"].setdefault(role, {"name": name, **hashes})
        if any(known[key] != value for key, value in hashes.items()):
            raise BadInput(f"{role} = {name} has other weights or another tokenizer than when "
                           f"{cfg.out} was begun ({known['name']}); {START_OVER}")
    return roles


def replies_of(cfg: GateConfig, record: dict, role: str, conversations: list[Conversation],
               ) -> dict[str, list[dict]]:
    """One role's replies in each of its formats, {ROLE-TEMPLATE: rows}.

    Its model is loaded only if some are missing, and a base is checked before its first reply.
    """
    folder, name, known = Path(cfg.out), getattr(cfg, role), record["models"][role]
    loaded = []     # model and tokenizer, from the first missing reply on

    def answer_part(template: str, first: int, last: int) -> list[dict]:
        if not loaded:
            loaded.extend(load_model(name, cfg.bits))
            if role != "instruct" and "clean" not in known:
                known["clean"] = check_base(name, loaded[1])
        if "clean" in known:
            known["clean"]["template_applied"] |= template == "chat"
        write_text(folder / "record.json", json.dumps(record, indent=1) + "\n")
        return answer(*loaded, conversations[first:last], template, cfg.max_reply_tokens)

    ids, others = [c.id for c in conversations], f"other conversations; {START_OVER}"
    return {f"{role}-{template}": grow(folder / f"replies_{role}-{template}.jsonl", PART, "id", ids,
                                       partial(answer_part, template), others)
            for template in dict.fromkeys(getattr(cfg, f"{role}_templates"))}


def load_model(name: str, bits: int | None):
    """A run as it was trained, or a model in so many bits; with its tokenizer."""
    if (Path(name) / "config.yaml").exists():
        return load_checkpoint(name)[:2]
    return load_base(name, bits=bits)


# --- the judge's part
def collect_verdicts(cfg: GateConfig, conversations: list[Conversation],
                     replies: dict[str, list[dict]]) -> dict[str, dict[tuple[str, int], str]]:
    """The judge's verdict on each scored turn: {condition: {(id, turn): verdict}}.

    Kept in judge_*.jsonl by a hash of judge, prompt and reply: only what is new is asked.
    """
    template = judge.load_prompt(cfg.judge_prompt)
    settings = ([cfg.judge, cfg.judge_model] if cfg.judge.startswith("http")
                else [cfg.judge, hash_model(cfg.judge), cfg.bits])
    asked, pairs = {name: {} for name in replies}, {}
    for name, rows in replies.items():
        for c, row in zip(conversations, rows):
            texts = [reply["text"] for reply in row["replies"]]
            for t, turn in enumerate(c.turns):
                if turn.scored:
                    pair = tuple(judge.fill_prompt(template, c, texts, t, cfg.judge_letters, order)
                                 for order in (False, True))
                    stamp = hash_text(repr((settings, pair)))[:24]
                    asked[name][c.id, t], pairs[stamp] = stamp, pair
    path = Path(cfg.out) / f"judge_{hash_text(repr(settings))[:8]}.jsonl"
    known = {row["stamp"]: row for row in read_json_lines(path)}
    missing = [stamp for stamp in pairs if stamp not in known]
    if missing:
        # what a kill has torn goes first; then line by line, since each may cost money
        write_text(path, json_lines(known.values()))
        for stamp, verdict in zip(missing, ask_judge(cfg, [pairs[stamp] for stamp in missing])):
            known[stamp] = {"stamp": stamp, "judge": cfg.judge, **verdict}
            append_text(path, json_lines([known[stamp]]))
    return {name: {turn: verdict_now(cfg, known[stamp]) for turn, stamp in turns.items()}
            for name, turns in asked.items()}


def ask_judge(cfg: GateConfig, pairs: list[tuple[str, str]]) -> Iterator[dict]:
    """Verdicts on pairs of prompts, one by one as they come."""
    if cfg.judge.startswith("http"):
        return judge.judge_by_endpoint(cfg.judge, cfg.judge_model, pairs, cfg.judge_letters)
    model, tokenizer = load_model(cfg.judge, cfg.bits)
    return judge.judge_locally(model, tokenizer, pairs, cfg.judge_letters, cfg.judge_threshold,
                               cfg.judge_unsure)


def verdict_now(cfg: GateConfig, row: dict) -> str:
    """A kept verdict at this config's thresholds: they may have moved since a judge was asked."""
    if "margin" not in row:
        return row["verdict"]
    return judge.verdict_of(row["margin"], row["mass"], cfg.judge_threshold, cfg.judge_unsure)


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def judge_report(cfg: GateConfig, conversations: list[Conversation], replies: dict,
                 outcomes: dict[str, dict], judged: dict) -> dict:
    """Calibration against people, counts of what is no verdict; writes the spot check to label."""
    flat = {(name, i): passed for name, cell in outcomes.items() for i, passed in cell.items()}
    counts = {name: {v: list(cell.values()).count(v) for v in ("pass", "fail", "unsure", "invalid")}
              for name, cell in judged.items()}
    rows = [{"condition": name, "id": c.id, "chat": transcript(c, row)}
            for name, part in replies.items() for c, row in zip(conversations, part)]
    chats = {(row["condition"], row["id"]): row["chat"] for row in rows}
    labels = judge.read_labels(cfg.labels, chats) if cfg.labels else {}
    judge.write_spotcheck(Path(cfg.out) / "spotcheck.jsonl", rows)
    return {"judge": cfg.judge, "turns": counts, "calibration": judge.calibrate(flat, labels)}


# --- the whole of it
def run_gate(path: str | Path, overrides: list[str] = ()) -> dict:
    """Replies, scores, verdict: writes gate.json and its neighbours, returns its content."""
    cfg = load_gate(path, overrides)
    conversations, sha = read_benchmark(cfg.benchmark)
    conversations = conversations[:cfg.limit]
    record, folder = open_evaluation(cfg, sha), Path(cfg.out)
    replies = {}
    for role in identify_models(cfg, record):
        replies |= replies_of(cfg, record, role, conversations)     # one model at a time
    judged = collect_verdicts(cfg, conversations, replies) if "judge" in cfg.scorers else {}
    scores = {s: {name: score(conversations, rows, s, judged.get(name))
                  for name, rows in replies.items()} for s in cfg.scorers}
    outcomes = {s: {name: {row["id"]: row["passed"] for row in rows}
                    for name, rows in by_condition.items()} for s, by_condition in scores.items()}
    report = {"benchmark": record["benchmark"] | {"conversations": len(conversations)},
              "config": asdict(cfg), "models": record["models"], "versions": provenance()}
    if "judge" in cfg.scorers:
        report["judge"] = judge_report(cfg, conversations, replies, outcomes["judge"], judged)
        if not report["judge"]["calibration"]["ok"]:
            # a judge that people have not confirmed does not head the report: it goes last
            others = tuple(s for s in cfg.scorers if s != "judge")
            cfg = dataclasses.replace(cfg, scorers=(*others, "judge"))
    report |= {"scorers": list(cfg.scorers), "conditions": {
        name: {s: summarize_scores(scores[s][name], replies[name]) for s in cfg.scorers}
        for name in replies}}
    if cfg.instruct:
        report |= decide(cfg, outcomes)
    report["paired"] = comparisons(cfg, outcomes[cfg.scorers[0]],
                                   {c.id: c.category for c in conversations},
                                   report.get("chosen", {}))
    report["warnings"] = length_warnings(outcomes, replies)
    write_outcomes(folder, conversations, replies, scores)
    write_text(folder / "gate.json", json.dumps(report, indent=1) + "\n")
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
