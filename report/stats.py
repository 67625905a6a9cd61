"""The few statistics the reports need, thin over scipy, and the figures made of them.

The choice of method is named: Wilson for shares, bootstrap for means, exact tests. Then what was
measured of each prompt, plain rows and arrays, becomes report.json and metrics.jsonl. Three series
are never mixed: the answer's first token, the operation's word, the operator's symbol. Strength is
the largest probability before the last block; the last block's own is the model's output and stands
beside it, not in it.
"""
from collections.abc import Sequence
from functools import cache

import numpy as np
import scipy  # `scipy.stats` is imported where it is first used: training can do without

from config import BadInput

SERIES = ("answer", "operation", "symbol")
EMERGED = 0.10  # the prior work's threshold on a lens probability before the last block


def wilson(successes: int, n: int, level: float = 0.95) -> dict:
    """A proportion with its Wilson score interval: {value, n, low, high}.

    Unlike value +- 1.96 sd it stays inside [0, 1] and is honest at 0 and at 1.
    example  9 of 9 -> low 0.70: nine right answers do not say much
    """
    if n == 0:
        return {"value": None, "n": 0, "low": None, "high": None}
    interval = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return {"value": successes / n, "n": n,
            "low": float(interval.low), "high": float(interval.high)}


def exact_interval(successes: int, n: int, tail: float = 0.025) -> dict:
    """A proportion with Clopper and Pearson's limits: each is passed by chance with at most `tail`.

    What Wilson's interval says on average holds here at every true rate, so a rule can stand on it.
    example  9 of 9 -> low 0.664;  Wilson 0.70
    """
    if n == 0:
        return {"value": None, "n": 0, "low": 0.0, "high": 1.0}
    limits = scipy.stats.binomtest(successes, n).proportion_ci(1 - 2 * tail, method="exact")
    return {"value": successes / n, "n": n, "low": float(limits.low), "high": float(limits.high)}


def corrected_rate(passed: int, n: int, right: tuple[int, int], wrong: tuple[int, int],
                   level: float = 0.95) -> dict:
    """The rate behind an imperfect scorer's verdicts: {value, n, low, high}.

    passed, n      what the scorer passes of the test's replies
    right, wrong   of the labelled replies that people pass (fail): how many the scorer gets right,
                   and of how many. Their shares are sensitivity q1 and specificity q0
    value          (p + q0 - 1) / (q0 + q1 - 1) (Rogan and Gladen 1978), kept in [0, 1]; None where
                   the scorer is not shown to be better than chance. The interval covers both
                   samplings, p's and q's (Lang and Reiczigel 2014; for judges 2511.21140)
    example        23 of 150, right (96, 100), wrong (89, 100) -> .051 [0, .146]
    """
    none = {"value": None, "n": n, "low": 0.0, "high": 1.0}
    if not (n and right[1] and wrong[1]) or right[0] / right[1] + wrong[0] / wrong[1] <= 1:
        return none
    point = (passed / n + wrong[0] / wrong[1] - 1) / (right[0] / right[1] + wrong[0] / wrong[1] - 1)
    z = scipy.stats.norm.ppf((1 + level) / 2)
    p, m, m1, m0 = (passed + z * z / 2) / (n + z * z), n + z * z, right[1] + 2, wrong[1] + 2
    q1, q0 = (right[0] + 1) / m1, (wrong[0] + 1) / m0       # drawn to one half, as the limits need
    if q1 + q0 <= 1:
        return none
    rate = (p + q0 - 1) / (q0 + q1 - 1)
    v1, v0 = q1 * (1 - q1) / m1, q0 * (1 - q0) / m0
    half = z * np.sqrt(p * (1 - p) / m + (1 - rate) ** 2 * v0 + rate ** 2 * v1) / (q0 + q1 - 1)
    middle = rate + 2 * z * z * (rate * v1 - (1 - rate) * v0)
    low, value, high = middle - half, min(max(point, 0.0), 1.0), middle + half
    if value != point:      # no rate explains the verdicts: as wide an interval around the nearest
        low, high = min(low, value - half), max(high, value + half)
    low, high = np.clip([low, high], 0, 1).tolist()
    return {"value": value, "n": n, "low": min(low, value), "high": max(high, value)}


def percent(interval: dict) -> str:
    """A share with its interval, for a person.

    example  {value .913, low .89, high .93, n 600} -> ' 91.3 % [89.0, 93.0] n=600'
    """
    if interval["value"] is None:
        return "-"
    return (f"{100 * interval['value']:5.1f} % "
            f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}] n={interval['n']}")


def interval_text(interval: dict, factor: float = 1, digits: int = 2, sign: str = "") -> str:
    """example  {value .813, low .78, high .842}, factor 100, digits 1 -> '81.3 [78.0, 84.2]' """
    value, low, high = (factor * interval[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict:
    """Exact McNemar test of two runs on the same problems: only those that just one solves count.

    returns  {only_first, only_second, p}, p two-sided binomial on the discordant pairs. Never the
             chi-squared form: it is off where discordant pairs are few, which is where it matters
    example  10 only by the first, 2 only by the second -> p 0.0386
    raises   ValueError if the lengths differ
    """
    if len(first) != len(second):
        raise ValueError("McNemar needs the same problems in both runs: "
                         f"got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second))
    only_second = sum(b and not a for a, b in zip(first, second))
    discordant = only_first + only_second
    p = scipy.stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": float(p)}


def cohens_h(first: float, second: float) -> float:
    """Effect size of two proportions, second over first, signed: .2 small, .5 medium, .8 large.

    example  (.3, .8) -> 1.055;  (298/300, 300/300) -> .163: a point at the edge is worth more
    """
    return float(2 * np.arcsin(np.sqrt(second)) - 2 * np.arcsin(np.sqrt(first)))


def paired_difference(only_first: int, only_second: int, n: int, level: float = 0.95) -> dict:
    """Second rate less first over the same n items: {value, n, stderr, low, high}.

    Bonett and Price (2012), whose interval keeps a width where all pairs go one way, as a
    bootstrap's does not: it is Wald's, from one more discordant pair on each side.
    example  57 only by the second, 2 only by the first, of 300 -> .183 [.136, .229]
    """
    if n == 0:
        return {"value": None, "n": 0, "stderr": None, "low": None, "high": None}
    up, down = (only_second + 1) / (n + 2), (only_first + 1) / (n + 2)
    error = np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    half = scipy.stats.norm.ppf((1 + level) / 2) * error
    return {"value": (only_second - only_first) / n, "n": n, "stderr": float(error),
            "low": max(-1.0, float(up - down - half)), "high": min(1.0, float(up - down + half))}


def power_of_mcnemar(n: int, only_first: float, only_second: float, alpha: float = 0.01) -> float:
    """Chance that n pairs give exact McNemar p < alpha in favour of the second, exactly.

    only_first, only_second  the chances of a pair that just one of the two passes
    example  (40, .06, .56) -> .964: a base at 30 % and an instruct model at 80 %, independent
    """
    apart = only_first + only_second
    if apart == 0:
        return 0.0
    m = np.arange(n + 1)                                            # discordant pairs
    # so few passed by the first alone that 2 P(at most that many of m) < alpha; -1: no m reaches it
    few = scipy.stats.binom.ppf(alpha / 2, m, 0.5) - 1
    wins = np.where(few >= 0, m - few, m + 1)
    reached = scipy.stats.binom.sf(wins - 1, m, only_second / apart)
    return float((scipy.stats.binom.pmf(m, n, apart) * reached).sum())


@cache
def pairs_needed(only_first: float, only_second: float, alpha: float = 0.01,
                 power: float = 0.9) -> int:
    """The fewest pairs with which the exact McNemar test has that power, to a pair; 9,999 at most.

    example  (.06, .56) -> 33: a base at 30 % and an instruct model at 80 %, independent
    """
    low, high = 1, 9999
    while low < high:
        middle = (low + high) // 2
        if power_of_mcnemar(middle, only_first, only_second, alpha) >= power:
            high = middle
        else:
            low = middle + 1
    return low


def cohens_kappa(first: Sequence, second: Sequence, level: float = 0.95) -> dict:
    """Agreement of two raters beyond chance: {value, low, high, n, agreement, ac1}.

    Large-sample interval (Fleiss, Cohen and Everitt 1969); of raters who agree in all, the exact
    limit of agreement (Clopper and Pearson) over the same chance. Value None where both use one
    label only. ac1 (Gwet) is 1 minus disagreement over what chance would give, and stays high where
    one label is rare, as kappa does not: read them together.
    example  9 both pass, 2 and 2 apart, 17 both fail -> .713, ac1 .751
    """
    labels = sorted(set(first) | set(second))
    table = np.array([[sum(a == i and b == j for a, b in zip(first, second, strict=True))
                       for j in labels] for i in labels], dtype=np.float64)
    n = int(table.sum())
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0, "agreement": None, "ac1": None}
    share = table / n
    rows, columns, agreement = share.sum(1), share.sum(0), float(np.trace(share))
    mean = (rows + columns) / 2
    chance = float((mean * (1 - mean)).sum() / max(len(labels) - 1, 1))
    found = {"value": None, "low": None, "high": None, "n": n, "agreement": agreement,
             "ac1": (agreement - chance) / (1 - chance)}
    expected = float(rows @ columns)
    if expected == 1:
        return found
    kappa = (agreement - expected) / (1 - expected)
    diagonal = (np.diag(share) * (1 - (rows + columns) * (1 - kappa)) ** 2).sum()
    crossed = share * (columns[:, None] + rows[None, :]) ** 2
    off = (1 - kappa) ** 2 * (crossed.sum() - np.trace(crossed))
    variance = (diagonal + off - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2)
    half = scipy.stats.norm.ppf((1 + level) / 2) * np.sqrt(max(variance, 0))
    if agreement == 1:      # the variance is 0 there, of ten items as of a thousand
        half = (1 - exact_interval(n, n, (1 - level) / 2)["low"]) / (1 - expected)
    return found | {"value": float(kappa), "low": max(-1.0, float(kappa - half)),
                    "high": min(1.0, float(kappa + half))}


def paired_bootstrap(first: Sequence[float], second: Sequence[float], strata: Sequence = (),
                     level: float = 0.95, draws: int = 10000) -> dict:
    """Mean of second - first over the same items, with a seeded percentile interval over items.

    Items are drawn with their two outcomes together, within strata (categories) where given.
    """
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    n = len(difference)
    if n == 0:
        return {"value": None, "n": 0, "low": None, "high": None}
    strata, rng = np.asarray(strata if len(strata) else [""] * n), np.random.default_rng(0)
    totals = np.zeros(draws)
    for stratum in np.unique(strata):
        part = difference[strata == stratum]
        totals += part[rng.integers(0, len(part), (draws, len(part)))].sum(1)
    low, high = np.quantile(totals / n, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(difference.mean()), "n": n, "low": float(low), "high": float(high)}


def bootstrap_mean(values: Sequence[float], level: float = 0.95, draws: int = 2000) -> dict:
    """A mean with its seeded percentile bootstrap interval over units: {value, n, low, high}."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return {"value": None, "n": 0, "low": None, "high": None}
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(values.mean()), "n": len(values), "low": float(low), "high": float(high)}


def bootstrap_ratio(sums: Sequence[float], counts: Sequence[float], level: float = 0.95,
                    draws: int = 2000) -> dict:
    """sum / count over all units with its interval: {value, n, low, high}, as bootstrap_mean's.

    Nats a token over rows of unequal length: rows are drawn, tokens counted. A mean of the rows'
    own means would weigh the tokens of short rows more.
    example  sums [2, 9], counts [1, 9] -> 1.1, where the mean of means is 1.5
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    rng, n = np.random.default_rng(0), len(sums)
    ratios = []
    for _ in range(draws):
        drawn = rng.integers(0, n, n)
        ratios.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(sums.sum() / counts.sum()), "n": n, "low": float(low),
            "high": float(high)}


def mean_interval(values: Sequence[float], level: float = 0.95) -> dict:
    """A mean over a few training runs with Student's interval: {value, n, low, high}.

    With one run there is no interval: low and high are None.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return {"value": mean, "n": len(values), "low": None, "high": None}
    half = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * scipy.stats.sem(values)
    return {"value": mean, "n": len(values), "low": mean - float(half), "high": mean + float(half)}


def sign_flip(differences: Sequence[float], draws: int = 9999) -> float:
    """Two-sided p that paired differences are centred on 0: the share of sign patterns as extreme.

    All 2^n patterns up to n = 16, else that many random ones and the observed one.
    example  six differences of one sign -> 2 / 64 = .031, the least that six can give
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]
    if len(d) == 0:
        return 1.0
    if len(d) <= 16:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (draws, len(d)))
        extra = 1
    # a hair below: patterns equal to the observed one must not lose by rounding
    as_extreme = (np.abs(signs @ d) >= np.abs(d.sum()) * (1 - 1e-9)).sum()
    return float((as_extreme + extra) / (len(signs) + extra))


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """p that the mean difference lies outside -margin..margin: two one-sided t tests (TOST)."""
    d = np.asarray(differences, dtype=np.float64)
    if np.ptp(d) == 0:
        return 0.0 if abs(d[0]) < margin else 1.0
    above = scipy.stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = scipy.stats.ttest_1samp(d, margin, alternative="less").pvalue
    return float(max(above, below))


def adjusted_p(p: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg: the false discovery rate at which each of a family would be accepted.

    example  [.001, .004, .03, .08, .15, .20] -> [.006, .012, .06, .12, .18, .20]
    """
    return scipy.stats.false_discovery_control(p).tolist() if len(p) else []


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p: a family's chance of any wrong acceptance, whatever the dependence.

    example  [.01, .04, .03] -> [.03, .06, .06]
    source   Holm 1979; equals statsmodels' multipletests(method="holm")
    """
    order, adjusted, largest = np.argsort(p), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = float(largest)
    return adjusted


def auc_within(scores: Sequence[float], right: Sequence[bool],
               cells: Sequence[str]) -> float | None:
    """Chance that a right answer scores above a wrong one of the same cell; ties count half.

    Within cells (an operation in a wording), since harder cells score lower in any case; cells
    weigh by their number of such twos. None where no cell has both.
    """
    scores, right, cells = np.asarray(scores), np.asarray(right, bool), np.asarray(cells)
    wins = twos = 0.0
    for cell in np.unique(cells):
        good, bad = (scores[(cells == cell) & (right == r)] for r in (True, False))
        if len(good) and len(bad):
            wins += scipy.stats.mannwhitneyu(good, bad).statistic
            twos += len(good) * len(bad)
    return float(wins / twos) if twos else None


def depth(score: np.ndarray, threshold: float, hold: int = 3) -> dict[str, int]:
    """Where a curve over taps rises, peaks and stays; taps, -1 for never.

    score    (L+1,) of one quantity. Looked at before the last block only, taps 1 to L-1: tap 0 is
             the input token, tap L the output.
    first    the first tap at the threshold or above: counts blips
    onset    the first such tap after a lower one that keeps it for `hold` taps (fewer at the end):
             what can be read from tap 0 on has no onset, since it never rose
    sustained  the first tap from which it stays; right for answers, wrong for words that fade again
    peak     where it is largest
    example  [0, .1, .6, .2, .7, .8, .9, 1] at .5 -> first 2, onset 4, sustained 4, peak 6
    """
    last = len(score) - 2
    above = np.asarray(score) >= threshold
    inner = range(1, last + 1)
    find = lambda rule: next((k for k in inner if rule(k)), -1)
    return {"first": find(lambda k: above[k]),
            "onset": find(lambda k: not above[k - 1] and above[k:min(k + hold, last + 1)].all()),
            "sustained": find(lambda k: above[k:last + 1].all()),
            "peak": 1 + int(np.argmax(score[1:last + 1]))}


# --------------------------------------------------------------------------------------------------
# from what was measured of each prompt to the figures of a report


def peak_of_prompt(probs: np.ndarray) -> dict:
    """Where each series peaks before the last block, and the last block's own; probs (L+1, N)."""
    row = {}
    for n, name in enumerate(SERIES[:probs.shape[1]]):
        inner = probs[1:-1, n]  # blocks 0 .. L-2: the last is the output itself
        row |= {f"{name}_layer": int(inner.argmax()), f"{name}_prob": float(inner.max()),
                f"{name}_prob_last": float(probs[-1, n])}
    return row


def summarize_accuracy(rows: list[dict]) -> dict:
    """Wilson intervals: all test problems, each operation and wording, + and -; named prompts."""
    def share(keep) -> dict:
        correct = [row["correct"] for row in rows if keep(row)]
        return wilson(sum(correct), len(correct))
    test = [row for row in rows if row["set"] == "test"]
    cells = {}
    for row in test:
        cells.setdefault(f"{row['operation']} {row['wording']}".strip(), []).append(row["correct"])
    invalid = [row["invalid"] for row in test if "invalid" in row]     # of whole solutions
    return {
        "accuracy": share(lambda row: row["set"] == "test"),
        **({"invalid": wilson(sum(invalid), len(invalid))} if invalid else {}),
        "accuracy_by": {cell: wilson(sum(correct), len(correct))
                        for cell, correct in sorted(cells.items())},
        "accuracy_add_subtract": share(
            lambda row: row["set"] == "test" and row["operation"] in ("add", "subtract")),
        "accuracy_named": {name: share(lambda row, name=name: row["set"] == name)
                           for name in dict.fromkeys(r["set"] for r in rows) if name != "test"},
    }


def summarize_loss(rows: list[tuple[float, int]]) -> dict:
    """Rows (nats, tokens) to {loss, perplexity, row_losses}: nats a token, e to that power, all."""
    loss = bootstrap_ratio(*zip(*rows))
    return {"loss": loss, "perplexity": {key: value if key == "n" else float(np.exp(value))
                                         for key, value in loss.items()}, "row_losses": rows}


def compare_rows(report: dict, other: dict) -> dict:
    """Two runs on the same test rows: McNemar's test, and the other's loss less this one's.

    raises   BadInput where they have read other rows, or in other tokens
    """
    found, both = {}, (report, other)
    first, second = ([row for row in r["prompts"] if row["set"] == "test"] for r in both)
    tokens = [[count for _, count in r.get("row_losses", [])] for r in both]
    if tokens[0] != tokens[1] or len(first) != len(second):
        raise BadInput(f"--compare: {report['ckpt']} and {other['ckpt']} read other tokens of the "
                       "test rows; expected one tokenizer and one context")
    if "accuracy" in report:
        found["mcnemar"] = mcnemar([row["correct"] for row in first],
                                   [row["correct"] for row in second])
    if "loss" in report:
        found["loss_difference"] = bootstrap_ratio(
            [b - a for (a, _), (b, _) in zip(report["row_losses"], other["row_losses"])], tokens[0])
    return found


def summarize_classifier(reading, ids: np.ndarray, lengths: np.ndarray,
                         block: int) -> dict:
    """The classifier's figures over the first B prompts: trained block, series, all blocks.

    ids, lengths  series_ids and answer_lengths. The answer's series is its first token's. Where
                  digits are tokens many answers share one, and a model that knows no answer may
                  have it. "Emerged" is therefore said of answers of one token alone; what all
                  first tokens do stands apart, under first_token
    """
    B, N = ids.shape
    names = SERIES[:N]
    probs, ranks = reading.probs[:, :B, 0], reading.ranks[:, :B, 0]                 # (L+1, B, N)
    is_top = reading.top_ids[:, :B, 0, :1] == ids                                   # (L+1, B, N)
    layers = []
    for tap in range(1, len(probs)):
        series = {name: {"prob": float(probs[tap, :, n].mean()),
                         "rank": float(np.median(ranks[tap, :, n])),
                         "top1": float(is_top[tap, :, n].mean())} for n, name in enumerate(names)}
        layers.append({"layer": tap - 1, "last": tap == len(probs) - 1,
                       "entropy": float(reading.entropy[tap, :B].mean()), **series})
    strength = {name: summarize_strength(probs[:, :, n], is_top[:, :, n])
                for n, name in enumerate(names)}
    trained = {}
    if N > 1:       # rows have an operation
        right = is_top[block + 1, :, 1]
        trained = {"class": {"layer": block, "top1": wilson(int(right.sum()), len(right)),
                             "prob": bootstrap_mean(probs[block + 1, :, 1])}}
    whole = lengths == 1
    strength["answer"]["first_token"] = summarize_emergence(probs[:, :, 0], is_top[:, :, 0])
    strength["answer"] |= summarize_emergence(probs[:, whole, 0], is_top[:, whole, 0])
    return {
        **trained,
        "one_token_answers": wilson(int(whole.sum()), len(whole)),
        "strength": strength,
        "layers": layers,
    }


def summarize_strength(probs: np.ndarray, is_top: np.ndarray) -> dict:
    """A series' mean peak before the last block, and how many emerged; probs, is_top (L+1, B)."""
    inner = probs[1:-1]
    return {
        "before_last": bootstrap_mean(inner.max(0)), "last": bootstrap_mean(probs[-1]),
        "peak_layer": int(inner.mean(1).argmax()),
        **summarize_emergence(probs, is_top),
    }


def summarize_emergence(probs: np.ndarray, is_top: np.ndarray) -> dict:
    """How many peak above EMERGED, how many are top-1, before the last block; both (L+1, B)."""
    inner = probs[1:-1]
    return {
        "emerged": wilson(int((inner.max(0) > EMERGED).sum()), inner.shape[1]),
        "top1_before_last": wilson(int(is_top[1:-1].any(0).sum()), inner.shape[1]),
    }


def summarize_lens(reading, ids: np.ndarray, block: int) -> dict:
    """Means over prompts for metrics.jsonl: per tap each series' probability and top-1 share."""
    N, summary = ids.shape[1], {}
    if N > 1:       # rows have an operation
        summary["class_top1"] = float((reading.top_ids[block + 1, :, 0, 0] == ids[:, 1]).mean())
    for n, name in enumerate(SERIES[:N]):
        summary[name] = {
            "prob": reading.probs[:, :, 0, n].mean(1).round(5).tolist(),
            "top1": (reading.top_ids[:, :, 0, 0] == ids[:, n]).mean(1).round(5).tolist()}
    return summary


def make_view(reading, tokenizer, prompt: str, ids: list[int], words: list[str],
              chosen: list[int]) -> dict:
    """Plain numbers of a lens.Reading of one prompt, at all of its positions or the last ones.

    ids      the tokens of these positions
    words, chosen  the Reading's targets, as texts and tokens
    returns  {prompt, tokens [T], taps [L+1 names], top [L+1][T][k] of [token, probability],
              entropy [L+1][T], kl [L+1][T], words {word: {id, piece, prob [L+1], rank [L+1],
              onset, peak}} at the last position; onset at 0.10}
    """
    def cell(tap, t):
        top = zip(reading.top_ids[tap, 0, t], reading.top_probs[tap, 0, t])
        return [[tokenizer.piece(i), round(float(p), 6)] for i, p in top]

    taps = range(len(reading.entropy))
    # tap l is after block l - 1: "L0" is the first block's
    names = ["embed"] + [f"L{l}" for l in range(len(taps) - 1)]
    series = {}
    for n, (word, token) in enumerate(zip(words, chosen)):
        prob = reading.probs[:, 0, -1, n]
        where = depth(prob, EMERGED)
        series[word] = {"id": token, "piece": tokenizer.piece(token),
                        "prob": prob.round(6).tolist(),
                        "rank": reading.ranks[:, 0, -1, n].tolist(),
                        "onset": names[where["onset"]] if where["onset"] > 0 else None,
                        "peak": names[where["peak"]]}
    return {
        "prompt": prompt, "tokens": [tokenizer.piece(i) for i in ids], "taps": names,
        "top": [[cell(tap, t) for t in range(len(ids))] for tap in taps],
        "entropy": reading.entropy[:, 0].round(4).tolist(),
        "kl": reading.kl[:, 0].round(4).tolist(), "words": series,
    }


def summarize_chains(rows: list[dict]) -> dict:
    """Wilson intervals of the accuracies and the invalid share; bootstrap means of the rewards."""
    def share(key: str) -> dict:
        found = [row[key] for row in rows if row[key] is not None]
        return wilson(sum(found), len(found))
    graded = ("correct", "correct_frozen", "correct_empty", "correct_shuffled", "invalid",
              "chain_finished")
    scored = ("reward", "reward_frozen", "reward_empty", "reward_shuffled", "chain_tokens")
    summary = {key: share(key) for key in graded}
    summary |= {key: bootstrap_mean([row[key] for row in rows]) for key in scored}
    if rows[0]["correct"] is not None:
        summary["own_against_shuffled"] = mcnemar([row["correct"] for row in rows],
                                                  [row["correct_shuffled"] for row in rows])
    return summary
