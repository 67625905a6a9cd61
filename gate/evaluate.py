"""The whole of a gate: plan, replies, scores, verdict, each kept as files of one folder.

plan.json stands before the first reply: thresholds, formats, scorers, models, benchmark, n. Each
reply carries its hash and the report the hashes of all, so that a plan edited afterwards or a
report written by hand are noticed, here and by `require_gate`. It keeps the honest from fooling
themselves; who forges every file forges hashes. Broken off, a run goes on where it stopped.
"""
import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
from tqdm import tqdm

from checkpoint import load_base, load_checkpoint
from files import disk
from files.keys import BadInput
from files.run_folder import hash_file, hash_json, hash_model, provenance
from gate import judge, verdict
from gate.clean import check_base
from gate.conversations import SHARES, Conversation, read_benchmark
from gate.plan import ANOTHER, begin, hash_text
from gate.replies import (
    PART,
    answer,
    check_rows,
    draw,
    score,
    stamp_row,
    summarize_replies,
    summarize_scores,
    transcript,
)
from report.gate_page import interval


# --- the models, and their replies
def models_of(cfg: verdict.GateConfig) -> dict[str, dict]:
    """The models by role: {role: {name, weights, tokenizer, clean}}. BadInput where a base is none,
    its prompts do not reach it untouched, or two are the same."""
    models = {}
    for role in verdict.ROLES:
        if name := getattr(cfg, role):
            models[role] = {"name": name, **hash_model(name)}
            if role != "instruct":      # without a verdict any model's formats can be compared
                models[role]["clean"] = check_base(name, is_base=bool(cfg.instruct))
    weights = [models[role]["weights"] for role in models]
    if len(set(weights)) < len(weights):
        named = ", ".join(f"{role} = {model['name']}" for role, model in models.items())
        raise BadInput(f"two of {named} are the same weights; expected different models. To "
                       "compare the formats of one, leave instruct and alternative empty: that "
                       "gives no verdict")
    return models


def load_model(name: str, bits: int | None):
    """A run as it was trained, or a model in so many bits; with its tokenizer."""
    if (Path(name) / "config.yaml").exists():
        return load_checkpoint(name)[:2]
    return load_base(name, bits=bits)


def replies_of(cfg: verdict.GateConfig, role: str, asked: list[Conversation],
               shots: list[Conversation], plan: dict) -> dict[str, list[dict]]:
    """One role's replies in each of its formats, {ROLE-FORMAT or ROLE-FORMAT-right: rows}."""
    load = functools.cache(load_model)      # not before the first missing reply

    def answer_part(form: str, history: str, rows: list[dict], n: int) -> list[dict]:
        done = answer(*load(getattr(cfg, role), cfg.bits), asked[len(rows):n], form,
                      cfg.max_reply_tokens, shots, history)
        return [stamp_row(row, plan["sha256"]) for row in done]

    several = any(len(c.turns) > 1 for c in asked)      # or there is no history
    histories = cfg.base_histories if role != "instruct" and several else ("own",)
    replies = {}
    for form in dict.fromkeys(getattr(cfg, f"{role}_templates")):
        for history in dict.fromkeys(histories):
            name = f"{role}-{form}" + "-right" * (history == "right")
            path = Path(cfg.out) / f"replies_{name}.jsonl"
            if cfg.replies and not path.exists():
                earlier = Path(cfg.replies) / path.name
                rows = check_rows(disk.read_json_lines(earlier)[:len(asked)], asked, earlier)
                disk.write_text(path, disk.json_lines(rows[:len(rows) // PART * PART]))
            rows = disk.grow(path, PART, "id", [c.id for c in asked], functools.partial(
                answer_part, form, history), f"other conversations; {ANOTHER}")
            check_rows(rows, asked, path)
            if odd := {row.get("plan") for row in rows} - {plan["sha256"], *plan["plans"]}:
                raise BadInput(f"{path} holds replies of another plan ({sorted(map(str, odd))[0]}, "
                               f"this is {plan['sha256'][:12]}): it was changed behind them; "
                               f"{ANOTHER}")
            replies[name] = rows
    return replies


def same_replies(replies: dict[str, list[dict]]) -> list[str]:
    """What speaks against a gap between models of other files that reply alike, word for word, in
    one format: saved anew, weights have another hash. One reply to all proves nothing."""
    texts = {name: [reply["text"] for row in rows for reply in row["replies"]]
             for name, rows in replies.items()}
    return [f"{a} and {b} are the same replies, word for word: two names for one model give no gap"
            for a, b in itertools.combinations(texts, 2)
            if a.partition("-")[2] == b.partition("-")[2] and texts[a] == texts[b]
            and len(set(texts[a])) > 1]


# --- the judge's part
def collect_verdicts(cfg: verdict.GateConfig, asked: list[Conversation], shots: list[Conversation],
                     replies: dict[str, list[dict]]) -> tuple[dict, dict]:
    """The judge's verdict on each scored turn, {condition: {(id, turn): verdict}}, and its test.
    Kept in judge_*.jsonl by a hash of judge, prompt and reply: only what is new is asked, and with
    rejudge what an endpoint gave no verdict on. BadInput where it cannot tell right from wrong."""
    template, letters = judge.load_prompt(cfg.judge_prompt), judge.LETTERS
    is_endpoint = cfg.judge.startswith("http")
    settings = ([cfg.judge, cfg.judge_model, cfg.judge_tokens] if is_endpoint
                else [cfg.judge, hash_model(cfg.judge), cfg.bits])
    stamp_of = lambda pair: hash_text(repr((settings, pair)))[:24]
    named, pairs = {name: {} for name in replies}, {}
    for name, rows in replies.items():
        for c, row in zip(asked, rows):
            texts = [reply["text"] for reply in row["replies"]]
            for t, turn in enumerate(c.turns):
                if turn.scored:
                    pair = tuple(judge.fill_prompt(template, c, texts, t, letters, swapped)
                                 for swapped in (False, True))
                    named[name][c.id, t] = stamp_of(pair)
                    pairs[stamp_of(pair)] = pair
    path = Path(cfg.out) / f"judge_{hash_text(repr(settings))[:8]}.jsonl"
    known = {row.get("stamp"): row for row in disk.read_json_lines(path)
             if not (cfg.rejudge and row.get("verdict") == "invalid")}
    load = functools.cache(load_model)

    def ask(pairs: dict[str, tuple[str, str]], what: str, requests: int) -> None:
        missing = {stamp: pair for stamp, pair in pairs.items() if stamp not in known}
        if not missing:
            return
        disk.write_text(path, disk.json_lines(known.values()))    # without what a kill has torn
        prompts = list(missing.values())
        found = (judge.judge_by_endpoint(cfg.judge, cfg.judge_model, prompts, letters,
                                         cfg.judge_tokens, requests) if is_endpoint
                 else enumerate(judge.judge_locally(*load(cfg.judge, cfg.bits), prompts, letters)))
        stamps = list(missing)
        for place, said in tqdm(found, what, len(prompts), disable=None):
            stamp = stamps[place]
            known[stamp] = {"stamp": stamp, "judge": cfg.judge, **said}
            disk.append_text(path, disk.json_lines([known[stamp]]))     # at once: it may cost money

    said = lambda stamp: judge.verdict_of(known[stamp], cfg.judge_unsure)
    probes = judge.probes_of([*shots, *asked], template, letters)
    ask({stamp_of(pair): pair for pair, _ in probes}, "self-test of the judge", 1)
    test = judge.check_judge(cfg.judge, [said(stamp_of(pair)) for pair, _ in probes], probes)
    ask(pairs, "judged", cfg.judge_requests)
    return {name: {turn: said(stamp) for turn, stamp in turns.items()}
            for name, turns in named.items()}, test


def people_of(cfg: verdict.GateConfig, chats: dict, outcomes: dict, chosen: dict,
              drawn: list[tuple[str, str]]) -> dict:
    """Each scorer against people's labels of what was drawn, with the rates that correct for its
    mistakes: what is undecided or has no label counts against the gap."""
    labels = judge.read_labels(cfg.labels, {key: chats[key] for key in drawn}) if cfg.labels else {}
    found = {}
    for s, cells in outcomes.items():
        flat = {(name, i): passed for name, cell in cells.items() for i, passed in cell.items()}
        cell = found[s] = judge.calibrate(flat, labels, drawn if labels else ())
        cell["corrected"] = {}
        for role, name in chosen.get(s, {}).items():
            at_most = role != "instruct"
            said = {i: at_most if v is None else v for i, v in outcomes[s][name].items()}
            seen = {i: labels.get((c, i), at_most) for c, i in drawn if c == name and labels}
            rate = cell["corrected"][name] = judge.rate_by_people(said, seen, verdict.TAIL)
            side = "most" if at_most else "least"
            wanted = getattr(cfg, f"{role}_at_{side}")
            if labels and not (rate["high"] <= wanted if at_most else rate["low"] >= wanted):
                cell["ok"] = False
                cell["why"].append(f"by people's labels {name} passes {interval(rate)}, not surely "
                                   f"at {side} {wanted:g}")
    return found


# --- the whole of it
def run_gate(path: str | Path, overrides: list[str] = ()) -> dict:
    """Plan, replies, scores, verdict: writes gate.json and its neighbours, returns its content."""
    cfg = verdict.load_gate(path, overrides)
    asked, shots, benchmark = questions_of(cfg)
    models = models_of(cfg)
    plan = begin(cfg, models, benchmark["sha256"], asked, shots)

    replies = {}
    for role in models:     # one model at a time
        replies |= replies_of(cfg, role, asked, shots, plan)

    scores, judge_test = scores_of(cfg, asked, shots, replies)
    health = {name: summarize_replies(asked, rows) for name, rows in replies.items()}
    for cell in health.values():
        cell["ill"] = verdict.ill_of(cell)

    found, drawn = weigh(cfg, plan, asked, replies, scores, health)
    return write_report(cfg, asked, replies, scores, drawn, {
        "name": Path(cfg.out).name, "plan": plan, "models": models, "benchmark": benchmark,
        "config": dataclasses.asdict(cfg), "versions": provenance(), "judge_test": judge_test,
        **found, **figures_of(cfg, models, replies, scores, health, found)})


def questions_of(cfg: verdict.GateConfig) -> tuple[list[Conversation], list[Conversation], dict]:
    """What is asked, the worked conversations, and where they are from."""
    conversations, sha = read_benchmark(cfg.benchmark)
    asked, shots = draw(conversations, cfg.limit, cfg.shots)
    if not asked:
        raise BadInput(f"shots = {cfg.shots} leaves none to ask of the {len(conversations)} "
                       f"conversations of {cfg.benchmark}; give fewer")
    return asked, shots, {"path": cfg.benchmark, "sha256": sha, "conversations": len(asked),
                          "available": len(conversations) - len(shots),
                          "drawn": {c.category for c in conversations} <= set(SHARES)}


def scores_of(cfg: verdict.GateConfig, asked: list[Conversation], shots: list[Conversation],
              replies: dict[str, list[dict]]) -> tuple[dict, dict | None]:
    """{scorer: {condition: rows of `score`}}, and how many probes the judge told."""
    judged, test = {}, None
    if "judge" in cfg.scorers:
        judged, test = collect_verdicts(cfg, asked, shots, replies)
    return {s: {name: score(asked, rows, s, judged.get(name)) for name, rows in replies.items()}
            for s in dict.fromkeys(cfg.scorers)}, test


def outcomes_of(scores: dict) -> dict:
    """{scorer: {condition: {id: True, False or None}}}, as gate/verdict.py reads them."""
    return {s: {name: {row["id"]: row["passed"] for row in rows}
                for name, rows in by_condition.items()} for s, by_condition in scores.items()}


def chats_of(asked: list[Conversation], replies: dict[str, list[dict]]) -> dict:
    return {(name, c.id): transcript(c, row)
            for name, rows in replies.items() for c, row in zip(asked, rows)}


def weigh(cfg: verdict.GateConfig, plan: dict, asked: list[Conversation], replies: dict,
          scores: dict, health: dict) -> tuple[dict, list[tuple[str, str]]]:
    """The verdict, with `people`, and what was drawn for them: (condition, id).

    Twice: what the scorers alone decide says which conditions people are to label.
    """
    outcomes, chats = outcomes_of(scores), chats_of(asked, replies)
    remarks = [f"{', '.join(plan['changed'])} was changed when replies were there already, and "
               "a plan stands before them: make another benchmark with `python -m "
               "gate.conversations make`"] if plan["changed"] else []
    remarks += same_replies(replies)
    decide = functools.partial(verdict.decide, cfg, outcomes, {c.id: c.category for c in asked},
                               health, looks=plan["looks"], remarks=remarks)
    chosen = decide()["chosen"] if cfg.instruct else {}
    deciding = {name for cells in chosen.values() for name in cells.values()}
    drawn = judge.draw_to_label(chats, deciding or set(replies))
    people = people_of(cfg, chats, outcomes, chosen, drawn)
    return {"people": people, **(decide(calibration=people) if cfg.instruct else {})}, drawn


def figures_of(cfg: verdict.GateConfig, models: dict, replies: dict, scores: dict, health: dict,
               found: dict) -> dict:
    """What stands beside a verdict: warnings, every condition's figures, paired differences."""
    outcomes = outcomes_of(scores)
    # a judge that people have not confirmed does not head the report: it goes last
    confirmed = found["people"].get("judge", {}).get("ok")
    scorers = sorted(outcomes, key=lambda s: s == "judge" and not confirmed)
    chosen = found.get("chosen", {}).get(scorers[0], {})
    return {"scorers": scorers, "warnings": warnings_of(cfg, models, outcomes, replies),
            "conditions": {name: {"replies": health[name], **{
                s: summarize_scores(scores[s][name]) for s in scorers}} for name in replies},
            "paired": {f"{a} against {b}": verdict.compare(*(
                outcomes[scorers[0]][name] for name in (a, b)))
                for a, b in pairs_of(list(replies), chosen)}}


def write_report(cfg: verdict.GateConfig, asked: list[Conversation], replies: dict, scores: dict,
                 drawn: list[tuple[str, str]], report: dict) -> dict:
    """gate.json, last of all: it holds the hashes of its neighbours, and its own."""
    folder, chats = Path(cfg.out), chats_of(asked, replies)
    needs = {c.id: [turn.need for turn in c.turns if turn.scored] for c in asked}
    judge.write_spotcheck(folder / "spotcheck.jsonl", chats, needs, drawn)
    write_outcomes(folder, asked, replies, scores)
    report["transcripts"] = {name: [chats[name, c.id] for c in asked[:3]] for name in replies}
    report["files"] = hash_files(folder, cfg.labels)
    report = json.loads(json.dumps(report))
    report["sha256"] = hash_json(report)
    disk.write_text(folder / "gate.json", json.dumps(report, indent=1) + "\n")
    return report


def hash_files(folder: Path, labels: str) -> dict[str, str]:
    """What a report rests on, {name from its folder: SHA-256}: replies, verdicts, people's."""
    files = [file for file in sorted(folder.glob("*.jsonl"))
             if file.name.startswith(("replies_", "outcomes", "judge_"))]
    files += [Path(labels)] if labels else []
    return {os.path.relpath(file.resolve(), folder.resolve()): hash_file(file) for file in files}


def pairs_of(names: list[str], chosen: dict[str, str]) -> list[tuple[str, str]]:
    """The gap, and what a format or a history alone does to each model."""
    pairs = [(chosen["base"], chosen[role]) for role in ("instruct", "alternative")
             if role in chosen]
    for role in verdict.ROLES:
        same = [name for name in names if verdict.role_of(name) == role]
        pairs += [(same[0], other) for other in same[1:]]
    return pairs


def warnings_of(cfg: verdict.GateConfig, models: dict, outcomes: dict, replies: dict) -> list[str]:
    """What a reader has to know before the figures."""
    found = verdict.loosened(cfg)
    # raw, lines: nothing tells it that an answer is wanted. chat: its own template, if it has one
    if cfg.instruct and not any(word in form for form in cfg.base_templates
                                for word in ("cue", "plain", "shots")):
        found.append(f"base_templates = {', '.join(cfg.base_templates)}: neither a cue nor worked "
                     "conversations tell the base that an answer is wanted; add raw+cue, plain or "
                     "plain+shots")
    if "judge" in cfg.scorers:
        mine = hash_model(cfg.judge)["weights"] if not cfg.judge.startswith("http") else ""
        same = [role for role, model in models.items() if model["weights"] == mine
                or Path(model["name"]).name.casefold() == Path(cfg.judge_model).name.casefold()]
        found += [f"the judge is the {role} model itself, and judges its own replies"
                  for role in same]
    for role, model in models.items():
        if model.get("clean", {}).get("has_chat_template") and "chat" not in getattr(
                cfg, f"{role}_templates"):
            found.append(f"{model['name']} has a chat template: {role}_templates should try chat")
    return found + verdict.length_warnings(outcomes, replies)


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
    disk.write_text(folder / "outcomes.jsonl", disk.json_lines(outcomes))
    disk.write_text(folder / "disagreements.jsonl", disk.json_lines(apart))
