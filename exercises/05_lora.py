"""Exercise 5: LoRA, forward and merge.

A linear layer multiplies by a weight W (out, in). LoRA freezes W and learns a small update beside
it, a product of two thin matrices A (in, r) and B (r, out):

    forward   y = x W^T + scale * (x A) B          scale = alpha / r
    merge     W' = W + scale * (A B)^T             so that x W'^T is the same y

r is read off A's shape. Multiply x by A first and the result by B: (x A) B makes r numbers a row,
x (A B) would make the whole (in, out) matrix.

example   x [1, 2], W identity, A [[1], [1]], B [[1, 0]], alpha 2: r is 1, scale 2, x A = 3,
          y = [1, 2] + 2 * [3, 0] = [7, 2]
useful    @, .T, lora_a.shape[1]
size      1 or 2 lines each.  Ours: LoRALinear in lora.py
check     make exercise N=5
"""
import mlx.core as mx


def forward(x: mx.array, weight: mx.array, lora_a: mx.array, lora_b: mx.array,
            alpha: float) -> mx.array:
    """x (..., in), weight (out, in), lora_a (in, r), lora_b (r, out) -> (..., out)."""
    raise NotImplementedError


def merge(weight: mx.array, lora_a: mx.array, lora_b: mx.array, alpha: float) -> mx.array:
    """weight (out, in), lora_a (in, r), lora_b (r, out) -> (out, in)."""
    raise NotImplementedError
