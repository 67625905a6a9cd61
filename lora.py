"""LoRA by hand: y = W x + scale * (x A) B, scale = alpha / rank, B = 0 at the start, W frozen.

Source: LoRA 2106.09685. Where packages differ: PEFT users set alpha, mlx-lm takes the scale itself;
we set alpha and print both. A ~ U(-1/sqrt(in), 1/sqrt(in)) as in mlx-lm. Adapters are saved in
mlx-lm's format and load there with the same logits. Loading is strict: the prior code fell back to
q and v where it found no list of targets, dropped the rest silently, and evaluated half an adapter.

    python lora.py --ckpt runs/sft --out fused     # fuse into a folder in the Hub's layout
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

from config import BadInput, Config, load_config, run_main, write_text
from hub import read_json, read_safetensors
from model import Llama, check_tensors, load, quantize, save_model, save_safetensors
from tokenizer import Tokenizer

MODULES = {**{t: f"self_attn.{t}_proj" for t in "qkvo"},
           **{t: f"mlp.{t}_proj" for t in ("gate", "up", "down")}}


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or quantised, plus a trainable update of low rank.

    lora_a (in, r), lora_b (r, out): float32 whatever the base's type, so that Adam's small steps
    are not rounded away
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float):
        super().__init__()
        # a quantised weight is packed: 32 / bits numbers to a uint32
        out_dims, in_dims = linear.weight.shape
        in_dims *= 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else 1
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
        """The plain linear layer, the update added to its weight in float32 and then cast back."""
        if isinstance(self.linear, nn.QuantizedLinear):
            raise BadInput("a quantised base cannot be fused: rounding would eat the update; "
                           "run from the adapter, or train without bits")
        self.linear.weight = self.fused_weight()
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
    """Wrap the model in place with an adapter, ours or mlx-lm's; BadInput lists what misfits."""
    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json")
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


def root_model(name: str | Path) -> str | Path:
    """The model under a run's adapter, under whatever runs it was itself trained on."""
    while (Path(name) / "adapter_config.json").exists() and (Path(name) / "config.yaml").exists():
        name = load_config(Path(name) / "config.yaml").model
    return name


def load_base(name: str | Path, dtype: str | None = None, bits: int | None = None,
              from_scratch: bool = False) -> tuple[Llama, Tokenizer | None]:
    """`model.load`, where name may also be a run: its adapter is merged first.

    So that an adapter trained on top is all that separates the policy from where it started, and
    switching it off gives the reference. raises  BadInput
    """
    if root_model(name) == name or from_scratch:
        return load(root_model(name), dtype, bits, from_scratch)
    model, tokenizer, _ = load_checkpoint(name)
    merge(model)
    if bits:
        quantize(model, bits)
    return model, tokenizer


def load_checkpoint(ckpt: str | Path) -> tuple[Llama, Tokenizer, Config | None]:
    """A run folder (adapter or full weights), model folder or Hub name -> (model, tokenizer, cfg).

    raises   BadInput, also where there is no tokenizer
    """
    folder, cfg = Path(ckpt), None
    if (folder / "config.yaml").exists():
        cfg = load_config(folder / "config.yaml")
        if not any((folder / name).exists()
                   for name in ("adapters.safetensors", "model.safetensors")):
            raise BadInput(f"run folder {folder} holds no weights yet; "
                           f"finish it with `python train.py {folder}/config.yaml`")
    adapter = (folder / "adapter_config.json").exists()
    if adapter and cfg is None:
        raise BadInput(f"{folder} holds an adapter but no config.yaml, so its base model is "
                       "unknown; use load_adapters on a model you loaded")
    model, tokenizer = load_base(cfg.model if adapter else ckpt, cfg.dtype if cfg else None,
                            cfg.bits if cfg else None)
    if adapter:
        load_adapters(model, folder)
    if tokenizer is None:
        raise BadInput(f"{cfg.model if adapter else ckpt} has no tokenizer.model and no "
                       "tokenizer.json; add the model's own")
    return model, tokenizer, cfg


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Fuse a run's adapter into its base model.")
    parser.add_argument("--ckpt", required=True, help="run folder")
    parser.add_argument("--out", required=True, type=Path,
                        help="folder to write, in the Hub's layout")
    args = parser.parse_args(argv)
    model, _, cfg = load_checkpoint(args.ckpt)
    if not adapter_arrays(model):
        raise BadInput(f"{args.ckpt} has no adapter to fuse; it is already a whole model")
    if (args.out / "config.json").exists():
        raise BadInput(f"{args.out} already holds a model; name a new folder")
    merge(model)
    save_model(model, args.out, root_model(cfg.model))
    print(f"fused {args.ckpt} into {args.out}")


if __name__ == "__main__":
    run_main(main)
