"""Exercise 9: dual-reward.

Two cross-entropies at once, for one row: a prompt of P tokens, its answer, EOS.

    loss = weight * class loss + (1 - weight) * answer loss

answer loss   the mean of -log p over the answer and EOS, at the model's output. Position t predicts
              token t + 1: the token right behind the prompt is scored by the prompt's last position
class loss    -log p of one token, `word`, by the logit lens: after block `block`, at the prompt's
              last position. (Block c is tap c + 1.)

It is supervised, no reward is involved; the name is historical. Published code made two errors in
these lines: no shift in the answer loss, and a class trained at the answer's last token.

example   seven tokens, <s> 7 * 8 = 56 EOS, P 5: positions 4 and 5 score 56 and EOS; the word
          "multiply" is read at position 4
useful    model.residuals(tokens) is (L+1, B, T, D); model.head(x) is final norm and unembedding,
          (..., D) -> logits (..., V); token_logprobs(logits (N, V), ids (N,)) -> (N,), without a
          shift of its own
size      6 to 8 lines.  Ours: dual_loss and dual_reward_loss in losses.py
check     make exercise N=9
"""
import mlx.core as mx

from losses import token_logprobs  # noqa: F401  (to be used)
from model import Llama


def dual_reward(model: Llama, tokens: mx.array, P: int, word: int, block: int,
                weight: float) -> mx.array:
    """tokens (1, T): P of the prompt, then the answer and EOS; word a token id -> scalar, nats."""
    raise NotImplementedError
