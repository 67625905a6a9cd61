"""Exercise 8: the logit lens at one tap.

The residual stream after each block has the same shape as after the last one. So it can be read as
if it were the last: the model's own final norm and its own unembedding make logits of it, and a
softmax makes probabilities. Nothing is trained.

Taps count from the embedding: tap 0 stands after it, tap l after block l - 1, tap L at the end.
"L4" in a table is block 4, tap 5. Read the last token's position, where the next word is decided,
and return the probability of one token there, for each row.

example   at tap L it is the model's own: softmax(model(tokens)[:, -1])[:, word]
useful    model.stream(tokens) yields the stream at tap 0, 1, ..., L, (B, T, D) each;
          model.model.norm is the final norm; model.unembed(x) the unembedding,
          (..., D) -> (..., V); mx.softmax(x, axis=-1)
size      4 lines.  Ours: Llama.head in model.py, read_taps in lens.py
check     make exercise N=8
"""
import mlx.core as mx

from model import Llama


def logit_lens(model: Llama, tokens: mx.array, tap: int, word: int) -> mx.array:
    """tokens (B, T) int32, tap 0 .. L, word a token id -> probabilities (B,)."""
    raise NotImplementedError
