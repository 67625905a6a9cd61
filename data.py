"""From rows to batches that say what the loss counts.

A problem is a prompt and its answer; arithmetic problems are made (text/arithmetic.py), all others
are read from a file, or a folder as `python -m tasks` writes it (text/columns.py).
text/rows.py turns a problem into a Row of token ids: prompt, answer, EOS. Here rows become batches:

    7 * 8 = 56 EOS     position of "=" predicts 56, position of 56 predicts EOS: two targets

The loss counts targets alone, and reads the model at their positions alone.
Shapes: B rows, T tokens, A the largest number of targets in a row of the data.
"""
import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import Config
from engine import workers
from text.rows import Row


def make_batch(rows: list[Row], indices: list[int], T: int, A: int,
               cfg: Config) -> dict[str, np.ndarray]:
    """Pad the rows to T tokens and say where their targets are.

    rows     Row.targets says what counts in the loss: the answer and EOS; of a conversation every
             reply and what ends it; all tokens after the first where cfg.mask_prompt is false
    indices  rows to take; -1 fills the batch up with a row of zeros that counts for nothing
    example  ids [1, 7, *, 8, =, 56, 2], 5 of them the prompt, A 3: target_positions [4, 5, 0],
             targets [56, 2, 7], target_mask [1, 1, 0]
    """
    B = len(indices)
    tokens, is_before_target = np.zeros((B, T), np.int32), np.zeros((B, T - 1), np.float32)
    class_positions, class_ids = np.zeros(B, np.int32), np.zeros(B, np.int32)
    for i, index in enumerate(indices):
        if index < 0:
            continue
        row = rows[index]
        tokens[i, :len(row.ids)] = row.ids      # right padding: no real token looks to its right
        for start, stop in row.targets(cfg):
            is_before_target[i, start - 1:stop - 1] = 1     # position t predicts token t + 1
        eos = (row.spans[-1][1] if row.spans else len(row.ids)) - 1
        # the class is read at the last prompt token; "answer": before EOS, a published error
        class_positions[i] = row.P - 1 if cfg.class_position == "prompt" else eos - 1
        class_ids[i] = row.class_id
    # the ones first, in order; what fills up to A has mask 0
    positions = np.argsort(-is_before_target, axis=1, kind="stable")[:, :A]
    return {
        "tokens": tokens,                                                           # (B, T)
        "target_positions": positions.astype(np.int32),                             # (B, A)
        "targets": np.take_along_axis(tokens, positions + 1, 1),                    # (B, A)
        "target_mask": np.take_along_axis(is_before_target, positions, 1),          # (B, A)
        "class_positions": class_positions,                                         # (B,)
        "class_ids": class_ids,     # (B,): the token that the class loss wants, mostly a word
        "row_mask": np.array([i >= 0 for i in indices], np.float32),                # (B,)
    }


class Batches:
    """Endless batches over fixed rows.

    `at(step)` depends on rows, config and step alone, so a resumed run needs no position. Rows are
    grouped into few lengths (multiples of 4 or 8 where rows are short, else of 32): little padding,
    and few distinct shapes, since `mx.compile` keeps one trace for each. Each epoch shuffles rows
    within lengths and the order of batches.
    """

    def __init__(self, rows: list[Row], cfg: Config):
        self.rows, self.cfg = rows, cfg
        lengths = np.array([len(r.ids) for r in rows])
        multiple = 32
        if lengths.max() <= 64:
            multiple = 4 if lengths.max() <= 32 else 8
        # each length rounded up to a multiple, at most the longest
        self.padded = np.minimum(-(-lengths // multiple) * multiple, lengths.max())
        self.A = max(sum(stop - start for start, stop in r.targets(cfg)) for r in rows)
        self.lengths = sorted(set(self.padded.tolist()))
        self.per_epoch = sum(-(-int((self.padded == n).sum()) // cfg.batch_size)
                             for n in self.lengths)
        self._epoch, self._plan = -1, []

    def _shuffle(self, epoch: int) -> list[tuple[int, list[int]]]:
        """One epoch's (length, row indices) in order; a length's last batch is filled with -1."""
        rng, B, plan = np.random.default_rng((self.cfg.seed, epoch)), self.cfg.batch_size, []
        for n in self.lengths:
            order = rng.permutation(np.flatnonzero(self.padded == n))
            order = np.concatenate([order, np.full(-len(order) % B, -1, order.dtype)])
            plan += [(n, order[i:i + B].tolist()) for i in range(0, len(order), B)]
        return [plan[i] for i in rng.permutation(len(plan))]

    def at(self, step: int) -> tuple[list[list[dict[str, mx.array]]], dict]:
        """([update], metrics) of a 0-based step: its rows in cfg.grad_accum_steps equal parts.

        n_targets and n_rows count the whole step, so that its micro-batches' losses add up. Of
        several processes cfg is that of all together (train.py's `whole`).
        """
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._shuffle(epoch)
        T, indices = self._plan[k]
        n = len(indices) // self.cfg.grad_accum_steps
        micro_batches = [make_batch(self.rows, indices[i:i + n], T, min(self.A, T - 1), self.cfg)
                         for i in range(0, len(indices), n)]
        counts = {"n_targets": np.float32(sum(b["target_mask"].sum() for b in micro_batches)),
                  "n_rows": np.float32(sum(b["row_mask"].sum() for b in micro_batches))}
        # of several processes each takes its own; alone: all
        update = [{name: mx.array(value) for name, value in (batch | counts).items()}
                  for batch in workers.mine(micro_batches)]
        rows = [i for i in indices if i >= 0]
        return [update], {"rows": rows, "n_tokens": sum(len(self.rows[i].ids) for i in rows)}

    def state(self) -> tuple[dict, dict]:
        """What `at` depends on beside rows, config and step: nothing."""
        return {}, {}

    def restore(self, arrays: dict, plain: dict) -> None:
        pass
