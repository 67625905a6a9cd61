"""LoRA by hand: y = W x + scale * (x A) B, scale = alpha / rank, B = 0 at the start, W frozen.

Source: LoRA 2106.09685. Where packages differ: PEFT users set alpha, mlx-lm takes the scale itself;
we set alpha and print both. A ~ U(-1/sqrt(in), 1/sqrt(in)) as in mlx-lm. Adapters are saved in
mlx-lm's format, PEFT's is written and read too; in both places they give the same logits. Loading
is strict (why: study/prior_work.md).

    python lora.py --ckpt runs/sft --out fused                  # fuse: a folder in the Hub's layout
    python lora.py --ckpt runs/sft --out adapter --format peft  # the adapter alone; mlx: for mlx-lm
"""
import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from config import BadInput, Config, load_config, run_main, write_bytes, write_text
from hub import read_json, read_safetensors
from model import Llama, check_tensors, load, save_model, save_safetensors
from quant import QuantizedLinear, is_quantized, plain_layer, quantize, unquantize
from tokenizer import Tokenizer

MODULES = {**{t: f"self_attn.{t}_proj" for t in "qkvo"},
           **{t: f"mlp.{t}_proj" for t in ("gate", "up", "down")}}
MLX_FILES = ("adapters.safetensors", "adapter_config.json")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
PEFT_TARGETS = {name.split(".")[1]: t for t, name in MODULES.items()}    # q_proj: q, ...
# a PEFT config's settings that do not change what a trained adapter computes
PEFT_NEUTRAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout",
                "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"}


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or quantised, plus a trainable update of low rank.

    lora_a (in, r), lora_b (r, out): float32 whatever the base's type, so that Adam's small steps
    are not rounded away
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float):
        super().__init__()
        out_dims, in_dims = linear.weight.shape
        if isinstance(linear, QuantizedLinear):     # its weight is packed
            in_dims = linear.scales.shape[1] * linear.group_size
        self.linear = linear
        self.lora_a = mx.random.uniform(-1, 1, (in_dims, rank)) * in_dims ** -0.5
        self.lora_b = mx.zeros((rank, out_dims))
        self.scale, self.enabled = scale, True

    def __call__(self, x: mx.array) -> mx.array:
        if not self.enabled:
            return self.linear(x)
        update = (x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        # cast back: a float32 scale would turn a bfloat16 model's whole residual stream to float32
        return self.linear(x) + (self.scale * update).astype(x.dtype)

    def fused(self) -> nn.Module:
        """The plain linear layer, the update added to its weight in float32 and then cast back.

        A quantised weight is unpacked and stays so: rounding it again would eat the update.
        """
        if isinstance(self.linear, QuantizedLinear):
            self.linear = plain_layer(self.linear, self.linear.unpacked().astype(self.linear.dtype))
        self.linear.weight = self.fused_weight()
        mx.eval(self.linear.parameters())   # one by one: no second model beside the first
        return self.linear

    def fused_weight(self) -> mx.array:
        """W + scale * (A B)^T, computed in float32, in W's type."""
        weight = self.linear.weight
        update = self.scale * (self.lora_a @ self.lora_b).T
        return (weight.astype(mx.float32) + update).astype(weight.dtype)


def apply_lora(model: Llama, rank: int, alpha: float, targets: tuple[str, ...]) -> None:
    """Freeze the model, wrap the targets (of q, k, v, o, gate, up, down) in every block, in place.

    The model computes the same as before, since B = 0. Only lora_a and lora_b stay trainable.
    """
    model.freeze()
    for block in model.model.layers:
        named = dict(block.named_modules())
        wrapped = [(MODULES[t], LoRALinear(named[MODULES[t]], rank, alpha / rank)) for t in targets]
        block.update_modules(tree_unflatten(wrapped))
    # `linear` inside the wrapper stays frozen; only the wrapper's own two arrays thaw
    for _, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.unfreeze(recurse=False, keys=["lora_a", "lora_b"])


def merge(model: Llama) -> None:
    """Fuse every LoRALinear into a plain linear layer, in place."""
    for block in model.model.layers:
        fused = [(name, module.fused()) for name, module in block.named_modules()
                 if isinstance(module, LoRALinear)]
        block.update_modules(tree_unflatten(fused))


@contextmanager
def adapters_off(model: Llama) -> Iterator[None]:
    """Within, the model computes as its base: the reference policy without a second copy."""
    layers = [m for _, m in model.named_modules() if isinstance(m, LoRALinear)]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def fused_for_decoding(model: Llama) -> Iterator[None]:
    """Within, each float32 LoRALinear is one matrix: decoding is spared two small products.

    Other types stay as they are: bfloat16 would round the update away, and what samples would no
    longer be what is trained.
    """
    layers = [m for _, m in model.named_modules()
              if isinstance(m, LoRALinear) and m.linear.weight.dtype == mx.float32]
    weights = [layer.linear.weight for layer in layers]
    try:
        for layer in layers:
            layer.linear.weight, layer.enabled = layer.fused_weight(), False
        mx.eval([layer.linear.weight for layer in layers])
        yield
    finally:
        for layer, weight in zip(layers, weights):
            layer.linear.weight, layer.enabled = weight, True


def fingerprint(model: Llama) -> str:
    """Tell bases of one shape apart by the final norm's gains, rounded alike for any load type."""
    gains = np.array(model.model.norm.weight.astype(mx.bfloat16).astype(mx.float32))
    return hashlib.sha256(gains.tobytes()).hexdigest()[:16]


def adapter_arrays(model: Llama) -> dict[str, mx.array]:
    """The adapter's tensors by mlx-lm's names: model.layers.0.self_attn.q_proj.lora_a, ..."""
    return {k: v for k, v in tree_flatten(model.parameters())
            if k.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}


def save_adapters(model: Llama, cfg: Config, folder: Path) -> None:
    """Write adapters.safetensors and adapter_config.json, which mlx-lm reads too."""
    settings = {
        "fine_tune_type": "lora", "num_layers": model.args.num_hidden_layers,
        "lora_parameters": {"rank": cfg.lora_rank, "alpha": cfg.lora_alpha,
                            "scale": cfg.lora_alpha / cfg.lora_rank, "dropout": 0.0,
                            "keys": [MODULES[t] for t in cfg.lora_targets]},
        "model": cfg.model, "base_fingerprint": fingerprint(model),
    }
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    save_safetensors(folder / "adapters.safetensors", adapter_arrays(model))


def load_adapters(model: Llama, folder: str | Path) -> None:
    """Wrap the model in place with an adapter, ours, mlx-lm's or PEFT's; BadInput lists misfits."""
    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json")
    if "peft_type" in settings:
        load_peft(model, folder, settings)
        return
    lora = settings.get("lora_parameters", {})
    kinds = {name: t for t, name in MODULES.items()}
    unknown = [k for k in lora.get("keys") or [] if k not in kinds]
    if (settings.get("fine_tune_type", "lora") != "lora" or not lora.get("keys") or unknown
            or not {"rank", "scale"} <= lora.keys()):
        raise BadInput(f"{folder}/adapter_config.json: expected fine_tune_type lora with "
                       f"lora_parameters rank, scale and keys out of {', '.join(kinds)}; "
                       f"got {json.dumps(settings)[:300]}")
    base = settings.get("base_fingerprint")
    found = read_safetensors(folder / "adapters.safetensors")
    apply_lora(model, lora["rank"], lora["scale"] * lora["rank"],
               tuple(kinds[k] for k in lora["keys"]))
    check_tensors(found, adapter_arrays(model), f"adapter {folder} on this model "
                  f"(it was trained on {settings.get('model', 'an unknown one')})")
    if base and base != fingerprint(model):
        raise BadInput(f"adapter {folder} was trained on another model of the same shape "
                       f"({settings.get('model')}); load it on that one")
    model.load_weights(list(found.items()), strict=False)  # all of them fit: just checked
    mx.eval(model.parameters())


def peft_name(name: str) -> str:
    """PEFT's name of one of our tensors, which is there the other way round.

    example  model.layers.0.mlp.up_proj.lora_a, (in, r)
             -> base_model.model.model.layers.0.mlp.up_proj.lora_A.weight, (r, in)
    """
    return f"base_model.model.{name[:-1]}{name[-1].upper()}.weight"


def export_peft(model: Llama, folder: Path, base_name: str | Path) -> None:
    """Write the adapter as `peft.PeftModel.from_pretrained(base, folder)` reads it.

    base_name   a folder, or the Hub's NAME or NAME@REVISION: what the adapter belongs on
    """
    arrays = adapter_arrays(model)
    layer = next(m for _, m in model.named_modules() if isinstance(m, LoRALinear))
    rank, used = layer.lora_a.shape[1], {name.split(".")[-2] for name in arrays}
    name, _, revision = str(base_name).partition("@")
    if Path(base_name).expanduser().is_dir():
        name, revision = str(base_name), None
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name,
        "revision": revision or None, "r": rank, "lora_alpha": layer.scale * rank,
        "lora_dropout": 0.0, "target_modules": [n for n in PEFT_TARGETS if n in used],
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True,
    }
    save_safetensors(folder / PEFT_FILES[0], {peft_name(k): v.T for k, v in arrays.items()})
    # last: its presence says that all is there
    write_text(folder / PEFT_FILES[1], json.dumps(settings, indent=2) + "\n")


def read_peft_config(settings: dict, where: str) -> tuple[int, float, tuple[str, ...]]:
    """A PEFT config's rank, alpha as of alpha / rank, and targets.

    raises   BadInput, naming every setting that asks for more than two matrices to a linear layer
    """
    rank, alpha, targets = (settings.get(k) for k in ("r", "lora_alpha", "target_modules"))
    number = lambda value, *kinds: type(value) in kinds and value > 0
    read = {  # setting: is it one we compute, and what it should be
        "peft_type": (settings["peft_type"] == "LORA", "LORA"),
        "r": (number(rank, int), "a whole number above 0"),
        "lora_alpha": (number(alpha, int, float), "a number above 0"),
        "target_modules": (isinstance(targets, list) and targets
                           and set(map(str, targets)) <= PEFT_TARGETS.keys(),
                           f"a list out of {', '.join(PEFT_TARGETS)}"),
        "bias": (settings.get("bias", "none") == "none", "none"),
        "use_rslora": (settings.get("use_rslora") in (None, False, True), "true or false"),
        # the others change the base's own weights as well
        "init_lora_weights": (settings.get("init_lora_weights", True) in (True, False, "gaussian"),
                              "true, false or gaussian"),
    }
    empty = lambda value: value is None or value is False or value in ("", [], {})
    mistakes = [(k, expected) for k, (fits, expected) in read.items() if not fits]
    # whatever else is set, by this PEFT or a later one, may change what is computed
    mistakes += [(k, "unset") for k, v in settings.items()
                 if k not in read.keys() | PEFT_NEUTRAL and not empty(v)]
    if mistakes:
        raise BadInput(f"{where}: not a PEFT adapter that can be read here: " + "; ".join(
            f"{k} = {json.dumps(settings.get(k))[:80]}, expected {expected}"
            for k, expected in mistakes))
    scale = alpha / (rank ** 0.5 if settings.get("use_rslora") else rank)
    return rank, scale * rank, tuple(t for n, t in PEFT_TARGETS.items() if n in targets)


def load_peft(model: Llama, folder: Path, settings: dict) -> None:
    """`load_adapters` of a folder in PEFT's format. The base's identity is not stored in one."""
    rank, alpha, targets = read_peft_config(settings, f"{folder}/{PEFT_FILES[1]}")
    found = read_safetensors(folder / PEFT_FILES[0])
    apply_lora(model, rank, alpha, targets)
    expected = {peft_name(k): (k, v) for k, v in adapter_arrays(model).items()}
    check_tensors(found, {k: v.T for k, (_, v) in expected.items()}, f"adapter {folder} on this "
                  f"model (it names {settings.get('base_model_name_or_path')} as its base)")
    model.load_weights([(expected[k][0], v.T.astype(mx.float32)) for k, v in found.items()],
                       strict=False)  # all of them fit: just checked
    mx.eval(model.parameters())


def root_model(name: str | Path) -> str | Path:
    """The model under a run's adapter, under whatever runs it was itself trained on."""
    while (Path(name) / "adapter_config.json").exists() and (Path(name) / "config.yaml").exists():
        name = load_config(Path(name) / "config.yaml").model
    return name


def load_base(name: str | Path, dtype: str | None = None, bits: int | None = None,
              from_scratch: bool = False, group_size: int = 64) -> tuple[Llama, Tokenizer | None]:
    """`model.load`, where name may also be a run: its adapter is merged first.

    So that an adapter trained on top is all that separates the policy from where it started, and
    switching it off gives the reference. A run's own quantised base stays so, but for the layers
    that its adapter is merged into. raises  BadInput
    """
    if root_model(name) == name or from_scratch:
        return load(root_model(name), dtype, bits, from_scratch, group_size)
    model, tokenizer, _ = load_checkpoint(name)
    merge(model)
    if bits and not is_quantized(model):
        quantize(model, bits, group_size)
    return model, tokenizer


def load_checkpoint(ckpt: str | Path) -> tuple[Llama, Tokenizer, Config | None]:
    """A run folder (adapter or full weights), model folder or Hub name -> (model, tokenizer, cfg).

    raises   BadInput, also where there is no tokenizer
    """
    folder, cfg = Path(ckpt), None
    if (folder / "config.yaml").exists():
        cfg = load_config(folder / "config.yaml")
        # a whole model's last file (model.save_model)
        if not any((folder / name).exists() for name in ("adapters.safetensors", "config.json")):
            raise BadInput(f"run folder {folder} holds no weights yet; "
                           f"finish it with `python train.py {folder}/config.yaml`")
    adapter = (folder / "adapter_config.json").exists()
    if adapter and cfg is None:
        raise BadInput(f"{folder} holds an adapter but no config.yaml, so its base model is "
                       "unknown; use load_adapters on a model you loaded")
    settings = {"dtype": cfg.dtype, "bits": cfg.bits,
                "group_size": cfg.bits_group_size} if cfg else {}
    model, tokenizer = load_base(cfg.model if adapter else ckpt, **settings)
    if adapter:
        load_adapters(model, folder)
    if tokenizer is None:
        raise BadInput(f"{cfg.model if adapter else ckpt} has no tokenizer.model and no "
                       "tokenizer.json; add the model's own")
    return model, tokenizer, cfg


def check_new(folder: Path) -> None:
    """BadInput unless a folder to write is absent or empty: two models in one would mix."""
    try:
        taken = any(folder.iterdir())
    except FileNotFoundError:
        taken = False
    except OSError:     # a file, or not to be looked into
        taken = True
    if taken:
        raise BadInput(f"{folder} already holds a model or other files; name a new folder")


def export(model: Llama, ckpt: str | Path, cfg: Config, folder: Path, kind: str) -> None:
    """Write a run's adapter alone, for peft or mlx-lm, and say which base it belongs on."""
    if kind == "peft":
        export_peft(model, folder, cfg.model)
    else:
        for name in MLX_FILES:
            write_bytes(folder / name, (Path(ckpt) / name).read_bytes())
    print(f"wrote the adapter of {ckpt} to {folder}; its base is {cfg.model}")
    if root_model(cfg.model) != cfg.model:
        print(f"{cfg.model} is a run itself, and the base is that run fused: "
              f"`python lora.py --ckpt {cfg.model} --out FOLDER`")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Fuse a run's adapter into its base model, or write the adapter alone.")
    parser.add_argument("--ckpt", required=True, help="run folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write, new or empty")
    parser.add_argument("--format", choices=("hub", "peft", "mlx"), default="hub",
                        help="hub: base and adapter fused, in the Hub's layout (default); peft, "
                             "mlx: the adapter alone, for peft or mlx-lm")
    args = parser.parse_args(argv)
    check_new(args.out)
    model, _, cfg = load_checkpoint(args.ckpt)
    if not adapter_arrays(model):
        raise BadInput(f"{args.ckpt} has no adapter to fuse; it is already a whole model")
    if args.format != "hub":
        export(model, args.ckpt, cfg, args.out, args.format)
        return
    merge(model)
    unquantize(model, model.model.norm.weight.dtype)
    save_model(model, args.out, root_model(cfg.model))
    print(f"fused {args.ckpt} into {args.out}")


if __name__ == "__main__":
    run_main(main)
