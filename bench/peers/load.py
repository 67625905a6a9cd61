"""Model and tokenizer from their folder into memory, float32, by transformers or mlx-lm; timed.

    PYTHON peers/load.py transformers|mlx-lm MODEL COUNT

Every weight is read once at the end: a file that is only mapped would otherwise be loaded later, in
the first step. Prints one line of JSON: the median seconds, peak GiB.
"""
import sys

from clock import clock, load_blas, report, torch_device

which, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
if which == "transformers":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = torch_device(torch)

    def load():
        AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        sum(p.sum() for p in model.parameters()).item()
else:
    load_blas()
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten

    def load():
        model, _ = mlx_lm.load(folder)
        model.set_dtype(mx.float32)
        sum(p.sum() for _, p in tree_flatten(model.parameters())).item()

report(clock(load, count))
