"""Decoding fast: keys and values of what has been read are kept, and LoRA is in the weights.

Without the cache each new token would read all earlier ones again; without the fusion each adapted
matrix would be three products. What all prompts begin with, such as worked examples or a system's
message, is read once. Rows go through the model together, so they are padded to one length: on the
left where they are to be continued, on the right where they are only read.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np

SHARED = 8      # tokens; fewer are not worth a pass of their own
STEP_COST = 32  # tokens: a pass over so many takes as long as a step of few rows does


class KVCache:
    """Keys and values of one block for up to `capacity` tokens, allocated once: no step copies.

    start   (B,) int32: where each row's tokens begin, for left-padded prompts; None: all at 0
    """

    def __init__(self, capacity: int, start: mx.array | None = None):
        self.capacity, self.start, self.offset = capacity, start, 0
        self.keys = self.values = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, K, T, d) keys and values; returns all so far, (B, K, offset + T, d)."""
        if self.keys is None:
            B, K, _, d = keys.shape
            self.keys = mx.zeros((B, K, self.capacity, d), keys.dtype)
            self.values = mx.zeros((B, K, self.capacity, d), values.dtype)
        end = self.offset + keys.shape[2]
        assert end <= self.capacity, f"KV cache of {self.capacity} tokens cannot hold {end}"
        # MLX updates in place where nobody else holds the array: hence no copy a step
        self.keys[:, :, self.offset:end] = keys
        self.values[:, :, self.offset:end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def mask(self, T: int) -> mx.array | str | None:
        """What the next T queries may see: "causal", nothing to hide (T = 1), or (B, 1, T, S)."""
        if self.start is None:
            return "causal" if T > 1 else None
        key, query = mx.arange(self.offset + T), self.offset + mx.arange(T)[:, None]
        real = key >= self.start[:, None, None, None]                               # (B, 1, 1, S)
        # a padding query sees itself: with nothing to see softmax gives NaN, and 0 * NaN is NaN
        return (real & (key <= query)) | (key == query)

    def repeat(self, times: int, capacity: int) -> "KVCache":
        """Each row `times` times over, with room for capacity tokens: one prefill, a whole group.

        By mx.repeat, whose gradient is a sum; an index's would be a scatter.
        """
        cache = KVCache(capacity, None if self.start is None else mx.repeat(self.start, times))
        keys, values = self.keys[:, :, :self.offset], self.values[:, :, :self.offset]
        cache.update(mx.repeat(keys, times, axis=0), mx.repeat(values, times, axis=0))
        return cache

    def keep(self, n: int, capacity: int) -> "KVCache":
        """The first n tokens alone, with room for capacity: what a longer prompt goes on from."""
        cache = KVCache(capacity, self.start)
        cache.update(self.keys[:, :, :n], self.values[:, :, :n])
        return cache

    def take(self, rows: mx.array) -> "KVCache":
        """Only these rows: what goes on when others have finished."""
        cache = KVCache(self.capacity, None if self.start is None else self.start[rows])
        cache.update(self.keys[rows, :, :self.offset], self.values[rows, :, :self.offset])
        return cache


@contextmanager
def fused_for_decoding(model: nn.Module) -> Iterator[None]:
    """Within, each float32 LoRALinear is one matrix: decoding is spared two small products.

    Other types stay as they are: bfloat16 would round the update away, and what samples would no
    longer be what is trained.
    """
    layers = [m for _, m in model.named_modules()
              if hasattr(m, "fused_weight") and m.linear.weight.dtype == mx.float32]
    weights = [layer.linear.weight for layer in layers]
    try:
        for layer in layers:
            layer.linear.weight, layer.enabled = layer.fused_weight(), False
        mx.eval([layer.linear.weight for layer in layers])
        yield
    finally:
        for layer, weight in zip(layers, weights):
            layer.linear.weight, layer.enabled = weight, True


# --------------------------------------------------------------------------------------------------
# prompts that begin alike


def shared_length(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left over.

    The first and the last in sorted order share least.
    example  [[5, 6, 7], [5, 6, 8, 9], [5, 6, 7, 1]] -> 2
    """
    first, last, most = min(prompts), max(prompts), min(map(len, prompts)) - 1
    n = 0
    while n < most and first[n] == last[n]:
        n += 1
    return n


def read_shared(model: nn.Module, prompts: list[list[int]],
                one_length: bool = False) -> tuple[list[KVCache], list[list[int]]]:
    """Read once what all prompts begin with: its caches, of one row, and the rest of each prompt.

    ([], prompts) where they share too little to be worth a pass of its own.
    one_length   so too where lengths differ: left padding would stand behind what is shared
    """
    n = shared_length(prompts) if len(prompts) > 1 else 0
    if n < SHARED or one_length and len(set(map(len, prompts))) > 1:
        return [], prompts
    caches = model.make_cache(n)
    model.last_resid(mx.array([prompts[0][:n]]), caches)
    # the last block's output, which nobody reads, is never computed
    mx.eval([(cache.keys, cache.values) for cache in caches])
    return caches, [ids[n:] for ids in prompts]


def in_batches(prompts: list[list[int]], most: int, steps: int) -> list[list[int]]:
    """Indices of prompts, the shortest first, at most so many at a time, to be continued.

    Padding stands in front of a row's first token, so only rows of one length can go on from what
    they share. Batches of one length are made where that spares more tokens than the steps of
    decoding that each further batch takes, of which one costs as much as STEP_COST tokens.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    further, shared = len({len(prompt) for prompt in prompts}) - 1, shared_length(prompts)
    apart = shared >= SHARED and shared * len(prompts) > further * steps * STEP_COST
    batches = []
    for i in order:
        other = apart and batches and len(prompts[batches[-1][0]]) != len(prompts[i])
        if not batches or other or len(batches[-1]) == most:
            batches.append([])
        batches[-1].append(i)
    return batches


# --------------------------------------------------------------------------------------------------
# rows of one length


def left_pad(prompts: list[list[int]]) -> tuple[mx.array, mx.array | None]:
    """Tokens (P, T), and where each row starts, (P,), or None where all are of one length."""
    T = max(map(len, prompts))
    starts = [T - len(p) for p in prompts]
    tokens = mx.array([[0] * s + p for s, p in zip(starts, prompts)])
    return tokens, mx.array(starts) if any(starts) else None


def pad_prompts(prompts: list[list[int]]) -> tuple[mx.array, mx.array]:
    """Right-pad prompts: tokens (B, T), and the position of each one's last token (B, 1)."""
    T = max(map(len, prompts))
    # on the right: causal attention never looks there, so that no mask is needed
    tokens = mx.array([ids + [0] * (T - len(ids)) for ids in prompts])
    return tokens, mx.array([[len(ids) - 1] for ids in prompts])


def pad_completions(done: list, limit: int) -> tuple[np.ndarray, ...]:
    """Right-padded ids, log-probabilities and mask of N sampled completions, (N, C) each.

    C is a multiple of four, at most limit: few shapes, few traces of mx.compile.
    """
    N, longest = len(done), max(len(c.ids) for c in done)
    C = min(-(-longest // 4) * 4, limit)
    ids, logprobs, mask = np.zeros((N, C), np.int32), *np.zeros((2, N, C), np.float32)
    for i, completion in enumerate(done):
        length = len(completion.ids)
        ids[i, :length] = completion.ids
        logprobs[i, :length] = completion.logprobs
        mask[i, :length] = 1
    return ids, logprobs, mask
