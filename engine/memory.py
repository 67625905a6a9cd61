"""What a run needs: an estimate before it starts, limits while it runs, and ways to need less.

    peak = process + weights + trained (gradient, Adam's state)
           + the largest of: a step, sampling its rollouts, an inspection on the way

A step needs kept activations, by tokens of a micro-batch and blocks; one block's working set; and
logits. `recompute` shrinks it (Chen 1604.06174), `grad_accum_steps` divides it. LoRA's frozen
weights have no gradient, so their inputs need not be kept, only what silu, softmax and norms read.
An inspection decodes hundreds of validation prompts at once and holds logits of many taps: where a
step's batch is small and the vocabulary is not, it needs the most. MLX's CPU backend allocates up
to a hundred operations ahead: there the memory limit is set to the estimate, which makes it wait
and costs no time (far below the need it would cost half).

To need less, `spare` puts two methods on a model, in place of model.run_block and
model.read_logits: activations are computed again for the gradient, and logits never exist all at
once. Values and gradients stay what they were; a test holds them equal to the plain ones.
"""
import os
import re
import resource
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from config import ON_POLICY, BadInput, Config
from engine import blas, parallel, workers
from files.model_folder import DTYPES, default_dtype

GIB = 2 ** 30
# how much is done at once: generate.py's rows and KV cache, lens.py's rows and logits
DECODED_ROWS, CACHED_TOKENS = 512, 2 ** 16      # that many tokens are 8 GiB of an 8B model's
LENS_ROWS, LENS_PROMPTS = 128, 64      # LENS_PROMPTS: of those that an inspection reads
# of so many logits a call of the head is made: fewer, and its matrix product runs slowly
LOGITS_PER_CALL = 2 ** 24
# so many logits are reduced at once on a CPU: of fewer, operations cost more than their arithmetic
LOGITS_REDUCED = 2 ** 19
# arrays of the logits' size that are there at once. An exp written out is six of them (ops.exp)
DRAWN = 9           # to draw a token: logits, shifted, exp, sum so far, ... (generate.choose)
FINAL = 11          # of a piece: two exps, nearly (lens.final_distribution). Two are there at least
# pieces and products that wait in line where weights are packed (quant.PIECE)
UNPACKED = 36 * 2 ** 21 * 4
LOGITS_AT_ONCE = 2 ** 19    # in training: 2 MiB; some ten such arrays wait in line

# --------------------------------------------------------------------------------------------------
# the estimate


@dataclass
class Load:
    """What one micro-batch asks of the model, and an inspection."""
    tokens: int         # through the blocks
    length: int         # of the longest row: what a query looks at
    logit_rows: int     # positions whose logits the loss reads
    cached: int = 0     # tokens in the KV cache of a rollout's largest batch
    repeated: int = 0   # tokens of keys and values, a prompt's once for each of its completions
    prompt: int = 0     # tokens of the longest prompt
    valid: int = 0      # validation problems; 0: no inspection


def load_of(cfg: Config, source) -> Load:
    """Of a batch source, data.Batches or grpo.Rollouts."""
    if cfg.method not in ON_POLICY:
        rows, length = cfg.batch_size // cfg.grad_accum_steps, max(source.lengths)
        logit_rows = rows * (source.A + (cfg.method == "dual_reward"))
        return Load(rows * length, length, logit_rows, prompt=max(row.P for row in source.rows))
    prompt, limit = max(len(ids) for _, ids in source.rows), cfg.rollout_tokens
    groups = -(-cfg.batch_size // cfg.grpo_group_size // cfg.grad_accum_steps)
    N = groups * cfg.grpo_group_size
    # no completion's last token is read; a chain is, and a second time, by its scorer
    tokens = groups * prompt + N * (limit - 1)
    tokens += (groups * prompt + N * limit) * (cfg.method == "markovian")
    sampled = min(cfg.batch_size // workers.size(), DECODED_ROWS) * (prompt + limit)
    return Load(tokens, prompt + limit, N * limit, min(sampled, CACHED_TOKENS),
                repeated=N * (prompt + limit - 1), prompt=prompt)


def peak_gib() -> float:
    """Peak memory in GiB: the device's on a GPU, the process' on a CPU, where MLX overcounts."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory() / GIB
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    # not ru_maxrss, which on Linux begins at the peak of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2 ** 20


def available_gib() -> float:
    """The machine's memory or what a limit leaves of it, or the GPU's."""
    about = mx.device_info() if mx.default_device() != mx.Device(mx.cpu) else {}
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in about:    # Metal, CUDA, Metal
            return about[key] / GIB
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]      # ulimit -v
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (memory if limit == resource.RLIM_INFINITY else min(memory, limit)) / GIB


def weight_bytes(args, raw: dict, cfg: Config) -> int:
    """A model's weights once loaded as cfg says, from its config.json: nothing is allocated.

    args, raw   ModelArgs, and the config.json that they were read of
    """
    on_cpu, stored = default_dtype() is not None, None
    own = DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), mx.bfloat16)
    kind = DTYPES[cfg.dtype] if cfg.dtype else default_dtype() or own
    total, table_size = (args.num_hidden_layers * 2 + 1) * args.hidden_size * kind.size, kind.size
    if cfg.bits or raw.get("quantization") or raw.get("quantization_config"):
        # imported here: other runs have no use for it
        from engine.quant import group_for, settings_of, stored_settings
        stored = stored_settings(raw, f"{cfg.model}/config.json")
        if on_cpu and not cfg.dtype:
            table_size = own.size       # tables that are not packed stay as they come
    for path, rows, width, bias in matrices(args):
        is_table = not path.startswith("model.layers.")
        bits = group = 0
        if stored and stored.get(path) is not False:
            bits, group = settings_of(path, stored)
        elif cfg.bits and not stored and not is_table:
            bits, group = cfg.bits, group_for(width)
        total += bias * rows * kind.size
        if bits:    # codes, and of each group a scale and a bias
            total += rows * width * bits // 8 + 2 * rows * (width // group) * kind.size
        else:
            total += rows * width * (table_size if is_table else kind.size)
    return total


def matrices(args) -> list[tuple[str, int, int, bool]]:
    """All of a model's matrices: (name, rows, row's width, whether it has a bias)."""
    part = {"o": "self_attn", "gate": "mlp", "up": "mlp", "down": "mlp"}
    biased = {"o": args.o_bias, "gate": args.mlp_bias, "up": args.mlp_bias, "down": args.mlp_bias}
    found = [(f"model.layers.{n}.{part.get(t, 'self_attn')}.{t}_proj", out, width,
              biased.get(t, args.qkv_bias))
             for n in range(args.num_hidden_layers)
             for t, (width, out) in matrix_shapes(args).items()]
    tables = ["model.embed_tokens"] + ([] if args.tie_word_embeddings else ["lm_head"])
    return found + [(name, args.vocab_size, args.hidden_size, False) for name in tables]


def matrix_shapes(args) -> dict[str, tuple[int, int]]:
    """A block's seven matrices: {"q": (in, out), ...}."""
    D, F = args.hidden_size, args.intermediate_size
    q, kv = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
    return {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D),
            "gate": (D, F), "up": (D, F), "down": (F, D)}


def trained_numbers(args, cfg: Config) -> int:
    """How many weights the optimizer moves."""
    D, L, shapes = args.hidden_size, args.num_hidden_layers, matrix_shapes(args)
    if not cfg.full:
        return L * cfg.lora_rank * sum(sum(shapes[t]) for t in cfg.lora_targets)
    tables = 1 if args.tie_word_embeddings else 2
    return L * (sum(a * b for a, b in shapes.values()) + 2 * D) + tables * args.vocab_size * D + D


def per_token(args, cfg: Config, length: int) -> tuple[int, int, int]:
    """Numbers that a block's backward pass reads for one token: (attention, softmax, mlp).

    The stream before and between its halves, both normed, q, k, v, what the heads say in two
    layouts; H rows of the softmax; gate and up, and with weights trained behind it their product.
    """
    D, F = args.hidden_size, args.intermediate_size
    q, kv = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
    return (5 * D + 3 * q + 2 * kv, args.num_attention_heads * length,
            2 * F + F * (cfg.full or "down" in cfg.lora_targets))


def decoding_bytes(args, rows: int, cached: int, width: int, copies: int) -> int:
    """Keys and values of all `cached` tokens, one position's results of each row, its logits."""
    kv = args.num_key_value_heads * args.head_dim
    block = sum(per_token(args, Config(), cached // max(rows, 1))) + 4 * args.intermediate_size
    return (args.num_hidden_layers * 2 * kv * cached + rows * block) * width + (
        copies * rows * args.vocab_size * 4)


def inspection_bytes(args, cfg: Config, load: Load, width: int = 4) -> int:
    """What eval.look_inside needs: validation prompts decoded greedily, then the lens on them.

    Both read all prompts of a batch in one pass without gradients: a block's results are there at
    once, since operations are handed out long before they are done.
    """
    L, T = args.num_hidden_layers, load.prompt
    kv = args.num_key_value_heads * args.head_dim
    block = sum(per_token(args, Config(), T)) + 4 * args.intermediate_size
    decode = lens = 0
    if cfg.eval_every_steps:
        rows = min(load.valid, cfg.eval_prompts, DECODED_ROWS)
        limit = cfg.max_completion_tokens + (cfg.chain_tokens if cfg.method == "markovian" else 0)
        decode = max((L * 2 * kv + block) * rows * T * width,
                     # the first logits beside those of the parts that they are put together from
                     decoding_bytes(args, rows, rows * (T + limit), width,
                                    copies=1 if parallel.count() == 1 else 2))
    if cfg.lens_every_steps and cfg.method != "markovian":
        rows = min(load.valid, cfg.eval_prompts, LENS_PROMPTS)
        # packed weights, or all trained: no parts side by side (model.parts)
        parts = parallel.count(1 if cfg.full or cfg.bits else None)
        at_tap = min(rows * args.vocab_size, parts * LOGITS_PER_CALL)   # as lens.read_resids cuts
        # the logits of so many taps are one product; beside them what the last tap's say, and what
        # is computed of a few rows
        taps = min(L + 1, max(1, parts * LOGITS_PER_CALL // max(at_tap, 1)))
        few = at_tap
        if default_dtype():
            piece = max(1, LOGITS_REDUCED // args.vocab_size) * args.vocab_size
            few = max(2, parts) * min(at_tap, piece)
        lens = max(4 * ((taps + 1) * at_tap + FINAL * few), rows * T * block * width)
    return max(decode, lens)


def step_bytes(args, cfg: Config, load: Load, width: int = 4) -> dict[str, int]:
    """What a step needs beside the weights, in bytes; width bytes a number.

    A block keeps what `per_token` lists. Its working set is once more that, with four gradients of
    width F. Rollouts also keep each prompt's keys and values once for each of its completions.
    """
    D, F, L = args.hidden_size, args.intermediate_size, args.num_hidden_layers
    kv = args.num_key_value_heads * args.head_dim
    attention, softmax, mlp = per_token(args, cfg, load.length)
    if default_dtype():     # a GPU's own attention keeps none
        attention, softmax = attention + softmax, 0
    kept = {"none": attention + mlp, "mlp": attention, "block": D + 2 * kv}[cfg.recompute]
    # sampling reads each adapted float32 matrix with its update added (engine/decode.py)
    fused = 0 if cfg.full or cfg.bits or width < 4 or not load.cached else sum(
        a * b for a, b in map(matrix_shapes(args).get, cfg.lora_targets))
    unpacked = UNPACKED + 20 * load.tokens * F * width if cfg.bits and default_dtype() else 0
    rows = load.logit_rows
    if not cfg.full:
        rows = min(rows, parallel.count() * logit_rows(args, cfg.recompute))
        # the class's logits are all there
        rows += cfg.batch_size // cfg.grad_accum_steps if cfg.method == "dual_reward" else 0
    elif cfg.recompute != "none":
        rows = -(-rows // 2)    # their parts go back in any order
    block = load.tokens * width
    # moments are float32 always, LoRA's weights too; all weights are what they are, with masters
    # beside 16 bits (engine/adamw.py). Micro-batches are added up in float32
    gradient = 4
    if cfg.full:
        gradient = DTYPES[cfg.dtype].size if cfg.dtype else width
    state = 8 if gradient == 4 else 12
    each = gradient + state + 4 * (cfg.grad_accum_steps > 1)
    return {
        "trained": trained_numbers(args, cfg) * each,
        "activations": L * block * kept + block * (attention + softmax + mlp + 4 * F)
                       + L * 2 * kv * load.repeated * width + unpacked,
        "logits": 4 * rows * args.vocab_size * 4,
        "sampling": L * fused * width + decoding_bytes(
            args, load.cached // load.length, load.cached, width, DRAWN),
        "inspection": inspection_bytes(args, cfg, load, width),
    }


def estimate(args, cfg: Config, load: Load, weights: int) -> dict[str, float]:
    """The parts and the peak, in GiB. A step, sampling and an inspection never coexist."""
    width = 4 if default_dtype() else 2
    parts = step_bytes(args, cfg, load, width)
    passing = max(parts["activations"] + parts["logits"], parts["sampling"], parts["inspection"])
    parts["process"] = process_bytes(passing)
    peak = weights + parts["trained"] + passing + parts["process"]
    return {name: value / GIB for name, value in
            {"weights": weights, **parts, "peak": peak}.items()}


def process_bytes(passing: int) -> int:
    """What is no array: Python, libraries, tokenizer, BLAS' buffers; on a GPU not the device's.

    And malloc's holes: what came and went leaves room that later arrays do not fit, 0 to a fifth.
    """
    return int(0.15 * GIB) + passing // 8 if default_dtype() else 0


def advice(args, cfg: Config, load: Load, raw: dict, limit: float) -> str:
    """What would make a run fit, each with the peak that it leads to."""
    def peak(changed: Config) -> float:
        share = cfg.grad_accum_steps / changed.grad_accum_steps
        part = replace(load, tokens=int(load.tokens * share),
                       logit_rows=int(load.logit_rows * share))
        return estimate(args, changed, part, weight_bytes(args, raw, changed))["peak"]

    rows = cfg.batch_size
    if cfg.method in ON_POLICY:
        rows //= cfg.grpo_group_size
    plain = not (cfg.bits or cfg.full or cfg.from_scratch
                 or raw.get("quantization") or raw.get("quantization_config"))
    options = [("recompute=block", replace(cfg, recompute="block")),
               (f"grad_accum_steps={rows}", replace(cfg, grad_accum_steps=rows))]
    few = min(cfg.eval_prompts, 16)
    if load.valid:
        options.append((f"eval_prompts={few}", replace(cfg, eval_prompts=few)))
    if cfg.full:
        if not cfg.from_scratch:
            options.append(("full=false (LoRA)", replace(cfg, full=False)))
    elif plain:
        options.append(("bits=4", replace(cfg, bits=4)))
    changed = [(name, peak(c)) for name, c in options if c != cfg]
    all_of = replace(cfg, recompute="block", grad_accum_steps=rows, eval_prompts=few,
                     full=cfg.full and cfg.from_scratch, bits=4 if plain else cfg.bits)
    changed.append(("all of them", peak(all_of)))
    text = ", ".join(f"{name}: {gib:.1f} GiB" for name, gib in changed)
    return text + ("" if changed[-1][1] <= limit else "; not enough: take a smaller model")


def describe(found: dict[str, float]) -> str:
    """example  "memory, GiB: weights 4.60, trained 0.04, ...; estimated peak 6.04" """
    parts = [f"{name} {found[name]:.2f}" for name in
             ("weights", "trained", "activations", "logits", "sampling", "inspection")]
    return f"memory, GiB: {', '.join(parts)}; estimated peak {found['peak']:.2f}"


def before_loading(args, raw: dict, cfg: Config) -> None:
    """Raises BadInput where the weights alone are too much; args, raw as for weight_bytes."""
    limit, needed = cfg.memory_limit_gib or available_gib(), weight_bytes(args, raw, cfg) / GIB
    if needed > limit:
        smaller = "bits=4" if not cfg.bits and not cfg.full else "a smaller model"
        raise BadInput(f"the weights of {cfg.model} take {needed:.1f} GiB and {limit:.1f} GiB are "
                       f"there; try {smaller}")
    if cfg.full or cfg.bits or raw.get("quantization") or raw.get("quantization_config"):
        blas.operations_in_own_order()  # said before MLX evaluates anything


def prepare(cfg: Config, model: nn.Module, raw: dict, load: Load) -> dict[str, float]:
    """Before step 1: the estimate of a loaded model's run, and MLX's limits. raises  BadInput

    raw   the model's config.json
    """
    weights = sum(v.nbytes for _, v in tree_flatten(model.parameters()))
    found = estimate(model.args, cfg, load, weights)
    limit = cfg.memory_limit_gib or available_gib()
    if found["peak"] > limit:
        raise BadInput(f"{describe(found)} and {limit:.1f} are there; estimates with "
                       f"{advice(model.args, cfg, load, raw, limit)}")
    set_limits(cfg, found)
    return found


def set_limits(cfg: Config, found: dict[str, float]) -> None:
    if default_dtype():         # a CPU
        mx.set_cache_limit(0)       # malloc keeps what is freed anyway
        if found["weights"] > 1:    # small models must never wait
            mx.set_memory_limit(int((found["peak"] - found["process"] - 0.05) * GIB))
            blas.trim()             # the holes that loading has left
    elif mx.metal.is_available():
        mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])
    if cfg.memory_limit_gib:
        mx.set_memory_limit(int(cfg.memory_limit_gib * GIB))


# --------------------------------------------------------------------------------------------------
# less memory: activations computed again, logits of few rows at a time


def read_in_turn(model: nn.Module, read, resid: mx.array, tokens: mx.array) -> mx.array:
    """read(head(resid), tokens) without a gradient: (n, A), of LOGITS_PER_CALL logits at a time."""
    width, parts = max(1, LOGITS_PER_CALL // (len(resid) * model.args.vocab_size)), []
    for i in range(0, tokens.shape[1], width):
        parts.append(read(model.head(resid[:, i:i + width]), tokens[:, i:i + width]))
        mx.eval(parts[-1])      # or all logits would be there at once
    return mx.concatenate(parts, axis=1)


def reduce_taps_in_turn(model: nn.Module, resids: mx.array, targets: mx.array, describe_final,
                        describe) -> list[mx.array]:
    """What `describe` reduces the logits of each tap to, (R, L+1, ...): resids (R, L+1, D).

    describe_final  (logits (n, V)) -> tuple of arrays (n, ...), of the last tap
    describe        (logits (n, V), targets (n, N), *those arrays) -> tuple of arrays (n, ...)
    A few taps' logits are made by one product, and reduced in pieces that fit a CPU's cache.
    mx.depends(x, y) is x, to be computed after y: without it the lazy graph would hold all logits
    at once.
    """
    resids = resids.transpose(1, 0, 2)                                          # (L+1, R, D)
    (taps, R, _), V = resids.shape, model.args.vocab_size
    at_once = max(1, LOGITS_PER_CALL // (R * V))
    rows = max(1, LOGITS_REDUCED // V) if blas.linux_cpu() else R
    cuts = [slice(i, i + rows) for i in range(0, R, rows)]
    final, previous, done = [], [], []

    def in_turn(x):
        return mx.depends(x, previous) if previous else x

    for end in range(taps, 0, -at_once):
        logits = model.head(in_turn(resids[max(0, end - at_once):end]))         # (g, R, V)
        if not final:
            for few in cuts:
                previous = list(describe_final(in_turn(logits[-1, few])))
                final.append(previous)
        for tap_logits in logits[::-1]:
            pieces = []
            for few, output in zip(cuts, final):
                previous = list(describe(in_turn(tap_logits[few]), targets[few], *output))
                pieces.append(previous)
            done.append([mx.concatenate(arrays) for arrays in zip(*pieces)])
    return [mx.stack(arrays[::-1], axis=1) for arrays in zip(*done)]


def spare(model: nn.Module, cfg: Config) -> None:
    """Have model recompute activations as cfg.recompute says, and read logits in parts; in place.

    recompute  what the backward pass computes again instead of keeping: none; mlp: a block's second
               half, whose F-wide products are most of its activations; block: both halves
    """
    if cfg.recompute != "none":
        model.run_block = partial(run_block, model, cfg.recompute)
    model.read_logits = partial(read_logits, model, logit_rows(model.args, cfg.recompute),
                                cfg.recompute != "none")


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


def logit_rows(args, recompute: str) -> int:
    """For how many rows logits exist at once in training; more where memory is not scarce."""
    at_once = LOGITS_AT_ONCE * (1 if blas.linux_cpu() or recompute != "none" else 32)
    # BLAS packs the whole table for each product: with 16 rows a row takes a third longer
    return max(32, at_once // args.vocab_size)


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
