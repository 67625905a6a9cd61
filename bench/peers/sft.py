"""transformers + peft: a LoRA training step, rank 16 on q, k, v, o, float32; timed by bench.py.

    python peers/sft.py MODEL ROWS TOKENS ANSWER_TOKENS STEPS        # SFT; fullsize.py runs it too
    python peers/sft.py MODEL ROWS TOKENS ANSWER_TOKENS STEPS BLOCK  # dual-reward at that block

A step is forward, backward, clipping, AdamW, on rows that are there as ids. Dual-reward is written
as the prior work's users had to: the model's own loss, and the final norm and unembedding applied
by hand to the stream behind the block, at the last prompt token.
"""
import sys

import torch
from clock import clock, report, torch_device
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

WEIGHT = 0.7    # of the class loss; changes no time
folder, (rows, tokens, answer, steps) = sys.argv[1], map(int, sys.argv[2:6])
block = int(sys.argv[6]) if sys.argv[6:] else None
device = torch_device(torch)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
model = get_peft_model(model, LoraConfig(
    r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, 1e-5)
ids = torch.randint(3, model.config.vocab_size, (rows, tokens), device=device)
labels = ids.clone()
labels[:, :tokens - answer] = -100
class_ids = torch.randint(3, model.config.vocab_size, (rows,), device=device)


def compute_loss():
    if block is None:
        return model(input_ids=ids, labels=labels).loss
    out = model(input_ids=ids, labels=labels, output_hidden_states=True)
    base = model.get_base_model()
    resid = out.hidden_states[block + 1][:, tokens - answer - 1]        # (B, D)
    class_loss = torch.nn.functional.cross_entropy(
        base.lm_head(base.model.norm(resid)), class_ids)
    return WEIGHT * class_loss + (1 - WEIGHT) * out.loss


def step():
    loss = compute_loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()


report(clock(step, steps))
