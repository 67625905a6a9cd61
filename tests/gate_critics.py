"""Which critic could tell a model's right answers from wrong ones? Measured on known pairs.

Pairs are the tasks of gate/benchmark/instructions.jsonl with their answers, and with another
answer of the same family that the task's checks fail ("Lima" for the capital of Denmark), or of
another category, which is easy. Every second task chooses the threshold, the others judge it.

    pmi          log p(answer | task) - log p(answer | "N/A"), summed or by token
    likelihood   log p(answer | task) by token
    worked       log p(Yes) - log p(No) behind four worked verdicts, less that of an empty pair

    python tests/gate_critics.py [models/smollm2 [64]]       # a minute or two of one idle core
"""
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.blas  # noqa: E402, F401  (before mlx)
import mlx.core as mx  # noqa: E402

from gate.checks import check_turn  # noqa: E402
from gate.conversations import read_benchmark  # noqa: E402
from gate.evaluate import load_model  # noqa: E402
from gate.judge import letter_logprobs  # noqa: E402
from gate.self_instruct import BENCHMARK, SEEDS  # noqa: E402
from losses import token_logprobs  # noqa: E402
from report.stats import auc_within  # noqa: E402

ROWS = 32


def known_pairs(count: int) -> list[tuple[str, str, str, int]]:
    """(task, answer, right | same family | another category, number of the task)."""
    conversations, rng, pairs = read_benchmark(BENCHMARK / "instructions.jsonl")[0], random.Random(
        0), []
    for number, c in enumerate(conversations[:count]):
        turn = c.turns[0]
        near = [o for o in conversations if o.family == c.family and o is not c]
        far = [o for o in conversations if o.category != c.category]
        wrong = [[o.turns[0].answer for o in pool if check_turn(
            turn.checks, o.turns[0].answer).verdict == "fail"] for pool in (near, far)]
        drawn = [rng.choice(pool) if pool else None for pool in wrong]
        if None not in drawn:
            pairs += [(turn.user, answer, kind, number) for answer, kind in zip(
                (turn.answer, *drawn), ("right", "same family", "another category"))]
    return pairs


def answer_logprobs(model, tokenizer, tasks: list[str], answers: list[str]) -> np.ndarray:
    """(B, 2): log p of each answer behind its task, nats, and its tokens."""
    found = []
    for first in range(0, len(tasks), ROWS):
        heads = [tokenizer.encode(f"Instruction: {task}\nResponse:")
                 for task in tasks[first:first + ROWS]]
        ends = [tokenizer.encode(f" {answer}") for answer in answers[first:first + ROWS]]
        longest = max(len(a) + len(b) for a, b in zip(heads, ends))
        tokens = mx.array([a + b + [0] * (longest - len(a) - len(b)) for a, b in zip(heads, ends)])
        resid = model.final_resid(tokens[:, :-1])
        for i, (head, end) in enumerate(zip(heads, ends)):
            span = slice(len(head) - 1, len(head) - 1 + len(end))
            each = token_logprobs(model.head(resid[i, span]), mx.array(end))
            found.append((each.sum().item(), len(end)))
    return np.array(found)


def worked_verdicts(model, tokenizer, tasks: list[str], answers: list[str]) -> np.ndarray:
    """(B,) nats of Yes over No behind two right and two exchanged seeds."""
    seeds = [json.loads(line) for line in SEEDS.read_text().splitlines()]
    item = "Task: {}\nAnswer: {}\nIs the answer right?"
    shown = ""
    for i in range(4):
        said = seeds[i + 3 * (i % 2)]["response"]
        shown += f"{item.format(seeds[i]['prompt'], said)} {'No' if i % 2 else 'Yes'}\n\n"
    prompts = [shown + item.format(*pair) for pair in [*zip(tasks, answers), ("N/A", "N/A")]]
    said = np.concatenate([letter_logprobs(model, tokenizer, prompts[k:k + ROWS], ("Yes", "No"))
                           for k in range(0, len(prompts), ROWS)])
    margins = said[:, 0] - said[:, 1]
    return margins[:-1] - margins[-1]


def judged(scores: np.ndarray, right: np.ndarray, chooses: np.ndarray) -> str:
    """AUC over all, and the balanced accuracy, with its bootstrap interval, of a threshold."""
    balanced = lambda hits, misses, limit: ((hits >= limit).mean() + (misses < limit).mean()) / 2
    mine, rest = ((scores[side & right], scores[side & ~right]) for side in (chooses, ~chooses))
    limit = max(np.unique(scores[chooses]), key=lambda limit: balanced(*mine, limit))
    rng = np.random.default_rng(0)
    drawn = [balanced(*(rng.choice(part, len(part)) for part in rest), limit) for _ in range(4000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    auc = auc_within(scores.tolist(), right.tolist(), [""] * len(scores))
    return (f"AUC {auc:.2f}, balanced accuracy {balanced(*rest, limit):.2f} [{low:.2f}, "
            f"{high:.2f}] of {len(rest[0])} and {len(rest[1])}")


def main(name: str = "models/smollm2", count: str = "64") -> None:
    model, tokenizer = load_model(name, None)
    pairs = known_pairs(int(count))
    tasks, answers, kinds, numbers = (list(column) for column in zip(*pairs))
    kinds, chooses = np.array(kinds), np.array(numbers) % 2 == 0
    behind = answer_logprobs(model, tokenizer, tasks, answers)
    alone = answer_logprobs(model, tokenizer, ["N/A"] * len(tasks), answers)
    gain = behind[:, 0] - alone[:, 0]
    critics = {"pmi, summed": gain, "pmi, by token": gain / behind[:, 1],
               "likelihood": behind[:, 0] / behind[:, 1],
               "worked verdicts": worked_verdicts(model, tokenizer, tasks, answers)}
    for wrong in ("same family", "another category"):
        kept = np.isin(kinds, ("right", wrong))
        for critic, scores in critics.items():
            found = judged(scores[kept], kinds[kept] == "right", chooses[kept])
            print(f"{critic:<16} wrong ones of the {wrong}: {found}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
