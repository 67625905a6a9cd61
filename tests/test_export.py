"""What we write, other libraries compute alike, and what PEFT writes, we do.

transformers, peft and mlx-lm are independent loaders and forward passes; float32 throughout.
"""
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, GOLDEN, adapted, assert_one_clear_line, config, run, small_model

from config import BadInput
from lora import (
    adapter_arrays,
    export,
    export_peft,
    load_adapters,
    load_checkpoint,
    main,
    merge,
    save_adapters,
)
from model import load, save_model

QKVO = ("q", "k", "v", "o")
ALL = (*QKVO, "gate", "up", "down")
# tinyllama is 64 wide and its q_proj and o_proj are square: at rank 64 no shape tells A from A^T
CASES = [*((family, QKVO, 4) for family in FAMILIES),
         ("llama3_1", ALL, 4), ("tinyllama", ("q", "o"), 64)]
pytestmark = [pytest.mark.filterwarnings(rule) for rule in (
    "error:Found missing adapter keys", "ignore:.is_gradient_checkpointing.:FutureWarning")]


@pytest.fixture(scope="module")
def torch():
    """On one thread, like the tests' BLAS; imported here, since it takes seconds."""
    import torch
    torch.set_num_threads(1)
    return torch


def golden(family):
    return load(GOLDEN / family, "float32")[0]


def golden_tokens(family):
    return mx.load(str(GOLDEN / family / "expected.safetensors"))["tokens"][:, :24]


def transformers_model(torch, folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="eager").eval()


def peft_model(torch, base, adapter):
    from peft import PeftModel
    return PeftModel.from_pretrained(transformers_model(torch, base), adapter).eval()


def mlx_lm_model(folder, adapter=None):
    from mlx_lm.tuner.utils import load_adapters as mlx_lm_load_adapters
    from mlx_lm.utils import load_model as mlx_lm_load_model
    model, _ = mlx_lm_load_model(folder, strict=True)
    model.set_dtype(mx.float32)
    return mlx_lm_load_adapters(model, adapter) if adapter else model


def logits_of(model, tokens):
    if isinstance(model, nn.Module):
        return np.array(model(tokens))
    import torch
    with torch.no_grad():
        return model(torch.tensor(np.array(tokens), dtype=torch.int64)).logits.numpy()


def assert_close(theirs, ours, base, atol=1e-4):
    """Equal, up to rounding of values of about 7, and far from the base: the adapter is in both."""
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=atol)
    assert np.abs(ours - base).max() > 500 * atol


# --- what we write


@pytest.mark.parametrize("family,targets,rank", CASES)
def test_peft_reads_our_export(torch, family, targets, rank, tmp_path):
    tokens = golden_tokens(family)
    model = adapted(golden(family), targets, rank)
    export_peft(model, tmp_path, GOLDEN / family)
    theirs = peft_model(torch, GOLDEN / family, tmp_path)
    assert_close(logits_of(theirs, tokens), logits_of(model, tokens),
                 logits_of(golden(family), tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_folder(torch, family, tmp_path):
    tokens, targets = golden_tokens(family), ALL if family == "llama3_1" else QKVO
    model = adapted(golden(family), targets)
    ours, base = logits_of(model, tokens), logits_of(golden(family), tokens)
    merge(model)
    save_model(model, tmp_path, GOLDEN / family)
    assert_close(logits_of(transformers_model(torch, tmp_path), tokens), ours, base)
    assert_close(logits_of(mlx_lm_model(tmp_path), tokens), ours, base, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_reads_a_run_and_its_export(family, tmp_path):
    tokens, targets = golden_tokens(family), (*QKVO, "gate", "down")
    folder, alone = tmp_path / "run", tmp_path / "alone"
    model = adapted(golden(family), targets)
    cfg = config(model=str(GOLDEN / family), lora_rank=4, lora_alpha=8.0, lora_targets=targets)
    save_adapters(model, cfg, folder)
    (folder / "metrics.jsonl").touch()
    export(model, folder, cfg, alone, "mlx")
    assert {f.name for f in alone.iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    for adapter in (folder, alone):
        theirs = mlx_lm_model(GOLDEN / family, adapter)
        assert_close(logits_of(theirs, tokens), logits_of(model, tokens),
                     logits_of(golden(family), tokens), atol=1e-3)


# --- what PEFT writes


@pytest.mark.parametrize("family,targets,rank,rslora", [*((*case, False) for case in CASES),
                                                         ("qwen2_5", ALL, 4, True)])
def test_we_read_what_peft_saved(torch, family, targets, rank, rslora, tmp_path):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    modules = [f"{t}_proj" for t in targets]
    theirs = get_peft_model(transformers_model(torch, GOLDEN / family), LoraConfig(
        r=rank, lora_alpha=6, target_modules=modules, use_rslora=rslora,
        task_type="CAUSAL_LM")).eval()
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "peft")
    tokens, model = golden_tokens(family), golden(family)
    base = logits_of(model, tokens)
    load_adapters(model, tmp_path / "peft")
    assert_close(logits_of(theirs, tokens), logits_of(model, tokens), base)
    # and back: the same bits; the same scale, written as alpha / r
    export_peft(model, tmp_path / "ours", GOLDEN / family)
    a, b = (mx.load(f"{tmp_path}/{name}/adapter_model.safetensors") for name in ("peft", "ours"))
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == (12 if rslora else 6) and not settings["use_rslora"]
    assert sorted(settings["target_modules"]) == sorted(modules)


@pytest.fixture
def exported(tmp_path):
    export_peft(adapted(small_model()), tmp_path / "exported", "someone/model@v2")
    return tmp_path / "exported"


def change_config(folder, change):
    path = folder / "adapter_config.json"
    settings = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}, default=str))


def change_tensors(folder, change):
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)


def refuses(folder, *words):
    with pytest.raises(BadInput) as error:
        load_adapters(small_model(), folder)
    assert all(word in str(error.value) for word in words), error.value


def test_a_hub_revision_stands_apart(exported):
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/model" and settings["revision"] == "v2"


def test_half_precision_is_read_as_float32(exported):
    change_tensors(exported, lambda arrays: arrays.update(
        {k: v.astype(mx.bfloat16) for k, v in arrays.items()}))
    model = small_model()
    load_adapters(model, exported)
    assert {v.dtype for v in adapter_arrays(model).values()} == {mx.float32}


@pytest.mark.parametrize("change,expected", [
    ({"target_modules": "all-linear"}, "a list out of q_proj, k_proj"),
    ({"target_modules": r".*\.(q|v)_proj"}, "a list out of q_proj, k_proj"),
    ({"target_modules": ["q_proj", "lm_head"]}, "a list out of q_proj, k_proj"),
    ({"target_modules": []}, "a list out of q_proj, k_proj"),
    ({"target_modules": [["q_proj"]]}, "a list out of q_proj, k_proj"),
    ({"peft_type": "LOHA"}, "LORA"), ({"peft_type": None}, "LORA"),
    ({"bias": "lora_only"}, "none"),
    ({"use_rslora": "yes"}, "true or false"),
    ({"r": 0}, "a whole number above 0"), ({"r": ...}, "a whole number above 0"),
    ({"r": True}, "a whole number above 0"),
    ({"lora_alpha": "16"}, "a number above 0"),
    ({"init_lora_weights": "pissa"}, "true, false or gaussian"),
    *(({key: value}, "unset") for key, value in {
        "modules_to_save": ["lm_head"], "layers_to_transform": [1], "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"q_proj": 8}, "use_dora": True, "fan_in_fan_out": True,
        "exclude_modules": "k_proj", "a_later_idea": "on"}.items()),
    ({"layers_to_transform": 0}, "unset"),
])
def test_settings_we_do_not_compute(exported, change, expected):
    change_config(exported, change)
    (key, value), = change.items()
    value = json.dumps(None if value is ... else value)
    refuses(exported, "adapter_config.json", f"{key} = {value}, expected {expected}")


def test_every_setting_and_tensor_is_named(exported):
    change_config(exported, {"use_dora": True, "bias": "all"})
    refuses(exported, "use_dora = true", 'bias = "all"')
    change_config(exported, {"use_dora": False, "bias": "none"})
    names = sorted(mx.load(str(exported / "adapter_model.safetensors")))

    def change(arrays):
        arrays["base_model.model.lm_head.lora_A.weight"] = arrays.pop(names[0])
        arrays[names[1]] = arrays[names[1]].T
    change_tensors(exported, change)
    refuses(exported, f"1 missing: {names[0]}", "1 not expected: base_model.model.lm_head.lora_A",
            f"1 of another shape: {names[1]}", "someone/model")
    (exported / "adapter_model.safetensors").unlink()
    refuses(exported, "adapter_model.safetensors is missing")


# --- the command


@pytest.fixture
def trained(write_config):
    path, folder = write_config(lr="1e-2", lora_targets="[q, v, o, up]")
    run("train.py", path, check=0)
    return folder


def test_command_on_a_run(torch, trained, small_folder, tmp_path, write_config, capsys):
    from peft import AutoPeftModelForCausalLM
    out = lambda name: tmp_path / "out" / name
    for name in ("hub", "peft", "mlx"):
        done = run("lora.py", "--ckpt", trained, "--out", out(name), "--format", name, check=0)
        assert str(out(name)) in done.stdout and not done.stderr
        assert name == "hub" or str(small_folder) in done.stdout
    tokens = mx.array([[1, 10, 20, 30, 40]])
    ours = logits_of(load_checkpoint(trained)[0], tokens)
    base = logits_of(load(small_folder)[0], tokens)
    # finds its base by the name in the adapter's config
    theirs = AutoPeftModelForCausalLM.from_pretrained(out("peft"), dtype=torch.float32).eval()
    assert_close(logits_of(theirs, tokens), ours, base)
    assert_close(logits_of(transformers_model(torch, out("hub")), tokens), ours, base)
    assert_close(logits_of(mlx_lm_model(small_folder, out("mlx")), tokens), ours, base)
    again = load(small_folder)[0]
    load_adapters(again, out("mlx"))    # checks the base's identity as well
    np.testing.assert_array_equal(logits_of(again, tokens), ours)
    # a run on a run: its adapter alone belongs on a model that is in no folder yet
    path, second = write_config("second", model=trained, steps=2)
    run("train.py", path, check=0)
    main(["--ckpt", str(second), "--out", str(out("second")), "--format", "peft"])
    assert f"lora.py --ckpt {trained} --out FOLDER" in capsys.readouterr().out


def test_refused_on_the_command_line(small_folder, exported, tmp_path):
    def refused(ckpt, out, kind, *words):
        with pytest.raises(BadInput) as error:
            main(["--ckpt", str(ckpt), "--out", str(out), "--format", kind])
        assert all(str(word) in str(error.value) for word in words), error.value

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for kind in ("hub", "peft", "mlx"):
        refused(small_folder, tmp_path / "new", kind, small_folder, "has no adapter")
        refused(small_folder, tmp_path / "empty", kind, small_folder, "has no adapter")
        refused(small_folder, exported, kind, exported, "already holds", "name a new folder")
        refused(small_folder, tmp_path / "file", kind, "already holds")
        refused(exported, tmp_path / "new", kind, "no config.yaml", "load_adapters")
    assert not (tmp_path / "new").exists()
    done = run("lora.py", "--ckpt", small_folder, "--out", exported, "--format", "peft")
    assert_one_clear_line(done, exported, "already holds a model or other files")
