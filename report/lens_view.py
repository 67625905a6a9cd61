"""A lens view: what every block says at every position of one prompt.

It is plain numbers (stats.make_view), which `python lens.py --json` writes, and here a table in the
terminal. report/plot.py makes a picture and a page of it.
"""
import json
import os
import sys
from pathlib import Path

from files.disk import write_text
from report.stats import EMERGED


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
    if args.png or args.html:
        from report.plot import lens_heatmap, lens_page  # most of a second
        if args.png:
            lens_heatmap(view, args.png)
        if args.html:
            write_text(Path(args.html), lens_page(view))
    if args.png or args.html or args.json:
        print("wrote " + ", ".join(filter(None, (args.png, args.html, args.json))))
