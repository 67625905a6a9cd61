"""How often does the gate say GO where it must not, and how often where it should? Simulated.

Each gate asks n conversations in four categories; base and instruct model pass each with their true
rates, independently. Two scorers report it, each right with the same chance, each undecided at
random. Then two that miss part of what the base does right, and people's labels behind them: where
scorers err alike, no figure of theirs tells. All of a scenario's gates are drawn and decided at
once, as counts: `fast_go` is `gate.verdict.decide` in arrays, and tests/test_gate_simulation.py
holds one against the other.

    python tests/gate_simulation.py          # docs/gate_simulation.png and its figures; minutes
"""
import itertools
import sys
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parent.parent))

from gate.verdict import ALONE, CATEGORIES, FDR, FEW, ODDS, TAIL, GateConfig, decide, pairs_needed  # noqa: E402
from report.stats import corrected_rate, exact_interval, percent, wilson  # noqa: E402

CFG = GateConfig()
NEEDED = pairs_needed(CFG)
GATES, GROUPS = 2000, 4
BASE, INSTRUCT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5), (0.7, 0.8, 0.9, 0.95)
# wrong by a hair: where a GO is likeliest among those that must not be one
EDGE = ((0.31, 0.95), (0.31, 1.0), (0.05, 0.79), (0.0, 0.79))
SIZES, UNDECIDED, RIGHT = (60, 100, 200, 300), (0.0, 0.05, 0.1), (0.8, 0.9, 0.95, 1.0)


# scorers that miss part of what the base does right: its true rate, their sensitivity on it
BLIND = tuple(itertools.product((0.35, 0.4, 0.5), (0.4, 0.6, 0.8), (False, True)))
LABELLED = 60   # of the base's replies, by people


def side(rate: float, undecided: float, sensitivity: float, specificity: float,
         alike: bool = False) -> np.ndarray:
    """Chances of what the two scorers say of one reply, (2, 3, 3): of one that is wrong, that is
    right; 0 failed, 1 passed, 2 undecided. alike: both err on the same replies."""
    said = lambda passes: np.array([1 - passes, passes, 0]) * (1 - undecided) + [0, 0, undecided]
    both = lambda passes: np.diag(said(passes)) if alike else np.outer(said(passes), said(passes))
    return np.stack([(1 - rate) * both(1 - specificity), rate * both(sensitivity)])


def draw(rng, gates: int, n: int, base: float, instruct: float, undecided: float,
         right: float, on_base: np.ndarray | None = None) -> np.ndarray:
    """Counts (gates, GROUPS, 3, 3, 3, 3): of base by checks and judge, of instruct by both.

    on_base   a side() of the base, where the scorers do otherwise there
    """
    first, second = (side(rate, undecided, right, right) for rate in (base, instruct))
    chances = np.multiply.outer((first if on_base is None else on_base).sum(0), second.sum(0))
    sizes = [len(range(g, n, GROUPS)) for g in range(GROUPS)]
    counts = [rng.multinomial(size, chances.ravel(), gates) for size in sizes]
    return np.stack(counts, 1).reshape(gates, GROUPS, 3, 3, 3, 3)


@cache
def limits(n: int, looks: int) -> tuple[np.ndarray, np.ndarray]:
    found = [exact_interval(k, n, TAIL / 2 ** looks) for k in range(n + 1)]
    return np.array([f["low"] for f in found]), np.array([f["high"] for f in found])


def mcnemar_p(only_first: np.ndarray, only_second: np.ndarray) -> np.ndarray:
    less, both = np.minimum(only_first, only_second), only_first + only_second
    return np.minimum(1, 2 * binom.cdf(less, both, 0.5))


def rules_hold(table: np.ndarray, looks: int = 1) -> np.ndarray:
    """All of one scorer's rules, (gates,), of counts (gates, GROUPS, base, instruct)."""
    n = int(table[0].sum())
    low, high = limits(n, looks)
    # undecided against the gap: of the base it passed, of the instruct model it failed
    ahead = table[:, :, 0, 1]
    against = table[:, :, 1:, ::2].sum((2, 3))
    b, c = ahead.sum(1), against.sum(1)
    base, instruct = table[:, :, 1:].sum((1, 2, 3)), table[..., 1].sum((1, 2))
    p = np.where(ahead > against, mcnemar_p(against, ahead), 1)
    steps = np.sort(p, 1) <= FDR * np.arange(1, GROUPS + 1) / GROUPS
    shown = np.where(steps.any(1), GROUPS - steps[:, ::-1].argmax(1), 0)
    return ((high[base] <= CFG.base_at_most) & (low[instruct] >= CFG.instruct_at_least)
            & (mcnemar_p(b, c) < CFG.p_below / looks) & (b > c) & (b >= ODDS * c) & (b >= ALONE)
            & (shown >= np.ceil(CATEGORIES * GROUPS)) & (n >= NEEDED))


def agree(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one condition, counts (gates, checks, judge): can agreement be judged; does it hold, or
    cannot be."""
    n = table[:, :2, :2].sum((1, 2))
    judged = np.minimum(n - table[:, 0, 0], n - table[:, 1, 1]) >= FEW
    with np.errstate(all="ignore"):
        s = table[:, :2, :2] / n[:, None, None]
        first, second, po = s[:, 1].sum(1), s[:, :, 1].sum(1), s[:, 0, 0] + s[:, 1, 1]
        pe = first * second + (1 - first) * (1 - second)
        kappa = (po - pe) / (1 - pe)
        diagonal = (s[:, 1, 1] * (1 - (first + second) * (1 - kappa)) ** 2
                    + s[:, 0, 0] * (1 - (2 - first - second) * (1 - kappa)) ** 2)
        off = (1 - kappa) ** 2 * (s[:, 1, 0] * (second + 1 - first) ** 2
                                  + s[:, 0, 1] * (1 - second + first) ** 2)
        variance = (diagonal + off - (kappa - pe * (1 - kappa)) ** 2) / (n * (1 - pe) ** 2)
        low = kappa - 1.959963984540054 * np.sqrt(np.maximum(variance, 0))
    return judged, ~judged | (po >= CFG.agreement_at_least) & (low > 0)


def fast_go(counts: np.ndarray, looks: int = 1) -> np.ndarray:
    """Which gates end in a GO, (gates,), at the so-manieth look."""
    cells = [agree(counts.sum((1, 4, 5))), agree(counts.sum((1, 2, 3)))]
    agreed = np.all([holds for _, holds in cells], 0) & np.any([judged for judged, _ in cells], 0)
    return agreed & rules_hold(counts.sum((3, 5)), looks) & rules_hold(
        counts.sum((2, 4)), looks)


def slow_verdict(counts: np.ndarray) -> str:
    """One gate, counts (GROUPS, 3, 3, 3, 3), by the gate's own code."""
    places = np.repeat(np.argwhere(counts >= 0), counts.ravel(), 0)     # an item: group, four words
    word = (False, True, None)
    outcomes = {s: {f"{role}-plain": {str(i): word[place[k]] for i, place in enumerate(places)}
                    for role, k in (("base", first), ("instruct", first + 2))}
                for s, first in (("checks", 1), ("judge", 2))}
    return decide(CFG, outcomes, {str(i): str(p[0]) for i, p in enumerate(places)})["verdict"]


def go_rates(gates: int = GATES) -> list[dict]:
    """[{base, instruct, n, undecided, right, go, gates}] of every scenario."""
    rates = [*itertools.product(BASE, INSTRUCT), *EDGE]
    found = []
    for number, (pair, n, undecided, right) in enumerate(
            itertools.product(rates, SIZES, UNDECIDED, RIGHT)):
        counts = draw(np.random.default_rng(number), gates, n, *pair, undecided, right)
        found.append({"base": pair[0], "instruct": pair[1], "n": n, "undecided": undecided,
                      "right": right, "go": int(fast_go(counts).sum()), "gates": gates})
    return found


def blind_rates(gates: int = GATES, n: int = 200) -> list[dict]:
    """[{base, sensitivity, alike, go, signed, gates}] where scorers are right but for what they
    miss of the base; signed: of those GO the ones that labels of its replies let pass, at most."""
    found = []
    for number, (base, sensitivity, alike) in enumerate(BLIND):
        rng, chances = np.random.default_rng(number), side(base, 0, sensitivity, 1, alike)
        counts = draw(rng, gates, n, base, 0.95, 0, 1, chances)
        ends, signed = counts[fast_go(counts)].sum((1, 4, 5)), 0
        is_right = (chances[1] / np.maximum(chances.sum(0), 1e-12)).ravel()
        for table in ends:
            seen = rng.multivariate_hypergeometric(table.ravel(), LABELLED)
            right = rng.binomial(seen, is_right).reshape(3, 3)
            wrong = seen.reshape(3, 3) - right
            highs = [corrected_rate(int(table.sum(1 - k)[1]), n,
                                    (int(right.sum(1 - k)[1]), int(right.sum())),
                                    (int(wrong.sum(1 - k)[0]), int(wrong.sum())),
                                    1 - 2 * TAIL)["high"] for k in (0, 1)]
            signed += max(highs) <= CFG.base_at_most
        found.append({"base": base, "sensitivity": sensitivity, "alike": alike, "go": len(ends),
                      "signed": signed, "gates": gates})
    return found


def asked_again(pair: tuple[float, float], times: int, free: bool = False, gates: int = 500,
                n: int = 200) -> int:
    """How many gates of true rates say GO at any of so many looks, each at other conversations;
    free: each with the limits of a first one."""
    rng, ever = np.random.default_rng(0), np.zeros(gates, bool)
    for look in range(1, times + 1):
        ever |= fast_go(draw(rng, gates, n, *pair, 0, 1), 1 if free else look)
    return int(ever.sum())


def is_wrong(row: dict) -> bool:
    return row["base"] > CFG.base_at_most or row["instruct"] < CFG.instruct_at_least


def picture(found: list[dict], path: Path) -> None:
    """Share of GO by n: a panel for each accuracy of the scorers, at each rate of undecided."""
    import matplotlib  # here: who only simulates needs none
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = dict(zip(((b, i) for b in BASE for i in (0.9, 0.95)), plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(len(UNDECIDED), len(RIGHT), figsize=(13, 8), sharex=True,
                                sharey=True)
    for row, undecided in zip(axes, UNDECIDED):
        for axis, right in zip(row, RIGHT):
            cell = [f for f in found if f["undecided"] == undecided and f["right"] == right]
            for pair in dict.fromkeys((f["base"], f["instruct"]) for f in cell):
                line = [f for f in cell if (f["base"], f["instruct"]) == pair]
                wrong = is_wrong(line[0])
                if not wrong and pair not in colours:
                    continue
                axis.plot([f["n"] for f in line], [100 * f["go"] / f["gates"] for f in line],
                          color="black" if wrong else colours[pair], marker=".",
                          lw=0.8 if wrong else 1.8,
                          label=None if wrong else f"true {pair[0]:g} and {pair[1]:g}")
            axis.axhline(2, color="grey", lw=0.6, ls=":")
            axis.set_title(f"scorers right {100 * right:.0f} %, undecided {100 * undecided:.0f} %",
                           fontsize=9)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=6, loc="upper left")
    figure.supxlabel("conversations")
    figure.supylabel("gates that say GO, % (black: must not; dotted: 2 %)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    found = go_rates()
    wrong, right = ([f for f in found if is_wrong(f) == side] for side in (True, False))
    worst = max(wrong, key=lambda f: f["go"])
    grid = [f for f in wrong if f["base"] in BASE and f["instruct"] in INSTRUCT]
    print(f"{len(found)} scenarios of {GATES} gates. Wrong GO at most "
          f"{max(f['go'] / f['gates'] for f in grid):.2%} on the grid of rates, at the edge "
          f"{percent(wilson(worst['go'], worst['gates']))}: {worst}")
    print(f"in all {sum(f['go'] for f in wrong)} of {sum(f['gates'] for f in wrong)} wrong gates")
    print("\nGO of true gaps, % of gates, nothing undecided | a tenth undecided by each scorer")
    print(f"{'base':>5}{'instruct':>9}{'right':>7}" + "".join(f"{n:>14}" for n in SIZES))
    for key in dict.fromkeys((f["base"], f["instruct"], f["right"]) for f in right):
        cells = []
        for n in SIZES:
            rates = [100 * f["go"] / f["gates"] for u in (0.0, 0.1) for f in right
                     if (f["base"], f["instruct"], f["right"], f["n"], f["undecided"])
                     == (*key, n, u)]
            cells.append(f"{rates[0]:>7.1f} |{rates[1]:>5.1f}")
        print(f"{key[0]:>5}{key[1]:>9}{key[2]:>7}" + "".join(cells))
    print("\nScorers that miss part of what the base does right, n 200: % GO, and % signed behind "
          f"{LABELLED} labels")
    for f in blind_rates():
        print(f"{f['base']:>5}{f['sensitivity']:>6}{'  alike' if f['alike'] else '  apart'}"
              f"{100 * f['go'] / f['gates']:>8.1f}{100 * f['signed'] / f['gates']:>7.1f}")
    print("\nAsked ten times, at other conversations each time, n 200; GO at any of them, of 500 | "
          "with a first look's limits each time")
    for pair in EDGE:
        print(f"{pair}: {asked_again(pair, 10):>4} |{asked_again(pair, 10, free=True):>4}")
    picture(found, Path(__file__).parent.parent / "docs" / "gate_simulation.png")


if __name__ == "__main__":
    main()
