"""Decoding with LoRA at the speed of the plain model: the update is in the weights meanwhile."""
from collections.abc import Iterator
from contextlib import contextmanager

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn


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
