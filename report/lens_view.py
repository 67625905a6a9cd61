"""A lens view: what every block says at every position of one prompt, as plain numbers and a table.

report/page.py and report/plot.py draw the same view; `python lens.py --json` writes it.
"""
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
