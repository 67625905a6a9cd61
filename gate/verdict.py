"""What has to hold for a GO, and whether it does: GO, NO-GO or AMBIGUOUS.

A rule on a rate holds if its interval lies on the right side of the threshold, is refuted if it
lies on the wrong one, and is open in between: 91 of 300 neither shows nor refutes "at most 30 %".
Intervals are exact, and what is undecided counts against the gap. The first look has 1 % in each
tail, the next 0.5 %, 0.25 % ... So with scorers that are right, a rate beyond its threshold gets a
GO with a chance of 2 % at most, however often more is asked. Whether
they are is asked apart: two kinds of scorer have to agree within each condition, and people sign.

All are pure functions of outcomes {scorer: {condition: {id: outcome}}}: True, False or None.
"""
import math
import statistics
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from files.keys import BITS, BadInput, read_keys
from gate.judge import FEW, LEAST_LABELS
from gate.replies import FORMATS, HISTORIES, SCORERS, worst
from report import stats
from report.gate_page import found_of, interval, number

ROLES = ("base", "instruct", "alternative")
TAIL = 0.02     # how often a rule may hold of a true rate beyond it, all looks together
POWER = 0.9     # of McNemar's test for the wanted gap; gives the least number of pairs
ODDS, ALONE = 5, 8      # pairs for the gap to one against it; that many where none is against it
FDR, CATEGORIES = 0.10, 0.75    # Benjamini-Hochberg; the share of categories that show the gap
# share of empty, cut or looping replies, and of conversations that one of these failed, above which
ILL = 0.10      # a base had no fair trial
SUSPICIOUS = 0.8    # AUC of length for a score above which length may be what is measured
REMEDY = {"empty": "give it another format, such as plain+shots",
          "cut": "raise max_reply_tokens, or give it plain+shots, where it sees how replies end",
          "loops": "give it plain+shots, and see what base_histories: [right] does",
          "spoilt": "mend what of empty, cut and loops is frequent, or leave that format out"}


@dataclass
class GateConfig:
    """All keys of a gate file, with defaults."""
    base: str = "models/tiny"
    instruct: str = ""              # empty: no verdict, only the figures of the others
    alternative: str = ""           # another base, so that a gap is not one base's quirk
    benchmark: str = "gate/benchmark/conversations.jsonl"
    out: str = ""                   # empty: runs/<name of the config file>
    limit: int | None = None        # so many conversations, of each category its share
    replies: str = ""               # an earlier gate's folder: a larger limit adds to its replies
    # formats: raw | lines | plain | cued | chat, raw+cue, and plain+shots (lines, cued: the same)
    base_templates: tuple[str, ...] = ("raw+cue", "plain", "plain+shots")
    instruct_templates: tuple[str, ...] = ("plain",)
    alternative_templates: tuple[str, ...] = ("plain+shots",)
    shots: int = 2                  # worked conversations before plain+shots; they are not asked
    base_histories: tuple[str, ...] = ("own", "right")  # whose earlier replies a base reads
    max_reply_tokens: int = 256
    bits: int | None = None         # of all models, the judge too

    # --- scoring: checks | judge | length; two kinds of them for a GO
    scorers: tuple[str, ...] = ("checks", "judge")
    judge: str = ""                 # model folder, run, Hub name; or http(s)://HOST/v1
    judge_model: str = ""           # what an endpoint calls it
    judge_prompt: str = ""          # text file; empty: the built-in one
    judge_unsure: float = 1.0       # a margin of fewer nats is undecided. Local judges only
    judge_tokens: int = 2048        # room of an endpoint's answer, its reasoning included
    judge_requests: int = 8         # to an endpoint at once
    rejudge: bool = False           # ask an endpoint again what it gave no verdict on
    labels: str = ""                # people's verdicts: spotcheck.jsonl, filled in

    # --- what has to hold
    base_at_most: float = 0.30
    instruct_at_least: float = 0.80
    alternative_at_most: float = 0.40
    p_below: float = 0.01           # exact McNemar
    agreement_at_least: float = 0.80    # of two kinds of scorer, within each condition


THRESHOLDS = ("base_at_most", "instruct_at_least", "alternative_at_most", "p_below",
              "agreement_at_least")
# formats and histories in which a base may turn out to be good enough
FAIR = ("base_templates", "base_histories", "alternative_templates")
# of a gate file, what its plan leaves out: places, and how an endpoint is asked
UNPLANNED = ("out", "replies", "labels", "rejudge", "judge_requests")
ALLOWED = {**{f"{role}_templates": FORMATS for role in ROLES}, "scorers": tuple(SCORERS),
           "bits": (None, *BITS), "base_histories": HISTORIES}


def load_gate(path: str | Path, overrides: list[str]) -> GateConfig:
    """Read a gate file and key=value words; raises BadInput with all mistakes."""
    values, mistakes = read_keys(path, overrides, typing.get_type_hints(GateConfig))
    cfg = GateConfig(**values)
    cfg.out = cfg.out or f"runs/{Path(path).stem}"
    for key, allowed in ALLOWED.items():
        value = getattr(cfg, key)
        given = value if isinstance(value, tuple) else (value,)
        if not given or any(item not in allowed for item in given):
            mistakes.append(f"{key} = {', '.join(map(str, given)) or 'nothing'}: expected any of "
                            f"{', '.join(str(item) for item in allowed if item)}")
    mistakes += [f"{key} = {getattr(cfg, key)}: expected a number from 0 to 1"
                 for key in THRESHOLDS if not 0 <= getattr(cfg, key) <= 1]
    mistakes += [f"{key} = {getattr(cfg, key)}: expected at least 1" for key in (
        "limit", "shots", "max_reply_tokens", "judge_tokens", "judge_requests")
        if getattr(cfg, key) is not None and getattr(cfg, key) < 1]
    if "judge" in cfg.scorers and not cfg.judge:
        mistakes.append("scorer judge needs judge: a model, or the URL of an endpoint")
    if cfg.judge.startswith("http") and not cfg.judge_model:
        mistakes.append("judge is an endpoint: give judge_model, its name for the model")
    if not cfg.base:
        mistakes.append("base is empty: expected the model that training would start from")
    if cfg.instruct and cfg.base_at_most >= cfg.instruct_at_least:
        mistakes.append(f"base_at_most = {cfg.base_at_most} is no less than instruct_at_least = "
                        f"{cfg.instruct_at_least}: expected a gap between them")
    if mistakes:
        raise BadInput("; ".join(mistakes))
    return cfg


def pairs_needed(cfg: GateConfig) -> int:
    """Pairs that find a gap just as large as wanted, of two models independent of each other."""
    base, instruct = cfg.base_at_most, cfg.instruct_at_least    # .30 and .80 -> .06 and .56
    return stats.pairs_needed(base * (1 - instruct), (1 - base) * instruct, cfg.p_below, POWER)


# --- statistics of one scorer
def paired(first: dict[str, bool | None], second: dict[str, bool | None],
           undecided: tuple[bool, bool] | None = None) -> tuple[list, list, list]:
    """The ids that both decided, and their outcomes; all, where `undecided` stands for None."""
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise BadInput(f"a paired test needs the same conversations on both sides: {len(odd)} are "
                       f"on one side only, such as {', '.join(odd[:3])}")
    if undecided:
        first, second = ({i: stands if v is None else v for i, v in side.items()}
                         for side, stands in zip((first, second), undecided))
    ids = [i for i in first if first[i] is not None and second[i] is not None]
    return ids, [first[i] for i in ids], [second[i] for i in ids]


def compare(first: dict, second: dict, undecided: tuple[bool, bool] | None = None) -> dict:
    """Exact McNemar, Bonett and Price's difference and Cohen's h of two conditions' outcomes."""
    ids, a, b = paired(first, second, undecided)
    found = stats.mcnemar(a, b)
    n = len(ids)
    return {"n": n, **found, "h": stats.cohens_h(sum(a) / n, sum(b) / n) if n else None,
            "difference": stats.paired_difference(found["only_first"], found["only_second"], n)}


def role_of(condition: str) -> str:
    return condition.split("-")[0]


def best_of(by_condition: dict[str, dict], health: dict[str, dict]) -> dict[str, str]:
    """Each role's best condition by one scorer; of a base with what is undecided passed. Of equal
    ones the one whose replies are fit."""
    best = {}
    for name, cell in by_condition.items():
        value = worst(cell.values(), role_of(name) != "instruct")["value"] or 0
        rank = value, not ill_of(health.get(name, {}))
        if role_of(name) not in best or rank > best[role_of(name)][1]:
            best[role_of(name)] = name, rank
    return {role: name for role, (name, _) in best.items()}


def share_rule(rule: str, outcomes: dict, wanted: float, at_most: bool, tail: float) -> dict:
    """A rate against its threshold: holds "yes", "no" or "open", with the n that would settle it,
    at the next look. What is undecided counts against the rule, and against its refutation."""
    against, for_it = (worst(outcomes.values(), side, tail) for side in (at_most, not at_most))
    clear = lambda found: found["high"] <= wanted if at_most else found["low"] >= wanted
    beyond = for_it["low"] > wanted if at_most else for_it["high"] < wanted
    holds = "yes" if clear(against) else "no" if beyond else "open"
    share, needed = against["value"], None
    if holds == "open" and share is not None and (share < wanted if at_most else share > wanted):
        needed = next((n for n in (round(against["n"] * 1.1 ** k) for k in range(1, 50))
                       if clear(stats.exact_interval(round(share * n), n, tail / 2))), None)
    return {"rule": rule, "wanted": wanted, **against, "holds": holds, "needed": needed}


def rules_of(cfg: GateConfig, outcomes: dict[str, dict], chosen: dict[str, str],
             categories: dict[str, str], looks: int) -> list[dict]:
    """One scorer's rules: [{rule, wanted, value, holds, needed}]."""
    # the best of several formats is lucky: an instruct model's limits allow for that
    formats = sum(role_of(name) == "instruct" for name in outcomes)
    base, instruct = outcomes[chosen["base"]], outcomes[chosen["instruct"]]
    tail = TAIL / 2 ** looks    # of all looks together TAIL at most
    rules = [share_rule("base passes at most", base, cfg.base_at_most, True, tail),
             share_rule("instruct passes at least", instruct, cfg.instruct_at_least, False,
                        tail / formats)]
    if "alternative" in chosen:
        rules.append(share_rule("alternative base passes at most", outcomes[chosen["alternative"]],
                                cfg.alternative_at_most, True, tail))
    undecided = (True, False)       # as bad for the gap as it can be
    ids, a, b = paired(base, instruct, undecided)
    gap = stats.mcnemar(a, b)
    ahead, against = gap["only_second"], gap["only_first"]
    p, groups = [], sorted(set(categories[i] for i in ids))
    for group in groups:
        cell = compare(*({i: side[i] for i in ids if categories[i] == group}
                         for side in (base, instruct)), undecided)
        p.append(cell["p"] if cell["only_second"] > cell["only_first"] else 1.0)
    shown = sum(value <= FDR for value in stats.adjusted_p(p))
    needed = pairs_needed(cfg)
    plain = [("pairs at least, for McNemar's power", len(ids), needed, len(ids) >= needed),
             ("McNemar p below, instruct ahead", gap["p"], cfg.p_below / looks,
              ahead > against and gap["p"] < cfg.p_below / looks),
             ("pairs for the gap, to one against", ahead / max(against, 1), ODDS,
              ahead >= ODDS * against and ahead >= ALONE),
             ("categories that show it", shown, math.ceil(CATEGORIES * len(groups)),
              bool(groups) and shown >= math.ceil(CATEGORIES * len(groups)))]
    return rules + [{"rule": rule, "wanted": wanted, "value": value,
                     "holds": "yes" if holds else "open",
                     "needed": needed if rule.startswith("pairs at least") and not holds else None}
                    for rule, value, wanted, holds in plain]


def agreement_of(cfg: GateConfig, first: dict[str, dict], second: dict[str, dict]) -> dict:
    """Two scorers on the same replies, within each condition: {condition: {..., judged, holds}}.

    It holds where they agree often and kappa is surely above 0: two that only tell the models apart
    have one about 0 within a condition, two that pass different replies one below. `judged` is
    False where fewer than FEW items are in a class by either
    """
    cells = {}
    for name in first:
        _, a, b = paired(first[name], second[name])
        found = stats.cohens_kappa(a, b)
        judged = min(sum(value in pair for pair in zip(a, b)) for value in (True, False)) >= FEW
        cells[name] = found | {"judged": judged, "holds": not judged or bool(
            found["agreement"] >= cfg.agreement_at_least and found["low"] > 0)}
    return cells


def ill_of(health: dict[str, dict]) -> list[str]:
    """What keeps a condition from a fair trial: of empty, cut, loops and spoilt those above ILL."""
    return [what for what in REMEDY if health.get(what) and (health[what]["value"] or 0) > ILL]


def decide(cfg: GateConfig, outcomes: dict[str, dict[str, dict]], categories: dict[str, str],
           health: dict[str, dict] | None = None, calibration: dict[str, dict] | None = None,
           looks: int = 1, remarks: list[str] = ()) -> dict:
    """The verdict with its reasons, rules and agreements.

    chosen       {scorer: {role: condition}}: a role counts by its best, by each scorer's own view
    health       {condition: {empty, cut, loops, spoilt}}
    calibration  {scorer: {"ok", "n", "why"}} by people's labels
    looks        how often these conversations have been looked at; remarks: other reasons
    """
    health, calibration = health or {}, calibration or {}
    scored = [s for s in cfg.scorers if s in outcomes]
    chosen = {s: best_of(outcomes[s], health) for s in scored}
    rules = {s: rules_of(cfg, outcomes[s], chosen[s], categories, looks) for s in scored}
    reasons = [describe(s, r) for s in scored for r in rules[s] if r["holds"] != "yes"]
    confirmed = [s for s in scored if calibration.get(s, {}).get("ok")]
    kinds = {SCORERS[s] for s in scored} | ({"people"} if confirmed else set())
    if len(kinds) < 2:
        reasons.append(f"{' and '.join(scored)}: scorers of one kind cannot confirm each other; "
                       "add scorer judge, or labels of spotcheck.jsonl")
    for s in scored:    # fewer labels neither confirm nor refute
        found = calibration.get(s, {"ok": True})
        if not found["ok"] and found.get("n", 0) >= LEAST_LABELS:
            reasons += [f"people do not confirm {s}: {what}" for what in found["why"]]
    agreements = {}
    for k, a in enumerate(scored):
        for b in scored[k + 1:]:
            if SCORERS[a] == SCORERS[b]:
                continue
            cells = agreements[f"{a} and {b}"] = agreement_of(cfg, outcomes[a], outcomes[b])
            reasons += [f"{a} and {b} do not agree within {name} (agreement "
                        f"{number(c['agreement'])}, kappa {interval(c)}): read disagreements.jsonl"
                        for name, c in cells.items() if not c["holds"]]
            decisive = {chosen[s][role] for s in (a, b) for role in ("base", "instruct")}
            if not any(cells[c]["judged"] for c in decisive) and not {a, b} <= set(confirmed):
                reasons.append(f"whether {a} and {b} agree cannot be judged: no condition has "
                               f"{FEW} passes and {FEW} failures; label spotcheck.jsonl")
    # in one that lost by its replies alone, a base that can do it may be hidden
    for name in sorted({name for s in scored for name in outcomes[s]}):
        if role_of(name) != "instruct":
            reasons += [f"{name}: {100 * health[name][what]['value']:.0f} % of "
                        f"{'conversations' if what == 'spoilt' else 'replies'} are {what}, so it "
                        f"may fail for that: {REMEDY[what]}"
                        for what in ill_of(health.get(name, {}))]
    reasons += remarks
    # refuted by rates that every scorer measured; of an instruct model only if its replies are fit
    refuted = {s: [r for r in rules[s] if r["holds"] == "no" and not (
        r["rule"].startswith("instruct") and ill_of(health.get(chosen[s]["instruct"], {})))]
        for s in scored}
    # one rule by all of them: checks that pass all and a judge that fails all only contradict
    by_all = set.intersection(*({r["rule"] for r in refuted[s]} for s in scored)) if scored else ()
    signed = bool(scored) and set(scored) == set(confirmed)
    verdict = ("NO-GO" if by_all else "AMBIGUOUS" if reasons else
               "GO" if signed else "GO, not signed off")
    if verdict == "NO-GO":      # what is merely not shown says no more then
        reasons = [describe(s, r) for s in scored for r in refuted[s]
                   if r["rule"] in by_all]
    return {"verdict": verdict, "reasons": reasons, "chosen": chosen, "rules": rules,
            "agreement": agreements}


def describe(scorer: str, rule: dict) -> str:
    """A rule that does not hold, in words, and how many conversations might settle it."""
    text = f"{scorer}: {rule['rule']} {rule['wanted']:g} "
    text += "is refuted" if rule["holds"] == "no" else "is not shown"
    needs = f"; needs about {rule['needed']} conversations" if rule["needed"] else ""
    return f"{text} ({found_of(rule)}){needs}"


# --- what heads a report
def length_warnings(outcomes: dict[str, dict[str, dict]],
                    replies: dict[str, list[dict]]) -> list[str]:
    """Scores that the length of the replies alone predicts, within a condition."""
    warnings = []
    for name, rows in replies.items():
        lengths = {row["id"]: statistics.mean(len(reply["text"]) for reply in row["replies"])
                   for row in rows}
        for scorer in [s for s in outcomes if s != "length"]:
            part = [(lengths[i], passed) for i, passed in outcomes[scorer][name].items()
                    if passed is not None]
            counts = Counter(passed for _, passed in part)
            few = min(counts[True], counts[False]) < FEW    # chance alone would predict
            value = None if few else stats.auc_within(*zip(*part), [name] * len(part))
            if value is not None and max(value, 1 - value) > SUSPICIOUS:
                side = "longer" if value > 0.5 else "shorter"
                warnings.append(f"{name}: length alone predicts what {scorer} passes (AUC "
                                f"{value:.2f}: {side} replies pass); read some before believing it")
    return warnings


def looser(plan: dict, usual: dict) -> list[str]:
    """Keys by which a plan asks for less than another: its thresholds, formats that it left out."""
    return [key for key in THRESHOLDS if (plan[key] - usual[key]) * (
        -1 if key.endswith("at_least") else 1) > 0] + [
        key for key in FAIR if set(usual[key]) - set(plan[key])]


def loosened(cfg: GateConfig) -> list[str]:
    """Thresholds that ask for less than the defaults do."""
    usual = GateConfig()
    return [f"{key} = {getattr(cfg, key):g} asks for less than the default, "
            f"{getattr(usual, key):g}" for key in looser(vars(cfg), vars(usual))
            if key in THRESHOLDS]
