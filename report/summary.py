"""From what was measured of each prompt to the figures of report.json and metrics.jsonl.

Plain rows and numpy arrays come in, intervals go out: Wilson for shares, bootstrap for means. Three
series are never mixed: the answer's first token, the operation's word, the operator's symbol.
Strength is the largest probability before the last block; the last block's own is the model's
output and stands beside it, not in it.
"""
import numpy as np

from report.stats import EMERGED, bootstrap_mean, mcnemar, wilson

SERIES = ("answer", "operation", "symbol")


def peak_of_prompt(probs: np.ndarray) -> dict:
    """Where each series peaks before the last block, and the last block's own; probs (L+1, 3)."""
    row = {}
    for n, name in enumerate(SERIES):
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


def summarize_classifier(reading, ids: np.ndarray, lengths: np.ndarray,
                         block: int) -> dict:
    """The classifier's figures over the first B prompts: trained block, series, all blocks.

    ids, lengths  series_ids and answer_lengths. The answer's series is its first token's. Where
                  digits are tokens many answers share one, and a model that knows no answer may
                  have it. "Emerged" is therefore said of answers of one token alone; what all
                  first tokens do stands apart, under first_token
    """
    B = len(ids)
    probs, ranks = reading.probs[:, :B, 0], reading.ranks[:, :B, 0]                 # (L+1, B, 3)
    is_top = reading.top_ids[:, :B, 0, :1] == ids                                   # (L+1, B, 3)
    word = SERIES.index("operation")
    layers = []
    for tap in range(1, len(probs)):
        series = {name: {"prob": float(probs[tap, :, n].mean()),
                         "rank": float(np.median(ranks[tap, :, n])),
                         "top1": float(is_top[tap, :, n].mean())} for n, name in enumerate(SERIES)}
        layers.append({"layer": tap - 1, "last": tap == len(probs) - 1,
                       "entropy": float(reading.entropy[tap, :B].mean()), **series})
    right = is_top[block + 1, :, word]
    strength = {name: summarize_strength(probs[:, :, n], is_top[:, :, n])
                for n, name in enumerate(SERIES)}
    whole = lengths == 1
    strength["answer"]["first_token"] = summarize_emergence(probs[:, :, 0], is_top[:, :, 0])
    strength["answer"] |= summarize_emergence(probs[:, whole, 0], is_top[:, whole, 0])
    return {
        "class": {"layer": block, "top1": wilson(int(right.sum()), len(right)),
                  "prob": bootstrap_mean(probs[block + 1, :, word])},
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
    summary = {"class_top1": float((reading.top_ids[block + 1, :, 0, 0] == ids[:, 1]).mean())}
    for n, name in enumerate(SERIES):
        summary[name] = {
            "prob": reading.probs[:, :, 0, n].mean(1).round(5).tolist(),
            "top1": (reading.top_ids[:, :, 0, 0] == ids[:, n]).mean(1).round(5).tolist()}
    return summary


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
