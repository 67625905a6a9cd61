"""A conversation in a terminal: what is typed or piped is read, replies are printed as they grow.

Each prompt holds all earlier turns, and what the model has read of them is not read again. The
model is generate.py's; how a token is drawn comes in as a function.
"""
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx

from engine.decode import KVCache
from text.rows import check_context
from text.tokenizer import Tokenizer


def read_lines() -> Iterator[str]:
    """What a user types or a pipe says, up to an empty line or the end."""
    sys.stdin.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):     # input() then knows arrow keys and earlier lines
            import readline  # noqa: F401
    try:
        while line := input("> " if is_terminal else "").strip():
            yield line
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            print()


def print_reply(pieces: Iterable[str], template: str, limit: int) -> str:
    """Print a reply as it grows, a piece a token, and return it; say that it reached its limit."""
    reply = ""
    for n, piece in enumerate(pieces, 1):
        if not reply and template in ("plain", "cued"):
            piece = piece.removeprefix(" ")     # it stands between a cue and its reply
        print(piece, end="", flush=True)
        reply += piece
    print()
    if template != "none" and n == limit:
        print(f"note: the reply ends at its limit of {limit} tokens (--max-tokens, or the "
              "context)", file=sys.stderr)
    return reply


def stream_text(model, tokenizer: Tokenizer, prompt: list[int], max_completion_tokens: int,
                choose: Callable, key: mx.array | None = None, many_lines: bool = False,
                stops: tuple[str, ...] = (), ends: Collection[int] = (),
                cache: list[KVCache] | None = None) -> Iterator[str]:
    """Yield one completion's text by tokens; the same as generate.sample with the same arguments.

    choose  generate.choose of logits (1, V) and uniform (1,), at a temperature
    cache   of the prompt's first tokens, with room for the rest and the completion
    """
    check_context([prompt], max_completion_tokens, model)
    uniforms = mx.random.uniform(shape=(1, max_completion_tokens), key=key)
    cache = cache or model.make_cache(len(prompt) + max_completion_tokens)
    tokens = mx.array([prompt[cache[0].offset:]])
    ends = {*ends, *(tokenizer.eos_ids if many_lines else tokenizer.stop_ids)}
    # half of a multi-byte character waits for the rest, and so does half of a stop
    halves = ("\ufffd", *(stop[:n] for stop in stops for n in range(1, len(stop))))
    ids, shown, last = [], 0, max_completion_tokens - 1
    token, _, _ = choose(model.head(model.last_resid(tokens, cache)), uniforms[:, 0])
    for t in range(max_completion_tokens):
        ids.append(token.item())
        ended = ids[-1] in ends or t == last
        if not ended:
            logits = model.head(model.last_resid(token[:, None], cache))
            token, _, _ = choose(logits, uniforms[:, t + 1])
            mx.async_eval(token)    # the device goes on while this token's text is made and shown
        text, stop = tokenizer.decode_until(ids, many_lines, stops)
        over = ended or stop != ""
        whole = over or not text.endswith(halves)
        yield text[shown:] if whole else ""
        shown = len(text) if whole else shown
        if over:
            return


def converse(model, tokenizer: Tokenizer, texts: Iterable[str], template: str,
             system: str | None, limit: int, seed: int, choose: Callable) -> None:
    """Print the replies, of at most limit tokens, to a user's texts; choose as for stream_text."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    ends = {} if template == "none" else tokenizer.reply_ends(template)  # as it is: one line
    cache, read = None, []
    for turn, text in enumerate(texts):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.encode_messages(messages, template)[0]
        check_context([prompt], 1, model)
        room = min(limit, model.args.max_position_embeddings - len(prompt))
        if cache and prompt[:len(read)] == read:
            # the last reply is read again: its text may have other tokens than those drawn
            cache = [block.keep(len(read), len(prompt) + room) for block in cache]
        else:
            cache = model.make_cache(len(prompt) + room)
        pieces = stream_text(model, tokenizer, prompt, room, choose, mx.random.key(seed + turn),
                             cache=cache, **ends)
        messages.append({"role": "assistant", "content": print_reply(pieces, template, room)})
        read = prompt


def talk(model, tokenizer: Tokenizer, args, template: str, choose: Callable) -> None:
    """What files.options.generate_options asks for: a conversation, or a reply to each prompt."""
    limit = args.max_tokens or (32 if template == "none" else 512)
    about = {"template": template, "system": args.system, "limit": limit, "choose": choose}
    if args.chat:
        converse(model, tokenizer, read_lines(), seed=args.seed, **about)
    for n, text in enumerate(args.prompt or []):
        print(text, end="" if template == "none" else "\n", flush=True)
        converse(model, tokenizer, [text], seed=args.seed + n, **about)
