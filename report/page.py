"""The lens view as one HTML file: no script, no link, nothing fetched; texts are escaped."""
import html


def lens_page(view: dict) -> str:
    """One HTML page without scripts or links: the same heat map, each cell's top ten on hover."""
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
