"""Before you train: is there a gap? The base must fail what the instruct model can do.

A training run once taught a 32B base to follow instructions. It already could: on raw prompts it
rambled, the score counted characters, and 81 % became 99 % with p = 2e-12; recounted, 100 % stood
against 99. So here a base is tried in several formats and counts by its *best*; at least two ways
of scoring have to agree, item by item and in their verdict; and the verdict is a file that
`train.py` asks for (`require_gate: FOLDER/gate.json`).

    python eval.py --gate configs/gate_tiny.yaml            # replies, scores, verdict, gate.json
    python eval.py --gate configs/gate_tiny.yaml judge=...  # scores anew, generates nothing anew
    python eval.py --paired runs/gate_tiny:base-raw runs/gate_tiny:base-lines

GO: every scorer finds the gap. NO-GO: every scorer measures a rate that refutes it. AMBIGUOUS: they
disagree, too much is undecided, or too little is there to say. All figures are printed in any case.
"""
import dataclasses
import hashlib
import itertools
import json
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

import blas  # noqa: F401  (before mlx)

from clean import check_base, hash_model, provenance
from config import (
    BITS,
    GROUP_SIZES,
    BadInput,
    Stopped,
    append_text,
    json_lines,
    read_json_lines,
    read_keys,
    write_text,
)
from conversations import Conversation, read_benchmark
from converse import (
    SCORERS,
    SUSPICIOUS,
    Condition,
    answer_all,
    passed,
    read_replies,
    reply_length,
    score,
    summarize_scores,
    transcript,
)
from judge import (
    LEAST_KAPPA,
    LEAST_LABELS,
    LEAST_LOW,
    calibrate,
    fill_prompt,
    judge_by_endpoint,
    judge_locally,
    load_prompt,
    read_labels,
    verdict_of,
    write_spotcheck,
)
from lora import load_base, load_checkpoint
from report.stats import (
    adjusted_p,
    auc,
    cohens_h,
    cohens_kappa,
    items_needed,
    mcnemar,
    paired_bootstrap,
    percent,
    power_of_mcnemar,
    wilson,
)
from tokenizer import TEMPLATES


@dataclass
class GateConfig:
    """All keys of a gate file, with defaults; thresholds stand in the file before the run."""
    base: str = "models/tiny"
    instruct: str = ""              # empty: no verdict, only the figures of the others
    alternative: str = ""           # another base, so that a gap is not one base's quirk
    benchmark: str = "benchmarks/conversations.jsonl"
    out: str = ""                   # empty: runs/<name of the config file>
    overwrite: bool = False
    limit: int | None = None        # the first so many conversations of the benchmark
    # formats: raw | lines | plain | cued | chat. A role counts by its best
    base_templates: tuple[str, ...] = ("raw", "plain")
    instruct_templates: tuple[str, ...] = ("plain",)
    alternative_templates: tuple[str, ...] = ("plain",)
    max_reply_tokens: int = 256
    history: str = "own"            # earlier replies: the model's own, or the right ones
    dtype: str | None = None
    bits: int | None = None         # of all models, the judge too
    bits_group_size: int = 64

    # --- scoring: checks | judge | exact | length; the first heads the report
    scorers: tuple[str, ...] = ("checks", "judge")
    judge: str = ""                 # model folder, run, Hub name; or http(s)://HOST/v1
    judge_model: str = ""           # what an endpoint calls it
    judge_prompt: str = ""          # text file; empty: the built-in one
    judge_letters: tuple[str, ...] = ("A", "B")     # a verdict's two tokens
    judge_threshold: float = 0.0    # nats
    judge_unsure: float = 1.0       # nearer to the threshold: undecided. Local judges only
    second_judge: str = ""          # judges a tenth again
    labels: str = ""                # people's verdicts: spotcheck.jsonl, filled in

    # --- what has to hold
    base_at_most: float = 0.30
    instruct_at_least: float = 0.80
    alternative_at_most: float = 0.40
    p_below: float = 0.01           # exact McNemar
    h_at_least: float = 0.5         # Cohen's h
    agreement_at_least: float = 0.80    # of two scorers, in each condition
    kappa_at_least: float = 0.70    # of two scorers, over all conditions
    undecided_at_most: float = 0.10     # of a condition's conversations


ROLES = ("base", "instruct", "alternative")
MARGIN = 0.10   # how far beyond its threshold a rate's Wilson interval may reach
# the rules that refute a gap; the others say that too little is known
RATES = ("base passes at most", "alternative base passes at most", "instruct passes at least")
# what replies depend on: other values of these are another evaluation
GENERATION = ("limit", "max_reply_tokens", "history", "dtype", "bits", "bits_group_size")


def load_gate(path: str | Path, overrides: list[str]) -> GateConfig:
    """Read a gate file and key=value words; raises BadInput with all mistakes."""
    values, mistakes = read_keys(path, overrides, typing.get_type_hints(GateConfig))
    cfg = GateConfig(**values)
    cfg.out = cfg.out or f"runs/{Path(path).stem}"
    for role in ROLES:
        key = f"{role}_templates"
        if wrong := [t for t in getattr(cfg, key) if t not in TEMPLATES]:
            mistakes.append(f"{key} = {', '.join(wrong)}: expected any of {', '.join(TEMPLATES)}")
        if not getattr(cfg, key):
            mistakes.append(f"{key} is empty: expected one or more of {', '.join(TEMPLATES)}")
    if wrong := [s for s in cfg.scorers if s not in SCORERS]:
        mistakes.append(f"scorers = {', '.join(wrong)}: expected any of {', '.join(SCORERS)}")
    if len(set(cfg.scorers)) < 2:
        mistakes.append(f"scorers = {', '.join(cfg.scorers)}: expected two different ones or more, "
                        "since one alone cannot be seen to measure something else")
    if "judge" in cfg.scorers and not cfg.judge:
        mistakes.append("scorer judge needs judge: a model, or the URL of an endpoint")
    if not cfg.judge_model and any(j.startswith("http") for j in (cfg.judge, cfg.second_judge)):
        mistakes.append("judge is an endpoint: give judge_model, its name for the model")
    if len(cfg.judge_letters) != 2 or len(set(cfg.judge_letters)) != 2:
        mistakes.append(f"judge_letters = {', '.join(cfg.judge_letters)}: expected two, as A,B")
    if not cfg.base:
        mistakes.append("base is empty: expected the model that training would start from")
    for key, allowed in (("history", ("own", "right")), ("bits", (None, *BITS)),
                         ("bits_group_size", GROUP_SIZES),
                         ("dtype", (None, "float32", "bfloat16", "float16"))):
        if getattr(cfg, key) not in allowed:
            mistakes.append(f"{key} = {getattr(cfg, key)}: expected one of "
                            f"{', '.join(str(a) for a in allowed if a)}")
    for key in ("base_at_most", "instruct_at_least", "alternative_at_most", "p_below",
                "agreement_at_least", "kappa_at_least", "undecided_at_most"):
        if not 0 <= getattr(cfg, key) <= 1:
            mistakes.append(f"{key} = {getattr(cfg, key)}: expected a number from 0 to 1")
    for key in ("limit", "max_reply_tokens"):
        if getattr(cfg, key) is not None and getattr(cfg, key) < 1:
            mistakes.append(f"{key} = {getattr(cfg, key)}: expected at least 1")
    if mistakes:
        raise BadInput("; ".join(mistakes))
    return cfg


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
# the verdict: pure functions of outcomes {scorer: {condition: {id: True, False or None}}}


def paired(first: dict[str, bool | None],
           second: dict[str, bool | None]) -> tuple[list, list, list]:
    """The ids that both conditions decided, and their outcomes. BadInput if unpaired."""
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise BadInput(f"a paired test needs the same conversations on both sides: {len(odd)} are "
                       f"on one side only, such as {', '.join(odd[:3])}; evaluate both on one "
                       "benchmark")
    ids = [i for i in first if first[i] is not None and second[i] is not None]
    return ids, [first[i] for i in ids], [second[i] for i in ids]


def rate(outcomes: dict[str, bool | None]) -> float | None:
    """Share that passed, of what was decided."""
    passed, decided = counts_of(outcomes)
    return passed / decided if decided else None


def counts_of(outcomes: dict[str, bool | None]) -> tuple[int, int]:
    """How many passed, and how many were decided."""
    decided = [passed for passed in outcomes.values() if passed is not None]
    return sum(decided), len(decided)


def best_of(role: str, outcomes: dict[str, dict]) -> str | None:
    """The condition of a role with the highest rate: a base counts by the format that helps it."""
    names = [name for name in outcomes if name.split("-")[0] == role]
    return max(names, key=lambda name: rate(outcomes[name]) or 0, default=None)


def compare(first: dict, second: dict, cfg: GateConfig, categories: dict[str, str]) -> dict:
    """Two conditions on the same conversations: test, effect, interval, power, categories."""
    ids, a, b = paired(first, second)
    n, test = len(ids), mcnemar(a, b)
    shares = [test[side] / n if n else 0 for side in ("only_first", "only_second")]
    cells = {}
    for c in sorted(set(categories.values())):
        of = [k for k, i in enumerate(ids) if categories[i] == c]
        cells[c] = {"n": len(of), **mcnemar([a[k] for k in of], [b[k] for k in of])}
    for cell, p in zip(cells.values(), adjusted_p([cell["p"] for cell in cells.values()])):
        cell["p_adjusted"] = p
    return {"n": n, **test, "h": cohens_h(sum(a) / n, sum(b) / n) if n else None,
            "difference": paired_bootstrap(a, b, [categories[i] for i in ids]),
            "observed_power": power_of_mcnemar(n, *shares, cfg.p_below),
            "design_power": power_of_mcnemar(n, *design_of(cfg), cfg.p_below),
            "items_needed": items_needed(*shares, cfg.p_below), "by_category": cells}


def design_of(cfg: GateConfig) -> tuple[float, float]:
    """Chances that just one of two independent models passes, at the thresholds themselves.

    example  base .30, instruct .80 -> .06, .56
    """
    base, instruct = cfg.base_at_most, cfg.instruct_at_least
    return base * (1 - instruct), (1 - base) * instruct


def rules_of(cfg: GateConfig, outcomes: dict[str, dict], chosen: dict[str, str]) -> list[dict]:
    """One scorer's rules: [{rule, value, wanted, holds}]."""
    rates = {role: rate(outcomes[name]) for role, name in chosen.items()}
    _, a, b = paired(outcomes[chosen["base"]], outcomes[chosen["instruct"]])
    test = mcnemar(a, b)
    h = cohens_h(sum(a) / len(a), sum(b) / len(b)) if a else None
    # of all a base's formats: one that could not be scored may be its best
    looked_at = [n for n in outcomes if n.split("-")[0] != "instruct"] + [chosen["instruct"]]
    undecided = max(sum(v is None for v in outcomes[name].values()) / max(len(outcomes[name]), 1)
                    for name in looked_at)
    interval = lambda role: wilson(*counts_of(outcomes[chosen[role]]))
    ahead = test["only_second"] > test["only_first"]
    rules = [
        ("base passes at most", rates["base"], cfg.base_at_most, lambda v, w: v <= w),
        ("instruct passes at least", rates["instruct"], cfg.instruct_at_least, lambda v, w: v >= w),
        ("McNemar p below, instruct ahead", test["p"], cfg.p_below, lambda v, w: v < w and ahead),
        ("Cohen's h at least", h, cfg.h_at_least, lambda v, w: v >= w),
        # so few that chance could have met the thresholds
        ("base's interval ends below", interval("base")["high"],
         cfg.base_at_most + MARGIN, lambda v, w: v < w),
        ("instruct's interval begins above", interval("instruct")["low"],
         cfg.instruct_at_least - MARGIN, lambda v, w: v > w),
        ("undecided at most", undecided, cfg.undecided_at_most, lambda v, w: v <= w)]
    if "alternative" in chosen:
        rules.insert(2, ("alternative base passes at most", rates["alternative"],
                         cfg.alternative_at_most, lambda v, w: v <= w))
    return [{"rule": rule, "value": value, "wanted": wanted,
             "holds": value is not None and bool(holds(value, wanted))}
            for rule, value, wanted, holds in rules]


def agreement_of(cfg: GateConfig, first: dict[str, dict], second: dict[str, dict]) -> dict:
    """Two scorers on the same replies: agreement in each condition, kappa over all of them."""
    cells, all_a, all_b, apart = {}, [], [], []
    for name in first:
        _, a, b = paired(first[name], second[name])
        cells[name] = cohens_kappa(a, b)
        # pooled, kappa is high for any two that tell the models apart; so within a condition too,
        # where there is enough of each fate to say so
        few = min(side.count(fate) for side in (a, b) for fate in (True, False)) < 5
        if not few and cells[name]["high"] < cfg.kappa_at_least:
            apart.append(name)
        all_a, all_b = all_a + a, all_b + b
    pooled = cohens_kappa(all_a, all_b)
    lowest = min((c["agreement"] for c in cells.values() if c["n"]), default=None)
    # kappa says nothing where every reply has the same fate; then agreement has said all
    kappa_holds = (pooled["value"] >= cfg.kappa_at_least if pooled["value"] is not None
                   else pooled["agreement"] == 1)
    return {"by_condition": cells, "pooled": pooled, "lowest": lowest, "apart": apart,
            "holds": lowest is not None and lowest >= cfg.agreement_at_least
            and bool(kappa_holds) and not apart}


def decide(cfg: GateConfig, outcomes: dict[str, dict[str, dict]]) -> dict:
    """GO, NO-GO or AMBIGUOUS, with the rules and agreements that lead there."""
    head = outcomes[cfg.scorers[0]]
    chosen = {role: best_of(role, head) for role in ROLES if best_of(role, head)}
    rules = {s: rules_of(cfg, outcomes[s], chosen) for s in cfg.scorers}
    agreements = {f"{a} and {b}": agreement_of(cfg, outcomes[a], outcomes[b])
                  for a, b in itertools.combinations(cfg.scorers, 2)}
    finds = {s: all(rule["holds"] for rule in rules[s]) for s in cfg.scorers}
    reasons = [f"{s}: {r['rule']} {r['wanted']:g} does not hold ({number(r['value'])})"
               for s in cfg.scorers for r in rules[s] if not r["holds"]]
    reasons += [f"{pair} do not agree (lowest agreement {number(a['lowest'])}, kappa "
                f"{number(a['pooled']['value'])}"
                + (f"; apart within {', '.join(a['apart'])}" if a["apart"] else "") + ")"
                for pair, a in agreements.items() if not a["holds"]]
    agree = all(a["holds"] for a in agreements.values())
    # refuted by a rate that was measured, not by lack of data
    refuted = [rules[s][-1]["holds"] and any(
        not r["holds"] and r["value"] is not None and r["rule"] in RATES for r in rules[s])
        for s in cfg.scorers]
    verdict = ("GO" if agree and all(finds.values())
               else "NO-GO" if agree and all(refuted) else "AMBIGUOUS")
    return {"verdict": verdict, "reasons": reasons, "chosen": chosen, "rules": rules,
            "agreement": agreements}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def length_warnings(outcomes: dict[str, dict[str, dict]],
                    replies: dict[str, list[dict]]) -> list[str]:
    """Scores that the length of the replies alone predicts, in one condition or over all."""
    lengths = {name: {row["id"]: reply_length(row) for row in rows}
               for name, rows in replies.items()}
    warnings = []
    for scorer, by_condition in outcomes.items():
        points = {name: [(lengths[name][i], passed) for i, passed in cell.items()
                         if passed is not None] for name, cell in by_condition.items()}
        points["all conditions"] = [point for part in points.values() for point in part]
        for name, part in points.items():
            fates = [passed for _, passed in part]
            few = min(fates.count(True), fates.count(False)) < 5    # chance alone would predict
            value = None if few else auc(*zip(*part))
            if value is not None and max(value, 1 - value) > SUSPICIOUS:
                side = "longer" if value > 0.5 else "shorter"
                warnings.append(f"{name}: length alone predicts what {scorer} passes (AUC "
                                f"{value:.2f}: {side} replies pass); read some before believing it")
    return warnings


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


def comparisons(cfg: GateConfig, outcomes: dict[str, dict], categories: dict[str, str],
                chosen: dict[str, str]) -> dict:
    """The gap, and what a format alone does to each model: "A against B" -> compare's figures."""
    pairs = [(chosen["base"], chosen["instruct"])] if "instruct" in chosen else []
    pairs += [(chosen["base"], chosen["alternative"])] if "alternative" in chosen else []
    for role in ROLES:
        names = [name for name in outcomes if name.split("-")[0] == role]
        pairs += [(names[0], other) for other in names[1:]]
    return {f"{a} against {b}": compare(outcomes[a], outcomes[b], cfg, categories)
            for a, b in pairs}


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


def compare_folders(first: str, second: str) -> dict:
    """FOLDER:CONDITION against FOLDER:CONDITION, by the first's heading scorer; raises BadInput."""
    sides = []
    for word in (first, second):
        folder, _, condition = word.rpartition(":")
        path = Path(folder or word) / "gate.json"
        report = read_report(path, f"--paired {word}: expected FOLDER:CONDITION of a finished "
                             "evaluation, such as runs/gate_tiny:base-raw")
        rows = read_json_lines(path.parent / "outcomes.jsonl")
        known = sorted(rows[0]["passed"][report["scorers"][0]]) if rows else []
        if condition not in known:
            raise BadInput(f"{path.parent} has no condition {condition!r}; expected one of "
                           f"{', '.join(known)}")
        sides.append((report, {row["id"]: row["passed"] for row in rows}, condition,
                      {row["id"]: row["category"] for row in rows}))
    (report, a, first_name, categories), (other, b, second_name, _) = sides
    if report["benchmark"]["sha256"] != other["benchmark"]["sha256"]:
        raise BadInput(f"{first} and {second} answered different benchmarks "
                       f"({report['benchmark']['path']}, {other['benchmark']['path']}); a paired "
                       "test needs the same conversations: evaluate both on one")
    scorer = report["scorers"][0]
    if scorer not in next(iter(b.values())):
        raise BadInput(f"{second} was not scored by {scorer}; score both by the same")
    pick = lambda side, name: {i: passed[scorer][name] for i, passed in side.items()}
    return {"scorer": scorer, **compare(pick(a, first_name), pick(b, second_name), GateConfig(),
                                        categories)}


# --------------------------------------------------------------------------------------------------
# what train.py asks for


def read_report(path: Path, mend: str) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError
        return report
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a report"
        raise BadInput(f"{path} cannot be read ({why}); {mend}") from None


def require(path: str, model: str) -> None:
    """Raises BadInput unless a gate says GO for these very weights: before a training run."""
    run = "run `python eval.py --gate CONFIG` first, and give its FOLDER/gate.json"
    report = read_report(Path(path), f"require_gate asks for a passed gate: {run}")
    if report.get("verdict") != "GO":
        why = "; ".join(report.get("reasons", [])[:3]) or "it compared nothing"
        raise BadInput(f"require_gate: {path} says {report.get('verdict', 'nothing')} ({why}); "
                       "training would teach what is there already, or cannot be measured: choose "
                       "another task or benchmark, or drop require_gate")
    stored = report.get("models", {}).get("base", {})
    if stored.get("weights") != hash_model(model)["weights"]:
        raise BadInput(f"require_gate: {path} is about other weights ({stored.get('name')}) than "
                       f"model = {model}; {run}")


# --------------------------------------------------------------------------------------------------
# for a person


def print_gate(report: dict) -> None:
    """Rates by condition and scorer, paired tests, rules, warnings, verdict."""
    about, scorers = report["benchmark"], report["scorers"]
    print(f"\n{about['path']}: {about['conversations']} conversations, SHA-256 "
          f"{about['sha256'][:12]}; greedy; 95 % Wilson intervals over decided ones")
    for role, model in report["models"].items():
        clean = model.get("clean")
        state = ("" if not clean else "encoding is clean; -chat applies its own template"
                 if clean["template_applied"] else "prompts reach it untouched")
        print(f"  {role:<12}{model['name']}  weights {model['weights'][:12]}  {state}")
    print(f"\n  {'condition':<20}" + "".join(f"{s:<32}" for s in scorers)
          + "undecided   tokens  cut")
    for name, cells in report["conditions"].items():
        first = cells[scorers[0]]
        undecided = "/".join(str(cells[s]["undecided"]) for s in scorers)
        print(f"  {name:<20}" + "".join(f"{percent(cells[s]['rate']):<32}" for s in scorers)
              + f"{undecided:<12}{first['median_tokens']:<8g}{100 * first['cut']['value']:.0f} %")
    print(f"\n  by {scorers[0]}:")
    for name, cells in report["conditions"].items():
        parts = "  ".join(f"{c} {percent(v).strip()}"
                          for c, v in cells[scorers[0]]["by_category"].items())
        print(f"  {name:<20}{parts}")
    print()
    for pair, test in report["paired"].items():
        print_comparison(pair, test)
    if "judge" in report:
        print_judge(report["judge"])
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    if "verdict" in report:
        print_rules(report)


def print_comparison(pair: str, test: dict) -> None:
    d = test["difference"]
    if d["value"] is None:
        print(f"  {pair}: no conversation that both decided")
        return
    needed = test["items_needed"]
    print(f"  {pair}: {100 * d['value']:+.1f} points [{100 * d['low']:+.1f}, "
          f"{100 * d['high']:+.1f}], n {test['n']}; only the first {test['only_first']}, only the "
          f"second {test['only_second']}; McNemar p {test['p']:.2g}, h {test['h']:+.2f}"
          + (f"; such a difference shows in 9 of 10 studies from {needed} conversations on"
             if needed else ""))


def print_judge(about: dict) -> None:
    c, turns = about["calibration"], about["turns"]
    lost = {v: sum(cell[v] for cell in turns.values()) for v in ("unsure", "invalid")}
    print(f"  judge {about['judge']}: {lost['unsure']} turns unsure, {lost['invalid']} without a "
          f"verdict; against people: {c['n']} labels, kappa {number(c['value'])}"
          + (" (trusted)" if c["ok"] else f" (not trusted to head a report: {LEAST_LABELS} labels "
             f"and kappa {LEAST_KAPPA}, surely above {LEAST_LOW}, are needed; label "
             "spotcheck.jsonl)"))
    if "second" in about:
        s = about["second"]
        print(f"  second judge {s['judge']}: agrees on {number(s['agreement'])} of {s['n']}, kappa "
              f"{number(s['value'])}; apart on {', '.join(':'.join(k) for k in s['disagreements'])}"
              .removesuffix("; apart on "))


def print_rules(report: dict) -> None:
    print(f"\n  {'rule':<36}{'wanted':>8}  " + "".join(f"{s:>14}" for s in report["scorers"]))
    for k, rule in enumerate(report["rules"][report["scorers"][0]]):
        cells = [report["rules"][s][k] for s in report["scorers"]]
        print(f"  {rule['rule']:<36}{rule['wanted']:>8g}  " + "".join(
            f"{number(c['value']):>10} {'yes' if c['holds'] else 'NO':<3}" for c in cells))
    chosen = report["chosen"]
    gap = report["paired"][f"{chosen['base']} against {chosen['instruct']}"]
    print(f"  the design: {gap['n']} pairs find a gap just as large as wanted with power "
          f"{gap['design_power']:.3f}")
    for pair, a in report["agreement"].items():
        print(f"  {pair} agree: {number(a['lowest'])} in the condition where they do least, kappa "
              f"{number(a['pooled']['value'])}: {'yes' if a['holds'] else 'NO'}")
    print(f"\n{report['verdict']}" + "".join(f"\n  {reason}" for reason in report["reasons"]))


def main(path: str, overrides: list[str]) -> None:
    """`eval.py --gate`: 0 for GO, or where there is nothing to decide; else raises Stopped."""
    report = run_gate(path, overrides)
    print_gate(report)
    folder = report["config"]["out"]
    print(f"\nwrote {folder}/gate.json, outcomes.jsonl, disagreements.jsonl"
          + (", spotcheck.jsonl" if "judge" in report else ""))
    if report.get("verdict", "GO") != "GO":
        raise Stopped(f"{folder}: {report['verdict']}; do not train on this yet")
