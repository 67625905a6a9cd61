"""mlx-lm, float32, timed: load, batched greedy generation, a LoRA step of rank 16 by its own loss.

    PYTHON bench/peers/mlxlm.py load MODEL COUNT
    PYTHON bench/peers/mlxlm.py generate|chat MODEL COUNT ROWS PROMPT_TOKENS COMPLETION_TOKENS
    PYTHON bench/peers/mlxlm.py sft MODEL COUNT ROWS TOKENS ANSWER_TOKENS

A step is forward, backward, clipping, AdamW, compiled as in its trainer, on rows that are there as
ids. NANOLENS_BLAS names an OpenBLAS to load first, so that only the code differs; "none" leaves MLX
the one it was installed with. Prints one line of JSON: the median seconds, peak GiB.
"""
import sys
from functools import partial

from clock import clock, load_blas, random_prompts, report

load_blas()
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.generate import batch_generate, stream_generate  # noqa: E402
from mlx_lm.tuner.trainer import default_loss  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402

work, folder, (count, *sizes) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])


def load_float32():
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    return model, tokenizer


def load_and_read():
    sum(p.sum() for _, p in tree_flatten(load_float32()[0].parameters())).item()


def generation(N, T, C):
    model, tokenizer = load_float32()
    prompts = random_prompts(folder, N, T)
    tokenizer._eos_token_ids = set()
    return lambda: batch_generate(model, tokenizer, prompts, max_tokens=C,
                                  completion_batch_size=N, prefill_batch_size=N)


def training(rows, tokens, answer):
    model, _ = load_float32()
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {
        "rank": 16, "scale": 2.0, "dropout": 0.0,
        "keys": [f"self_attn.{x}_proj" for x in "qkvo"]})
    model.train()
    optimizer = optim.AdamW(1e-5)
    ids = mx.array(random_prompts(folder, rows, tokens))
    spans = mx.array([[tokens - answer, tokens]] * rows)    # the targets, as its loss counts them
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(ids, spans):
        (loss, _), grads = nn.value_and_grad(model, default_loss)(model, ids, spans)
        optimizer.update(model, optim.clip_grad_norm(grads, 1.0)[0])
        return loss
    return lambda: mx.eval(update(ids, spans), state)


def chat(N, T, C):
    model, tokenizer = load_float32()
    prompt, = random_prompts(folder, N, T)
    tokenizer._eos_token_ids = set()
    return lambda: list(stream_generate(model, tokenizer, prompt, max_tokens=C))


works = {"generate": generation, "chat": chat, "sft": training}
report(clock(works[work](*sizes) if sizes else load_and_read, count))
