"""LoRA by hand: y = W x + scale * (x A) B, scale = alpha / rank, B = 0 at the start, W frozen.

Source: LoRA 2106.09685. Where packages differ: PEFT users set alpha, mlx-lm takes the scale itself;
we set alpha and print both. A ~ U(-1/sqrt(in), 1/sqrt(in)) as in mlx-lm. Adapters are saved in
mlx-lm's format, PEFT's is written and read too; in both places they give the same logits. Loading
is strict (files/adapters.py).

    python lora.py --ckpt runs/sft --out fused                  # fuse: a folder in the Hub's layout
    python lora.py --ckpt runs/sft --out adapter --format peft  # the adapter alone; mlx: for mlx-lm
    python lora.py --ckpt models/tiny --adapter FOLDER --out fused      # mlx-lm's or PEFT's adapter
"""
import argparse
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from config import BadInput, Config, load_config, run_main
from files.adapters import (
    MODULES,
    from_peft,
    layer_names,
    mlx_files,
    peft_files,
    read_adapter,
    to_peft,
)
from files.model_folder import (
    check_numbers,
    check_tensors,
    find_folder,
    model_files,
    root_model,
    write_files,
)
from model import Llama, load, save_model
from tokenizer import Tokenizer


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or quantised, plus a trainable update of low rank.

    lora_a (in, r), lora_b (r, out): float32 whatever the base's type, so that Adam's small steps
    are not rounded away
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float):
        super().__init__()
        out_dims, in_dims = linear.weight.shape
        in_dims = getattr(linear, "in_dims", in_dims)       # a quantised layer's weight is packed
        self.linear = linear
        self.lora_a = mx.random.uniform(-1, 1, (in_dims, rank)) * in_dims ** -0.5    # (in, r)
        self.lora_b = mx.zeros((rank, out_dims))        # (r, out); 0: the update starts at nothing
        self.scale, self.enabled = scale, True

    def __call__(self, x: mx.array) -> mx.array:
        if not self.enabled:
            return self.linear(x)
        update = (x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)    # (..., out)
        # cast back: a float32 scale would turn a bfloat16 model's whole residual stream to float32
        return self.linear(x) + (self.scale * update).astype(x.dtype)

    def fused(self) -> nn.Module:
        """The plain linear layer, the update added to its weight in float32 and then cast back.

        A quantised weight is unpacked and stays so: rounding it again would eat the update.
        """
        if hasattr(self.linear, "dense"):
            self.linear = self.linear.dense()
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
    paths = [f"model.layers.{block}.{MODULES[t]}"
             for block in range(model.args.num_hidden_layers) for t in targets]
    wrap(model, paths, rank, alpha / rank)


def wrap(model: Llama, paths: list[str], rank: int, scale: float) -> None:
    """`apply_lora` of the linear layers at these paths: of any blocks, not the same in each."""
    model.freeze()
    named = dict(model.named_modules())
    model.update_modules(tree_unflatten(
        [(path, LoRALinear(named[path], rank, scale)) for path in paths]))
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


def fingerprint(model: Llama) -> str:
    """Tell bases of one shape apart by the final norm's gains, rounded alike for any load type."""
    gains = np.array(model.model.norm.weight.astype(mx.bfloat16).astype(mx.float32))
    return hashlib.sha256(gains.tobytes()).hexdigest()[:16]


def adapter_arrays(model: Llama) -> dict[str, mx.array]:
    """The adapter's tensors by mlx-lm's names: model.layers.0.self_attn.q_proj.lora_a, ..."""
    return {k: v for k, v in tree_flatten(model.parameters())
            if k.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}


def about_adapter(model: Llama, base: str | Path) -> dict:
    """What an adapter's folder says of it; base: the model that it belongs on."""
    wrapped = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    layer = next(iter(wrapped.values()))
    return {"rank": layer.lora_a.shape[1], "scale": layer.scale, "base": base,
            "layers": layer_names(list(wrapped), model.args.num_hidden_layers),
            "fingerprint": fingerprint(model)}


def checkpoint_files(model: Llama, cfg: Config) -> dict:
    """What a run saves for eval.py and others, {file name: content}: the adapter, or all weights."""
    if not cfg.full:
        return mlx_files(adapter_arrays(model), about_adapter(model, cfg.model))
    origin = find_folder(root_model(cfg.model), weights=False)
    return model_files(origin, dict(tree_flatten(model.parameters())), model.args.rope_theta,
                       model.args.rope_scaling)


def load_adapters(model: Llama, folder: str | Path) -> None:
    """Wrap the model in place with an adapter, ours, mlx-lm's or PEFT's; BadInput lists misfits.

    The adapter may be on any of the blocks' linear layers, in any blocks. A PEFT adapter does not
    store its base's identity, nor does one of mlx-lm's; ours does, and it is checked.
    """
    about, found, file = read_adapter(Path(folder), model.args.num_hidden_layers)
    wrap(model, about["paths"], about["rank"], about["scale"])
    expected = adapter_arrays(model)
    # by the names in the file, which are those that its owner can look for
    check_tensors(found, to_peft(expected) if about["is_peft"] else expected,
                  f"adapter {folder} on this model (it was trained on {about['base']})")
    check_numbers(found, file)
    found = from_peft(found) if about["is_peft"] else found
    if about["fingerprint"] not in (None, fingerprint(model)):
        raise BadInput(f"adapter {folder} was trained on another model of the same shape "
                       f"({about['base']}); load it on that one")
    arrays = [(name, array.astype(mx.float32)) for name, array in found.items()]
    model.load_weights(arrays, strict=False)    # all of them fit: just checked
    mx.eval(model.parameters())


# --------------------------------------------------------------------------------------------------
# from a run to its model


def load_base(name: str | Path, dtype: str | None = None, bits: int | None = None,
              from_scratch: bool = False, group_size: int | None = None) -> tuple[Llama, Tokenizer | None]:
    """`model.load`, where name may also be a run: its adapter is merged first.

    So that an adapter trained on top is all that separates the policy from where it started, and
    switching it off gives the reference.
    dtype   goes for the whole chain of runs under name; None: each run's own
    bits    a run's own quantised base stays as it was trained on until its adapter is merged; then
            its layers are quantised to these bits, unless it had the same: then they stay, and
            those that the adapter was merged into stay plain, or rounding would eat the update
    raises  BadInput
    """
    if root_model(name) == name or from_scratch:
        return load(root_model(name), dtype, bits, from_scratch, group_size)
    model, tokenizer, _ = load_checkpoint(name, dtype=dtype)
    if not bits:
        merge(model)
        return model, tokenizer
    from engine.quant import packed_settings, quantize  # QLoRA alone needs it
    stored = packed_settings(model)
    merge(model)
    if {b for b, _ in stored} != {bits}:
        quantize(model, bits, group_size)
    return model, tokenizer


def load_checkpoint(ckpt: str | Path, adapter: str | Path | None = None,
                    dtype: str | None = None) -> tuple[Llama, Tokenizer, Config | None]:
    """A run folder (adapter or full weights), model folder or Hub name -> (model, tokenizer, cfg).

    adapter  a folder, of ours, mlx-lm's or PEFT's: on top of the checkpoint, whose own adapter is
             then merged
    dtype    None: a run's own
    raises   BadInput, also where there is no tokenizer
    """
    folder, cfg = Path(ckpt), None
    if (folder / "config.yaml").exists():
        cfg = load_config(folder / "config.yaml")
        # a whole model's last file (model.save_model)
        if not any((folder / name).exists() for name in ("adapters.safetensors", "config.json")):
            raise BadInput(f"run folder {folder} holds no weights yet; "
                           f"finish it with `python train.py {folder}/config.yaml`")
    own = (folder / "adapter_config.json").exists()
    if own and cfg is None:
        raise BadInput(f"{folder} holds an adapter but no config.yaml, so its base model is "
                       f"unknown; give --ckpt BASE --adapter {folder} (load_adapters does it on a "
                       "model you loaded)")
    base, top = (cfg.model, folder) if own and adapter is None else (ckpt, adapter)
    if cfg:
        model, tokenizer = load_base(base, dtype or cfg.dtype, cfg.bits)
    else:
        model, tokenizer = load_base(base, dtype)
    if top is not None:
        load_adapters(model, top)
    if tokenizer is None:
        raise BadInput(f"{base} has no tokenizer.model and no tokenizer.json; add the model's own")
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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Fuse a run's adapter into its base model, or write the adapter alone.")
    parser.add_argument("--ckpt", required=True,
                        help="run folder; with --adapter any model folder or Hub name")
    parser.add_argument("--adapter", metavar="FOLDER", help="take this adapter, ours, mlx-lm's or "
                        "peft's, on top of --ckpt")
    parser.add_argument("--out", required=True, type=Path, help="folder to write, new or empty")
    parser.add_argument("--format", choices=("hub", "peft", "mlx"), default="hub",
                        help="hub: base and adapter fused, in the Hub's layout (default); peft, "
                             "mlx: the adapter alone, for peft or mlx-lm")
    args = parser.parse_args(argv)
    check_new(args.out)
    model, _, cfg = load_checkpoint(args.ckpt, args.adapter)
    if not adapter_arrays(model):
        raise BadInput(f"{args.ckpt} has no adapter to fuse; it is already a whole model: give an "
                       "adapter with --adapter FOLDER")
    name, base = (args.adapter, args.ckpt) if args.adapter else (args.ckpt, cfg.model)
    if args.format != "hub":
        make_files = peft_files if args.format == "peft" else mlx_files
        write_files(args.out, make_files(adapter_arrays(model), about_adapter(model, base)))
        print(f"wrote the adapter of {name} to {args.out}; its base is {base}")
        if root_model(base) != base:
            print(f"{base} is a run itself, and the base is that run fused: "
                  f"`python lora.py --ckpt {base} --out FOLDER`")
        return
    merge(model)
    from engine.quant import unquantize  # as above
    unquantize(model, model.model.norm.weight.dtype)
    save_model(model, args.out, root_model(base))
    print(f"fused {name} into {args.out}")


if __name__ == "__main__":
    run_main(main)
