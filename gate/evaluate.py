"""The whole of a gate: replies, scores, verdict, each kept as files of one folder.

Scoring is apart from generating: other scorers, judges or thresholds generate nothing anew, and a
run that was broken off goes on behind the last part it wrote.
"""
import dataclasses
import hashlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path

from config import BadInput, append_text, json_lines, read_json_lines, write_text
from gate.clean import check_base
from gate.conversations import Conversation, read_benchmark
from gate.judge import (
    calibrate,
    fill_prompt,
    judge_by_endpoint,
    judge_locally,
    load_prompt,
    read_labels,
    verdict_of,
    write_spotcheck,
)
from gate.replies import (
    Condition,
    answer_all,
    passed,
    read_replies,
    score,
    summarize_scores,
    transcript,
)
from gate.settings import ROLES, GateConfig, load_gate
from gate.verdict import comparisons, decide, length_warnings
from lora import load_base, load_checkpoint
from provenance import hash_model, provenance
from stats import cohens_kappa

# what replies depend on: other values of these are another evaluation
GENERATION = ("limit", "max_reply_tokens", "history", "dtype", "bits", "bits_group_size")


# --------------------------------------------------------------------------------------------------
# the folder


def open_evaluation(cfg: GateConfig, sha: str) -> dict:
    """Make or re-open the folder; returns its record: {benchmark, generation, models, ...}.

    raises   BadInput where the benchmark or what replies depend on changed since its first run
    """
    folder, path = Path(cfg.out), Path(cfg.out) / "record.json"
    fresh = {"benchmark": {"path": cfg.benchmark, "sha256": sha},
             "generation": {key: getattr(cfg, key) for key in GENERATION}, "models": {}}
    if cfg.overwrite and path.exists():
        for old in [*folder.glob("replies_*.jsonl"), *folder.glob("judge_*.jsonl"),
                    folder / "gate.json", path]:
            old.unlink(missing_ok=True)
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"out = {folder} exists and is not an evaluation (it has no "
                           "record.json); give another out")
        write_text(path, json.dumps(fresh, indent=1) + "\n")
        return fresh
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        stored = record["benchmark"]["sha256"], record["generation"], record["models"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error!r}); overwrite=true starts over") from None
    again = "give another out, or overwrite=true to answer everything again"
    if stored[0] != sha:
        raise BadInput(f"benchmark {cfg.benchmark} changed since {folder} was begun (SHA-256 "
                       f"{stored[0][:12]}, now {sha[:12]}): its replies answer other questions; "
                       f"put the file back, {again}")
    differ = [f"{k} was {stored[1].get(k)}, is {v}" for k, v in fresh["generation"].items()
              if stored[1].get(k) != v]
    if differ:
        raise BadInput(f"{folder} was begun with another setting ({'; '.join(differ)}); {again}")
    return record


def conditions_of(cfg: GateConfig) -> list[Condition]:
    return [Condition(role, getattr(cfg, role), template) for role in ROLES if getattr(cfg, role)
            for template in dict.fromkeys(getattr(cfg, f"{role}_templates"))]


def collect_replies(cfg: GateConfig, record: dict, conversations: list[Conversation],
                    ) -> dict[str, list[dict]]:
    """Every condition's replies; a base is checked before its first one (clean.check_base).

    Models are loaded one at a time, and only where replies are missing.
    """
    folder, replies = Path(cfg.out), {}
    for role, group in itertools.groupby(conditions_of(cfg), lambda c: c.role):
        group = list(group)
        name, hashes = group[0].model, hash_model(group[0].model)
        known = record["models"].setdefault(role, {"name": name, **hashes})
        if any(known[key] != value for key, value in hashes.items()):
            raise BadInput(f"{role} = {name} has other weights or another tokenizer than when "
                           f"{folder} was begun ({known['name']}); give another out, or "
                           "overwrite=true")
        loaded = model = tokenizer = None       # or the last role's model would still be held
        for condition in group:
            path = folder / f"replies_{condition.name}.jsonl"
            rows = read_replies(path, conversations)
            if len(rows) < len(conversations):
                loaded = loaded or load_model(cfg, name)
                model, tokenizer = loaded
                if role != "instruct" and "clean" not in known:
                    known["clean"] = check_base(name, model, tokenizer)
                if "clean" in known:
                    known["clean"]["template_applied"] |= condition.template == "chat"
                write_text(folder / "record.json", json.dumps(record, indent=1) + "\n")
                rows = answer_all(path, rows, model, tokenizer, conversations, condition.template,
                                  cfg.max_reply_tokens, cfg.history)
            replies[condition.name] = rows
    return replies


def load_model(cfg: GateConfig, name: str):
    """A run as it was trained, or a model by the gate's own dtype and bits."""
    if (Path(name) / "config.yaml").exists():
        return load_checkpoint(name)[:2]
    model, tokenizer = load_base(name, cfg.dtype, cfg.bits, group_size=cfg.bits_group_size)
    if tokenizer is None:
        raise BadInput(f"{name} has no tokenizer.model and no tokenizer.json; add the model's own")
    return model, tokenizer


# --------------------------------------------------------------------------------------------------
# the judge's part


def collect_verdicts(cfg: GateConfig, judge: str, conversations: list[Conversation],
                     replies: dict[str, list[dict]], keys: set[tuple[str, str]] | None = None,
                     ) -> dict[str, dict[tuple[str, int], str]]:
    """A judge's verdict on each scored turn: {condition: {(id, turn): verdict}}.

    Kept in judge_*.jsonl by a hash of judge, prompt and reply: only what is new is asked.
    keys     (condition, id) of the only conversations to judge; all if None
    """
    template, url = load_prompt(cfg.judge_prompt), judge.startswith("http")
    settings = [judge, cfg.judge_model] if url else [judge, hash_model(judge), cfg.bits, cfg.dtype]
    stamp = lambda pair: hashlib.sha256(repr((settings, pair)).encode()).hexdigest()[:24]
    wanted = {name: [(c.id, t, tuple(fill_prompt(template, c, texts_of(row), t,
                                                 cfg.judge_letters, swapped)
                                     for swapped in (False, True)))
                     for c, row in zip(conversations, rows) for t, turn in enumerate(c.turns)
                     if turn.scored and (keys is None or (name, c.id) in keys)]
              for name, rows in replies.items()}
    path = Path(cfg.out) / f"judge_{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}.jsonl"
    known = {row["stamp"]: row for row in read_json_lines(path)}
    asked = {stamp(pair): pair for items in wanted.values() for _, _, pair in items}
    missing = {key: pair for key, pair in asked.items() if key not in known}
    if missing:
        if url:
            verdicts = judge_by_endpoint(judge, cfg.judge_model, list(missing.values()),
                                         cfg.judge_letters)
        else:
            model, tokenizer = load_model(cfg, judge)
            verdicts = judge_locally(model, tokenizer, list(missing.values()),
                                     cfg.judge_letters, cfg.judge_threshold, cfg.judge_unsure)
        # what a kill has torn goes first; then line by line, since each may cost money
        write_text(path, json_lines(known.values()))
        for key, verdict in zip(missing, verdicts):
            known[key] = {"stamp": key, "judge": judge, **verdict}
            append_text(path, json_lines([known[key]]))
    # at this config's thresholds, which may have moved since a local judge gave its margin
    decide = lambda row: (row["verdict"] if row["verdict"] == "invalid" or "margin" not in row else
                          verdict_of(row["margin"], 1, cfg.judge_threshold, cfg.judge_unsure))
    return {name: {(id, t): decide(known[stamp(pair)]) for id, t, pair in items}
            for name, items in wanted.items()}


def texts_of(row: dict) -> list[str]:
    return [reply["text"] for reply in row["replies"]]


# --------------------------------------------------------------------------------------------------
# the whole of it


def run_gate(path: str | Path, overrides: list[str] = ()) -> dict:
    """Replies, scores, verdict: writes gate.json and its neighbours, returns its content."""
    cfg = load_gate(path, overrides)
    conversations, sha = read_benchmark(cfg.benchmark)
    conversations = conversations[:cfg.limit]
    record, folder = open_evaluation(cfg, sha), Path(cfg.out)
    replies = collect_replies(cfg, record, conversations)
    judged = (collect_verdicts(cfg, cfg.judge, conversations, replies)
              if "judge" in cfg.scorers else {})
    scores = {s: {name: score(conversations, rows, s, judged.get(name))
                  for name, rows in replies.items()} for s in cfg.scorers}
    outcomes = {s: {name: {row["id"]: row["passed"] for row in rows}
                    for name, rows in by_condition.items()} for s, by_condition in scores.items()}
    categories = {c.id: c.category for c in conversations}
    report = {"benchmark": record["benchmark"] | {"conversations": len(conversations)},
              "config": asdict(cfg), "models": record["models"], "versions": provenance()}
    if "judge" in cfg.scorers:
        report["judge"] = judge_report(cfg, conversations, replies, outcomes["judge"], judged)
        cfg = heading(cfg, report["judge"])
    report |= {"scorers": list(cfg.scorers), "conditions": {
        name: {s: summarize_scores(scores[s][name], replies[name]) for s in cfg.scorers}
        for name in replies}}
    if cfg.instruct:
        report |= decide(cfg, outcomes)
    report["paired"] = comparisons(cfg, outcomes[cfg.scorers[0]], categories,
                                   report.get("chosen", {}))
    report["warnings"] = length_warnings(outcomes, replies)
    write_outcomes(folder, conversations, replies, scores)
    write_text(folder / "gate.json", json.dumps(report, indent=1) + "\n")
    return report


def heading(cfg: GateConfig, about: dict) -> GateConfig:
    """A judge that people have not confirmed does not head the report: it goes last."""
    if cfg.scorers[0] != "judge" or about["calibration"]["ok"]:
        return cfg
    rest = tuple(s for s in cfg.scorers if s != "judge")
    return dataclasses.replace(cfg, scorers=(*rest, "judge"))


def judge_report(cfg: GateConfig, conversations: list[Conversation], replies: dict,
                 outcomes: dict[str, dict], judged: dict) -> dict:
    """Calibration against people, counts of what is no verdict, and the second judge's tenth."""
    flat = {(name, i): passed for name, cell in outcomes.items() for i, passed in cell.items()}
    counts = {name: {v: list(cell.values()).count(v) for v in ("pass", "fail", "unsure", "invalid")}
              for name, cell in judged.items()}
    rows = [{"condition": name, "id": c.id, "chat": transcript(c, row)}
            for name, part in replies.items() for c, row in zip(conversations, part)]
    chats = {(row["condition"], row["id"]): row["chat"] for row in rows}
    labels = read_labels(cfg.labels, chats) if cfg.labels else {}
    drawn = write_spotcheck(Path(cfg.out) / "spotcheck.jsonl", rows)
    about = {"judge": cfg.judge, "turns": counts, "calibration": calibrate(flat, labels)}
    if cfg.second_judge:
        keys = {(row["condition"], row["id"]) for row in drawn}
        again = collect_verdicts(cfg, cfg.second_judge, conversations, replies, keys)
        verdicts = lambda name, id: [v for (i, _), v in again[name].items() if i == id]
        second = {(name, id): passed(verdicts(name, id)) for name, id in keys}
        both = [k for k in keys if flat[k] is not None and second[k] is not None]
        about["second"] = {"judge": cfg.second_judge, **cohens_kappa(
            [flat[k] for k in both], [second[k] for k in both]),
            "disagreements": sorted(k for k in both if flat[k] != second[k])}
    return about


def write_outcomes(folder: Path, conversations: list[Conversation], replies: dict,
                   scores: dict[str, dict[str, list[dict]]]) -> None:
    """outcomes.jsonl: every conversation's fate by scorer and condition; disagreements.jsonl."""
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
    for name, rows in (("outcomes", outcomes), ("disagreements", apart)):
        write_text(folder / f"{name}.jsonl", json_lines(rows))
