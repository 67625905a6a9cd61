"""Both libraries behind one interface; the rules about BOS, EOS and the prompt-answer border."""
import json

import pytest
import sentencepiece
import tokenizers
from conftest import GOLDEN, TINY, assert_one_clear_line, run

from config import BadInput
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def qwen(llama3, tmp_path_factory):
    """The same without a post-processor: Qwen2.5 has no BOS."""
    folder = tmp_path_factory.mktemp("qwen")
    raw = json.loads((llama3 / "tokenizer.json").read_text())
    raw["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


def test_bos_exactly_once(tokenizer, llama3, qwen):
    for loaded, bos in ((tokenizer, 1), (load_tokenizer(llama3), 0), (load_tokenizer(qwen), None)):
        assert loaded.bos_id == bos
        pair, P = loaded.encode_pair("7 * 8 = ", "56")
        assert loaded.encode_prompt("7 * 8 = ") == pair[:P]
        counts = [pair.count(bos), loaded.encode("7 * 8 = ").count(bos)]
        assert counts == ([1, 0] if bos is not None else [0, 0])
        assert pair[-1] == loaded.eos_id and loaded.decode(pair) == "7 * 8 = 56"


def test_ids_equal_the_libraries_own(tokenizer, llama3):
    text = "12 * 5 = 60, subtract 7"
    library = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert tokenizer.encode_prompt(text) == library.encode(text, add_bos=True)
    library = tokenizers.Tokenizer.from_file(str(llama3 / "tokenizer.json"))
    assert load_tokenizer(llama3).encode_prompt(text) == library.encode(text).ids  # its own BOS


def test_bundled_vocabulary(tokenizer):
    """Numbers 0..999 and the operation words are one token.

    This gives the lens one thing to look for.
    """
    assert all(len(tokenizer.encode(str(n))) == 1 for n in range(1000))
    words = ("add", "subtract", "multiply", "divide", "+", "-", "*", "/")
    assert len({tokenizer.single_id(w) for w in words}) == 8
    assert tokenizer.encode_pair("7 * 8 = ", "56")[1] == 5
    assert tokenizer.decode(tokenizer.encode("Any tëxt, round\ntrip")) == "Any tëxt, round\ntrip"
    assert tokenizer.piece(tokenizer.single_id("multiply")) == "·multiply"
    assert tokenizer.piece(99999) == "<99999>"


def test_stop_set_and_trained_eos(llama3, qwen):
    """Stops: all of generation_config. Trained: the one the tokenizer calls EOS."""
    assert load_tokenizer(llama3).eos_ids == {1, 2} and load_tokenizer(llama3).eos_id == 1
    assert load_tokenizer(qwen).eos_ids == {1}


def test_single_id_with_and_without_space(llama3):
    loaded = load_tokenizer(llama3)
    assert loaded.decode([loaded.single_id("multiply")]) == "multiply"
    assert loaded.decode([loaded.single_id("subtract")]) == " subtract"
    with pytest.raises(BadInput, match=r"'zebra' is \d tokens of .*must be one token"):
        loaded.single_id("zebra")


def test_border_inside_a_token_is_refused(tokenizer):
    with pytest.raises(BadInput, match="falls inside a token"):
        tokenizer.encode_pair("7 * 8 = 5", "6")  # "56" is one token


def test_missing_and_damaged(tmp_path, small_folder):
    assert load_tokenizer(GOLDEN / "tinyllama") is None
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(BadInput, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    done = run("lens.py", "--ckpt", GOLDEN / "tinyllama", "--prompt", "x")
    assert_one_clear_line(done, "no tokenizer.model", "tokenizer.json")
