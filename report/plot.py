"""Pictures and pages of the numbers that runs and lenses write; nothing is computed or loaded here.

Conventions: the last block is always on top and always drawn; one picture shows one named quantity
with its scale. matplotlib takes most of a second to load, so the commands that draw at their end
import this file there. A page is page.html with numbers in it: it fetches nothing, a run's walks
through its inspections as metrics.jsonl holds them, a lens view's has one moment.
"""
import io
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from files.disk import write_bytes, write_text

matplotlib.use("Agg")  # draw into files, also where there is no screen
# what a run's page walks through
MEASURED = {"lens", "valid_accuracy", "valid_loss", "valid_reward", "valid"}


def save_figure(figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    write_bytes(Path(path), buffer.getvalue())


def show_text(token: str, limit: int = 9) -> str:
    """A token as picture text: no maths mode, no endless words."""
    return token[:limit].replace("$", r"\$")


def lens_heatmap(view: dict, path: str | Path) -> None:
    """Blocks by positions: the cell's text is the top token, its colour the token's probability."""
    taps, T = len(view["taps"]), len(view["tokens"])
    probs = np.array([[cells[0][1] for cells in row] for row in view["top"]])   # (taps, T)
    figure, axes = plt.subplots(figsize=(1.5 + 0.95 * T, 1.0 + 0.36 * taps))
    image = axes.imshow(probs, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for tap in range(taps):
        for t in range(T):
            axes.text(t, tap, show_text(view["top"][tap][t][0][0]), ha="center", va="center",
                      fontsize=8, color="black" if probs[tap, t] > 0.6 else "white")
    axes.set_xticks(range(T), [show_text(token) for token in view["tokens"]])
    axes.set_yticks(range(taps), view["taps"])
    axes.set(xlabel="position (its token; the cell is what follows it)", ylabel="after block",
             title=f"logit lens: {view['prompt']!r}".replace("$", r"\$"))
    figure.colorbar(image, label="probability of the top token")
    save_figure(figure, path)


def emergence(records: list[dict], path: str | Path, title: str) -> None:
    """The run as a curve: blocks by steps for operation word and answer, below accuracy and loss.

    records  the lines of metrics.jsonl; those with "lens" hold mean probabilities per block on
             validation prompts
    """
    lens = [r for r in records if "lens" in r]
    accuracy = [r for r in records if "valid_accuracy" in r]
    losses = [r for r in records if "valid_loss" in r]
    named = lens and "class_top1" in lens[0]["lens"]
    below = [name for name, there in (("share", accuracy or named), ("loss", losses)) if there]
    if not lens and not below:
        return
    panels = [(key, label) for key, label in (("operation", "operation word"),
                                              ("answer", "answer's first token"))
              if lens and key in lens[0]["lens"]]
    n = len(panels) + len(below)
    figure, axes = plt.subplots(n, 1, figsize=(8, 2.6 * n), sharex=True, layout="constrained")
    axes = np.atleast_1d(axes)
    steps = [r["step"] for r in lens]
    for axis, (key, label) in zip(axes, panels):
        # (L, checkpoints), embedding left out
        grid = np.array([r["lens"][key]["prob"][1:] for r in lens]).T
        edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
        image = axis.pcolormesh(edges, np.arange(len(grid) + 1) - 0.5, grid,
                                cmap="viridis", vmin=0, vmax=1)
        axis.set(ylabel="after block",
                 title=f"{label}: mean lens probability at the last prompt token")
        figure.colorbar(image, ax=axis)
    if "share" in below:
        axis = axes[len(panels)]
        if accuracy:
            axis.plot([r["step"] for r in accuracy], [r["valid_accuracy"] for r in accuracy],
                      "o-", ms=3, label="answers right")
        if named:
            axis.plot(steps, [r["lens"]["class_top1"] for r in lens], "s--", ms=3,
                      label="operation word top-1 at the trained block")
        axis.set(ylabel="share", ylim=(-0.03, 1.03), title="validation prompts (unseen "
                 f"{'rows' if losses else 'operand pairs'})")
        axis.legend(loc="lower right")
        axis.grid(alpha=0.3)
    if losses:
        trained = [r for r in records if "answer_loss" in r]
        axes[-1].plot([r["step"] for r in trained], [r["answer_loss"] for r in trained], lw=1,
                      label="training rows of a step")
        axes[-1].plot([r["step"] for r in losses], [r["valid_loss"] for r in losses], "o-", ms=3,
                      label="validation rows")
        axes[-1].set(ylabel="nats a token", title="loss")
        axes[-1].legend(loc="upper right")
        axes[-1].grid(alpha=0.3)
    axes[-1].set_xlabel("training step")
    figure.suptitle(title)
    save_figure(figure, path)


def rollout_curves(records: list[dict], path: str | Path, title: str) -> None:
    """A policy's health: what a collapse shows in, over steps; reverts as red lines."""
    panels = {"reward": ("reward", "accuracy", "frozen_reward"), "entropy": ("entropy",),
              "KL to the reference, a token": ("kl_k1", "kl_k3"), "ratio": ("ratio", "ratio_max"),
              "length": ("length", "length_right", "length_wrong"), "repetition": ("repetition",),
              "zero-variance groups, truncated": ("zero_variance_groups", "truncated"),
              "gradient norm": ("grad_norm",)}
    rows = [r for r in records if "reward" in r]
    if not rows:
        return
    figure, axes = plt.subplots(2, 4, figsize=(14, 5.5), sharex=True, layout="constrained")
    # without a guard the key is missing
    reverts = [b["step"] for a, b in zip(rows, rows[1:])
               if b.get("reverts", 0) > a.get("reverts", 0)]
    for axis, (label, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if points:
                axis.plot(*zip(*points), lw=1, label=key)
        for step in reverts:
            axis.axvline(step, color="red", lw=1)
        axis.set(title=label)
        if label in ("ratio", "gradient norm"):
            axis.set_yscale("log", nonpositive="mask")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel("training step")
    figure.suptitle(title)
    save_figure(figure, path)


def collapse_curves(losses: dict[str, list[list[dict]]], path: str | Path) -> None:
    """Runs of several losses side by side, a thin line a seed: what a collapse shows in."""
    panels = {"reward": "log p(answer | chain), nats", "frozen_reward": "the same by the frozen "
              "base", "entropy": "entropy of the chains, nats a token", "kl_k3": "KL to the base, "
              "nats a token", "repetition": "repeated trigrams", "valid_accuracy": "right, greedy"}
    figure, axes = plt.subplots(2, 3, figsize=(12, 5.5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, panels.items()):
        for n, (label, runs) in enumerate(losses.items()):
            for i, records in enumerate(runs):
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                axis.plot(*zip(*points), color=f"C{n}", lw=1, alpha=0.8, label="" if i else label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("training step")
    save_figure(figure, path)


def damage_curves(report: dict, path: str | Path) -> None:
    """Nats lost by severity, a panel for each kind of damage; the other run's beside it."""
    kinds = list(dict.fromkeys(row["kind"] for row in report["damage"]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(2.8 * len(kinds), 3), sharey=True,
                                layout="constrained")
    names = {"reward_drop": Path(report["ckpt"]).name}
    if "compare" in report:
        names["other_reward_drop"] = Path(report["compare"]).name
    for axis, kind in zip(axes, kinds):
        rows = [row for row in report["damage"] if row["kind"] == kind]
        x = [100 * row["severity"] for row in rows]
        for key, name in names.items():
            axis.plot(x, [row[key]["value"] for row in rows], marker="o", ms=3, label=name)
            axis.fill_between(x, [row[key]["low"] for row in rows],
                              [row[key]["high"] for row in rows], alpha=0.25)
        axis.set(title=kind, xlabel="% of characters")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("log p(answer | chain) lost, nats")
    axes[0].legend(fontsize=7)
    save_figure(figure, path)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")   # Okabe and Ito's


def forest(rows: list[dict], path: str | Path) -> None:
    """Effects beside what was expected of them: a panel a test, a line a base, a dot a run.

    rows  {title, unit, bounds: (low, high) of the band that is shaded, equal where one side is
          asked for, bases: {name: (each run's value, mean, (low, high) or None)}}
    """
    heights = [len(row["bases"]) + 1.4 for row in rows]
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.29 * sum(heights)), squeeze=False,
                                height_ratios=heights, layout="constrained")
    names = list(dict.fromkeys(name for row in rows for name in row["bases"]))
    for axis, row in zip(axes[:, 0], rows):
        low, high = row["bounds"]
        if low == high:
            axis.axvline(low, color="0.4", ls="--", lw=1)
        else:
            axis.axvspan(low, high, color="0.92")
            axis.axvline(0, color="0.7", lw=0.8)
        for y, (name, (runs, mean, interval)) in enumerate(row["bases"].items()):
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axis.plot(runs, [y + 0.22] * len(runs), "o", ms=3, color=colour, alpha=0.5, mew=0)
            if interval:
                axis.plot(interval, [y, y], color=colour, lw=2, solid_capstyle="butt")
            axis.plot([mean], [y], "D", ms=5, color=colour)
        axis.set_yticks(range(len(row["bases"])), row["bases"], fontsize=7)
        axis.set_ylim(len(row["bases"]) - 0.4, -0.6)
        axis.set_title(row["title"], fontsize=8, loc="left", pad=3)
        axis.set_xlabel(row["unit"], fontsize=7, labelpad=1)
        axis.tick_params(axis="x", labelsize=7)
        axis.margins(x=0.08)
    save_figure(figure, path)


def strips(panels: dict[tuple[str, str], tuple[list[int], list[list[float]]]], claims: list[str],
           path: str | Path) -> None:
    """Where each claim holds: in a panel a row a claim, a column a block, dark in all runs.

    panels  {(row's title, column's title): (blocks, a list of shares of runs for each claim)}
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*panels))
    figure, axes = plt.subplots(len(rows), len(columns), squeeze=False, layout="constrained",
                                figsize=(1.4 + 3.1 * len(columns), 1.05 * len(rows) + 0.4))
    for axis in axes.flat:
        axis.set_visible(False)
    for (row, column), (blocks, shares) in panels.items():
        axis = axes[rows.index(row), columns.index(column)]
        axis.set_visible(True)
        image = axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        step = -(-len(blocks) // 8)
        axis.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize=6)
        axis.set_yticks(range(len(claims)), [] if columns.index(column) else claims, fontsize=7)
        axis.set_title(f"{row}, {column}", fontsize=7, loc="left", pad=2)
    figure.colorbar(image, ax=axes, label="share of runs", shrink=0.3, aspect=40)
    figure.supxlabel("after block", fontsize=8)
    save_figure(figure, path)


def make_page(title: str, moments: list[dict], block: int | None = None) -> str:
    """One page; moments: {step, view (make_view's), lens (summarize_lens's), MEASURED ...}.

    A moment may lack any of them but step, which is None where a model was looked at only once.
    block    whose top token lens.class_top1 speaks of
    """
    data = json.dumps({"title": title, "block": block, "moments": moments})
    data = json.loads(data, parse_constant=lambda constant: None)       # NaN is no JSON to browsers
    text = json.dumps(data, separators=(",", ":"))                      # ASCII
    for sign in "<>&":      # or "</script>" in a prompt would end the element that holds it
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Path(__file__).with_name("page.html").read_text("utf-8").replace("{data}", text)


def lens_page(view: dict) -> str:
    return make_page(f"logit lens: {view['prompt']}", [{"step": None, "view": view}])


def emergence_page(records: list[dict], title: str, block: int | None) -> str:
    """A run's page, of its metrics.jsonl; "" where it was never looked at on its way."""
    moments = [record for record in records if MEASURED & record.keys()]
    return make_page(title, moments, block) if moments else ""


def plot_run(records: list[dict], folder: Path, title: str, block: int | None) -> list[str]:
    """A finished run's page and pictures from metrics.jsonl; their names. block: class loss's."""
    page = emergence_page(records, title, block)
    if page:
        write_text(folder / "emergence.html", page)
    emergence(records, folder / "emergence.png", title)
    if any("reward" in record for record in records):
        rollout_curves(records, folder / "curves.png", title.partition(", ")[2])
    # a run that never looked inside has no emergence to show
    names = ("emergence.html", "emergence.png", "curves.png")
    return [name for name in names if (folder / name).exists()]
