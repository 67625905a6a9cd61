"""QLoRA's base: weights as small codes in groups, unpacked only while a product needs them.

    W[i, j] = scale * code + bias,   code 0 .. 2^bits - 1, one scale and bias for a group of a row

With groups of 64 and 16-bit scales, 4 bits cost 4.5 bits a weight (5 with 32-bit ones). The layers
hold what mlx-community's checkpoints hold, under the same names: weight (codes, packed into
uint32), scales, biases. Where we differ from QLoRA (2305.14314): affine codes, not NF4, and scales
that are not quantised again; like it, embedding and unembedding are left alone.

On Metal and CUDA `mx.quantized_matmul` does the work. On MLX's Linux CPU backend it is a scalar
loop: for more than FEW_ROWS rows it is faster to unpack the matrix and call the BLAS. What is
unpacked lives for one product, and is made again for the gradient: kept, all of it together would
be the float32 model that quantising was to avoid.
"""
import functools

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from engine.blas import linux_cpu
from mlx.utils import tree_flatten, tree_unflatten

from files.keys import BITS, BadInput
from files.model_folder import default_dtype

FEW_ROWS = 2            # of x, for which the scalar loop is the faster one
# weights that are unpacked together: 8 MiB of float32. MLX's CPU backend allocates for dozens of
# operations ahead, so that much more is taken at a time (128 MiB pieces: 2 GiB)
PIECE = 2 ** 21
GROUP_SIZES = (32, 64, 128)    # what MLX's affine quantisation has


@functools.cache
def make_unpack(bits: int, group_size: int):
    """`mx.dequantize` to float32: (O, I * bits / 32), (O, I / group_size) twice -> (O, I)."""
    def unpack(codes, scales, biases):
        codes = (codes[..., None] >> mx.arange(0, 32, bits, dtype=mx.uint32)) & (2 ** bits - 1)
        codes = codes.astype(mx.float32).reshape(*scales.shape, group_size)
        return (codes * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)

    if linux_cpu() and 32 % bits == 0:
        return mx.compile(unpack)   # fused, half the time of MLX's loop
    return lambda *packed: mx.dequantize(*packed, group_size, bits).astype(mx.float32)


def packed_product(x: mx.array, arrays: list[mx.array], unpack) -> mx.array:
    """x W^T for x (..., I), with W (O, I) float32 = unpack(rows of `arrays`), a piece at a time."""
    rows = max(1, PIECE // x.shape[-1])
    starts = range(0, arrays[0].shape[0], rows)

    def piece(start, after):
        # after: or the scheduler unpacks many matrices ahead, and mx.compile, seeing the same
        # computation in value and gradient, would do it once and keep all of them in between
        return unpack(*mx.depends([a[start:start + rows] for a in arrays], [after]))

    @mx.custom_function
    def product(x):
        return mx.concatenate([x @ piece(i, x).T for i in starts], axis=-1)

    @product.vjp
    def gradient(x, cotangent, _):
        total = 0
        for i in starts:
            part = cotangent[..., i:i + rows]
            total = total + part @ piece(i, part)
        return total

    return product(x)


class QuantizedLinear(nn.Module):
    """y = W x + b with W (O, I) in codes; frozen.

    dtype   of what it gives when it serves as an embedding; a product keeps its input's type
    """

    def __init__(self, weight: mx.array, scales: mx.array, biases: mx.array, bits: int,
                 group_size: int, dtype: mx.Dtype, bias: mx.array | None = None):
        super().__init__()
        self.weight, self.scales, self.biases = weight, scales, biases
        self.bits, self.group_size, self.dtype = bits, group_size, dtype
        if bias is not None:
            self.bias = bias
        self.freeze()

    @classmethod
    def empty(cls, like: nn.Module, bits: int, group_size: int, dtype: mx.Dtype, where: str):
        """Room for a quantised form of a linear layer or embedding; BadInput where it cannot be."""
        O, I = like.weight.shape
        check_settings(bits, group_size, I, where)
        table = lambda width, kind: mx.zeros((O, width), kind)
        return cls(table(I * bits // 32, mx.uint32), table(I // group_size, mx.float32),
                   table(I // group_size, mx.float32), bits, group_size, dtype, like.get("bias"))

    @classmethod
    def pack(cls, weight: mx.array, bias: mx.array | None, bits: int, group_size: int):
        """Quantise (O, I): a group's smallest and largest weight become its ends."""
        return cls(*mx.quantize(weight, group_size, bits), bits, group_size, weight.dtype, bias)

    def unpacked(self, rows=slice(None)) -> mx.array:
        """W, or some of its rows, in float32."""
        return make_unpack(self.bits, self.group_size)(
            self.weight[rows], self.scales[rows], self.biases[rows])

    @property
    def in_dims(self) -> int:
        """I, which the packed weight's shape does not show."""
        return self.scales.shape[1] * self.group_size

    def dense(self) -> nn.Module:
        """The plain layer of these weights."""
        return plain_layer(self, self.unpacked().astype(self.dtype))

    def product(self, x: mx.array) -> mx.array:
        if linux_cpu() and x.size > FEW_ROWS * x.shape[-1]:
            return packed_product(x.astype(mx.float32), [self.weight, self.scales, self.biases],
                                  make_unpack(self.bits, self.group_size)).astype(x.dtype)
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, transpose=True,
                                   group_size=self.group_size, bits=self.bits)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.product(x)
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(QuantizedLinear):
    """Rows of the table by token, and the table as a matrix where the unembedding is tied to it."""

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.unpacked(tokens).astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.product(x)


class HalfLinear(nn.Module):
    """A 16-bit matrix under a float32 model, cast where it is used; frozen.

    Beside a quantised 1B model, a float32 embedding would be two thirds of all memory.
    """

    def __init__(self, weight: mx.array):
        super().__init__()
        self.weight = weight    # (O, I)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return packed_product(x, [self.weight], lambda rows: rows.astype(mx.float32))


class HalfEmbedding(HalfLinear):
    def __call__(self, tokens: mx.array) -> mx.array:
        return self.weight[tokens].astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return super().__call__(x)


def group_for(width: int) -> int:
    """Weights of a row that share a scale: 64, or 32 where 64 does not divide the row."""
    return 64 if width % 64 == 0 else 32


def check_settings(bits: int, group_size: int, width: int, where: str) -> None:
    """Raises BadInput on settings that MLX has not, or that do not divide a layer's width."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise BadInput(f"{where}: {bits} bits in groups of {group_size} are not supported; "
                       f"expected {', '.join(map(str, BITS))} bits, groups of "
                       f"{', '.join(map(str, GROUP_SIZES))}")
    if width % group_size:
        fits = [str(g) for g in GROUP_SIZES if width % g == 0]
        raise BadInput(f"{where}: groups of {group_size} do not divide the input width {width}; "
                       + (f"take groups of {' or '.join(fits)}" if fits else
                          "no group size does: train without bits"))


def stored_settings(raw: dict, where: str) -> dict | None:
    """What config.json says of a checkpoint's quantisation, in mlx-community's layout; or None.

    A dict of bits and group_size, and by a layer's name its own, or false. raises  BadInput on
    other layouts (bitsandbytes, GPTQ, AWQ) and other codes (mxfp4)
    """
    settings = raw.get("quantization") or raw.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict) or not {"bits", "group_size"} <= settings.keys() \
            or settings.get("mode", "affine") != "affine" or "quant_method" in settings:
        raise BadInput(f"{where}: quantised as {str(settings)[:120]}; expected mlx-community's "
                       "affine layout ({\"bits\": 4, \"group_size\": 64}), or the unquantised "
                       "model with bits=4 given here")
    return settings


def settings_of(path: str, settings: dict) -> tuple[int, int]:
    """One layer's bits and group size: its own, or everyone's."""
    own = settings.get(path)
    own = own if isinstance(own, dict) else settings
    return own.get("bits", settings["bits"]), own.get("group_size", settings["group_size"])


def layer_maker(model: nn.Module, found: dict[str, mx.array], raw: dict, bits: int | None,
                group_size: int | None, dtype: mx.Dtype | None, where: str):
    """The function that packs layers while a checkpoint is read: (path, layer, own, cast) -> layer.

    own, cast   the layer's tensors as they are stored, and in the type that is asked for
    Layers that the checkpoint has packed already are put into the model, still empty, at once.
    raises      BadInput
    """
    model.parts = 1     # each part of a batch would unpack all matrices again
    kind = dtype or default_dtype()
    stored = stored_settings(raw, f"{where}/config.json")
    if not stored and any(name.endswith(".scales") for name in found):
        stored = {"bits": bits, "group_size": 32}   # a GGUF's own codes
    if stored and bits and (bits, group_size or stored["group_size"]) != settings_of("", stored):
        raise BadInput(f"bits = {bits}: {where} is already quantised to "
                       f"{stored['bits']} bits in groups of {stored['group_size']}; leave bits "
                       "out, or load the unquantised model")
    if stored:
        make_room(model, found, stored, kind, f"{where}/config.json")
    # where memory is scarce, a float32 model's tables stay in the 16 bits they come in
    keep_half = dtype is None and kind == mx.float32

    def make_layer(path, layer, own, cast):
        is_half = own["weight"].dtype in (mx.bfloat16, mx.float16)
        if bits and not stored and isinstance(layer, nn.Linear) and path != "lm_head":
            size = group_size or group_for(own["weight"].shape[1])
            check_settings(bits, size, own["weight"].shape[1], f"{where}: {path}")
            return QuantizedLinear.pack(cast["weight"], cast.get("bias"), bits, size)
        if keep_half and is_half and isinstance(layer, nn.Embedding):
            return HalfEmbedding(own["weight"])
        if keep_half and is_half and path == "lm_head":
            return HalfLinear(own["weight"])
        layer.update(cast)
        return layer

    return make_layer


def make_room(model: nn.Module, found: dict[str, mx.array], settings: dict,
              dtype: mx.Dtype | None, where: str) -> None:
    """Put quantised layers, still empty, where a checkpoint has scales; in place.

    dtype  of what they compute; None: the scales' own
    """
    packed = []
    for path, layer in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if f"{path}.scales" in found:
            kind = QuantizedEmbedding if isinstance(layer, nn.Embedding) else QuantizedLinear
            packed.append((path, kind.empty(layer, *settings_of(path, settings),
                                            dtype or found[f"{path}.scales"].dtype,
                                            f"{where}: {path}")))
    model.update_modules(tree_unflatten(packed))


def quantize(model: nn.Module, bits: int, group_size: int | None = None) -> None:
    """Quantise the blocks' linear layers, plain ones or of other bits, in place, one by one.

    raises  BadInput
    """
    packed = []
    for path, layer in block_layers(model):
        weight = layer.weight
        if isinstance(layer, QuantizedLinear):
            weight = layer.unpacked().astype(layer.dtype)
        size = group_size or group_for(weight.shape[1])
        check_settings(bits, size, weight.shape[1], path)
        packed.append((path, QuantizedLinear.pack(weight, layer.get("bias"), bits, size)))
        mx.eval(packed[-1][1].parameters())
        layer.weight = None
    model.update_modules(tree_unflatten(packed))
    model.parts = 1     # as in layer_maker


def block_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks' linear layers, plain or packed, by path: not the embedding, not the unembedding.

    Of a layer under an adapter the layer itself.
    """
    return [(path, layer) for path, layer in tree_flatten(model.leaf_modules(),
                                                          is_leaf=nn.Module.is_module)
            if path.startswith("model.layers.") and isinstance(layer, (nn.Linear, QuantizedLinear))]


def packed_settings(model: nn.Module) -> set[tuple[int, int]]:
    """Bits and group sizes of the blocks' packed layers: empty where none is."""
    return {(layer.bits, layer.group_size) for _, layer in block_layers(model)
            if isinstance(layer, QuantizedLinear)}


def unquantize(model: nn.Module, dtype: mx.Dtype) -> None:
    """Make every packed layer a plain one, in place: for a checkpoint that others read."""
    plain = []
    for path, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, HalfLinear)):
            weight = module.unpacked() if isinstance(module, QuantizedLinear) else module.weight
            plain.append((path, plain_layer(module, weight.astype(dtype))))
            mx.eval(plain[-1][1].parameters())
    model.update_modules(tree_unflatten(plain))


def plain_layer(module: nn.Module, weight: mx.array) -> nn.Module:
    """A linear layer or embedding of that weight, with the module's bias."""
    O, I = weight.shape
    if isinstance(module, (QuantizedEmbedding, HalfEmbedding)):
        plain = nn.Embedding(O, I)
    else:
        plain = nn.Linear(I, O, bias="bias" in module)
    plain.update({"weight": weight, **({"bias": module.bias} if "bias" in module else {})})
    return plain
