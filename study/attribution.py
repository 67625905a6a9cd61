"""Direct logit attribution: which attention, head or MLP wrote a word's logit into the stream?

The last tap is a sum, of the embedding and of what each attention and MLP wrote; with the final
norm's scale held at the clean run's, so is each logit. It says who wrote the answer, not what would
happen without them.

    python -m study.attribution --ckpt runs/dual_reward --prompt "23 + 45 = " --words 68 22
"""

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from checkpoint import load_checkpoint
from config import run_main
from engine.decode import pad_prompts
from files.keys import BadInput
from files.options import Parser
from model import Llama, gather_positions
from study.jacobian import word_directions
from text.rows import check_context
from text.tokenizer import Tokenizer


def contributions(model: Llama, prompts: list[list[int]], targets: list[int],
                  foils: list[int] | None = None,
                  heads: bool = False) -> tuple[list[str], np.ndarray]:
    """Each component's share of a logit at the last prompt token: N names, and (N, B) in logits.

    With foils, of the difference of two logits, target minus foil: what all logits share cancels.
    Components are the embedding, every block's attention (or its heads one by one) and its MLP.
    They sum to the logit, since the stream is a sum and the scale is the clean run's: contribution
    of c is <gain * U_target, c> / rms(h_L). A later norm or block would react to a missing
    component, so this is not the effect of removing it.
    """
    tokens, last = pad_prompts(prompts)
    rows = word_directions(model, mx.array(targets))                                # (B, D)
    if foils is not None:
        rows = rows - word_directions(model, mx.array(foils))
    pick = lambda resid: gather_positions(resid, last)[:, 0].astype(mx.float32)     # (B, D)
    names, parts, before = ["embed"], [], None
    for tap, resid in enumerate(model.stream(tokens)):
        if tap == 0:
            parts.append(pick(resid))
        else:
            block, name = model.model.layers[tap - 1], f"L{tap - 1}"
            middle = pick(block.attend(before))
            if heads:
                parts += split_heads(block.self_attn, block.input_layernorm(before), last)
                names += [f"{name} head {i}" for i in range(model.args.num_attention_heads)]
                bias = middle - pick(before) - sum(parts[-model.args.num_attention_heads:])
                parts[-1] = parts[-1] + bias    # o_proj's bias, where there is one, and rounding
            else:
                parts.append(middle - pick(before))
                names.append(f"{name} attn")
            parts.append(pick(resid) - middle)
            names.append(f"{name} mlp")
        mx.eval(parts[-1], resid)
        before = resid
    scale = mx.sqrt((pick(before) ** 2).mean(-1) + model.args.rms_norm_eps)         # (B,)
    return names, np.array(mx.stack([(part * rows).sum(-1) / scale for part in parts]))


def split_heads(attention, x: mx.array, last: mx.array) -> list[mx.array]:
    """What each head adds to the stream at one position: H arrays (B, D). x (B, T, D), normed.

    o_proj is linear up to its bias, whether plain, quantised or LoRA: fed with one head's slice
    and zeros elsewhere it gives that head's share.
    """
    y = gather_positions(attention.heads(x), last)[:, 0]                            # (B, H * d)
    owner = mx.arange(y.shape[-1]) // attention.head_dim
    nothing = attention.o_proj(mx.zeros_like(y))
    return [(attention.o_proj(mx.where(owner == i, y, 0)) - nothing).astype(mx.float32)
            for i in range(y.shape[-1] // attention.head_dim)]


def attribution_table(model: Llama, tokenizer: Tokenizer, prompt: str, words: list[str]) -> str:
    """Who wrote the word's logit (or its difference to a second word's), block by block."""
    ids = tokenizer.encode_prompt(prompt)
    check_context([ids], 0, model)
    target, *foil = chosen = tokenizer.word_ids(words, ids)
    names, shares = contributions(model, [ids], [target], foil or None, heads=True)
    named = dict(zip(names, shares[:, 0]))
    lines = [f"direct logit attribution of {words[0]!r}" + (f" minus {words[1]!r}" if foil else "")
             + f" (tokens {tokenizer.show(chosen)}): {shares.sum():.2f} logits, "
               "final norm's scale held",
             f"  embed {named['embed']:7.2f}",
             "  block     MLP   heads"]
    for block in reversed(range(model.args.num_hidden_layers)):
        heads = [named[f"L{block} head {i}"] for i in range(model.args.num_attention_heads)]
        lines.append(f"  L{block:<5}{named[f'L{block} mlp']:7.2f}   "
                     + " ".join(f"{share:6.2f}" for share in heads))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m study.attribution",
                                     description="Who wrote a word's logit: blocks and heads.")
    parser.add_argument("--ckpt", required=True, help="run folder, model folder or Hub name")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--words", nargs="+", required=True, metavar="WORD",
                        help="one: its logit; two: the first's minus the second's")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise BadInput("--prompt is empty; give a text such as '7 * 8 = '")
    if len(args.words) > 2:
        raise BadInput(f"--words takes one word or two, got {len(args.words)}")
    model, tokenizer, _ = load_checkpoint(args.ckpt)
    print(attribution_table(model, tokenizer, args.prompt, args.words))


if __name__ == "__main__":
    run_main(main)
