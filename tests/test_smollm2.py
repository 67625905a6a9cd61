"""Every exchange with other libraries on a real model, SmolLM2-135M-Instruct; and a run on it.

Tiny random models hide what trained weights show: logits of 30, outliers, 49,152 tokens. Fetched
once a machine (conftest.smollm2); skipped where there is no network, but in CI.
"""
import json

import mlx.core as mx
import mlx_lm.utils as mlx_lm
import numpy as np
import pytest
from conftest import adapted, kill_and_continue, run
from test_export import (
    QKVO,
    assert_close,
    export,
    logits_of,
    mlx_lm_adapter,
    mlx_lm_model,
    peft_model,
    torch,  # noqa: F401  (a fixture)
    transformers_model,
)

from checkpoint import load_checkpoint
from engine.quant import packed_settings
from files.adapters import mlx_files
from files.disk import read_json_lines
from lens import read_prompts
from lora import load_adapters
from model import load

pytestmark = [pytest.mark.filterwarnings(rule) for rule in (
    "error:Found missing adapter keys", "ignore:.is_gradient_checkpointing.:FutureWarning")]
SHOTS = "2 + 3 = 5\n9 - 6 = 3\n3 * 2 = 6\n7 - 4 = "
STEPS = 4


@pytest.fixture(scope="module")
def tokens(smollm2):
    """(2, 16): worked sums, and prose."""
    _, tokenizer = load(smollm2, "float32")
    prose = "The capital of France is Paris, and the river that flows through it is the Seine. It"
    return mx.array([tokenizer.encode(text)[:16] for text in (SHOTS, prose)])


@pytest.fixture(scope="module")
def base_logits(smollm2, tokens):
    return logits_of(load(smollm2, "float32")[0], tokens)


# --- a run


def test_a_run_on_it(torch, smollm2, tokens, base_logits, tmp_path):  # noqa: F811
    """Killed and continued, bit for bit; as much memory as estimated; read alike by others.

    One test, since its two runs take half a minute.
    """
    run("-m", "tasks", "few_shot", tmp_path / "data", check=0)
    for split in ("valid", "test"):
        path = tmp_path / "data" / f"{split}.jsonl"
        path.write_text("".join(path.read_text().splitlines(True)[:6]))
    keys = (f"model: {smollm2}\nmethod: dual_reward\ndata: {tmp_path}/data\nsteps: {STEPS}\n"
            "batch_size: 4\nlr: 5e-4\nclass_weight: 0.2\neval_every_steps: 0\n"
            "lens_every_steps: 0\nsave_every_steps: 1\n")
    for name in ("alone", "killed"):
        (tmp_path / f"{name}.yaml").write_text(f"{keys}run_dir: {tmp_path}/{name}\n")
    run("train.py", tmp_path / "alone.yaml", check=0)
    kill_and_continue(tmp_path / "killed.yaml", tmp_path / "killed")
    alone, killed = (mx.load(str(tmp_path / name / "adapters.safetensors"))
                     for name in ("alone", "killed"))
    assert alone.keys() == killed.keys() and len(alone) == 2 * 4 * 30
    assert all(mx.array_equal(alone[key], killed[key]) for key in alone)
    losses = [[row["loss"] for row in read_json_lines(tmp_path / name / "metrics.jsonl")
               if "loss" in row] for name in ("alone", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS

    report = json.loads((tmp_path / "alone" / "report.json").read_text())
    assert report["peak_gib"] == pytest.approx(report["estimated_peak_gib"], rel=0.1)

    ours = logits_of(load_checkpoint(tmp_path / "alone", dtype="float32")[0], tokens)
    for kind in ("hub", "peft", "mlx"):
        run("lora.py", "--ckpt", tmp_path / "alone", "--out", tmp_path / kind, "--format", kind,
            check=0)
    for read in (lambda: transformers_model(torch, tmp_path / "hub"),
                 lambda: peft_model(torch, smollm2, tmp_path / "peft"),
                 lambda: mlx_lm_model(tmp_path / "hub"),
                 lambda: mlx_lm_model(smollm2, tmp_path / "mlx"),
                 lambda: load(tmp_path / "hub", "float32")[0]):
        assert_close(logits_of(read(), tokens), ours, base_logits, atol=2e-3)


# --- their adapters


def test_an_adapter_of_peft(torch, smollm2, tokens, base_logits, tmp_path):  # noqa: F811
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    theirs = get_peft_model(transformers_model(torch, smollm2), LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"],
        task_type="CAUSAL_LM")).eval()
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    theirs.save_pretrained(tmp_path)
    model, _ = load(smollm2, "float32")
    load_adapters(model, tmp_path)
    assert_close(logits_of(theirs, tokens), logits_of(model, tokens), base_logits, atol=2e-3)


def test_an_adapter_of_mlx_lm(smollm2, tokens, base_logits, tmp_path):
    theirs = mlx_lm_adapter(smollm2, tmp_path / "theirs", tokens, learning_rate=1e-3)
    model, _ = load(smollm2, "float32")
    load_adapters(model, tmp_path / "theirs")
    assert_close(theirs, logits_of(model, tokens), base_logits, atol=2e-3)
    # and back: what we write of it, mlx-lm reads alike
    export(model, smollm2, tmp_path / "ours", mlx_files)
    again = mlx_lm_model(smollm2, tmp_path / "ours")
    again.eval()
    assert_close(logits_of(again, tokens), theirs, base_logits, atol=2e-3)


# --- fewer bits


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_as_mlx_lm_does(bits, smollm2, tokens, base_logits, tmp_path):
    """At load, and a folder that mlx-lm has quantised: the logits are mlx-lm's."""
    theirs, raw = mlx_lm.load_model(smollm2)
    theirs.set_dtype(mx.float32)
    theirs, raw = mlx_lm.quantize_model(theirs, raw, 64, bits,
                                        quant_predicate=lambda path, _: "proj" in path)
    expected = np.array(theirs(tokens))
    mlx_lm.save_model(tmp_path, theirs)
    mlx_lm.save_config(raw, tmp_path / "config.json")
    error = np.abs(expected - base_logits).mean()
    assert (0 < error < 0.2) if bits == 8 else error > 0.5     # it is coarser, and 4 bits much
    for path, asked in ((smollm2, bits), (tmp_path, None)):
        model, _ = load(path, "float32", bits=asked)
        assert packed_settings(model) == {(bits, 64)}
        np.testing.assert_allclose(np.array(model(tokens)), expected, rtol=0, atol=5e-3)


def test_qlora_adapter_on_it(torch, smollm2, tokens, tmp_path):  # noqa: F811
    """An adapter over 8 bits goes to PEFT over the same weights, unpacked."""
    model, _ = load(smollm2, "float32", bits=8)
    adapted(model, QKVO)
    ours = logits_of(model, tokens)
    export(model, smollm2, tmp_path)
    theirs = peft_model(torch, smollm2, tmp_path)
    for name, layer in model.named_modules():
        if hasattr(layer, "dense"):
            plain = theirs.get_submodule(f"base_model.model.{name.removesuffix('.linear')}")
            plain = getattr(plain, "base_layer", plain)
            plain.weight.data = torch.tensor(np.array(layer.dense().weight))
    np.testing.assert_allclose(logits_of(theirs, tokens), ours, rtol=0, atol=2e-3)


# --- the lens


def test_lens_equals_transformers_hidden_states(torch, smollm2, tokens):  # noqa: F811
    """The stream at all 31 taps, and what norm and unembedding make of each."""
    theirs = transformers_model(torch, smollm2)
    model, _ = load(smollm2, "float32")
    ids = torch.tensor(np.array(tokens), dtype=torch.int64)
    with torch.no_grad():
        found = theirs.model(ids, output_hidden_states=True)
        hidden = list(found.hidden_states)      # the last has been through the final norm
        assert torch.equal(hidden[-1], found.last_hidden_state)
        heads = [theirs.lm_head(theirs.model.norm(h)) for h in hidden[:-1]]
        logprobs = torch.stack([*heads, theirs.lm_head(hidden[-1])]).log_softmax(-1).numpy()
    ours = np.array(model.residuals(tokens))
    for tap in range(30):
        scale = np.abs(hidden[tap].numpy()).max()
        np.testing.assert_allclose(ours[tap], hidden[tap].numpy(), rtol=0, atol=1e-5 * scale)
    words = [803, 17109, 17557]     # add, multiply, subtract, each with its space
    reading = read_prompts(model, np.array(tokens).tolist(), [words] * 2, k=1)
    at_end = logprobs[:, :, -1]                                                 # (31, 2, V)
    np.testing.assert_allclose(reading.logprobs[:, :, 0], at_end[..., words], rtol=0, atol=2e-3)
    np.testing.assert_array_equal(reading.top_ids[:, :, 0, 0], at_end.argmax(-1))
    wanted = (at_end[..., None, :] > at_end[..., words][..., None]).sum(-1) + 1
    assert np.abs(np.log(reading.ranks[:, :, 0] / wanted)).max() < 0.02     # near ties may swap
