"""A Llama, from the checkpoint's folder to logits, with its residual stream open to view.

One forward pass serves training, generation and the lens: `stream` yields the residual stream after
the embedding and after every block, and `head` (final norm, then unembedding) turns any of them
into logits. At the last tap that is the model's output; at an earlier tap it is the logit lens. So
the lens cannot drift from the model it looks at.

Families, told apart by config.json: Llama-2 and TinyLlama (plain RoPE), Llama-3.x (llama3-scaled
RoPE, tied or untied unembedding), Qwen2.5 (bias on q, k, v). Parameter names equal the Hub
checkpoint's keys, so loading renames nothing.
Sources: Llama 2307.09288, Llama 3 2407.21783, RoPE 2104.09864, GQA 2305.13245, SwiGLU 2002.05202,
Qwen2.5 2412.15115.

Shapes, for the whole project: B batch, T tokens, D model width, H query heads, K key-value heads,
d head width, F MLP width, V vocabulary, L blocks, r LoRA rank. Tap 0 is after the embedding,
tap l after block l-1, up to tap L.
"""
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import blas  # before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open

from config import (
    COUNT,
    OBJECT,
    POSITIVE,
    REQUIRED,
    SWITCH,
    BadInput,
    one_of,
    read_fields,
    replace_file,
    write_bytes,
)
from fastexp import attention, linux_cpu, rope, swiglu
from hub import find_folder, one_line, open_weights, read_json
from quant import (
    HalfEmbedding,
    HalfLinear,
    QuantizedLinear,
    check_settings,
    make_room,
    settings_of,
    stored_settings,
)
from tokenizer import load_tokenizer

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
LOGITS_AT_ONCE = 2 ** 19    # 2 MiB; some ten such arrays wait in line
LARGE = 2 ** 30     # bytes of weights from which memory is scarcer than time
Edit = dict[int, Callable[[mx.array], mx.array]]     # tap -> what to make of the stream there
FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}


@dataclass
class ModelArgs:
    hidden_size: int                # D
    intermediate_size: int          # F
    num_hidden_layers: int          # L
    num_attention_heads: int        # H
    num_key_value_heads: int        # K
    head_dim: int                   # d; not always D / H
    vocab_size: int                 # V
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None       # {"rope_type": "llama3" | "linear", ...}
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


# config.json: what each value must be, and what it is where it is left out
FIELDS = {
    "hidden_size": (COUNT, REQUIRED), "intermediate_size": (COUNT, REQUIRED),
    "num_hidden_layers": (COUNT, REQUIRED), "num_attention_heads": (COUNT, REQUIRED),
    "vocab_size": (COUNT, REQUIRED), "num_key_value_heads": (COUNT, None),
    "head_dim": (COUNT, None), "max_position_embeddings": (COUNT, 2048),
    "rms_norm_eps": (POSITIVE, 1e-6), "rope_theta": (POSITIVE, 10000.0),
    "rope_scaling": (OBJECT, {}), "rope_parameters": (OBJECT, {}),
    "attention_bias": (SWITCH, False), "mlp_bias": (SWITCH, False),
    "tie_word_embeddings": (SWITCH, False),
    "hidden_act": (one_of("silu"), "silu"), "use_sliding_window": (one_of(False), False),
}
LINEAR = {"factor": (POSITIVE, REQUIRED)}
LLAMA3 = {**LINEAR, "low_freq_factor": (POSITIVE, REQUIRED),
          "high_freq_factor": (POSITIVE, REQUIRED),
          "original_max_position_embeddings": (POSITIVE, REQUIRED)}
ROPE = {"default": {}, "linear": LINEAR, "llama3": LLAMA3}


def parse_args(raw: dict, where: str) -> ModelArgs:
    """Read config.json, old or new spelling; raises BadInput on what we would compute wrongly."""
    family = raw.get("model_type")
    if family not in FAMILIES.values():
        names = ", ".join(f"{name} ({model_type})" for name, model_type in FAMILIES.items())
        raise BadInput(f"{where}: model_type {family!r} is not supported; expected {names}")
    fields = read_fields(raw, FIELDS, where)
    rope_theta, rope_scaling = read_rope(fields, where)
    D, H, bias = fields["hidden_size"], fields["num_attention_heads"], fields["attention_bias"]
    K, d = fields["num_key_value_heads"] or H, fields["head_dim"] or D // H
    if H % K or d < 2 or d % 2 or (D % H and not fields["head_dim"]):
        raise BadInput(f"{where}: hidden_size {D}, num_attention_heads {H}, num_key_value_heads "
                       f"{K}, head_dim {fields['head_dim']} do not fit: expected key-value heads "
                       "that divide the heads, heads that divide hidden_size (or a head_dim), and "
                       "heads of an even width, which RoPE turns in pairs")
    return ModelArgs(
        hidden_size=D, intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"], num_attention_heads=H,
        num_key_value_heads=K, head_dim=d, vocab_size=fields["vocab_size"],
        max_position_embeddings=fields["max_position_embeddings"],
        rms_norm_eps=fields["rms_norm_eps"], rope_theta=rope_theta, rope_scaling=rope_scaling,
        qkv_bias=family == "qwen2" or bias, o_bias=family == "llama" and bias,
        mlp_bias=fields["mlp_bias"], tie_word_embeddings=fields["tie_word_embeddings"],
    )


def read_rope(fields: dict, where: str) -> tuple[float, dict | None]:
    """RoPE's theta and scaling, of config.json's FIELDS; no scaling: None.

    Transformers 5 writes rope_parameters; before it, rope_theta stood beside rope_scaling. Reading
    only one of them gives a model that runs and is wrong from the first token on.
    """
    rope = fields["rope_parameters"] or fields["rope_scaling"]
    kind = {"rope_theta": (POSITIVE, fields["rope_theta"]), "type": (one_of(*ROPE), "default")}
    rope_type = rope.get("rope_type") or rope.get("type")
    kind = read_fields({**rope, "type": rope_type}, kind, f"{where}: RoPE")
    if kind["type"] == "default":
        return kind["rope_theta"], None
    scaling = read_fields(rope, ROPE[kind["type"]], f"{where}: RoPE")
    if kind["type"] == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise BadInput(f"{where}: RoPE low_freq_factor = {scaling['low_freq_factor']}, expected "
                       f"less than high_freq_factor = {scaling['high_freq_factor']}")
    return kind["rope_theta"], {"rope_type": kind["type"], **scaling}


def rope_periods(args: ModelArgs) -> mx.array:
    """Return the d/2 reciprocal rotation frequencies, which is what `mx.fast.rope` calls `freqs`.

    Plain RoPE turns pair i by position / theta^(2i/d). Llama 3's scaling leaves fast pairs
    (wavelength below C / high), slows slow ones by `factor` (above C / low), and blends between;
    C is the original context. It acts at every position, the first included, so leaving it out
    is never harmless.
    source   Llama 3.1 model card and transformers' modeling_rope_utils
    """
    d = args.head_dim
    freqs = args.rope_theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)  # (d/2,)
    scaling = args.rope_scaling
    if scaling and scaling["rope_type"] == "linear":
        freqs = freqs / scaling["factor"]
    elif scaling:
        context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = context * freqs / (2 * math.pi)              # full turns in the original context
        blend = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow pair, 1: fast pair
        freqs = (1 - blend) * freqs / factor + blend * freqs
    return mx.array((1 / freqs).astype(np.float32))


def gather_positions(resid: mx.array, positions: mx.array) -> mx.array:
    """Take rows of the residual stream: resid (B, T, D), positions (B, A) int32 -> (B, A, D).

    Done before the unembedding, so that logits exist for A positions and never for all T.
    """
    return mx.take_along_axis(resid, positions[..., None], axis=1)


def logit_rows(args: ModelArgs, recompute: str) -> int:
    """For how many rows logits exist at once in training; more where memory is not scarce."""
    at_once = LOGITS_AT_ONCE * (1 if linux_cpu() or recompute != "none" else 32)
    # BLAS packs the whole table for each product, which a large one's few rows would not repay
    least = 32 if args.vocab_size * args.hidden_size > 2 ** 26 else 16
    return max(least, at_once // args.vocab_size)


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
        self.keys[:, :, self.offset:end] = keys
        self.values[:, :, self.offset:end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def mask(self, T: int) -> mx.array | str | None:
        """What the next T queries may see: "causal", nothing to hide (T = 1), or (B, 1, T, S) bool.

        "causal" lines the last query up with the last key, so it is also right behind a cache.
        """
        if self.start is None:
            return "causal" if T > 1 else None
        key, query = mx.arange(self.offset + T), self.offset + mx.arange(T)[:, None]
        real = key >= self.start[:, None, None, None]
        # a padding query sees itself: with nothing to see softmax gives NaN, and 0 * NaN is NaN
        return (real & (key <= query)) | (key == query)

    @staticmethod
    def join(caches: list["KVCache"]) -> "KVCache":
        """Rows of several caches, as far filled, in one."""
        if len(caches) == 1:
            return caches[0]
        first = caches[0]
        start = None if first.start is None else mx.concatenate([c.start for c in caches])
        cache = KVCache(first.offset, start)
        cache.update(*(mx.concatenate([x[:, :, :first.offset] for x in side])
                       for side in zip(*((c.keys, c.values) for c in caches))))
        return cache

    def repeat(self, times: int, room: int) -> "KVCache":
        """Each row `times` times over, with room for more tokens: one prefill serves a group."""
        return self._rows(lambda x: mx.repeat(x, times, axis=0), self.offset + room)

    def take(self, rows: mx.array) -> "KVCache":
        """Only these rows: what goes on when others have finished."""
        return self._rows(lambda x: mx.take(x, rows, axis=0), self.capacity)

    def _rows(self, pick, capacity: int) -> "KVCache":
        cache = KVCache(capacity, None if self.start is None else pick(self.start))
        cache.update(*(pick(x[:, :, :self.offset]) for x in (self.keys, self.values)))
        return cache


class Attention(nn.Module):
    """Causal self-attention with rotary positions; H query heads share K key-value heads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, H, K, d = (args.hidden_size, args.num_attention_heads, args.num_key_value_heads,
                      args.head_dim)
        self.head_dim = d
        self.q_proj = nn.Linear(D, H * d, bias=args.qkv_bias)
        self.k_proj = nn.Linear(D, K * d, bias=args.qkv_bias)
        self.v_proj = nn.Linear(D, K * d, bias=args.qkv_bias)
        self.o_proj = nn.Linear(H * d, D, bias=args.o_bias)
        self._periods = rope_periods(args)  # (d/2,); the underscore keeps it out of parameters()

    def __call__(self, x: mx.array, cache: KVCache | None = None,
                 positions: mx.array | None = None) -> mx.array:
        return self.o_proj(self.heads(x, cache, positions))  # (B, T, D), or (B, A, D)

    def heads(self, x: mx.array, cache: KVCache | None = None,
              positions: mx.array | None = None) -> mx.array:
        """What the heads say before o_proj mixes them: (B, T, H * d), head i in slice i.

        positions   (B, A) of x whose queries alone are asked; then (B, A, H * d)
        """
        B, T, _ = x.shape
        d = self.head_dim
        split = lambda y: y.reshape(B, T, -1, d).transpose(0, 2, 1, 3)
        # (B, H, T, d), then (B, K, T, d) twice
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        offset = cache.offset if cache else 0
        q, k = rope(q, offset, self._periods), rope(k, offset, self._periods)
        mask = cache.mask(T) if cache else "causal"
        if cache:
            k, v = cache.update(k, v)
        if positions is not None:
            rows = positions[:, None, :, None]                                      # (B, 1, A, 1)
            q = mx.take_along_axis(q, rows, axis=2)
            mask = (mx.take_along_axis(mask, rows, axis=2) if isinstance(mask, mx.array)
                    else mx.arange(k.shape[2]) <= offset + rows)                    # (B, 1, A, S)
        # right padding needs no mask of its own, since no real token can look to its right
        y = attention(q, k, v, d ** -0.5, mask)
        return y.transpose(0, 2, 1, 3).reshape(B, y.shape[2], -1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, F = args.hidden_size, args.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=args.mlp_bias)
        self.up_proj = nn.Linear(D, F, bias=args.mlp_bias)
        self.down_proj = nn.Linear(F, D, bias=args.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


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


class Block(nn.Module):
    """Read the stream through a norm, add attention's result; the same again with the MLP."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = MLP(args)

    def attend(self, resid: mx.array, cache: KVCache | None = None,
               positions: mx.array | None = None) -> mx.array:
        """The stream between the block's halves: attention has written, the MLP has not."""
        written = self.self_attn(self.input_layernorm(resid), cache, positions)
        return (resid if positions is None else gather_positions(resid, positions)) + written

    def transform(self, resid: mx.array) -> mx.array:
        """The block's second half: the MLP reads the stream and adds to it, each position alone."""
        return resid + self.mlp(self.post_attention_layernorm(resid))

    def __call__(self, resid: mx.array, cache: KVCache | None = None,
                 recompute: str = "none", positions: mx.array | None = None) -> mx.array:
        """resid (B, T, D) -> (B, T, D), or at some positions (B, A) alone (B, A, D).

        Keys and values are made of all T in any case; with positions nothing is recomputed.
        recompute  what the backward pass computes again instead of keeping: none; mlp: the second
                   half, whose F-wide products are most of a block's activations; block: both
        """
        if recompute == "block":
            return self.recomputed(resid, cache)
        resid = self.attend(resid, cache, positions)
        if recompute == "mlp":
            return checkpoint(self.transform, self.post_attention_layernorm, self.mlp)(resid)
        return self.transform(resid)

    def recomputed(self, resid: mx.array, cache: KVCache | None) -> mx.array:
        """The whole block, nothing kept but what goes in and out, keys and values included."""
        if cache is None:
            return checkpoint(self, self)(resid)

        offset = cache.offset   # now: `run` runs again in the backward pass

        def run(resid, *past):
            own = KVCache(cache.capacity, cache.start)
            own.keys, own.values, own.offset = *(past or (None, None)), offset
            return self(resid, own), own.keys, own.values

        past = (cache.keys, cache.values) if offset else ()
        resid, cache.keys, cache.values = checkpoint(run, self)(resid, *past)
        cache.offset += resid.shape[1]
        return resid


class Body(nn.Module):
    """Everything under the checkpoint's prefix `model.`: embedding, blocks, final norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.recompute = args, "none"
        self.model = Body(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def stream(self, tokens: mx.array, cache: list[KVCache] | None = None,
               edit: Edit | None = None,
               positions: mx.array | None = None) -> Iterator[mx.array]:
        """Yield the residual stream (B, T, D) at tap 0, 1, ..., L, each before the final norm.

        positions  (B, A): tap L there alone, (B, A, D); not with an edit of tap L. Nobody reads the
                   last block's other rows, and its MLP is a large part of a shallow model
        tokens   (B, T) int32. A consumer that drops what it has read never holds more than one tap.
        edit     {tap: function (B, T, D) -> (B, T, D)}: what the stream is replaced by at a tap;
                 the blocks above go on from there. Ablation, steering and patching are this.
        """
        edit = edit or {}
        unchanged = lambda resid: resid
        resid = edit.get(0, unchanged)(self.model.embed_tokens(tokens))
        yield resid
        caches = cache or [None] * len(self.model.layers)
        for tap, (block, block_cache) in enumerate(zip(self.model.layers, caches), 1):
            # the last block's activations are wanted at once: keeping them costs nothing; and one
            # token behind a cache is decoding, which has no backward pass
            keep = tap == len(caches) or (cache and tokens.shape[1] == 1)
            recompute = "none" if keep else self.recompute
            here = positions if tap == len(caches) else None
            if here is not None and 2 * here.shape[1] > tokens.shape[1]:
                # most rows are wanted: gathering them would cost more than it spares
                resid = gather_positions(block(resid, block_cache, recompute), here)
            else:
                resid = block(resid, block_cache, recompute, here)
            resid = edit.get(tap, unchanged)(resid)
            yield resid

    def final_resid(self, tokens: mx.array, cache: list[KVCache] | None = None,
                    edit: Edit | None = None, positions: mx.array | None = None) -> mx.array:
        """The residual stream at tap L: what `head` turns into the model's logits.

        (B, T, D), or at some positions (B, A) alone (B, A, D)
        """
        for resid in self.stream(tokens, cache, edit, positions):
            pass
        return resid

    def last_resid(self, tokens: mx.array, cache: list[KVCache] | None = None) -> mx.array:
        """The same at the last position of tokens (B, T) alone: (B, D)."""
        B, T = tokens.shape
        at_last = None if T == 1 else mx.full((B, 1), T - 1)
        return self.final_resid(tokens, cache, positions=at_last)[:, 0]

    def head(self, resid: mx.array) -> mx.array:
        """Final norm, then unembedding: (..., D) -> float32 logits (..., V).

        The logit lens is this at an earlier tap. float32, because bfloat16 leaves a vocabulary of
        128,256 about a thousand distinct logits: ranks become arbitrary.
        """
        return self.unembed(self.model.norm(resid)).astype(mx.float32)

    def unembed(self, normed: mx.array) -> mx.array:
        """The unembedding alone, without the norm: linear, (..., D) -> (..., V)."""
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(normed)
        return self.lm_head(normed)

    def read_logits(self, read, resid: mx.array, tokens: mx.array, slopes: bool = True) -> mx.array:
        """read(head(resid), tokens): resid (B, A, D), tokens (B, A) -> what read gives, (B, A).

        read    a function of each row alone
        slopes  whether a gradient will be asked for
        Logits are by far the largest arrays of a step, so they exist for `logit_rows` rows at a
        time, for value and gradient both: a row's value is one number with a gradient J (D,), and
        going back only multiplies that by the row's cotangent. Where the unembedding itself is
        trained they exist all at once or, with `recompute`, twice. source  Liger 2410.10989
        """
        table = self.model.embed_tokens if self.args.tie_word_embeddings else self.lm_head
        flat = tokens.reshape(-1)
        rows = logit_rows(self.args, self.recompute)
        starts = range(0, tokens.size, rows)
        if table.trainable_parameters():
            if self.recompute == "none" or len(starts) == 1:
                return read(self.head(resid), tokens)
            resid = resid.reshape(-1, resid.shape[-1])
            parts = [checkpoint(lambda part, i=i: read(self.head(part), flat[i:i + rows]),
                                self.model.norm, table)(resid[i:i + rows]) for i in starts]
            return mx.concatenate(parts).reshape(tokens.shape)

        @mx.custom_function
        def read_all(normed):
            values, J = [], []
            for i in starts:
                x, ids = normed[i:i + rows], flat[i:i + rows]
                if values:      # first the part before, or all logits would be there at once
                    x = mx.depends(x, [values[-1], *J[-1:]])
                of = lambda x, ids=ids: read(self.unembed(x).astype(mx.float32), ids)
                if slopes:
                    value, slope = mx.vjp(of, [x], [mx.ones(len(ids))])
                    J += slope
                values += value if slopes else [of(x)]
            return mx.concatenate(values), mx.concatenate(J) if J else mx.zeros(0)

        @read_all.vjp
        def gradient(normed, cotangents, outputs):
            return (cotangents[0][:, None] * outputs[1]).astype(normed.dtype)

        normed = self.model.norm(resid.reshape(-1, resid.shape[-1]))
        return read_all(normed)[0].reshape(tokens.shape)

    def __call__(self, tokens: mx.array, cache: list[KVCache] | None = None,
                 edit: Edit | None = None) -> mx.array:
        """tokens (B, T) int32 -> logits (B, T, V) float32; position t scores token t+1."""
        return self.head(self.final_resid(tokens, cache, edit))

    def residuals(self, tokens: mx.array) -> mx.array:
        """All taps at once, (L+1, B, T, D), before the norm. For small inputs; prefer `stream`."""
        return mx.stack(list(self.stream(tokens)))

    def completion_resid(self, prompts: mx.array, start: mx.array | None,
                         completions: mx.array) -> mx.array:
        """The final residual stream that scores each completion token, (P * G, C, D).

        prompts      (P, T) int32, left-padded up to start (P,), or None where none is padded
        completions  (P * G, C) int32, a prompt's G in a row. The prompt is computed once for all
                     of them, gradients included: P (T + G C) tokens instead of P G (T + C).
        """
        G, C = completions.shape[0] // prompts.shape[0], completions.shape[1]
        cache = self.make_cache(prompts.shape[1], start)
        first = self.last_resid(prompts, cache)[:, None]                # (P, 1, D): scores token 0
        cache = [c.repeat(G, room=C - 1) for c in cache]
        first = mx.repeat(first, G, axis=0)
        if C == 1:
            return first
        return mx.concatenate([first, self.final_resid(completions[:, :-1], cache)], axis=1)

    def make_cache(self, capacity: int, start: mx.array | None = None) -> list[KVCache]:
        return [KVCache(capacity, start) for _ in self.model.layers]


# --------------------------------------------------------------------------------------------------
# from a folder or a Hub name to a model


def check_tensors(found: dict[str, mx.array], expected: dict[str, mx.array], where: str) -> None:
    """Compare names and shapes; raises BadInput with every mismatch (the first 8 of each kind)."""
    kinds = {
        "missing": [k for k in expected if k not in found],
        "not expected": [k for k in found if k not in expected],
        "of another shape": [f"{k} {found[k].shape}, expected {expected[k].shape}" for k in found
                             if k in expected and found[k].shape != expected[k].shape],
    }
    show = lambda names: ", ".join(names[:8]) + (
        f" and {len(names) - 8} more" if len(names) > 8 else "")
    mistakes = [f"{len(names)} {kind}: {show(names)}" for kind, names in kinds.items() if names]
    if mistakes:
        raise BadInput(f"{where}: tensors do not fit: {'; '.join(mistakes)}")


# of a float type: the signed and the unsigned whole numbers of its width, infinity's bits
BITS_OF = {mx.float32: (mx.int32, mx.uint32, 0x7F800000), mx.float16: (mx.int16, mx.uint16, 0x7C00),
           mx.bfloat16: (mx.int16, mx.uint16, 0x7F80)}


def is_finite(x: mx.array) -> mx.array:
    """Whether every number of a float array is finite: a bool, without a second array of its size.

    Infinity and NaN have all exponent bits set. So read as whole numbers positive ones are the
    largest of the signed, negative ones of the unsigned.
    """
    signed, unsigned, infinity = BITS_OF[x.dtype]
    sign_bit = 2 ** (8 * x.dtype.size - 1)
    return ((x.view(signed).max() < infinity) & (x.view(unsigned).max() < sign_bit + infinity))


def check_numbers(arrays: dict[str, mx.array], where: str, codes: tuple[str, ...] = ()) -> None:
    """Raises BadInput where a tensor is of another type than expected, or not finite throughout.

    Every number is looked at: what passes holds no infinity and no NaN.
    codes    names of packed weights, which are uint32; all others are floats
    """
    wrong = [f"{k} {str(v.dtype).removeprefix('mlx.core.')}" for k, v in arrays.items()
             if (v.dtype != mx.uint32 if k in codes else v.dtype not in BITS_OF)]
    if wrong:
        raise BadInput(f"{where}: tensors of the wrong type: {', '.join(wrong[:8])}; expected "
                       "float32, bfloat16 or float16, and uint32 for packed codes")
    finite = {k: is_finite(v) for k, v in arrays.items() if k not in codes}
    mx.eval(finite)
    if ruined := [k for k, all_finite in finite.items() if not all_finite.item()]:
        raise BadInput(f"{where}: NaN or infinity in {', '.join(ruined[:8])}; "
                       "fetch or train it again")


def default_dtype() -> mx.Dtype | None:
    """float32 on a CPU, where half precision is emulated; on a GPU None, the checkpoint's own."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else None


def load_weights(model: Llama, folder: Path, raw: dict, dtype: mx.Dtype | None = None,
                 bits: int | None = None, group_size: int = 64) -> None:
    """Put the checkpoint's tensors into the model, every one accounted for, layer by layer.

    MLX reads a tensor when it is evaluated, not before. So a model that is quantised here never
    exists whole: memory peaks at the quantised size plus one layer.
    """
    found, files = {}, sorted(set(open_weights(folder).values()))
    if blas.CPU_WHEEL and sum(file.stat().st_size for file in files) > LARGE:
        blas.map_large_blocks()
    for file in files:
        found |= mx.load(str(file))
    # derived, in old checkpoints
    found = {k: v for k, v in found.items() if not k.endswith("rotary_emb.inv_freq")}
    if model.args.tie_word_embeddings:
        # some exporters store the tied matrix twice
        found = {k: v for k, v in found.items() if not k.startswith("lm_head.")}
    kind, where = dtype or default_dtype(), f"{folder}/config.json"
    stored = stored_settings(raw, where)
    if bits or stored:
        blas.keep_batches_whole()
    if stored:
        if bits and (bits, group_size) != settings_of("", stored):
            raise BadInput(f"bits = {bits} in groups of {group_size}: {folder} is already "
                           f"quantised to {stored['bits']} bits in groups of "
                           f"{stored['group_size']}; leave bits out, or load the unquantised model")
        make_room(model, found, stored, kind, where)
    check_tensors(found, dict(tree_flatten(model.parameters())), str(folder))
    # where memory is scarce, a float32 model's tables stay in the 16 bits they come in
    keep_half = (bits or stored) and dtype is None and kind == mx.float32
    layers = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    for i, (path, layer) in enumerate(layers):
        own = {name: found.pop(f"{path}.{name}") for name, _ in tree_flatten(layer.parameters())}
        codes = (f"{path}.weight",) if isinstance(layer, QuantizedLinear) else ()
        try:
            check_numbers({f"{path}.{k}": v for k, v in own.items()}, str(folder), codes)
            mx.eval(own)
        except RuntimeError as error:   # MLX reads a tensor when it is evaluated
            raise BadInput(f"could not read {path} of {folder} ({one_line(error)}); "
                           "fetch the model again") from None
        is_half = own["weight"].dtype in (mx.bfloat16, mx.float16)
        cast = {k: v if v.dtype == mx.uint32 or not kind else v.astype(kind)    # codes stay codes
                for k, v in own.items()}
        if bits and not stored and isinstance(layer, nn.Linear) and path != "lm_head":
            check_settings(bits, group_size, own["weight"].shape[1], f"{folder}: {path}")
            layer = QuantizedLinear.pack(cast["weight"], cast.get("bias"), bits, group_size)
        elif keep_half and is_half and isinstance(layer, nn.Embedding):
            layer = HalfEmbedding(own["weight"])
        elif keep_half and is_half and path == "lm_head":
            layer = HalfLinear(own["weight"])
        else:
            layer.update(cast)
        layers[i] = path, layer
        mx.eval(layer.parameters())
    model.update_modules(tree_unflatten(layers))


def init_weights(model: Llama) -> None:
    """Random weights for training from scratch: sd 1/sqrt(inputs).

    The two matrices that write to the stream have 1/sqrt(2L) of it. The embedding starts small,
    sd 0.02: from a large one the bundled model learnt its sums by heart instead of adding.
    """
    scaled = []
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim == 2:
            sd = 0.02 if "embed" in name or "lm_head" in name else weight.shape[1] ** -0.5
            writes = "o_proj" in name or "down_proj" in name
            sd *= (2 * model.args.num_hidden_layers) ** -0.5 if writes else 1
            scaled.append((name, sd * mx.random.normal(weight.shape)))
    model.load_weights(scaled, strict=False)  # norm gains stay 1, biases as they are


def load(path_or_hub_name: str | Path, dtype: str | mx.Dtype | None = None,
         bits: int | None = None, from_scratch: bool = False, group_size: int = 64):
    """Return (model, tokenizer) from a folder or Hub name; tokenizer None where there is none.

    path_or_hub_name  also NAME@REVISION; a checkpoint that is quantised, in mlx-community's layout,
                  stays so
    dtype         float32, bfloat16, float16, or None: float32 on CPU, the checkpoint's on GPU
    bits          2, 3, 4, 5, 6 or 8 quantises the blocks' linear layers, in groups of group_size
                  (32, 64, 128); embedding and unembedding stay, on a CPU in their own 16 bits
    from_scratch  random weights from MLX's current random state;
                  only config.json and the tokenizer are read
    raises        BadInput
    """
    folder = find_folder(path_or_hub_name, weights=not from_scratch)
    raw = read_json(folder / "config.json")
    model = Llama(parse_args(raw, str(folder / "config.json")))
    tokenizer = load_tokenizer(folder)
    if tokenizer:
        tokenizer.check_rows(model.args.vocab_size)
    if from_scratch:
        init_weights(model)
    else:
        load_weights(model, folder, raw, DTYPES[dtype] if isinstance(dtype, str) else dtype, bits,
                     group_size)
    model.eval()
    return model, tokenizer


def save_safetensors(path: Path, arrays: dict[str, mx.array],
                     metadata: dict[str, str] | None = None) -> None:
    """Write aside, check, sync, rename: a reader sees the old file or the new one, never a part.

    raises   BadInput if the disk is full or not writable; the old file is then untouched
    """
    # mx appends .safetensors to any other ending
    temporary = path.with_name(f".{path.name}.tmp.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.eval(arrays)
        mx.save_safetensors(str(temporary), arrays, metadata={"format": "mlx", **(metadata or {})})
        # a full disk can leave a short file without an exception
        with safe_open(temporary, framework="numpy"):
            pass
        replace_file(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"could not write {path} ({' '.join(str(error).split())}); "
                       "free some disk space: what was saved before is intact") from None


def save_model(model: Llama, folder: Path, source: str | Path) -> None:
    """Write a folder in the Hub's layout: weights; config and tokenizer copied from the source."""
    origin = find_folder(source, weights=False)
    raw = read_json(origin / "config.json")
    raw.pop("quantization", None), raw.pop("quantization_config", None)     # the weights are plain
    # both spellings: mlx-lm reads the older alone, and takes theta 10,000 where it is not there
    raw["rope_theta"], raw["rope_scaling"] = model.args.rope_theta, model.args.rope_scaling
    raw["torch_dtype"] = raw["dtype"] = str(model.model.norm.weight.dtype).removeprefix("mlx.core.")
    for file in origin.iterdir():
        if file.name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                         "generation_config.json", "special_tokens_map.json",
                         "chat_template.jinja"):
            write_bytes(folder / file.name, file.read_bytes())
    save_safetensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    # last: its presence says that all is there
    write_bytes(folder / "config.json", (json.dumps(raw, indent=2) + "\n").encode())
