"""A lens view: what every block says at every position of one prompt.

It is plain numbers, which `python lens.py --json` writes, and a table in the terminal. The page is
one HTML file: no script, no link, nothing fetched, and texts are escaped.
"""
import html
import json
import os
import sys
from pathlib import Path

from files.disk import write_text
from report.stats import EMERGED, depth
from text.tokenizer import Tokenizer


def make_view(reading, tokenizer: Tokenizer, prompt: str, ids: list[int], words: list[str],
              chosen: list[int]) -> dict:
    """Plain numbers of a lens.Reading of one prompt, at all of its positions.

    ids      the prompt's tokens;  words, chosen: the Reading's targets, as texts and tokens
    returns  {prompt, tokens [T], taps [L+1 names], top [L+1][T][k] of [token, probability],
              entropy [L+1][T], kl [L+1][T], words {word: {id, piece, prob [L+1], rank [L+1],
              onset, peak}} at the last position; onset at 0.10}
    """
    def cell(tap, t):
        top = zip(reading.top_ids[tap, 0, t], reading.top_probs[tap, 0, t])
        return [[tokenizer.piece(i), round(float(p), 6)] for i, p in top]

    taps = range(len(reading.entropy))
    # tap l is after block l - 1: "L0" is the first block's
    names = ["embed"] + [f"L{l}" for l in range(len(taps) - 1)]
    series = {}
    for n, (word, token) in enumerate(zip(words, chosen)):
        prob = reading.probs[:, 0, -1, n]
        where = depth(prob, EMERGED)
        series[word] = {"id": token, "piece": tokenizer.piece(token),
                        "prob": prob.round(6).tolist(),
                        "rank": reading.ranks[:, 0, -1, n].tolist(),
                        "onset": names[where["onset"]] if where["onset"] > 0 else None,
                        "peak": names[where["peak"]]}
    return {
        "prompt": prompt, "tokens": [tokenizer.piece(i) for i in ids], "taps": names,
        "top": [[cell(tap, t) for t in range(len(ids))] for tap in taps],
        "entropy": reading.entropy[:, 0].round(4).tolist(),
        "kl": reading.kl[:, 0].round(4).tolist(), "words": series,
    }


def lens_table(view: dict, color: bool, width: int = 12) -> str:
    """Blocks by positions, last on top: each cell's top token and per cent, darker when surer."""
    def cell(token: str, prob: float) -> str:
        text = f"{token[:width - 5]:<{width - 5}}{100 * prob:4.0f} "
        shade = 255 - int(23 * prob ** 0.5)  # 256-colour greys run from 232 (black) to 255 (white)
        return (f"\033[48;5;{shade}m\033[38;5;{16 if shade > 243 else 231}m{text}\033[0m"
                if color else text)
    lines = [" " * 7 + "".join(f"{token[:width - 1]:<{width}}" for token in view["tokens"])
             + "entropy, KL to the end (nats, last position)"]
    for tap in reversed(range(len(view["taps"]))):
        lines.append(f"{view['taps'][tap]:<7}"
                     + "".join(cell(*cells[0]) for cells in view["top"][tap])
                     + f"{view['entropy'][tap][-1]:5.2f} {abs(view['kl'][tap][-1]):6.2f}")
    for word, series in view["words"].items():
        steps = "  ".join(f"{name} {p:.2f} (#{r})" for name, p, r in
                          zip(view["taps"], series["prob"], series["rank"]))
        lines.append(f"{word!r}, token {series['piece']} ({series['id']}), at the last position, "
                     f"probability (rank): {steps}; "
                     f"onset {series['onset'] or 'none'}, peak {series['peak']}")
    if view["words"]:
        lines.append("before the last block: onset, where the probability rises to "
                     f"{EMERGED} and stays for 3 blocks; peak, where it is largest")
    return "\n".join(lines)


def show_view(view: dict, name: str, args) -> None:
    """Print a view of the model `name`; write what files.options.lens_options says of it."""
    print(f"{name}   {view['prompt']!r}   logit lens: final norm and unembedding at every tap; "
          "cell: top token, per cent")
    print(lens_table(view, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if args.json:
        write_text(Path(args.json), json.dumps(view) + "\n")
    if args.png:
        from report.plot import lens_heatmap  # most of a second
        lens_heatmap(view, args.png)
    if args.html:
        write_text(Path(args.html), lens_page(view))
    if args.png or args.html or args.json:
        print("wrote " + ", ".join(filter(None, (args.png, args.html, args.json))))


def lens_page(view: dict) -> str:
    """The same as a heat map, each cell's top ten on hover."""
    def cell(tap: int, t: int) -> str:
        (token, prob), *_ = top = view["top"][tap][t]
        tip = "".join(f"<tr><td>{html.escape(w)}</td><td>{100 * p:.1f} %</td></tr>" for w, p in top)
        style = f"background:rgba(20,110,140,{prob:.3f});color:{'#fff' if prob > 0.5 else '#111'}"
        return (f'<td class="cell" style="{style}">{html.escape(token)}<table class="tip">'
                f'<caption>entropy {view["entropy"][tap][t]:.2f} nats</caption>{tip}</table></td>')
    header = "".join(f"<th>{html.escape(token)}</th>" for token in view["tokens"])
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(cell(tap, t) for t in range(len(view['tokens'])))}</tr>"
        for tap, name in reversed(list(enumerate(view["taps"]))))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>logit lens</title>\n'
        "<style>body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:.3em .6em;font-family:monospace;text-align:left;white-space:pre}\n"
        # room right of the table and below it for the tips of the last column and row: a tip that
        # made the page grow could not be scrolled to without leaving its cell
        "main{display:inline-block;padding:0 24em 20em 0}\n"
        # the mouse passes through a tip, or it would hide the cells below it while it is over it
        ".cell{border:1px solid #ddd;position:relative}.tip{display:none;position:absolute;"
        "left:60%;top:80%;z-index:1;background:#fff;color:#111;border:1px solid #888;"
        "pointer-events:none}\n"
        ".cell:hover .tip{display:table}.tip td{padding:.1em .6em;max-width:14em;overflow:hidden;"
        "text-overflow:ellipsis}caption{background:#fff}</style>\n"
        f'<h1>logit lens: <code>{html.escape(view["prompt"])}</code></h1>'
        "<p>Rows: after each block, the last on top. Colour: probability of the top token. "
        "Hover: the ten most probable.</p>\n"
        f"<main><table><tr><th></th>{header}</tr>{rows}</table></main></html>\n")
