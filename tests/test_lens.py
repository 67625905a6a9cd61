"""The lens is the model: same stream, same head, no future; and its statistics against numpy."""
import json
import re

import mlx.core as mx
import numpy as np
from conftest import FAMILIES, GOLDEN, assert_one_clear_line, run

from lens import read_prompts, read_taps, terminal_table, view_prompt
from model import load
from plot import lens_page


def test_last_tap_is_the_model():
    """On all four families: the lens at tap L has the golden logits' probabilities.

    Tap 0 has the embedding's.
    """
    for family in FAMILIES:
        model, _ = load(GOLDEN / family, "float32")
        expected = mx.load(str(GOLDEN / family / "expected.safetensors"))
        tokens = expected["tokens"]
        targets = mx.broadcast_to(mx.arange(320), (2, 2, 320))
        reading = read_taps(model, tokens, mx.array([[5, 95], [40, 0]]), targets, k=3)
        for b, a, position in ((0, 0, 5), (0, 1, 95), (1, 0, 40), (1, 1, 0)):
            middle = model.head(expected["residuals"][2, b, position])
            for tap, logits in ((-1, expected["logits"][b, position]), (2, middle)):
                probs = np.array(mx.softmax(logits))
                np.testing.assert_allclose(reading.probs[tap, b, a], probs, atol=1e-4)
                assert reading.top_ids[tap, b, a].tolist() == np.argsort(-probs)[:3].tolist()
                assert abs(reading.entropy[tap, b, a] + (probs * np.log(probs)).sum()) < 1e-3
        assert reading.probs.shape == (5, 2, 2, 320)


def test_ranks_and_ties_against_numpy():
    """Ranks by comparison equal ranks by sorting.

    Exact ties are counted, not broken by position.
    """
    from lens import read_logits
    logits = np.random.default_rng(0).integers(0, 12, (2, 3, 40)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 40, (2, 3, 5))
    _, ranks, ties, *_ = read_logits(mx.array(logits), mx.array(targets), 1)
    for index in np.ndindex(2, 3, 5):
        row, chosen = logits[index[:2]], logits[index[:2]][targets[index]]
        assert ranks[index].item() == 1 + (row > chosen).sum()
        assert ties[index].item() == (row == chosen).sum() - 1


def test_padding_changes_nothing(model, tokenizer):
    """A short prompt beside a long one reads the same as alone."""
    prompts = [tokenizer.encode_prompt(t)
               for t in ("7 * 8 = ", "what is seventy two plus nine = ")]
    together = read_prompts(model, prompts, [[5], [9]])
    for i, (prompt, target) in enumerate(zip(prompts, ([5], [9]))):
        alone = read_prompts(model, [prompt], [target])
        np.testing.assert_allclose(together.probs[:, i], alone.probs[:, 0], rtol=1e-4)


def test_view_holds_what_the_pictures_show(model, tokenizer):
    view = view_prompt(model, tokenizer, "7 * 8 = ", ["multiply", "56"])
    assert view["tokens"] == ["<s>", "·7", "·*", "·8", "·="]
    assert view["taps"] == ["embed", "L0", "L1"]
    assert np.array(view["top"], dtype=object).shape == (3, 5, 10, 2)
    table = terminal_table(view, color=False)
    lines = table.splitlines()
    assert lines[1].startswith("L1") and lines[3].startswith("embed")  # the last block on top
    assert view["top"][2][4][0][0][:7] in lines[1]
    assert "'multiply'" in table and "\033" not in table
    assert "\033[48;5;" in terminal_table(view, color=True)
    logits = model(mx.array([tokenizer.encode_prompt("7 * 8 = ")]))[0, -1]
    probs = np.array(mx.softmax(logits))
    assert abs(view["words"]["56"]["prob"][-1] - probs[tokenizer.single_id("56")]) < 1e-5


def test_page_is_self_contained_and_escaped():
    cell = [["<b>&", 0.7]] + [[f"t{i}", 0.01] for i in range(9)]
    view = {"prompt": "<script>alert(1)</script>", "tokens": ["<s>"], "taps": ["embed", "L0"],
            "top": [[cell], [cell]], "entropy": [[1.0], [2.0]]}
    page = lens_page(view)
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;&amp;" in page
    assert not re.search(r"(src|href)\s*=|https?:|url\(", page) and page.count('class="tip"') == 2


def test_command_line_writes_all_pictures(small_folder, tmp_path):
    files = [tmp_path / f"x.{kind}" for kind in ("png", "html", "json")]
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "7 * 8 = ", "--words", "multiply",
               "--png", files[0], "--html", files[1], "--json", files[2], check=0)
    assert "L1" in done.stdout and "embed" in done.stdout
    assert files[0].read_bytes().startswith(b"\x89PNG") and "<html" in files[1].read_text()
    assert json.loads(files[2].read_text())["prompt"] == "7 * 8 = "


def test_bad_input(small_folder):
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "x", "--words", "zebra")
    assert_one_clear_line(done, "'zebra' is", "must be one token")
    for script in ("lens.py", "generate.py"):
        done = run(script, "--ckpt", small_folder, "--prompt", "7 + " * 200)
        assert_one_clear_line(done, "exceed the model's context of 128")
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "")
    assert_one_clear_line(done, "--prompt is empty")
