"""Decode greedily for many prompts at once, with a KV cache.

Prompts of equal length share a batch, so no row is padded and no mask is needed: arithmetic prompts
have few lengths.

    python generate.py --ckpt runs/sft --prompt "7 * 8 = "
"""
import argparse
from dataclasses import dataclass

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import BadInput, run_main
from lora import load_checkpoint
from model import Llama
from tokenizer import Tokenizer

ROWS_PER_BATCH = 256


@dataclass
class Completion:
    ids: list[int]      # sampled tokens, the stop token included
    text: str           # decoded, cut at the first line break
    finished: bool      # ended by EOS or a line break; otherwise cut by the length limit


def check_context(prompts: list[list[int]], max_completion_tokens: int, model: Llama) -> None:
    """Raises BadInput where prompt and completion together would not fit the model's context."""
    context, longest = model.args.max_position_embeddings, max(map(len, prompts))
    if longest + max_completion_tokens > context:
        raise BadInput(f"a prompt of {longest} tokens and {max_completion_tokens} more exceed "
                       f"the model's context of {context}; shorten the prompt")


def read_completion(ids: list[int], tokenizer: Tokenizer) -> Completion:
    """Cut sampled ids at the first EOS, and their text at the first line break."""
    stop = next((i for i, token in enumerate(ids) if token in tokenizer.eos_ids), None)
    ids = ids if stop is None else ids[:stop + 1]
    text, line_break, _ = tokenizer.decode(ids).partition("\n")
    return Completion(ids, text, stop is not None or bool(line_break))


def decode_greedy(model: Llama, tokenizer: Tokenizer, prompts: list[list[int]],
                  max_completion_tokens: int) -> list[Completion]:
    """The top token again and again, until EOS, a line break or the limit; in the prompts' order.

    raises   BadInput if a prompt does not fit the context
    """
    check_context(prompts, max_completion_tokens, model)
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(index)
    completions: dict[int, Completion] = {}
    for length, members in groups.items():
        for i in range(0, len(members), ROWS_PER_BATCH):
            part = members[i:i + ROWS_PER_BATCH]
            cache = model.make_cache(length + max_completion_tokens)
            tokens = mx.array([prompts[j] for j in part])               # (B, length)
            sampled: list[list[int]] = [[] for _ in part]
            for _ in range(max_completion_tokens):
                # slice the stream, not the logits: the unembedding runs for one position only
                logits = model.head(model.final_resid(tokens, cache)[:, -1])    # (B, V)
                tokens = mx.argmax(logits, axis=-1)[:, None]            # (B, 1)
                # tolist evaluates: one host sync per token
                for ids, token in zip(sampled, tokens[:, 0].tolist()):
                    ids.append(token)
                done = [read_completion(ids, tokenizer) for ids in sampled]
                if all(c.finished for c in done):
                    break
            completions.update(zip(part, done))
    return [completions[index] for index in range(len(prompts))]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Complete prompts greedily.")
    parser.add_argument("--ckpt", required=True, help="run folder, model folder or Hub name")
    parser.add_argument("--prompt", required=True, action="append",
                        help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    model, tokenizer, _ = load_checkpoint(args.ckpt)
    prompts = [tokenizer.encode_prompt(text) for text in args.prompt]
    completions = decode_greedy(model, tokenizer, prompts, args.max_tokens)
    for text, completion in zip(args.prompt, completions):
        print(f"{text}{completion.text}")


if __name__ == "__main__":
    run_main(main)
