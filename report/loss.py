"""The loss on held-out rows of a user's own: what training makes small, where answers are too long
or too free to be matched. Perplexity is e to it (report.stats).
"""
import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import Config
from engine.memory import read_in_turn
from engine.ops import token_logprobs
from engine.parallel import map_rows
from text.rows import tokenize

LOSS_TOKENS = 4096      # of padded rows in one forward pass


def measure_loss(model, tokenizer, problems: list, cfg: Config, make_batch) -> list[tuple]:
    """Each row's -log p of its targets in nats, summed, and their count; padded by make_batch."""
    rows = tokenize(problems, tokenizer, model.args.max_position_embeddings, template=cfg.template)
    counts = [sum(stop - start for start, stop in row.targets(cfg)) for row in rows]
    waiting, nats = sorted(range(len(rows)), key=lambda i: len(rows[i].ids)), {}
    while waiting:      # the longest first; no more at a time than training has
        T = len(rows[waiting[-1]].ids)
        n = max(1, min(cfg.batch_size // cfg.grad_accum_steps, LOSS_TOKENS // T))
        part, waiting = waiting[-n:], waiting[:-n]
        batch = make_batch(rows, part, T, max(counts[i] for i in part), cfg)
        arrays = {name: mx.array(batch[name]) for name in ("tokens", "target_positions", "targets")}
        # rows are independent, so a Linux CPU reads parts of them side by side
        resids = map_rows(lambda b: model.final_resid(
            b["tokens"][:, :-1], positions=b["target_positions"]), arrays, model.parts)
        resid = mx.concatenate(resids)                                              # (n, A, D)
        logprobs = read_in_turn(model, token_logprobs, resid, arrays["targets"])    # (n, A)
        nats |= zip(part, -(np.array(logprobs) * batch["target_mask"]).sum(1))
    return [(float(nats[i]), counts[i]) for i in range(len(rows))]
