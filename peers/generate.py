"""Batched greedy generation by transformers or mlx-lm, timed: what a user would otherwise run.

    PYTHON peers/generate.py transformers|mlx-lm MODEL ROWS PROMPT_TOKENS COMPLETION_TOKENS

float32; no row stops early. mlx-lm gets the OpenBLAS that NANOLENS_BLAS names, so that only the
code differs. Prints one line of JSON: the median seconds, peak GiB.
"""
import ctypes
import json
import os
import random
import resource
import statistics
import sys
import time

which, path, (N, T, C) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:6])
rng = random.Random(0)
prompts = [[rng.randrange(3, 1000) for _ in range(T)] for _ in range(N)]
if which == "transformers":
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.tensor(prompts)

    def generate():
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=C,
                           min_new_tokens=C, do_sample=False, pad_token_id=0)
else:
    if os.environ.get("NANOLENS_BLAS"):
        ctypes.CDLL(os.environ["NANOLENS_BLAS"], mode=ctypes.RTLD_GLOBAL)
    import mlx.core as mx
    from mlx_lm.generate import batch_generate
    from mlx_lm.utils import load
    model, tokenizer = load(path)
    model.set_dtype(mx.float32)
    tokenizer._eos_token_ids = set()

    def generate():
        batch_generate(model, tokenizer, prompts, max_tokens=C, completion_batch_size=N,
                       prefill_batch_size=N)

generate()
seconds = []
for _ in range(3):
    start = time.perf_counter()
    generate()
    seconds.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": statistics.median(seconds), "peak_gib": round(peak, 2)}))
