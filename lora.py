"""LoRA by hand: y = x W^T + scale * (x A) B, scale = alpha / rank, B = 0 at the start, W frozen.

Source: LoRA 2106.09685. Where packages differ: PEFT users set alpha, mlx-lm takes the scale itself;
we set alpha and print both. A ~ U(-1/sqrt(in), 1/sqrt(in)) as in mlx-lm. Adapters are saved in
mlx-lm's format, PEFT's is written and read too; mlx-lm and PEFT then give the same logits.

    python lora.py --ckpt runs/sft --out fused                  # fuse: a folder in the Hub's layout
    python lora.py --ckpt runs/sft --out adapter --format peft  # the adapter alone; mlx: for mlx-lm
    python lora.py --ckpt models/tiny --adapter FOLDER --out fused      # mlx-lm's or PEFT's adapter
"""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from config import run_main
from files.adapters import MODULES, fit_adapter, read_adapter
from model import Llama


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or quantised, plus a trainable update of low rank.

    lora_a (in, r), lora_b (r, out): float32 whatever the base's type, so that Adam's small steps
    are not rounded away
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float):
        super().__init__()
        out_dims, in_dims = linear.weight.shape
        in_dims = getattr(linear, "in_dims", in_dims)       # a quantised layer's weight is packed
        self.linear = linear
        self.lora_a = mx.random.uniform(-1, 1, (in_dims, rank)) * in_dims ** -0.5    # (in, r)
        self.lora_b = mx.zeros((rank, out_dims))        # (r, out); 0: the update starts at nothing
        self.scale, self.enabled = scale, True

    def __call__(self, x: mx.array) -> mx.array:
        if not self.enabled:
            return self.linear(x)
        update = (x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)    # (..., out)
        # scale is a Python number: a float32 array would widen a bfloat16 model's whole stream
        return self.linear(x) + self.scale * update

    def fused(self) -> nn.Module:
        """The plain linear layer, the update added to its weight in float32 and then cast back.

        In place: this wrapper would then add the update twice, so it is done with (`merge`).
        A quantised weight comes back unquantised: rounding it again would erase the update.
        """
        if hasattr(self.linear, "dense"):
            self.linear = self.linear.dense()
        self.linear.weight = self.fused_weight()
        mx.eval(self.linear.parameters())   # one by one: no second model beside the first
        return self.linear

    def fused_weight(self) -> mx.array:
        """W + scale * (A B)^T, computed in float32, in W's type."""
        weight = self.linear.weight
        update = self.scale * (self.lora_a @ self.lora_b).T
        return (weight.astype(mx.float32) + update).astype(weight.dtype)


def apply_lora(model: Llama, rank: int, alpha: float, targets: tuple[str, ...]) -> None:
    """Freeze the model, wrap the targets (of q, k, v, o, gate, up, down) in every block, in place.

    The model computes the same as before, since B = 0. Only lora_a and lora_b stay trainable.
    """
    paths = [f"model.layers.{block}.{MODULES[t]}"
             for block in range(model.args.num_hidden_layers) for t in targets]
    wrap(model, paths, rank, alpha / rank)


def wrap(model: Llama, paths: list[str], rank: int, scale: float) -> None:
    """`apply_lora` for a list of paths, such as model.layers.0.self_attn.q_proj."""
    model.freeze()      # everything: only arrays made below have gradients and optimizer state
    named = dict(model.named_modules())
    model.update_modules(tree_unflatten(
        [(path, LoRALinear(named[path], rank, scale)) for path in paths]))


def merge(model: Llama) -> None:
    """Fuse every LoRALinear into a plain linear layer, in place."""
    for block in model.model.layers:    # block by block, so that each's old weights can go
        fused = [(name, module.fused()) for name, module in block.named_modules()
                 if isinstance(module, LoRALinear)]
        block.update_modules(tree_unflatten(fused))


@contextmanager
def adapters_off(model: Llama) -> Iterator[None]:
    """Within, the model computes as its base: the reference policy without a second copy."""
    layers = [m for _, m in model.named_modules() if isinstance(m, LoRALinear)]
    try:
        for layer in layers:
            layer.enabled = False   # no array: a compiled function keeps it as it was when traced
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def load_adapters(model: Llama, folder: str | Path) -> None:
    """Wrap the model in place with an adapter, ours, mlx-lm's or PEFT's; BadInput lists misfits.

    The adapter may be on any of the blocks' linear layers, in any blocks. PEFT's and mlx-lm's
    store their base's name alone; ours a fingerprint too, which is checked.
    """
    about, found, file = read_adapter(Path(folder), model.args.num_hidden_layers)
    wrap(model, about["paths"], about["rank"], about["scale"])
    arrays = fit_adapter(model, about, found, file)
    model.load_weights(list(arrays.items()), strict=False)      # all of them fit: just checked
    mx.eval(model.parameters())


if __name__ == "__main__":
    # the command stands in checkpoint.py, which stands on this file
    from checkpoint import main
    run_main(main)
