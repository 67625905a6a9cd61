"""What has to hold for a GO, and whether it does: GO, NO-GO or AMBIGUOUS.

The thresholds stand in the gate's config file before the run, so that nobody moves them to where
the result is. The rest are pure functions of outcomes {scorer: {condition: {id: outcome}}}: True
(passed), False (failed) or None (undecided).
"""
import itertools
import statistics
import typing
from dataclasses import dataclass
from operator import ge, gt, le, lt
from pathlib import Path

from files.keys import BITS, BadInput, read_keys
from gate.replies import SCORERS, rate
from report import stats
from text.chat import TEMPLATES

ROLES = ("base", "instruct", "alternative")
MARGIN = 0.10   # how far beyond its threshold a rate's Wilson interval may reach
SUSPICIOUS = 0.8    # AUC of length for a score above which length may be what is measured
# the rules that refute a gap; the others say that too little is known
RATES = ("base passes at most", "alternative base passes at most", "instruct passes at least")


@dataclass
class GateConfig:
    """All keys of a gate file, with defaults."""
    base: str = "models/tiny"
    instruct: str = ""              # empty: no verdict, only the figures of the others
    alternative: str = ""           # another base, so that a gap is not one base's quirk
    benchmark: str = "gate/benchmark/conversations.jsonl"
    out: str = ""                   # empty: runs/<name of the config file>
    limit: int | None = None        # the first so many conversations of the benchmark
    # formats: raw | lines | plain | cued | chat. A role counts by its best
    base_templates: tuple[str, ...] = ("raw", "plain")
    instruct_templates: tuple[str, ...] = ("plain",)
    alternative_templates: tuple[str, ...] = ("plain",)
    max_reply_tokens: int = 256
    bits: int | None = None         # of all models, the judge too

    # --- scoring: checks | judge | exact | length; the first heads the report
    scorers: tuple[str, ...] = ("checks", "judge")
    judge: str = ""                 # model folder, run, Hub name; or http(s)://HOST/v1
    judge_model: str = ""           # what an endpoint calls it
    judge_prompt: str = ""          # text file; empty: the built-in one
    judge_letters: tuple[str, ...] = ("A", "B")     # a verdict's two tokens
    judge_unsure: float = 1.0       # a margin of fewer nats is undecided. Local judges only
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


ALLOWED = {
    **{f"{role}_templates": tuple(TEMPLATES) for role in ROLES}, "scorers": SCORERS,
    "bits": (None, *BITS)}
SHARES = ("base_at_most", "instruct_at_least", "alternative_at_most", "p_below",
          "agreement_at_least", "kappa_at_least", "undecided_at_most")


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
                 for key in SHARES if not 0 <= getattr(cfg, key) <= 1]
    mistakes += [f"{key} = {value}: expected at least 1" for key, value in (
        ("limit", cfg.limit), ("max_reply_tokens", cfg.max_reply_tokens))
        if value is not None and value < 1]
    if len(set(cfg.scorers)) < 2:
        mistakes.append(f"scorers = {', '.join(cfg.scorers)}: expected two different ones or more, "
                        "since one alone cannot be seen to measure something else")
    if "judge" in cfg.scorers and not cfg.judge:
        mistakes.append("scorer judge needs judge: a model, or the URL of an endpoint")
    if cfg.judge.startswith("http") and not cfg.judge_model:
        mistakes.append("judge is an endpoint: give judge_model, its name for the model")
    if len(cfg.judge_letters) != 2 or len(set(cfg.judge_letters)) != 2:
        mistakes.append(f"judge_letters = {', '.join(cfg.judge_letters)}: expected two, as A,B")
    if not cfg.base:
        mistakes.append("base is empty: expected the model that training would start from")
    if mistakes:
        raise BadInput("; ".join(mistakes))
    return cfg


# --- statistics of one scorer
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


def tested(a: list[bool], b: list[bool]) -> dict:
    """Exact McNemar and Cohen's h of paired outcomes: {n, only_first, only_second, p, h}."""
    n = len(a)
    return {"n": n, **stats.mcnemar(a, b),
            "h": stats.cohens_h(sum(a) / n, sum(b) / n) if n else None}


def compare(first: dict, second: dict, cfg: GateConfig, categories: dict[str, str]) -> dict:
    """Two conditions on the same conversations: test, effect, interval, the design's power."""
    ids, a, b = paired(first, second)
    # what two independent models at the thresholds give: .30 and .80 -> .06 and .56
    base, instruct = cfg.base_at_most, cfg.instruct_at_least
    design = base * (1 - instruct), (1 - base) * instruct
    return {**tested(a, b),
            "difference": stats.paired_bootstrap(a, b, [categories[i] for i in ids]),
            "design_power": stats.power_of_mcnemar(len(ids), *design, cfg.p_below)}


def conditions_of(role: str, outcomes: dict[str, dict]) -> list[str]:
    return [name for name in outcomes if name.split("-")[0] == role]


def comparisons(cfg: GateConfig, outcomes: dict[str, dict], categories: dict[str, str],
                chosen: dict[str, str]) -> dict:
    """The gap, and what a format alone does to each model: "A against B" -> compare's figures."""
    pairs = [(chosen["base"], chosen[role]) for role in ("instruct", "alternative")
             if role in chosen]
    for role in ROLES:
        names = conditions_of(role, outcomes)
        pairs += [(names[0], other) for other in names[1:]]
    return {f"{a} against {b}": compare(outcomes[a], outcomes[b], cfg, categories)
            for a, b in pairs}


def rules_of(cfg: GateConfig, outcomes: dict[str, dict], chosen: dict[str, str]) -> list[dict]:
    """One scorer's rules: [{rule, value, wanted, holds}]."""
    rates = {role: rate(outcomes[name].values()) for role, name in chosen.items()}
    base, instruct = rates["base"], rates["instruct"]
    _, a, b = paired(outcomes[chosen["base"]], outcomes[chosen["instruct"]])
    gap = tested(a, b)
    ahead = gap["only_second"] > gap["only_first"]
    # of all a base's formats: one that could not be scored may be its best
    looked_at = [list(cell.values()) for name, cell in outcomes.items()
                 if name.split("-")[0] != "instruct" or name == chosen["instruct"]]
    undecided = max(cell.count(None) / max(len(cell), 1) for cell in looked_at)
    rules = [
        ("base passes at most", base["value"], cfg.base_at_most, le),
        ("instruct passes at least", instruct["value"], cfg.instruct_at_least, ge),
        *[("alternative base passes at most", rates[role]["value"], cfg.alternative_at_most, le)
          for role in chosen if role == "alternative"],
        ("McNemar p below, instruct ahead", gap["p"], cfg.p_below,
         lambda p, below: ahead and p < below),
        ("Cohen's h at least", gap["h"], cfg.h_at_least, ge),
        # so few that chance could have met the thresholds
        ("base's interval ends below", base["high"], cfg.base_at_most + MARGIN, lt),
        ("instruct's interval begins above", instruct["low"], cfg.instruct_at_least - MARGIN, gt),
        ("undecided at most", undecided, cfg.undecided_at_most, le)]
    return [{"rule": rule, "value": value, "wanted": wanted,
             "holds": value is not None and bool(holds(value, wanted))}
            for rule, value, wanted, holds in rules]


def agreement_of(cfg: GateConfig, first: dict[str, dict], second: dict[str, dict]) -> dict:
    """Two scorers on the same replies: agreement in each condition, kappa over all of them."""
    cells, all_a, all_b, apart = {}, [], [], []
    for name in first:
        _, a, b = paired(first[name], second[name])
        cells[name] = stats.cohens_kappa(a, b)
        # pooled, kappa is high for any two scorers that tell the models apart; so it must hold
        # within each condition too, where there are enough passes and failures to say so
        few = min(side.count(value) for side in (a, b) for value in (True, False)) < 5
        if not few and cells[name]["high"] < cfg.kappa_at_least:
            apart.append(name)
        all_a, all_b = all_a + a, all_b + b
    pooled = stats.cohens_kappa(all_a, all_b)
    lowest = min((c["agreement"] for c in cells.values() if c["n"]), default=None)
    # where every reply has the same outcome kappa is undefined, and agreement says all there is
    kappa_holds = (pooled["value"] >= cfg.kappa_at_least if pooled["value"] is not None
                   else pooled["agreement"] == 1)
    return {"by_condition": cells, "pooled": pooled, "lowest": lowest, "apart": apart,
            "holds": lowest is not None and lowest >= cfg.agreement_at_least
            and bool(kappa_holds) and not apart}


def decide(cfg: GateConfig, outcomes: dict[str, dict[str, dict]]) -> dict:
    """GO, NO-GO or AMBIGUOUS, with the rules and agreements that lead there.

    A role counts by its best format, by the scorer that heads the report.
    """
    head = outcomes[cfg.scorers[0]]
    chosen = {role: max(names, key=lambda name: rate(head[name].values())["value"] or 0)
              for role in ROLES if (names := conditions_of(role, head))}
    rules = {s: rules_of(cfg, outcomes[s], chosen) for s in cfg.scorers}
    agreements = {f"{a} and {b}": agreement_of(cfg, outcomes[a], outcomes[b])
                  for a, b in itertools.combinations(cfg.scorers, 2)}
    broken = {s: [rule for rule in rules[s] if not rule["holds"]] for s in cfg.scorers}
    reasons = [f"{s}: {r['rule']} {r['wanted']:g} does not hold ({number(r['value'])})"
               for s in cfg.scorers for r in broken[s]]
    reasons += [f"{pair} do not agree (lowest agreement {number(a['lowest'])}, kappa "
                f"{number(a['pooled']['value'])}"
                + (f"; apart within {', '.join(a['apart'])}" if a["apart"] else "") + ")"
                for pair, a in agreements.items() if not a["holds"]]
    agree = all(a["holds"] for a in agreements.values())
    # refuted by a rate that was measured, not by lack of data
    refuted = all(rules[s][-1]["holds"] and any(
        r["rule"] in RATES and r["value"] is not None for r in broken[s]) for s in cfg.scorers)
    verdict = "GO" if not reasons else "NO-GO" if agree and refuted else "AMBIGUOUS"
    return {"verdict": verdict, "reasons": reasons, "chosen": chosen, "rules": rules,
            "agreement": agreements}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def length_warnings(outcomes: dict[str, dict[str, dict]],
                    replies: dict[str, list[dict]]) -> list[str]:
    """Scores that the length of the replies alone predicts, in one condition or over all."""
    lengths = {name: {row["id"]: statistics.mean(len(reply["text"]) for reply in row["replies"])
                      for row in rows} for name, rows in replies.items()}
    warnings = []
    for scorer, by_condition in outcomes.items():
        points = {name: [(lengths[name][i], passed) for i, passed in cell.items()
                         if passed is not None] for name, cell in by_condition.items()}
        points["all conditions"] = [point for part in points.values() for point in part]
        for name, part in points.items():
            passes = [passed for _, passed in part]
            few = min(passes.count(True), passes.count(False)) < 5  # chance alone would predict
            value = None if few else stats.auc(*zip(*part))
            if value is not None and max(value, 1 - value) > SUSPICIOUS:
                side = "longer" if value > 0.5 else "shorter"
                warnings.append(f"{name}: length alone predicts what {scorer} passes (AUC "
                                f"{value:.2f}: {side} replies pass); read some before believing it")
    return warnings
