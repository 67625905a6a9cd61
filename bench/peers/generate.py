"""Batched greedy generation by transformers or mlx-lm, timed: what a user would otherwise run.

    PYTHON peers/generate.py transformers|mlx-lm MODEL ROWS PROMPT_TOKENS COMPLETION_TOKENS COUNT

float32; no row stops early. mlx-lm gets the OpenBLAS that NANOLENS_BLAS names, so that only the
code differs. Prints one line of JSON: the median seconds, peak GiB.
"""
import sys

from clock import clock, load_blas, random_prompts, report, torch_device

which, folder, (N, T, C, count) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:7])
prompts = random_prompts(folder, N, T)
if which == "transformers":
    import torch
    from transformers import AutoModelForCausalLM
    device = torch_device(torch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    tokens = torch.tensor(prompts, device=device)

    def generate():
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=C,
                           min_new_tokens=C, do_sample=False, pad_token_id=0)
else:
    load_blas()
    import mlx.core as mx
    from mlx_lm.generate import batch_generate
    from mlx_lm.utils import load
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    tokenizer._eos_token_ids = set()

    def generate():
        batch_generate(model, tokenizer, prompts, max_tokens=C, completion_batch_size=N,
                       prefill_batch_size=N)

report(clock(generate, count))
