"""Memory: what is computed again instead of kept changes no number."""
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_COT, config, grads_of, small_model
from mlx.utils import tree_flatten

import model as model_module
from lora import apply_lora
from tokenizer import load_tokenizer
from train import load_source, next_updates

STEPS = {   # method: settings of one step
    "sft": {}, "dual_reward": {}, "mask_prompt": {"mask_prompt": False},
    "grpo": {"grpo_group_size": 4, "max_completion_tokens": 5, "grpo_entropy_weight": 0.1},
    "markovian": {"data": "sums", "data_terms": 3, "grpo_group_size": 4, "chain_tokens": 6},
}


def one_step(which, full):
    """A model of three blocks, and the micro-batches of its first step."""
    source = TINY_COT if which == "markovian" else TINY
    tokenizer, model = load_tokenizer(source), small_model(blocks=3, source=source)
    method = "sft" if which == "mask_prompt" else which
    kl = {"grpo_kl_weight": 0.0} if full else {}
    cfg = config(method=method, batch_size=8, data_samples=50, full=full, grad_accum_steps=2,
                 **STEPS[which], **(kl if which == "grpo" else {}))
    if not full:
        apply_lora(model, 4, 8.0, ("q", "v", "o", "up"))
        mx.random.seed(1)
        model.load_weights([(k, mx.random.normal(v.shape) * 0.3) for k, v in
                            tree_flatten(model.trainable_parameters()) if "lora_b" in k],
                           strict=False)
    batches = load_source(cfg, model, tokenizer)
    batches.reward = lambda problem, completion: float(len(completion.text))
    return model, cfg, next_updates(batches, 0, cfg)[0][0]


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("which,full", [(w, f) for w in STEPS for f in (False, True)
                                        if not (f and w == "markovian")])
def test_recomputing_changes_no_gradient(recompute, which, full, monkeypatch):
    """Loss and every gradient, LoRA's or all weights', behind prefilled caches too.

    `mx.checkpoint` gives weights that its function closes over gradient 0, and a cache written
    twice would shift positions. The logits come in parts of 3 rows.
    """
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 3 * 1200)
    model, cfg, micro_batches = one_step(which, full)
    expected_loss, _, expected = grads_of(model, cfg, micro_batches)
    model.recompute = recompute
    loss, _, grads = grads_of(model, cfg, micro_batches)
    assert max(np.abs(g).max() for g in expected.values()) > 1e-4
    assert all(np.abs(g).max() > 0 for k, g in expected.items())
    assert abs(loss - expected_loss) < 1e-5
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected[name], atol=2e-6, rtol=1e-4, err_msg=name)
