"""mlx-lm: a LoRA SFT step, rank 16 on q, k, v, o, float32, by its own loss; timed by bench.py.

    python peers/mlxlm_sft.py MODEL ROWS TOKENS ANSWER_TOKENS STEPS

A step is forward, backward, clipping, AdamW, compiled as in its trainer, on rows that are there as
ids. NANOLENS_BLAS names an OpenBLAS to load first; "none" leaves MLX the one it was installed with.
"""
import sys
from functools import partial
from pathlib import Path

from clock import clock, load_blas, report

load_blas()
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_lm.tuner.trainer import default_loss  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

folder, (rows, tokens, answer, steps) = sys.argv[1], map(int, sys.argv[2:6])
model, config = load_model(Path(folder))
model.freeze()
model.set_dtype(mx.float32)
linear_to_lora_layers(model, len(model.layers), {
    "rank": 16, "scale": 2.0, "dropout": 0.0,
    "keys": [f"self_attn.{x}_proj" for x in "qkvo"]})
model.train()
optimizer = optim.AdamW(1e-5)
ids = mx.random.randint(3, config["vocab_size"], (rows, tokens))
spans = mx.array([[tokens - answer, tokens]] * rows)    # the targets, as its loss counts them
state = [model.state, optimizer.state, mx.random.state]


@partial(mx.compile, inputs=state, outputs=state)
def update(ids, spans):
    (loss, _), grads = nn.value_and_grad(model, default_loss)(model, ids, spans)
    optimizer.update(model, optim.clip_grad_norm(grads, 1.0)[0])
    return loss


report(clock(lambda: mx.eval(update(ids, spans), state), steps))
