"""The benchmark's own arithmetic, and its contract, on a model of a few thousand weights."""
import ast
import dataclasses
import json
import re
import sys

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, assert_one_clear_line, run

from bench import __main__ as bench
from bench import fullsize, limit, ours, page, whole
from bench.__main__ import Peer, summarise
from bench.limit import minimal_flops
from bench.ours import llama_config, write_random_model
from files.gguf import read_config, read_gguf, read_tensors
from files.keys import BadInput
from files.model_folder import parse_args

SHAPE = (12, 2, 3, 1, 20, 256)      # D, blocks, heads, key-value heads, MLP, vocabulary
SMALL = {"sft": {"rows": 2, "tokens": 7, "answer": 3},
         "dual_reward": {"rows": 2, "tokens": 7, "answer": 3},
         "grpo": {"rows": 2, "group": 3, "tokens": 5, "completion": 4},
         "generate": {"rows": 3, "group": 1, "tokens": 5, "completion": 4},
         "chat": {"rows": 1, "group": 1, "tokens": 5, "completion": 4},
         "lens": {"rows": 4, "tokens": 6}, "load": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("bench") / "model", llama_config(*SHAPE))


@pytest.fixture(scope="module")
def args(folder):
    return parse_args(json.loads((folder / "config.json").read_text()), "test")


class Counted:
    """The products of a Llama with LoRA on q, k, v, o, done one by one on zeros, and counted."""

    def __init__(self, args):
        self.a, self.flops, self.r = args, 0, limit.RANK
        self.q = args.num_attention_heads * args.head_dim
        self.kv = args.num_key_value_heads * args.head_dim

    def product(self, M, K, N):
        self.flops += 2 * M * K * N
        return np.zeros((M, K)) @ np.zeros((K, N))

    def layer(self, n, inside, outside, adapted=False):
        self.product(n, inside, outside)
        if adapted:
            self.product(n, inside, self.r), self.product(n, self.r, outside)

    def forward(self, rows, T, read, past=0, adapted=False):
        """read: of each row so many last positions are needed behind the last block."""
        D, F = self.a.hidden_size, self.a.intermediate_size
        for block in range(self.a.num_hidden_layers):
            queries = range(T - read if block == self.a.num_hidden_layers - 1 else 0, T)
            n = rows * len(queries)
            self.layer(n, D, self.q, adapted)
            self.layer(rows * T, D, self.kv, adapted), self.layer(rows * T, D, self.kv, adapted)
            for _ in range(rows * self.a.num_attention_heads):
                for t in queries:       # each against what it may see
                    self.product(1, self.a.head_dim, past + t + 1)
                    self.product(1, past + t + 1, self.a.head_dim)
            self.layer(n, self.q, D, adapted)
            self.layer(n, D, F), self.layer(n, D, F), self.layer(n, F, D)

    def backward(self, rows, T, read, past=0):
        D, F, r = self.a.hidden_size, self.a.intermediate_size, self.r

        def adapter(n, inside, outside, to_input=True):
            self.product(r, n, outside)             # B: (x A)^T dy
            self.product(n, outside, r)             # dy B^T
            self.product(inside, n, r)              # A: x^T (dy B^T)
            if to_input:
                self.product(n, outside, inside)    # dy W^T
                self.product(n, r, inside)          # (dy B^T) A^T

        for block in reversed(range(self.a.num_hidden_layers)):
            queries = range(T - read if block == self.a.num_hidden_layers - 1 else 0, T)
            n = rows * len(queries)
            self.product(n, D, F), self.product(n, F, D), self.product(n, F, D)
            adapter(n, self.q, D)
            for _ in range(rows * self.a.num_attention_heads):
                for t in queries:
                    for _ in "VPQK":                # four gradients
                        self.product(1, self.a.head_dim, past + t + 1)
            adapter(n, D, self.q, to_input=block > 0)
            adapter(rows * T, D, self.kv, to_input=block > 0)
            adapter(rows * T, D, self.kv, to_input=block > 0)

    def head(self, positions, times=1):
        for _ in range(times):
            self.product(positions, self.a.hidden_size, self.a.vocab_size)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("work", SMALL)
def test_minimal_flops_by_enumeration(args, work, blocks):
    """Every product of the work, done and counted, against the formula."""
    args = dataclasses.replace(args, num_hidden_layers=blocks)
    counted, s = Counted(args), SMALL[work]
    if work in ("sft", "dual_reward"):
        counted.forward(s["rows"], s["tokens"] - 1, s["answer"], adapted=True)
        counted.backward(s["rows"], s["tokens"] - 1, s["answer"])
        counted.head(s["rows"] * (s["answer"] + (work == "dual_reward")), times=2)
    elif work == "lens":
        counted.forward(s["rows"], s["tokens"], 1)
        counted.head(s["rows"] * (args.num_hidden_layers + 1))
    elif work in limit.DECODING:
        R, steps = s["rows"] * s["group"], s["completion"] - 1
        for _ in range(2 if work == "grpo" else 1):     # sampling; and the reference
            counted.forward(s["rows"], s["tokens"], 1)
            for step in range(steps):
                counted.forward(R, 1, 1, past=s["tokens"] + step)
            counted.head(s["rows"] + R * steps)
        if work == "grpo":
            for part in (s["rows"], s["tokens"], 1), (R, steps, steps, s["tokens"]):
                counted.forward(*part, adapted=True)
                counted.backward(*part)
            counted.head(s["rows"] + R * steps, times=2)
    assert minimal_flops(work, args, s) == counted.flops


def test_minimal_flops_by_hand(args):
    """The docstrings' examples."""
    small = parse_args({"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1,
                        "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 10}, "x")
    assert limit.block_weights(small) == 160
    assert limit.one_pass(1, 3, 1) == limit.Pass(3, 6, 1, 3)
    assert (limit.seen_pairs(1, 3), limit.seen_pairs(1, 3, 10)) == (6, 36)
    assert minimal_flops("sft", small, {"rows": 1, "tokens": 3, "answer": 1}) == 4832


def test_limit_takes_the_slower_of_operations_and_bytes(args):
    sizes = SMALL["generate"]
    least = lambda rate, bandwidth: limit.limit_seconds(
        "generate", args, sizes, {"flops_per_s": rate, "bytes_per_s": bandwidth})
    flops, decoding = minimal_flops("generate", args, sizes), limit.decode_flops(args, sizes)
    assert least(1e9, 1e30) == pytest.approx(flops / 1e9)
    # 3 steps read all weights; the 3 rows see 6, 7, 8 tokens' keys and values
    read = 4 * (3 * limit.parameters(args) + 2 * 4 * 2 * 3 * (6 + 7 + 8))
    assert limit.decode_bytes(args, sizes) == read
    assert least(1e30, 1e3) == pytest.approx(read / 1e3)
    assert least(1e9, 1e3) == pytest.approx((flops - decoding) / 1e9 + read / 1e3)
    # the second limit: decoding alone at the rate of few rows
    machine = {"flops_per_s": 1e9, "few_rows_flops_per_s": 1e8, "bytes_per_s": 1e30}
    assert limit.limit_seconds("generate", args, sizes, machine, "few_rows_flops_per_s") == (
        pytest.approx((flops - decoding) / 1e9 + decoding / 1e8))


def test_the_machine_is_measured():
    """Rates of this machine, each within what any machine has; few rows only where asked for."""
    found = limit.measure_machine(64, 128, rows=2)
    assert found.keys() == {"flops_per_s", "few_rows_flops_per_s", "bytes_per_s"}
    assert all(1e7 < found[key] < 1e15 for key in ("flops_per_s", "few_rows_flops_per_s"))
    assert 1e8 < found["bytes_per_s"] < 1e13
    assert "few_rows_flops_per_s" not in limit.measure_machine(64, 128)


@pytest.mark.parametrize("work", SMALL)
def test_our_side_of_each_work(folder, work):
    found = ours.time_here(work, str(folder), SMALL[work], 1)
    assert 0 < found["seconds"] < 60 and found["peak_gib"] >= found["before_gib"] > 0


def test_ratios_are_taken_within_rounds(args):
    """A round in which all sides are slow changes no ratio and no share."""
    side = lambda *seconds: [{"seconds": s, "peak_gib": 1.0} for s in seconds]
    machine = [{"flops_per_s": rate, "bytes_per_s": 1e9} for rate in (9e6, 3e6, 9e6)]
    found = summarise("sft", args, SMALL["sft"], {
        "": side(1, 3, 1), "machine": machine, "peer": side(2, 6, 2), "slow": side(50), "none": []})
    assert (found["seconds"], found["spread"], found["tokens_per_s"]) == (1, [1, 3], 14)
    assert found["limit_share"] == pytest.approx(minimal_flops("sft", args, SMALL["sft"]) / 9e6)
    assert found["peers"].keys() == {"peer", "slow"}
    assert found["peers"]["peer"]["ratio_spread"] == [2, 2]
    assert found["peers"]["slow"]["ratio"] == 50


def test_table():
    peer = lambda ratio: {"seconds": ratio, "spread": [1, 2], "peak_gib": 2.0, "ratio": ratio}
    result = {"work": "sft", "shape": "1b", "seconds": 1.0, "spread": [0.9, 1.2], "peak_gib": 1.3,
              "tokens_per_s": 512.0, "limit_share": 0.8, "few_rows_share": None,
              "peers": {"transformers + peft": peer(1.4), "mlx-lm": peer(1.7)}}
    head, ours, *peers = bench.table([result]).split("\n")
    assert ours.split() == ["sft,", "1b", "1,000.0", "900.0", "-", "1,200.0", "512", "1.30", "80",
                            "%"]
    assert [line.split()[-1] for line in peers] == ["1.40x", "1.70x"]
    assert len(head) == len(peers[0]) and peers[0].lstrip().startswith("transformers + peft")


def test_contract(folder, tmp_path, capsys, monkeypatch):
    """--json's keys; a peer without its packages and one that fails are skipped with a line."""
    monkeypatch.setattr(bench, "SIZES", SMALL)
    monkeypatch.setattr(bench, "find_python", lambda named: (sys.executable, {"numpy": "2"}))
    monkeypatch.setattr(bench, "peers_of", lambda *_: {
        "absent": Peer(("no_such_package",), []), "broken": Peer((), ["-c", "1 / 0"]),
        "there": Peer((), ["-c", "print('{\"seconds\": 9.0, \"peak_gib\": 0.5}')"])})
    bench.main(["--json", str(tmp_path / "b.json"), "--only", "lens", "--model", str(folder),
                "--rounds", "1"])
    said = capsys.readouterr().out
    assert "absent: not installed, skipped" in said and "ZeroDivisionError" in said
    result, = json.loads((tmp_path / "b.json").read_text())
    assert result["work"] == "lens" and 0 < result["limit_share"] < 1 and result["rounds"] == 1
    assert result["few_rows_share"] is None     # the lens decodes nothing
    assert {"seconds", "spread", "tokens_per_s", "peak_gib", "machine", "sizes", "shape",
            "versions", "device", "minimal_flops", "other_cores"} <= result.keys()
    assert result["peers"].keys() == {"there"}
    assert {"seconds", "peak_gib", "ratio"} <= result["peers"]["there"].keys()
    assert result["peers"]["there"]["ratio"] == pytest.approx(9 / result["seconds"])


def test_packages_are_found():
    """Of this very Python; the peers' is asked in the same way."""
    assert bench.find_python("none") == ("", {})
    python, found = bench.find_python(sys.executable)
    assert python == sys.executable
    assert found.keys() <= {"torch", "transformers", "peft", "trl", "datasets", "transformer_lens",
                            "mlx_lm", "llama_cpp"}


@pytest.mark.parametrize("main,words,said", [
    (bench.main, ["--only", "sleep"], "unknown work sleep; expected sft, dual_reward"),
    (bench.main, ["--rounds", "0"], "--rounds 0: expected at least 1"),
    (bench.main, ["--peer-python", "/no/python"], "--peer-python /no/python does not run"),
    (bench.main, ["--model", "/no/model", "--peer-python", "none"], "/no/model")])
def test_bad_input(main, words, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        main(words)


def test_one_line_and_exit_code():
    assert_one_clear_line(run("-m", "bench", "--only", "sleep"), "sleep", "dual_reward")


def test_peers_compile():
    """They run in other environments; here at least they are Python, and say what they do."""
    for path in sorted((ROOT / "bench" / "peers").glob("*.py")):
        assert len(ast.get_docstring(ast.parse(path.read_text())).split()) > 12


def test_what_llama_cpp_is_given(folder, tmp_path):
    """Read back by files/gguf.py, whose order of rows is held against transformers'."""
    script = ROOT / "bench" / "peers" / "llamacpp.py"
    run(script, "write", folder, tmp_path / "model.gguf", check=0)
    file, raw = read_gguf(tmp_path / "model.gguf"), json.loads((folder / "config.json").read_text())
    found = read_tensors(file)
    for shard in folder.glob("*.safetensors"):
        for key, weight in mx.load(str(shard)).items():
            assert mx.array_equal(found.pop(key), weight), key
    assert not found
    config = read_config(file)
    same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
            "intermediate_size", "vocab_size", "rope_theta", "head_dim")
    assert [config[key] for key in same] == [raw[key] for key in same]
    assert config["rms_norm_eps"] == pytest.approx(raw["rms_norm_eps"])
    done = run(script, "write", ROOT / "tests" / "golden" / "llama3_2", tmp_path / "no.gguf")
    assert done.returncode == 1 and "plain RoPE" in done.stderr


def test_fullsize_takes_every_work(tmp_path, monkeypatch, capsys):
    """A small shape through the real commands: shards, processes, the estimate, two losses."""
    raw = llama_config(*SHAPE) | {"torch_dtype": "bfloat16"}
    monkeypatch.setattr(fullsize, "SHAPES", {"small": raw})
    monkeypatch.setattr(fullsize, "BLOCKS", {"small": 2})
    fullsize.main(["load", "sft", "recompute=mlp", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    # nothing is recomputed while loading
    assert " sft " in said and " load " not in said and "estimated 0." in said
    losses = json.loads(re.search(r"losses (\[.*\])", said)[1])
    assert len(losses) == 2 and all(abs(x - np.log(256)) < 0.1 for x in losses)
    assert "small          4 bits    weights" in said
    shards = {p.name for p in (tmp_path / "small").glob("*.safetensors")}
    assert shards == {"model-rest.safetensors", "model-block0.safetensors",
                      "model-block1.safetensors"}
    with pytest.raises(BadInput, match="unknown work sleep; expected load, sft"):
        fullsize.main(["sleep"])


def test_the_whole_wait_is_told_by_part():
    """The parts make up the whole, and a run that fails says why."""
    found = whole.time_whole("configs/sft.yaml", ["steps=2", "batch_size=4", "eval_prompts=8"])
    assert sum(found[part] for part in whole.PARTS) == pytest.approx(found["whole"])
    assert min(found.values()) > 0
    with pytest.raises(BadInput, match="did not finish: .*steps"):
        whole.time_whole("configs/sft.yaml", ["steps=-1"])


def test_the_page_holds_what_was_measured():
    """docs/speed.md's tables are those of the committed files, to the character."""
    text = page.PAGE.read_text()
    assert text == page.fill(text) and len(page.MARKS.findall(text)) == 2
    at = text.index(" rounds; ", text.index("<!-- speed_40m.json"))
    assert page.fill(text[:at - 1] + "9" + text[at:]) == text != text[:at - 1] + "9" + text[at:]
