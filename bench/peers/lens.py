"""The logit lens at the last position by transformers or TransformerLens, timed: what a user would
otherwise run.

    PYTHON bench/peers/lens.py transformers|transformer_lens MODEL N T BATCH COUNT

N prompts of T random tokens, BATCH at a time, float32: final norm and unembedding at the embedding
and after every block, log-probabilities, the five most probable tokens. (Ours also gives each tap's
entropy, KL, and a target's rank.) Prints one line of JSON: the median seconds, peak GiB.
"""
import sys

import torch
from clock import clock, random_prompts, report, torch_device

TOP = 5
which, path, (N, T, B, count) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:7])
device = torch_device(torch)
tokens = torch.tensor(random_prompts(path, N, T), device=device)
if which == "transformers":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)

    def read(part):
        """Logits (L+1, B, V) of one batch of prompts (B, T)."""
        states = model(part, output_hidden_states=True, logits_to_keep=1).hidden_states
        taps = torch.stack([state[:, -1] for state in states])  # (L+1, B, D)
        # transformers hands the last one over normed
        return model.lm_head(torch.cat([model.model.norm(taps[:-1]), taps[-1:]]))
else:
    from transformer_lens.model_bridge import TransformerBridge
    model = TransformerBridge.boot_transformers(path, device=device, dtype=torch.float32)
    names = ["blocks.0.hook_in", *(f"blocks.{l}.hook_out" for l in range(model.cfg.n_layers))]

    def read(part):
        """Logits (L+1, B, V) of one batch of prompts (B, T)."""
        # by default, as here, the model's own logits at all positions are made too; logits_to_keep
        # 1, which it hands on to transformers, would spare them: then it takes as long as that
        _, cache = model.run_with_cache(part, names_filter=names)
        taps = torch.stack([cache[name][:, -1] for name in names])  # (L+1, B, D)
        return model.unembed(model.ln_final(taps))


def lens():
    with torch.no_grad():
        for part in tokens.split(B):
            torch.log_softmax(read(part), -1).topk(TOP, -1)


report(clock(lens, count))
