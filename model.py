"""A Llama, from the checkpoint's folder to logits, with its residual stream open to view.

One forward pass serves training, generation and the lens: `stream` yields the residual stream (the
hidden states) after the embedding, tap 0, and after every block, tap 1 to L. `head` (final norm,
then unembedding) turns any of them into logits. At tap L that is the model's output; at an earlier
tap it is the logit lens. So the lens cannot drift from the model it looks at.

Families, told apart by config.json: Llama-2, TinyLlama, SmolLM2 (plain RoPE), Llama-3.x (scaled
RoPE, tied or untied unembedding), Qwen2.5 (bias on q, k, v). Parameter names equal the Hub
checkpoint's keys, so loading renames nothing.
Sources: Llama 2307.09288, Llama 3 2407.21783, RMSNorm 1910.07467, RoPE 2104.09864, GQA 2305.13245,
SwiGLU 2002.05202, Qwen2.5 2412.15115.

Shapes, for the whole project: B batch, T tokens, A positions asked for, S keys in view, D model
width, H query heads, K key-value heads, d head width, F MLP width, V vocabulary, L blocks, r LoRA
rank. Blocks are counted from 0: "L5" in a table is block 5, and tap 6 comes after it.
"""
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx: an OpenBLAS that is loaded later has no effect)
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engine.decode import KVCache
from files import model_folder
from files.disk import read_json
from files.model_folder import ModelArgs
from text.tokenizer import Tokenizer, load_tokenizer

Edit = dict[int, Callable[[mx.array], mx.array]]     # tap -> what replaces the stream there


# --------------------------------------------------------------------------------------------------
# the four formulas of a Llama, to be read. What runs is engine.ops', imported below them: faster


def rms_norm(x: mx.array, gain: mx.array, eps: float) -> mx.array:
    """x / rms(x) * gain: (..., D) -> (..., D). No mean is subtracted, no bias is added."""
    # bfloat16 has 8 significant bits: too few for a mean of squares
    wide = x.astype(mx.float32)
    wide = wide * mx.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + eps)            # (..., D)
    return gain * wide.astype(x.dtype)


def rope(x: mx.array, offset: int, periods: np.ndarray) -> mx.array:
    """Rotate each pair of features by position / period, so that q k^T sees relative positions.

    x (B, H, T, d) at positions offset, offset + 1, ...; periods (d/2,) of rope_periods: positions
    for one radian
    """
    T, d = x.shape[-2:]
    # mx.array: MLX gives a numpy operand the other side's type, here that of whole numbers
    angles = (offset + mx.arange(T))[:, None] / mx.array(periods)                       # (T, d/2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    # feature i is paired with i + d/2, as in the Hub's weights; the paper pairs 2i with 2i + 1
    first, second = x[..., :d // 2], x[..., d // 2:]                             # (B, H, T, d/2)
    rotated = [first * cos - second * sin, first * sin + second * cos]
    return mx.concatenate(rotated, axis=-1).astype(x.dtype)                      # (B, H, T, d)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    """softmax(q k^T / sqrt(d)) v: q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d).

    mask   bool that broadcasts to (B, 1, T, S), True where a query may look; "causal"; None: all
    """
    H, T, d = q.shape[1:]
    K, S = k.shape[1:3]
    if isinstance(mask, str):
        # the last query lines up with the last key, which is also right behind a cache
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]                             # (T, S)
    # grouped heads: each key-value head serves H / K query heads
    k, v = mx.repeat(k, H // K, axis=1), mx.repeat(v, H // K, axis=1)            # (B, H, S, d)
    scores = (q @ k.transpose(0, 1, 3, 2)).astype(mx.float32) * d ** -0.5        # (B, H, T, S)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return mx.softmax(scores, axis=-1).astype(v.dtype) @ v


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, with silu(x) = x * sigmoid(x): (..., F) twice -> (..., F)."""
    return gate * mx.sigmoid(gate) * up


# The same four, faster: MLX's own, and on a Linux CPU ours where it takes less time.
# Without the last of these lines all runs on the formulas; test_ops.py holds both equal
FORMULAS = {f.__name__: f for f in (rms_norm, rope, attention, swiglu)}
from engine.ops import attention, rms_norm, rope, swiglu  # noqa: E402


def rope_periods(args: ModelArgs) -> np.ndarray:
    """Of each of d/2 pairs the positions that turn it by one radian; `mx.fast.rope`'s `freqs`.

    Plain RoPE turns pair i by position / theta^(2i/d); linear scaling slows all by `factor`.
    Llama 3's leaves fast pairs (wavelength below C / high), slows slow ones (above C / low) and
    blends between, C the original context: inside it too, so leaving it out is never harmless.
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
    return (1 / freqs).astype(np.float32)


def gather_positions(resid: mx.array, positions: mx.array) -> mx.array:
    """Take rows of the residual stream: resid (B, T, D), positions (B, A) int32 -> (B, A, D).

    Done before the unembedding, so that logits exist for A positions and never for all T.
    """
    return mx.take_along_axis(resid, positions[..., None], axis=1)


# --------------------------------------------------------------------------------------------------
# the model


class RMSNorm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight, self.eps = mx.ones(dims), eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


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
        self.periods = rope_periods(args)   # (d/2,); numpy's, so it is no parameter

    def __call__(self, x: mx.array, cache: KVCache | None = None,
                 positions: mx.array | None = None) -> mx.array:
        return self.o_proj(self.heads(x, cache, positions))  # (B, T, D), or (B, A, D)

    def heads(self, x: mx.array, cache: KVCache | None = None,
              positions: mx.array | None = None) -> mx.array:
        """What the heads say before o_proj mixes them: (B, T, H * d), head i in slice i.

        positions   (B, A) of x whose queries alone are asked; then (B, A, H * d)
        """
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.reshape(B, T, -1, self.head_dim).transpose(0, 2, 1, 3)                # (B, H, T, d)
        k = k.reshape(B, T, -1, self.head_dim).transpose(0, 2, 1, 3)                # (B, K, T, d)
        v = v.reshape(B, T, -1, self.head_dim).transpose(0, 2, 1, 3)
        offset = cache.offset if cache else 0
        q, k = rope(q, offset, self.periods), rope(k, offset, self.periods)
        # right padding needs no mask of its own, since no real token can look to its right. Asked
        # before the update: the mask counts the T new tokens itself
        mask = cache.mask(T) if cache else "causal"
        if cache:
            k, v = cache.update(k, v)                                               # (B, K, S, d)
        if positions is not None:
            # keys and values of all tokens, but queries only where somebody reads the result
            rows = positions[:, None, :, None]                                      # (B, 1, A, 1)
            q = mx.take_along_axis(q, rows, axis=2)
            mask = (mx.take_along_axis(mask, rows, axis=2) if isinstance(mask, mx.array)
                    else mx.arange(k.shape[2]) <= offset + rows)                    # (B, 1, A, S)
        y = attention(q, k, v, mask)                                      # (B, H, T or A, d)
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


class Block(nn.Module):
    """Read the stream through a norm, add attention's result; the same again with the MLP."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.input_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
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
                 positions: mx.array | None = None) -> mx.array:
        """resid (B, T, D) -> (B, T, D), or at some positions (B, A) alone (B, A, D)."""
        if positions is not None and 2 * positions.shape[1] > resid.shape[1]:
            # most rows are wanted: gathering them first would cost more than it spares
            return gather_positions(self.transform(self.attend(resid, cache)), positions)
        return self.transform(self.attend(resid, cache, positions))


class Body(nn.Module):
    """Everything under the checkpoint's prefix `model.`: embedding, blocks, final norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.parts = None   # the most that engine.parallel runs at a time; None: blas.PARTS
        self.model = Body(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def stream(self, tokens: mx.array, cache: list[KVCache] | None = None,
               edit: Edit | None = None,
               positions: mx.array | None = None) -> Iterator[mx.array]:
        """Yield the residual stream (B, T, D) at tap 0, 1, ..., L, each before the final norm.

        tokens     (B, T) int32. MLX is lazy: evaluate a tap and drop it, and one is held at a time
        edit       {tap: function (B, T, D) -> (B, T, D)}: what the stream is replaced by at a tap;
                   the blocks above go on from there. Ablation, steering and patching are this
        positions  (B, A): tap L has these positions only, (B, A, D), and so has an edit there.
                   Nobody reads the last block's other rows, and its MLP is much of a shallow model
        """
        edit = edit or {}
        resid = self.model.embed_tokens(tokens)
        for tap in range(self.args.num_hidden_layers + 1):
            if tap > 0:
                wanted = positions if tap == self.args.num_hidden_layers else None
                resid = self.run_block(self.model.layers[tap - 1], resid,
                                       cache[tap - 1] if cache else None, wanted)
            if tap in edit:
                resid = edit[tap](resid)
            yield resid

    def run_block(self, block: Block, resid: mx.array, cache: KVCache | None,
                  positions: mx.array | None) -> mx.array:
        """The block itself; engine.memory.spare puts one here that recomputes activations."""
        return block(resid, cache, positions)

    def final_resid(self, tokens: mx.array, cache: list[KVCache] | None = None,
                    edit: Edit | None = None, positions: mx.array | None = None) -> mx.array:
        """The stream at tap L, what `head` reads: (B, T, D), or at positions (B, A) (B, A, D)."""
        for resid in self.stream(tokens, cache, edit, positions):
            pass
        return resid

    def last_resid(self, tokens: mx.array, cache: list[KVCache] | None = None) -> mx.array:
        """The same at the last position of tokens (B, T) alone: (B, D)."""
        B, T = tokens.shape
        last = None if T == 1 else mx.full((B, 1), T - 1)
        return self.final_resid(tokens, cache, positions=last)[:, 0]

    def head(self, resid: mx.array) -> mx.array:
        """Final norm, then unembedding: (..., D) -> float32 logits (..., V).

        The logit lens is this at an earlier tap. Softmax and ranks need float32. The product of a
        bfloat16 model is rounded before: of 128,256 logits a few thousand are distinct, and the
        lens counts ties.
        """
        return self.unembed(self.model.norm(resid)).astype(mx.float32)

    def unembed(self, normed: mx.array) -> mx.array:
        """The unembedding alone, without the norm: linear, (..., D) -> (..., V)."""
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(normed)
        return self.lm_head(normed)

    def read_logits(self, read, resid: mx.array, tokens: mx.array,
                    with_grad: bool = True) -> mx.array:
        """read(logits, tokens) where a loss reads them: resid (B, A, D), tokens (B, A) -> (B, A).

        read       (logits (..., V), tokens (...)) -> (...), a function of each row alone
        In training engine.memory.spare puts one here that makes the logits of few rows at a time;
        with_grad tells that one whether a gradient will be asked for.
        """
        return read(self.head(resid), tokens)

    def __call__(self, tokens: mx.array, cache: list[KVCache] | None = None,
                 edit: Edit | None = None) -> mx.array:
        """tokens (B, T) int32 -> logits (B, T, V) float32; position t scores token t+1."""
        return self.head(self.final_resid(tokens, cache, edit))

    def residuals(self, tokens: mx.array) -> mx.array:
        """All taps at once, (L+1, B, T, D), before the norm. For small inputs; prefer `stream`."""
        return mx.stack(list(self.stream(tokens)))

    def make_cache(self, capacity: int, start: mx.array | None = None) -> list[KVCache]:
        return [KVCache(capacity, start) for _ in self.model.layers]


# --------------------------------------------------------------------------------------------------
# from a folder or a Hub name to a model


def load(path_or_hub_name: str | Path, dtype: str | mx.Dtype | None = None,
         bits: int | None = None,
         group_size: int | None = None) -> tuple[Llama, Tokenizer | None]:
    """Return (model, tokenizer) from a folder or Hub name; tokenizer None where there is none.

    path_or_hub_name  also NAME@REVISION, or a .gguf file. A quantised checkpoint stays so
    dtype         float32, bfloat16, float16, or None: float32 on CPU, the checkpoint's on GPU
    bits          2, 3, 4, 5, 6 or 8 quantises the blocks' linear layers, in groups of group_size
                  (32, 64, 128; None: 64 where that divides a row, else 32)
    raises        BadInput
    """
    folder = model_folder.find_folder(path_or_hub_name)
    raw = read_json(folder / "config.json")
    model = Llama(model_folder.parse_args(raw, f"{folder}/config.json"))
    dtype = model_folder.DTYPES[dtype] if isinstance(dtype, str) else dtype
    found = model_folder.read_weights(folder, model.args.tie_word_embeddings, dtype, bits,
                                      group_size)
    make_layer, where = None, str(folder)       # each layer takes its tensors as they are
    if bits or raw.get("quantization") or raw.get("quantization_config"):
        # QLoRA's base: weights as small codes in groups
        from engine.quant import layer_maker
        make_layer = layer_maker(model, found, raw, bits, group_size, dtype, where)
    dtype = dtype or model_folder.default_dtype()
    model_folder.fill_weights(model, found, dtype, make_layer, where)
    return model.eval(), load_tokenizer(folder, model.args.vocab_size)
