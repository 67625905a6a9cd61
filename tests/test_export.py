"""What we write, other libraries compute alike, and what PEFT writes, we do.

transformers, peft and mlx-lm are independent loaders and forward passes; float32 throughout.
"""
import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    GOLDEN,
    TINY,
    adapted,
    assert_one_clear_line,
    config,
    run,
    small_config,
    small_model,
    write_model,
)

import eval as eval_script
import generate as generate_script
import lens as lens_script
from checkpoint import checkpoint_files, load_checkpoint, main
from files.adapters import about_adapter, adapter_arrays, mlx_files, peft_files
from files.keys import BadInput
from files.model_folder import model_files, write_files
from lora import load_adapters, merge
from model import load

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


def export(model, base, folder, make_files=peft_files):
    """The adapter alone, as `lora.py --format peft` or mlx writes it."""
    write_files(folder, make_files(adapter_arrays(model), about_adapter(model, base)))


# --- what we write


@pytest.mark.parametrize("family,targets,rank", CASES)
def test_peft_reads_our_export(torch, family, targets, rank, tmp_path):
    tokens = golden_tokens(family)
    model = adapted(golden(family), targets, rank)
    export(model, GOLDEN / family, tmp_path)
    theirs = peft_model(torch, GOLDEN / family, tmp_path)
    assert_close(logits_of(theirs, tokens), logits_of(model, tokens),
                 logits_of(golden(family), tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_folder(torch, family, tmp_path):
    tokens, targets = golden_tokens(family), ALL if family == "llama3_1" else QKVO
    model = adapted(golden(family), targets)
    ours, base = logits_of(model, tokens), logits_of(golden(family), tokens)
    merge(model)
    write_files(tmp_path, model_files(model, GOLDEN / family))
    assert_close(logits_of(transformers_model(torch, tmp_path), tokens), ours, base)
    assert_close(logits_of(mlx_lm_model(tmp_path), tokens), ours, base, atol=1e-3)


@pytest.mark.parametrize("rope", [
    {"rope_theta": 100000.0, "rope_type": "default"},
    {"rope_theta": 100000.0, "rope_type": "linear", "factor": 4.0},
    {"rope_theta": 100000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 16}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_folder_of_a_base_from_transformers_5(torch, family, rope, tmp_path):
    """config.json with rope_parameters alone; mlx-lm does not read those."""
    raw = small_config() | {"model_type": family, "rope_parameters": rope,
                            "architectures": [{"llama": "LlamaForCausalLM",
                                               "qwen2": "Qwen2ForCausalLM"}[family]]}
    del raw["rope_theta"], raw["rope_scaling"]
    base, tokens = write_model(tmp_path / "base", raw, TINY), mx.arange(3, 99).reshape(2, 48)
    model = adapted(load(base, "float32")[0])
    ours = logits_of(model, tokens)
    merge(model)
    write_files(tmp_path / "fused", model_files(model, base))
    assert_close(logits_of(mlx_lm_model(tmp_path / "fused"), tokens), ours,
                 logits_of(load(base, "float32")[0], tokens))
    np.testing.assert_allclose(logits_of(transformers_model(torch, tmp_path / "fused"), tokens),
                               ours, rtol=0, atol=1e-4)
    again = load(tmp_path / "fused", "float32")[0]
    assert (again.args.rope_theta, again.args.rope_scaling) == (
        model.args.rope_theta, model.args.rope_scaling)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_reads_a_run_and_its_export(family, tmp_path):
    tokens, targets = golden_tokens(family), (*QKVO, "gate", "down")
    folder, alone = tmp_path / "run", tmp_path / "alone"
    model = adapted(golden(family), targets)
    cfg = config(model=str(GOLDEN / family), lora_rank=4, lora_alpha=8.0, lora_targets=targets)
    write_files(folder, checkpoint_files(model, cfg))
    (folder / "metrics.jsonl").touch()
    export(model, cfg.model, alone, mlx_files)
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
    export(model, GOLDEN / family, tmp_path / "ours")
    a, b = (mx.load(f"{tmp_path}/{name}/adapter_model.safetensors") for name in ("peft", "ours"))
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == (12 if rslora else 6) and not settings["use_rslora"]
    assert sorted(settings["target_modules"]) == sorted(modules)


@pytest.mark.parametrize("target_modules,blocks", [
    (["q_proj", "up_proj"], [1, 3]), (["q_proj"], 2), (["v_proj", "down_proj"], [0]),
    (["model.layers.0.self_attn.q_proj", "2.mlp.up_proj", "o_proj"], None)])
def test_peft_on_some_blocks(torch, target_modules, blocks, tmp_path):
    """Read as PEFT computes it; written for PEFT and for mlx-lm, both read it alike."""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    base = GOLDEN / "llama3_1"
    theirs = get_peft_model(transformers_model(torch, base), LoraConfig(
        r=4, lora_alpha=6, target_modules=target_modules, layers_to_transform=blocks,
        task_type="CAUSAL_LM")).eval()
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "peft")
    tokens, model = golden_tokens("llama3_1"), golden("llama3_1")
    plain = logits_of(model, tokens)
    load_adapters(model, tmp_path / "peft")
    ours = logits_of(model, tokens)
    assert_close(logits_of(theirs, tokens), ours, plain)
    for kind, make_files in (("peft", peft_files), ("mlx", mlx_files)):
        export(model, base, tmp_path / f"our {kind}", make_files)
        again = golden("llama3_1")
        load_adapters(again, tmp_path / f"our {kind}")
        np.testing.assert_array_equal(logits_of(again, tokens), ours)
    assert_close(logits_of(peft_model(torch, base, tmp_path / "our peft"), tokens), ours, plain)
    assert_close(logits_of(mlx_lm_model(base, tmp_path / "our mlx"), tokens), ours, plain,
                 atol=1e-3)


# --- what mlx-lm writes


def mlx_lm_adapter(base, folder, tokens, iters=2, **settings):
    """An adapter that mlx-lm itself trained and saved; what it computes with it."""
    from mlx_lm import lora as mlx_lm_lora
    model = mlx_lm_model(base)
    args = SimpleNamespace(**{
        **mlx_lm_lora.CONFIG_DEFAULTS, "model": str(base), "adapter_path": str(folder),
        "iters": iters, "batch_size": 2, "learning_rate": 1e-2, "val_batches": 1, **settings})
    rows = Rows(np.array(tokens).tolist())
    mlx_lm_lora.train_model(args, model, rows, rows)
    trained = mlx_lm_model(base, folder)
    trained.eval()      # no dropout
    return logits_of(trained, tokens)


class Rows(list):
    """A data set as mlx-lm's trainer reads one: (tokens, where the loss begins)."""
    def process(self, row):
        return row, 0


def deep_folder(folder):
    """Deeper than the 16 blocks of mlx-lm's default."""
    return write_model(folder, small_config(blocks=18), TINY)


@pytest.mark.parametrize("settings", [
    {}, {"num_layers": 3}, {"num_layers": -1},
    {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys":
                                          ["self_attn.q_proj", "mlp.down_proj"]}},
    {"num_layers": 1, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1, "keys":
                                          ["self_attn.v_proj", "model.layers.3.mlp.up_proj"]}}])
def test_we_read_what_mlx_lm_trained(settings, tmp_path):
    base, tokens = deep_folder(tmp_path / "base"), mx.arange(3, 51).reshape(2, 24)
    theirs = mlx_lm_adapter(base, tmp_path / "adapter", tokens, **settings)
    model, _ = load(base, "float32")
    plain = logits_of(model, tokens)
    load_adapters(model, tmp_path / "adapter")
    assert_close(theirs, logits_of(model, tokens), plain, atol=1e-3)
    assert {v.dtype for v in adapter_arrays(model).values()} == {mx.float32}


@pytest.fixture(scope="module", params=["mlx-lm", "peft"])
def foreign(request, tmp_path_factory):
    """A base of 18 blocks and an adapter on its last ones that another library wrote."""
    folder = tmp_path_factory.mktemp("foreign")
    base, adapter = deep_folder(folder / "base"), folder / "adapter"
    if request.param == "mlx-lm":
        mlx_lm_adapter(base, adapter, mx.arange(3, 51).reshape(2, 24))
        return base, adapter
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = peft.get_peft_model(transformers_model(torch, base), peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], layers_to_transform=[16, 17],
        task_type="CAUSAL_LM"))
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.5)
    theirs.save_pretrained(adapter)
    return base, adapter


def test_adapter_on_the_command_line(foreign, tmp_path, capsys, monkeypatch):
    """eval, generate, lens: what the fused folder gives, which `lora --adapter` wrote."""
    base, adapter = foreign
    both, fused = ["--ckpt", str(base), "--adapter", str(adapter)], tmp_path / "fused"
    main([*both, "--out", str(fused)])
    tokens = mx.arange(3, 51).reshape(2, 24)
    model = load(base, "float32")[0]
    plain = logits_of(model, tokens)
    load_adapters(model, adapter)
    assert_close(logits_of(load(fused, "float32")[0], tokens), logits_of(model, tokens), plain)
    for kind in ("mlx", "peft"):
        main([*both, "--out", str(tmp_path / kind), "--format", kind])
        assert f"its base is {base}" in capsys.readouterr().out
        again = load(base, "float32")[0]
        load_adapters(again, tmp_path / kind)
        np.testing.assert_array_equal(logits_of(again, tokens), logits_of(model, tokens))

    def numbers(script, argv, file):
        script.main([*argv, "--json", str(tmp_path / file)])
        capsys.readouterr()
        return json.loads((tmp_path / file).read_text())
    # eval
    few = ["data_samples=40", "max_completion_tokens=2"]
    ours, same, other = (numbers(eval_script, [*argv, *few], "report.json") for argv in
                         (both, ["--ckpt", str(fused)], ["--ckpt", str(base)]))
    assert ours["ckpt"] == f"{base} + {adapter}"
    last = lambda r: [row["answer_prob_last"] for row in r["prompts"]]
    np.testing.assert_allclose(last(ours), last(same), rtol=1e-3)
    assert not np.allclose(last(ours), last(other), rtol=1e-2)
    with_base = eval_script.make_report(str(base), True, None, few, str(adapter))
    assert with_base["base"]["ckpt"] == str(base) and last(with_base["base"]) == last(other)
    # lens
    ours, same, other = (numbers(lens_script, [*argv, "--prompt", "7 * 8 = "], "lens.json")
                         for argv in (both, ["--ckpt", str(fused)], ["--ckpt", str(base)]))
    np.testing.assert_allclose(ours["entropy"], same["entropy"], rtol=1e-3, atol=1e-3)
    assert not np.allclose(ours["entropy"], other["entropy"], rtol=1e-3, atol=1e-3)
    # generate
    texts = []
    for argv in (both, ["--ckpt", str(fused)], ["--ckpt", str(base)]):
        generate_script.main([*argv, "--prompt", "7 * 8 = ", "--max-tokens", "12"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_adapter_on_a_run(trained, small_folder, tmp_path):
    """The run's own adapter is merged, and the other one stands on that."""
    model, _, _ = load_checkpoint(trained)
    merge(model)
    tokens = mx.arange(3, 51).reshape(2, 24)
    plain = logits_of(model, tokens)
    expected = logits_of(adapted(model, seed=5), tokens)
    export(model, trained, tmp_path / "second")
    both, _, cfg = load_checkpoint(trained, tmp_path / "second")
    assert_close(logits_of(both, tokens), expected, plain)
    assert cfg.model == str(small_folder)


@pytest.fixture
def exported(tmp_path):
    export(adapted(small_model()), "someone/model@v2", tmp_path / "exported")
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
    *(({"r": r}, "a whole number of at least 1") for r in (0, ..., True, -4, 4.0)),
    *(({"lora_alpha": alpha}, "a finite number above 0")
      for alpha in ("16", 0, -8.0, float("nan"), float("inf"))),
    ({"init_lora_weights": "pissa"}, "true, false or gaussian"),
    *(({key: value}, "unset") for key, value in {
        "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"q_proj": 8}, "use_dora": True, "fan_in_fan_out": True,
        "exclude_modules": "k_proj", "a_later_idea": "on"}.items()),
    ({"a_later_idea": 0}, "unset"),
    *(({"layers_to_transform": blocks}, "blocks out of 0 to 1")
      for blocks in ([0, 2], -1, [True], ["1"], [[0]], "0")),
    ({"layers_pattern": "h"}, "layers"),
])
def test_settings_we_do_not_compute(exported, change, expected):
    change_config(exported, change)
    (key, value), = change.items()
    said = f"{key} = {json.dumps(None if value is ... else value)}, expected {expected}"
    if value is ... or value is None:
        said = f"missing {key}, expected {expected}"
    refuses(exported, "adapter_config.json", said)


@pytest.mark.parametrize("change,words", [
    (lambda x: x * float("nan"), "NaN or infinity in "),
    (lambda x: x.astype(mx.int32), "of the wrong type: "),
])
def test_ruined_numbers(exported, change, words):
    name = sorted(mx.load(str(exported / "adapter_model.safetensors")))[3]
    change_tensors(exported, lambda arrays: arrays.update({name: change(arrays[name])}))
    refuses(exported, "adapter_model.safetensors", words + name)


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
        refused(small_folder, tmp_path / "file", kind, "file cannot be written", "no folder")
        refused(exported, tmp_path / "new", kind, "no config.yaml", "load_adapters",
                f"--ckpt BASE --adapter {exported}")
    assert not (tmp_path / "new").exists()
    with pytest.raises(BadInput, match="empty holds no adapter"):
        load_checkpoint(small_folder, tmp_path / "empty")
    done = run("lora.py", "--ckpt", small_folder, "--out", exported, "--format", "peft")
    assert_one_clear_line(done, exported, "already holds a model or other files")
