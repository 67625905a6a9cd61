"""Training in less memory: activations computed again, and logits that never exist all at once.

`spare` puts two methods on a model, in place of model.run_block and model.read_logits. Values and
gradients stay what they were; a test holds them equal to the plain ones.
"""
from functools import partial

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from engine.blas import linux_cpu

from config import Config

LOGITS_AT_ONCE = 2 ** 19    # 2 MiB; some ten such arrays wait in line


def spare(model: nn.Module, cfg: Config) -> None:
    """Have model recompute activations as cfg.recompute says, and read logits in parts; in place.

    recompute  what the backward pass computes again instead of keeping: none; mlp: a block's second
               half, whose F-wide products are most of its activations; block: both halves
    """
    if cfg.recompute != "none":
        model.run_block = partial(run_block, model, cfg.recompute)
    model.read_logits = partial(read_logits, model, logit_rows(model.args, cfg.recompute),
                                cfg.recompute != "none")


# --------------------------------------------------------------------------------------------------
# activations


def checkpoint(fn, *modules: nn.Module):
    """fn, whose inner results the backward pass computes again instead of keeping them.

    modules  what fn reads weights of. `mx.checkpoint` differentiates arguments alone: trainable
             weights that fn just closes over would get gradient 0, without a word
    source   Chen 1604.06174
    """
    def run(weights, *args):
        for module, own in zip(modules, weights):
            module.update(own)
        return fn(*args)

    return lambda *args: mx.checkpoint(run)([m.trainable_parameters() for m in modules], *args)


def run_block(model: nn.Module, recompute: str, block: nn.Module, resid: mx.array, cache,
              positions: mx.array | None) -> mx.array:
    """A block whose activations are not kept; resid (B, T, D) -> (B, T, D), or (B, A, D)."""
    # the last block's activations are wanted at once: keeping them costs nothing; and one token
    # behind a cache is decoding, which has no backward pass
    is_last = block is model.model.layers[-1]
    if is_last or positions is not None or (cache and resid.shape[1] == 1):
        return block(resid, cache, positions)
    if recompute == "mlp":
        transform = checkpoint(block.transform, block.post_attention_layernorm, block.mlp)
        return transform(block.attend(resid, cache))
    if cache is None:
        return checkpoint(block, block)(resid)
    return recompute_behind_cache(block, resid, cache)


def recompute_behind_cache(block: nn.Module, resid: mx.array, cache) -> mx.array:
    """The whole block, nothing kept but what goes in and out, keys and values included."""
    offset = cache.offset   # as it is now: `run` runs again in the backward pass

    def run(resid, *past):
        own = type(cache)(cache.capacity, cache.start)
        own.offset = offset
        own.keys, own.values = past or (None, None)
        return block(resid, own), own.keys, own.values

    past = (cache.keys, cache.values) if offset else ()
    resid, cache.keys, cache.values = checkpoint(run, block)(resid, *past)
    cache.offset += resid.shape[1]
    return resid


# --------------------------------------------------------------------------------------------------
# logits


def logit_rows(args, recompute: str) -> int:
    """For how many rows logits exist at once in training; more where memory is not scarce."""
    at_once = LOGITS_AT_ONCE * (1 if linux_cpu() or recompute != "none" else 32)
    # BLAS packs the whole table for each product, which a large one's few rows would not repay
    least = 32 if args.vocab_size * args.hidden_size > 2 ** 26 else 16
    return max(least, at_once // args.vocab_size)


def read_logits(model: nn.Module, rows: int, recompute: bool, read, resid: mx.array,
                tokens: mx.array, with_grad: bool = True) -> mx.array:
    """read(head(resid), tokens): resid (B, A, D), tokens (B, A) -> what read gives, (B, A).

    read       a function of each row alone
    with_grad  whether a gradient will be asked for
    Logits are by far the largest arrays of a step, so they exist for `rows` rows at a time, for
    value and gradient both: a row's value is one number with a gradient J (D,), and going back only
    multiplies that by the row's cotangent. Where the unembedding itself is trained they exist all
    at once or, with `recompute`, twice. source  Liger 2410.10989
    """
    table = model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head
    flat = tokens.reshape(-1)
    starts = range(0, tokens.size, rows)
    if table.trainable_parameters():
        if not recompute or len(starts) == 1:
            return read(model.head(resid), tokens)
        resid = resid.reshape(-1, resid.shape[-1])
        parts = []
        for i in starts:
            read_part = checkpoint(lambda part, i=i: read(model.head(part), flat[i:i + rows]),
                                   model.model.norm, table)
            parts.append(read_part(resid[i:i + rows]))
        return mx.concatenate(parts).reshape(tokens.shape)

    @mx.custom_function
    def read_all(normed):
        values, J = [], []
        for i in starts:
            x, ids = normed[i:i + rows], flat[i:i + rows]
            if values:      # first the part before, or all logits would be there at once
                x = mx.depends(x, [values[-1], *J[-1:]])

            def of(x, ids=ids):
                return read(model.unembed(x).astype(mx.float32), ids)

            if with_grad:
                value, row_grad = mx.vjp(of, [x], [mx.ones(len(ids))])
                values += value
                J += row_grad
            else:
                values.append(of(x))
        return mx.concatenate(values), mx.concatenate(J) if J else mx.zeros(0)

    @read_all.vjp
    def gradient(normed, cotangents, outputs):
        return (cotangents[0][:, None] * outputs[1]).astype(normed.dtype)

    normed = model.model.norm(resid.reshape(-1, resid.shape[-1]))
    return read_all(normed)[0].reshape(tokens.shape)
