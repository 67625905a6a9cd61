"""Is the operation in the stream, in the words' own directions, said aloud, and used?

Four claims that are easily mixed up, each measured at every tap, at the last prompt token, on
operand pairs no model or probe was trained on. The prompts are *matched*: each pair under every
operation, so that operands carry no label.

    decodable   a linear probe finds the operation, 10 points above the best baseline, and finds a
                control task (Hewitt & Liang 2019) worse
    aligned     among the operations' words the lens ranks the right one first, 10 points above
                chance, after taking out how it ranks them where the operator is masked
    verbalised  the word itself: median rank 5 or better and mean probability .10 or more
    used        swapping the operation's direction turns the answer towards the other operation's,
                more than a random direction of the same length does

Aligned and verbalised are read twice: by the logit lens, which dual-reward trains, and by the
Jacobian lens, which nothing trains.

The control task: a random label for each first operand. It can be learnt from what the stream holds
and carries over to unseen pairs, yet means nothing. (A label for each *pair* could not be known on
an unseen pair at all, and any probe would look selective.) A direction that a probe finds need not
be one the model uses; and a swap within a subspace may act through directions that are dormant in
ordinary prompts (Makelov et al. 2311.17030), hence the patch from a real prompt beside it.

    python -m study.probe --ckpt runs/dual_reward [--json FILE] [key=value ...]
"""
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from scipy.optimize import minimize

from checkpoint import load_checkpoint
from config import Config, load_config, load_overrides, run_main
from engine.decode import pad_prompts
from files.disk import write_text
from files.keys import BadInput
from files.options import Parser
from lens import read_prompts, taps_at
from model import Edit, Llama, gather_positions
from report.stats import bootstrap_mean
from study.jacobian import jacobian, last_token_stream, read_transported, word_directions
from text.arithmetic import Problem, make_problem, phrases_of, split_of
from text.columns import read_problems
from text.rows import target_ids
from text.tokenizer import Tokenizer

L2_GRID = (1e-3, 1e-2, 1e-1, 1.0)
PERMUTATIONS = 199              # smallest p .005
# 16 lines of the bundled base's own text, over which the Jacobian is averaged
CORPUS = Path(__file__).parent.parent / "models" / "tiny" / "lines.jsonl"
LARGEST_FULL_JACOBIAN = 256     # model width up to which the whole matrix is computed
MARGIN = 0.10                   # what decodable and aligned must exceed their baselines by


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


def permutation_p(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray,
                  l2: list[float], seed: int, permutations: int) -> list[float]:
    """Could a probe do as well on labels that mean nothing? One p a tap, for all taps together.

    x, x_test  (K, N, D), (K, M, D) of K taps; each probe is fitted again on shuffled labels
    returns    (1 + shuffles whose *best* tap does as well as this tap did) / (1 + shuffles): the
               best, since one has looked at all of them (Westfall & Young's max statistic)
    """
    rng = np.random.default_rng((seed, 2))
    score = lambda labels: np.array([
        balanced_accuracy(y_test, fit_probe(x[k], labels, l2[k]).predict(x_test[k]))
        for k in range(len(x))])
    observed = score(y)
    best = np.array([score(rng.permutation(y)).max() for _ in range(permutations)])
    return [(1 + int((best >= o).sum())) / (1 + permutations) for o in observed]


# --------------------------------------------------------------------------------------------------
# edits of the stream, for the `edit` argument of the model's forward


def edit_at(positions: mx.array, change: Callable[[mx.array], mx.array]):
    """An edit of one position a row: positions (B, 1); change maps (B, 1, D) to (B, 1, D)."""
    def edit(resid):
        here = (mx.arange(resid.shape[1]) == positions)[..., None]                  # (B, T, 1)
        changed = change(gather_positions(resid, positions)).astype(resid.dtype)
        return mx.where(here, changed, resid)
    return edit


def ablate(basis: mx.array, mean: mx.array):
    """Put the mean in place of h within the span of orthonormal rows (r, D).

    The mean, not zero: zero is far from anything the blocks above have seen.
    """
    return lambda h: h - (h - mean) @ basis.T @ basis


def swap(difference: mx.array):
    """Add one row's difference of class means, (B, D): operation a's prompt becomes b's."""
    return lambda h: h + difference[:, None]


def patch(resid: mx.array):
    """Put other prompts' stream (B, 1, D) in place."""
    return lambda h: resid


def span(vectors: np.ndarray) -> np.ndarray:
    """Orthonormal rows of the span of C centred vectors (C, D): (C - 1, D)."""
    centred = vectors - vectors.mean(0)
    return np.linalg.svd(centred, full_matrices=False)[2][:len(vectors) - 1]


# --------------------------------------------------------------------------------------------------
# prompts and their streams


@dataclass
class Matched:
    """Matched prompts of one split: rows prompt-major, the C operations of a pair in a row."""
    problems: list[Problem]
    prompts: list[list[int]]
    labels: np.ndarray          # (N,) index of the operation
    classes: int                # C

    def by_pair(self, values: np.ndarray) -> np.ndarray:
        """Means over each pair's rows, (N,) -> (N / C,): the unit that is drawn in a bootstrap."""
        return np.asarray(values, np.float64).reshape(-1, self.classes).mean(1)


def matched_problems(cfg: Config, split: str, pairs: int, wording: str) -> list[Problem]:
    """The same operand pairs under every operation: the operands say nothing of the operation.

    Elsewhere they do: products of numbers to 20, differences that are never negative, so that 81 %
    of the labels follow from two bits of the operands alone. Pairs a >= b of 2..99; products beyond
    the trained range are for asking which operation it is, not what it gives. A pair's problems
    stand in a row, in the order of cfg.data_operations, without divide.
    """
    chosen = [(a, b) for a in range(2, 100) for b in range(2, a + 1) if split_of(a, b) == split]
    rng = random.Random(f"matched {split}")
    rng.shuffle(chosen)
    operations = [o for o in cfg.data_operations if o != "divide"]
    problems = []
    for a, b in chosen[:pairs]:
        which = rng.randrange(5)    # one phrase for all operations of a pair
        for operation in operations:
            phrases = phrases_of(operation, wording)
            phrase = phrases[which % len(phrases)]
            problems.append(make_problem(operation, a, b, phrase, wording))
    return problems


def make_matched(cfg: Config, tokenizer: Tokenizer, split: str, pairs: int,
                 wording: str = "symbolic") -> Matched:
    problems = matched_problems(cfg, split, pairs, wording)
    operations = list(dict.fromkeys(p.operation for p in problems))
    return Matched(problems, [tokenizer.encode_prompt(p.prompt) for p in problems],
                   np.array([operations.index(p.operation) for p in problems]), len(operations))


# --------------------------------------------------------------------------------------------------
# decodable


def probe_taps(model: Llama, tokenizer: Tokenizer, cfg: Config, train: Matched, valid: Matched,
               test: Matched, words: list[int], permutations: int = 0) -> list[dict]:
    """The probe at every tap: accuracy, control, selectivity, transfer to words, alignment.

    returns  [{accuracy, selectivity: interval over pairs, control, worded, l2, cosine, and p if
             permutations}] for L+1 taps
    """
    streams = {name: last_token_stream(model, part.prompts)
               for name, part in (("train", train), ("valid", valid), ("test", test))}
    worded = make_matched(cfg, tokenizer, "test", len(test.problems) // test.classes, "worded")
    worded_stream = last_token_stream(model, worded.prompts)
    control = {name: control_labels(part.problems, part.classes, 0)
               for name, part in (("train", train), ("test", test))}
    lens = np.array(word_directions(model, mx.array(words)))                        # (C, D)
    centred = lambda v: v - v.mean(0)
    rows = []
    for k in range(len(streams["train"])):
        x, x_test = streams["train"][k], streams["test"][k]
        l2 = choose_l2(x, train.labels, streams["valid"][k], valid.labels)
        probe = fit_probe(x, train.labels, l2)
        right = probe.predict(x_test) == test.labels
        control_right = fit_probe(x, control["train"], l2).predict(x_test) == control["test"]
        a, b = centred(probe.directions()), centred(lens)
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1) + 1e-12)
        rows.append({
            "accuracy": bootstrap_mean(test.by_pair(right)),
            "selectivity": bootstrap_mean(test.by_pair(right) - test.by_pair(control_right)),
            "control": float(control_right.mean()), "l2": l2,
            "worded": float((probe.predict(worded_stream[k]) == worded.labels).mean()),
            "cosine": float(cosine.mean())})
    if permutations:
        found = permutation_p(streams["train"], train.labels, streams["test"], test.labels,
                              [row["l2"] for row in rows], 0, permutations)
        rows = [{**row, "p": p} for row, p in zip(rows, found)]
    return rows


# --------------------------------------------------------------------------------------------------
# aligned and verbalised


def corrected_choice(scores: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """Which word is highest after subtracting each word's mean on neutral prompts.

    scores (N, C), neutral (M, C): a word that is always high, as frequent ones are, wins nothing
    """
    return (scores - neutral.mean(0)).argmax(1)


def lens_taps(read, test: Matched, neutral: Matched, words: list[int]) -> list[dict]:
    """Aligned and verbalised at every tap, by a lens: read(prompts, targets) -> a Reading."""
    reading, on_neutral = (read(part.prompts, [words] * len(part.prompts))
                           for part in (test, neutral))
    rows, at = [], np.arange(len(test.labels))
    for k in range(len(reading.ranks)):
        choice = corrected_choice(reading.logprobs[k, :, 0], on_neutral.logprobs[k, :, 0])
        prob = reading.probs[k, at, 0, test.labels]
        rows.append({"aligned": bootstrap_mean(test.by_pair(choice == test.labels)),
                     "rank": float(np.median(reading.ranks[k, at, 0, test.labels])),
                     "prob": bootstrap_mean(test.by_pair(prob))})
    return rows


def jacobian_taps(model: Llama, tokenizer: Tokenizer, test: Matched, neutral: Matched,
                  words: list[int]) -> list[dict]:
    """The same by the Jacobian lens, its mean taken over lines of the base's own text.

    Wide models: one backward pass a word instead of one a feature, which ranks the words among
    themselves (aligned) and leaves rank and probability in the vocabulary open (None).
    """
    text = read_problems(CORPUS)
    corpus = [tokenizer.encode_pair(p.prompt, p.answer)[0] for p in text]
    D = model.args.hidden_size
    if D <= LARGEST_FULL_JACOBIAN:
        read = partial(read_transported, model, jacobians=jacobian(model, corpus, mx.eye(D)))
        return lens_taps(read, test, neutral, words)
    vectors = np.array(jacobian(model, corpus, word_directions(model, mx.array(words))))
    score = lambda part: np.einsum("lnd,lcd->lnc", last_token_stream(model, part.prompts), vectors)
    return [{"aligned": bootstrap_mean(test.by_pair(corrected_choice(s, n) == test.labels)),
             "rank": None, "prob": None} for s, n in zip(score(test), score(neutral))]


# --------------------------------------------------------------------------------------------------
# used


@dataclass
class Swaps:
    """Prompts in twos, equal but for add and subtract: row i's partner is row i ^ 1."""
    tokens: mx.array            # (B, T)
    last: mx.array              # (B, 1) the last prompt token
    operator: mx.array          # (B, 1) where the two differ first
    answer: mx.array            # (B,) first token of the own answer
    foil: mx.array              # (B,) first token of the partner's
    labels: np.ndarray          # (B,) index of the operation among the matched ones
    partner: np.ndarray         # (B,)


def make_swaps(tokenizer: Tokenizer, test: Matched) -> Swaps:
    """Add and subtract on the same operands; pairs whose answers begin alike are left out."""
    chosen = []
    for i in range(0, len(test.problems), test.classes):
        two = [j for j in range(i, i + test.classes)
               if test.problems[j].operation in ("add", "subtract")]
        first = []
        for j in two:
            ids, P = tokenizer.encode_pair(test.problems[j].prompt, test.problems[j].answer)
            first.append(ids[P])
        if len(two) == 2 and first[0] != first[1] and len({len(test.prompts[j]) for j in two}) == 1:
            chosen += list(zip(two, first))
    rows, answer = [j for j, _ in chosen], np.array([a for _, a in chosen])
    prompts, partner = [test.prompts[j] for j in rows], np.arange(len(rows)) ^ 1
    differ = [next(t for t, (x, y) in enumerate(zip(p, prompts[i ^ 1])) if x != y)
              for i, p in enumerate(prompts)]
    tokens, last = pad_prompts(prompts)
    return Swaps(tokens, last, mx.array(differ)[:, None], mx.array(answer),
                 mx.array(answer[partner]), test.labels[rows], partner)


def outcome(model: Llama, swaps: Swaps, edit: Edit | None = None) -> dict[str, np.ndarray]:
    """What the model answers, edited or not: (B,) log-odds foil against answer, and top tokens."""
    resid = model.final_resid(swaps.tokens, edit=edit)
    logits = model.head(gather_positions(resid, swaps.last))[:, 0]                  # (B, V)
    pick = lambda ids: mx.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
    odds, top = pick(swaps.foil) - pick(swaps.answer), mx.argmax(logits, axis=-1)
    mx.eval(odds, top)
    return {"odds": np.array(odds), "flipped": np.array(top == swaps.foil),
            "right": np.array(top == swaps.answer)}


def swap_taps(model: Llama, swaps: Swaps, means: np.ndarray, words: list[int],
              seed: int = 0) -> list[dict]:
    """Swap, patch and ablate at every tap; means (L+1, C, D) of the classes on training pairs.

    means   the difference of class means; lens and rest: its part within the span of the words'
            lens directions, and the part outside
    random  a random direction as long as the means' difference; random_lens: as the lens part
    patch   the partner's whole stream at the last token; patch_operator: at the operator
    *_ablated  the class means' span, the words' span, a random span of the same rank put to their
            mean: how many answers stay right
    returns for each tap and kind {odds: mean change with interval over pairs, flipped: share of
            the answers right before that become the partner's}; `used`: means minus random
    """
    rng, clean = np.random.default_rng((seed, 3)), outcome(model, swaps)
    streams = [np.array(tap[:, 0].astype(mx.float32))
               for tap in taps_at(model, swaps.tokens, swaps.last)]
    at_operator = [tap.astype(mx.float32)
                   for tap in taps_at(model, swaps.tokens, swaps.operator)]
    lens_span = span(np.array(word_directions(model, mx.array(words))))
    by_pair = lambda values: values.reshape(-1, 2).mean(1)
    rows = []
    for k in range(len(means)):
        difference = means[k][swaps.labels[swaps.partner]] - means[k][swaps.labels]    # (B, D)
        in_lens = difference @ lens_span.T @ lens_span
        noise = rng.standard_normal(difference.shape)
        as_long = lambda v, noise=noise: noise * np.linalg.norm(v, axis=1, keepdims=True) \
            / np.linalg.norm(noise, axis=1, keepdims=True)
        changes = {"means": difference, "lens": in_lens, "rest": difference - in_lens,
                   "random": as_long(difference), "random_lens": as_long(in_lens)}
        edits = {name: edit_at(swaps.last, swap(mx.array(v.astype(np.float32))))
                 for name, v in changes.items()}
        edits["patch"] = edit_at(swaps.last, patch(mx.array(streams[k][swaps.partner])[:, None]))
        edits["patch_operator"] = edit_at(
            swaps.operator, patch(at_operator[k][mx.array(swaps.partner)]))
        middle = mx.array(means[k].mean(0).astype(np.float32))
        spans = {"means_ablated": span(means[k]), "lens_ablated": lens_span,
                 "random_ablated": span(rng.standard_normal(means[k].shape))}
        edits |= {name: edit_at(swaps.last, ablate(mx.array(b.astype(np.float32)), middle))
                  for name, b in spans.items()}
        row, change = {}, {}
        for name, edit in edits.items():
            edited = outcome(model, swaps, {k: edit})
            change[name] = edited["odds"] - clean["odds"]
            row[name] = {"odds": bootstrap_mean(by_pair(change[name])),
                         "flipped": float(edited["flipped"][clean["right"]].mean())
                         if clean["right"].any() else 0.0,
                         "right": float(edited["right"].mean())}
        row["used"] = bootstrap_mean(by_pair(change["means"] - change["random"]))
        row["lens_used"] = bootstrap_mean(by_pair(change["lens"] - change["random_lens"]))
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# all four


def four_claims(model: Llama, tokenizer: Tokenizer, cfg: Config, pairs: int = 200,
                swap_pairs: int = 100, permutations: int = 0) -> dict:
    """Everything above for one model: {clean_right, chance, taps: [{...}] of L+1}.

    pairs    operand pairs to fit the probe on and to test all on, a third as many for its penalty
    A tap's entry: probe, logit_lens, jacobian_lens, swaps, and claims {name: bool} with
    aligned_jacobian and verbalised_jacobian beside the four. raises BadInput where an operation's
    word is not one token.
    """
    make = lambda split, n, wording="symbolic": make_matched(cfg, tokenizer, split, n, wording)
    train, valid, test = make("train", pairs), make("valid", pairs // 3), make("test", pairs)
    ids = target_ids(tokenizer, test.problems, "word")
    words = [ids[p.operation] for p in test.problems[:test.classes]]
    neutral = make("test", pairs, "masked")
    neutral = Matched(neutral.problems[::test.classes], neutral.prompts[::test.classes],
                      neutral.labels[::test.classes], 1)     # one: they are the same text
    probes = probe_taps(model, tokenizer, cfg, train, valid, test, words, permutations)
    lens = lens_taps(partial(read_prompts, model), test, neutral, words)
    jacobian_lens = jacobian_taps(model, tokenizer, test, neutral, words)
    stream = last_token_stream(model, train.prompts)                                # (L+1, N, D)
    means = np.stack([stream[:, train.labels == c].mean(1) for c in range(train.classes)], 1)
    swaps = make_swaps(tokenizer, make("test", swap_pairs))
    swapped = swap_taps(model, swaps, means, words)
    chance, last = 1 / test.classes, len(lens) - 1
    taps = []
    for k in range(last + 1):
        baseline = max(chance, probes[0]["accuracy"]["value"])
        inside = 1 <= k <= last - 2     # the last two are the output, or nearly
        loud = lambda row, inside=inside: bool(inside and row["rank"] is not None
                                               and row["rank"] <= 5 and row["prob"]["value"] >= .10)
        taps.append({
            "tap": k, "probe": probes[k], "logit_lens": lens[k], "jacobian_lens": jacobian_lens[k],
            "swaps": swapped[k], "claims": {
                "decodable": probes[k]["accuracy"]["low"] > baseline + MARGIN
                and probes[k]["selectivity"]["low"] > 0,
                "aligned": lens[k]["aligned"]["low"] > chance + MARGIN,
                "verbalised": loud(lens[k]),
                "used": swapped[k]["used"]["low"] > 0,
                "aligned_jacobian": jacobian_lens[k]["aligned"]["low"] > chance + MARGIN,
                "verbalised_jacobian": loud(jacobian_lens[k])}})
    return {"clean_right": float(outcome(model, swaps)["right"].mean()), "chance": chance,
            "pairs": pairs, "swap_pairs": len(swaps.labels) // 2, "taps": taps}


def claims_table(result: dict) -> str:
    """One line a block, the last on top; a star where the claim holds."""
    mark = lambda held: "*" if held else " "
    share = lambda x: f"{100 * x:5.1f}"
    rank = lambda r: "    -" if r is None else f"{r:5.0f}"
    lines = [f"matched prompts, unseen pairs: {result['pairs']} pairs, every operation of each; "
             f"swap add and subtract: {result['swap_pairs']} pairs, "
             f"{100 * result['clean_right']:.0f} % right before. * the claim holds",
             "        decodable              aligned             verbalised              used",
             "        probe  select.    p    lens    Jacobian    word P  rank  Jacobian  "
             "log-odds  turned, random, patch"]
    for tap in reversed(result["taps"]):
        held, probe, lens = tap["claims"], tap["probe"], tap["logit_lens"]
        swaps, other = tap["swaps"], tap["jacobian_lens"]
        lines.append("".join((
            f"{'embed' if tap['tap'] == 0 else 'L' + str(tap['tap'] - 1):<7}",
            f"{share(probe['accuracy']['value'])} {mark(held['decodable'])}",
            f"{share(probe['selectivity']['value'])}  ",
            f"{probe['p']:.3f}  " if "p" in probe else "    -  ",
            f"{share(lens['aligned']['value'])} {mark(held['aligned'])} ",
            f"{share(other['aligned']['value'])} {mark(held['aligned_jacobian'])}     ",
            f"{lens['prob']['value']:.3f} {rank(lens['rank'])} {mark(held['verbalised'])}   ",
            f"{rank(other['rank'])} {mark(held['verbalised_jacobian'])}  ",
            f"{swaps['used']['value']:7.2f} {mark(held['used'])}  ",
            ", ".join(share(swaps[k]["flipped"]) for k in ("means", "random", "patch")))))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m study.probe",
                                     description="Four claims about the operation in the stream.")
    parser.add_argument("--ckpt", required=True, help="run folder, model folder or Hub name")
    parser.add_argument("--pairs", type=int, default=200, help="operand pairs of each split")
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS,
                        help="refits on shuffled labels, for the probe's p; 0: none")
    parser.add_output("--json", "the report")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys")
    args = parser.parse_args(argv)
    if args.pairs < 6:
        raise BadInput(f"--pairs {args.pairs}: expected at least 6 operand pairs")
    model, tokenizer, cfg = load_checkpoint(args.ckpt)
    if args.overrides and cfg:
        cfg = load_config(Path(args.ckpt) / "config.yaml", args.overrides)
    result = four_claims(model, tokenizer, cfg or load_overrides(args.overrides), args.pairs,
                         permutations=args.permutations)
    print(claims_table(result))
    if args.json:
        write_text(Path(args.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
