"""Is the operation in the stream, in the words' own directions, said aloud, and used?

Four claims that are easily mixed up, each measured at every tap, at the last prompt token, on
operand pairs no model or probe was trained on. The prompts are *matched* (prompts.py): each pair
under every operation, so that operands carry no label.

    decodable   a linear probe finds the operation, 10 points above the best baseline, and finds a
                control task (Hewitt & Liang 2019) worse
    aligned     among the operations' words the lens ranks the right one first, 10 points above
                chance, after taking out how it ranks them where the operator is masked
    verbalised  the word itself: median rank 5 or better and mean probability .10 or more
    used        swapping the operation's direction turns 10 points more of the right answers into
                the other operation's than a random direction of the same length does (swaps.py)

Aligned is read twice: by the logit lens, which dual-reward trains, and by the Jacobian lens, which
nothing trains.

The control task: a random label for each first operand. It can be learnt from what the stream holds
and carries over to unseen pairs, yet means nothing. (A label for each *pair* could not be known on
an unseen pair at all, and any probe would look selective.) A direction that a probe finds need not
be one the model uses; and a swap within a subspace may act through directions that are dormant in
ordinary prompts (Makelov et al. 2311.17030), hence the patch from a real prompt beside it.

    python -m study.probe --ckpt runs/dual_reward [--json FILE] [key=value ...]
"""
import json
from dataclasses import dataclass
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from scipy.optimize import minimize

from checkpoint import load_checkpoint
from config import Config, load_config, load_overrides, run_main
from files.disk import write_text
from files.keys import BadInput
from files.options import Parser
from model import Llama
from report.stats import bootstrap_mean
from study.jacobian import jacobian, last_token_stream, own_texts, read_stream, word_directions
from study.prompts import (
    Matched,
    make_matched,
    masked_prompts,
    operations_of,
    swap_operations,
    swap_splits,
)
from study.swaps import Streams, class_means, make_swaps, read_streams, swap_lengths, swap_taps
from text.arithmetic import Problem
from text.rows import target_ids
from text.tokenizer import Tokenizer

L2_GRID = (1e-3, 1e-2, 1e-1, 1.0)
MARGIN = 0.10                   # what decodable, aligned and used must exceed their baselines by
TEXTS = 100                     # that the Jacobian lens is fitted on


# --------------------------------------------------------------------------------------------------
# the linear probe


@dataclass
class Probe:
    """Multinomial logistic regression on standardised features; numpy float64."""
    weight: np.ndarray      # (C, D)
    bias: np.ndarray        # (C,)
    mean: np.ndarray        # (D,) of the training rows
    std: np.ndarray         # (D,)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C): log-odds up to a constant of each row."""
        return (x - self.mean) / self.std @ self.weight.T + self.bias

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.scores(x).argmax(1)

    def directions(self) -> np.ndarray:
        """(C, D) in the stream's own units: the standardisation undone."""
        return self.weight / self.std


def fit_probe(x: np.ndarray, y: np.ndarray, l2: float) -> Probe:
    """Minimise mean cross-entropy + l2 / 2 * |W|^2 by L-BFGS; the bias is not penalised.

    x       (N, D), standardised here with its own statistics;  y  (N,) int from 0 to C-1
    source  scikit-learn's LogisticRegression has the same minimum at C = 1 / (N * l2), tested
    """
    x = np.asarray(x, np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-8
    z, (N, D), C = (x - mean) / std, x.shape, int(y.max()) + 1
    one_hot = np.eye(C)[y]

    def loss_and_gradient(flat):
        W, b = flat[:C * D].reshape(C, D), flat[C * D:]
        logits = z @ W.T + b
        logits -= logits.max(1, keepdims=True)
        log_total = np.log(np.exp(logits).sum(1, keepdims=True))
        error = (np.exp(logits - log_total) - one_hot) / N                          # (N, C)
        loss = ((log_total[:, 0] - logits[np.arange(N), y]).mean() + l2 / 2 * (W ** 2).sum())
        return loss, np.concatenate([(error.T @ z + l2 * W).ravel(), error.sum(0)])

    best = minimize(loss_and_gradient, np.zeros(C * D + C), jac=True, method="L-BFGS-B",
                    options={"maxiter": 500})
    return Probe(best.x[:C * D].reshape(C, D), best.x[C * D:], mean, std)


def balanced_accuracy(y: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over classes of the share found: a majority guess gets 1 / C."""
    return float(np.mean([(predicted[y == c] == c).mean() for c in np.unique(y)]))


def choose_l2(x: np.ndarray, y: np.ndarray, x_valid: np.ndarray, y_valid: np.ndarray) -> float:
    """The strongest penalty among the best on validation rows."""
    score = {l2: balanced_accuracy(y_valid, fit_probe(x, y, l2).predict(x_valid)) for l2 in L2_GRID}
    return max(score, key=lambda l2: (score[l2], l2))


def control_labels(problems: list[Problem], classes: int, seed: int) -> np.ndarray:
    """A random but fixed label for each first operand: learnable, and without a meaning."""
    labels = np.random.default_rng((seed, 1)).integers(0, classes, 1000)
    return np.array([labels[p.a % 1000] for p in problems])


# --------------------------------------------------------------------------------------------------
# decodable


def probe_taps(stream: np.ndarray, matched: Matched, taps: list[int]) -> list[dict]:
    """The probe at some taps of (L+1, N, D): [{accuracy, selectivity: intervals over pairs,
    control, l2}]."""
    train, valid, test = (matched.splits == split for split in ("train", "valid", "test"))
    y, control = matched.labels, control_labels(matched.problems, matched.classes, 0)
    rows = []
    for k in taps:
        x, x_test = stream[k][train], stream[k][test]
        l2 = choose_l2(x, y[train], stream[k][valid], y[valid])
        right = fit_probe(x, y[train], l2).predict(x_test) == y[test]
        control_right = fit_probe(x, control[train], l2).predict(x_test) == control[test]
        rows.append({
            "accuracy": bootstrap_mean(matched.by_pair(right)),
            "selectivity": bootstrap_mean(matched.by_pair(right) - matched.by_pair(control_right)),
            "control": float(control_right.mean()), "l2": l2})
    return rows


# --------------------------------------------------------------------------------------------------
# aligned and verbalised


def corrected_choice(scores: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """Which word is highest after subtracting each word's mean on neutral prompts.

    scores (N, C), neutral (M, C): a word that is always high, as frequent ones are, wins nothing
    """
    return (scores - neutral.mean(0)).argmax(1)


def lens_taps(model: Llama, stream: np.ndarray, neutral: np.ndarray, labels: np.ndarray,
              matched: Matched, words: list[int]) -> list[dict]:
    """Aligned and verbalised by the logit lens: [{aligned, prob: intervals, rank}], all taps.

    stream, neutral  (L+1, N, D) of test prompts, (L+1, M, D) of masked ones;  labels  (N,)
    """
    reading, on_neutral = (read_stream(model, part, [words] * part.shape[1])
                           for part in (stream, neutral))
    rows, at = [], np.arange(len(labels))
    for k in range(len(reading.ranks)):
        choice = corrected_choice(reading.logprobs[k, :, 0], on_neutral.logprobs[k, :, 0])
        prob = reading.probs[k, at, 0, labels]
        rows.append({"aligned": bootstrap_mean(matched.by_pair(choice == labels)),
                     "rank": float(np.median(reading.ranks[k, at, 0, labels])),
                     "prob": bootstrap_mean(matched.by_pair(prob))})
    return rows


def jacobian_taps(model: Llama, stream: np.ndarray, neutral: np.ndarray, labels: np.ndarray,
                  matched: Matched, words: list[int], texts: list[list[int]]) -> list[dict]:
    """Aligned by the Jacobian lens, fitted twice on half of the texts each: [{aligned, floor}].

    floor  cosine of the words' read-out vectors of the two fits, the least of the words: how much
           of a vector is left by other texts. The lens reads by both fits' mean
    """
    directions = word_directions(model, mx.array(words))                            # (C, D)
    half = len(texts) // 2
    fits = [np.array(jacobian(model, part, directions)) for part in (texts[:half], texts[half:])]
    floor = (fits[0] * fits[1]).sum(-1) / np.prod([np.linalg.norm(f, axis=-1) for f in fits], 0)
    vectors = (fits[0] + fits[1]) / 2                                               # (L+1, C, D)
    score = lambda part: np.einsum("lnd,lcd->lnc", part, vectors)
    rows = []
    for on_test, on_neutral, cosines in zip(score(stream), score(neutral), floor):
        choice = corrected_choice(on_test, on_neutral)
        rows.append({"aligned": bootstrap_mean(matched.by_pair(choice == labels)),
                     "floor": float(cosines.min())})
    return rows


# --------------------------------------------------------------------------------------------------
# all four


def four_claims(model: Llama, tokenizer: Tokenizer, cfg: Config, matched: Matched,
                streams: Streams, taps: list[int] | None = None,
                lengths: np.ndarray | None = None, words: list[int] | None = None,
                texts: list[list[int]] | None = None) -> dict:
    """Everything above for one model: {chance, pairs, edits, lengths, taps: [{...}]}.

    taps     which; None: all L+1
    lengths  (L+1,) of the edits that are compared between models; None: this model's own swap's
    words    along which a swap has its part, C tokens; None: the operations' own
    texts    for the Jacobian lens, token ids; None: without it
    A tap's entry: tap, probe, logit_lens, jacobian_lens, swaps, and claims {name: bool}, with
    aligned_jacobian beside the four. raises BadInput where an operation's word is not one token.
    """
    test = matched.splits == "test"
    pairs, labels = int(test.sum()) // matched.classes, matched.labels[test]
    ids = target_ids(tokenizer, matched.problems, "word")
    names = [ids[operation] for operation in operations_of(cfg)]
    neutral = last_token_stream(model, masked_prompts(cfg, tokenizer, pairs))
    lens_arguments = model, streams.stream[:, test], neutral, labels, matched, names
    lens = lens_taps(*lens_arguments)
    by_jacobian = jacobian_taps(*lens_arguments, texts) if texts else None
    last = model.args.num_hidden_layers
    taps = list(range(last + 1)) if taps is None else taps
    probes = probe_taps(streams.stream, matched, [0, *taps])
    means = class_means(streams, matched)                                           # (L+1, C, D)
    swaps = make_swaps(tokenizer, matched, swap_operations(cfg), swap_splits(cfg))
    lengths = swap_lengths(swaps, means) if lengths is None else lengths
    edited = swap_taps(model, streams, swaps, means, words or names, taps, lengths)
    chance, rows = 1 / matched.classes, []
    baseline = max(chance, probes[0]["accuracy"]["value"])      # what the last token says itself
    for k, probe, edits in zip(taps, probes[1:], edited):
        inside = 1 <= k <= last - 2     # the last two are the output, or nearly
        loud = lens[k]["rank"] <= 5 and lens[k]["prob"]["value"] >= .10
        turned = lambda kind, edits=edits: edits[kind]["turned"] or 0
        claims = {"decodable": probe["accuracy"]["low"] > baseline + MARGIN
                  and probe["selectivity"]["low"] > 0,
                  "aligned": lens[k]["aligned"]["low"] > chance + MARGIN,
                  "verbalised": bool(inside and loud),
                  "used": turned("swap_n") - turned("random_n") >= MARGIN}
        if by_jacobian:
            claims["aligned_jacobian"] = by_jacobian[k]["aligned"]["low"] > chance + MARGIN
        rows.append({"tap": k, "probe": probe, "logit_lens": lens[k], "swaps": edits,
                     "jacobian_lens": by_jacobian[k] if by_jacobian else None, "claims": claims})
    return {"chance": chance, "pairs": pairs, "edits": len(swaps.own),
            "lengths": lengths.tolist(), "taps": rows}


def claims_table(result: dict) -> str:
    """One line a block, the last on top; a star where the claim holds."""
    mark = lambda held: "*" if held else " "
    share = lambda x: "    -" if x is None else f"{100 * x:5.1f}"
    lines = [f"matched prompts, unseen pairs: {result['pairs']} pairs, every operation of each; "
             f"{result['edits']} swaps. * the claim holds",
             "        decodable        aligned             verbalised       used: answers turned",
             "        probe  select.   lens    Jacobian    word P  rank     by swap, random, patch"]
    for tap in reversed(result["taps"]):
        held, probe, lens, swaps = (tap[k] for k in ("claims", "probe", "logit_lens", "swaps"))
        other = tap["jacobian_lens"]
        lines.append("".join((
            f"{'embed' if tap['tap'] == 0 else 'L' + str(tap['tap'] - 1):<7}",
            f"{share(probe['accuracy']['value'])} {mark(held['decodable'])}",
            f"{share(probe['selectivity']['value'])}   ",
            f"{share(lens['aligned']['value'])} {mark(held['aligned'])} ",
            f"{share(other and other['aligned']['value'])} ",
            f"{mark(held.get('aligned_jacobian'))}     ",
            f"{lens['prob']['value']:.3f} {lens['rank']:5.0f} {mark(held['verbalised'])}   ",
            ", ".join(share(swaps[k]["turned"]) for k in ("swap", "random_n", "patch")),
            f" {mark(held['used'])}")).rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m study.probe",
                    description="Four claims about the operation in the stream.")
    parser.add_argument("--ckpt", required=True, help="run folder, model folder or Hub name")
    parser.add_argument("--pairs", type=int, default=200, help="operand pairs of each split")
    parser.add_output("--json", "the report")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys")
    args = parser.parse_args(argv)
    if args.pairs < 6:
        raise BadInput(f"--pairs {args.pairs}: expected at least 6 operand pairs")
    model, tokenizer, cfg = load_checkpoint(args.ckpt)
    if args.overrides and cfg:
        cfg = load_config(Path(args.ckpt) / "config.yaml", args.overrides)
    cfg = cfg or load_overrides(args.overrides)
    matched = make_matched(cfg, tokenizer, args.pairs)
    result = four_claims(model, tokenizer, cfg, matched, read_streams(model, matched.prompts),
                         texts=own_texts(model, tokenizer, TEXTS))
    print(claims_table(result))
    if args.json:
        write_text(Path(args.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
