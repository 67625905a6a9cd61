"""What a config may say: choices, ranges, which keys go together. config.py stands on this file.

Everything here is found without a model and without reading data; mistakes are collected.
"""
METHODS = ("sft", "dual_reward", "grpo", "markovian")
ON_POLICY = ("grpo", "markovian")     # methods that train on their own samples
BITS = (2, 3, 4, 5, 6, 8)             # what MLX's affine quantisation has
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# keys that only some methods read, by prefix, the longer first: in another method's config they
# would do nothing, so they are refused
METHOD_KEYS = (("class_", ("dual_reward",)), ("answer_", ("dual_reward",)),
               ("mask_", ("sft", "dual_reward")), ("template", ("sft", "dual_reward")),
               ("grpo_reward", ("grpo",)), ("grpo_", ON_POLICY),
               ("markovian", ("markovian",)), ("chain_", ("markovian",)))
CHOICES = {
    "method": METHODS, "dtype": ("float32", "bfloat16", "float16"), "bits": BITS,
    "recompute": ("none", "mlp", "block"),
    "lr_schedule": ("cosine", "constant"), "template": ("none", "lines", "plain", "cued", "chat"),
    "data_operations": ("add", "subtract", "multiply", "divide"),
    "data_wordings": ("symbolic", "worded", "asked", "asked_worded", "masked"),
    "lora_targets": LORA_TARGETS,
    "class_target": ("word", "symbol", "answer", "shuffled", "random"),
    "class_position": ("prompt", "answer"),
    "grpo_advantage": ("none", "batch", "group"), "grpo_norm": ("constant", "token", "sequence"),
    "grpo_ratio": ("sampler", "base"), "markovian_scorer": ("actor", "frozen"),
    "chain_extraction": ("anchored", "simple", "anchor", "legacy", "word_boundary"),
}
AT_LEAST = {"data_samples": 0, "steps": 1, "batch_size": 1, "grad_accum_steps": 1,
            "lr_warmup_steps": 0, "weight_decay": 0, "grad_clip": 0, "lora_rank": 1,
            "eval_every_steps": 0, "eval_prompts": 1, "lens_every_steps": 0,
            "save_every_steps": 0, "grpo_group_size": 2, "grpo_clip_low": 0, "grpo_clip_high": 0,
            "grpo_dual_clip": 0, "grpo_kl_weight": 0, "grpo_epochs": 1, "grpo_kl_stop": 0,
            "grpo_std_floor": 0, "markovian_answer_weight": 0, "markovian_ramp_steps": 0,
            "chain_tokens": 1, "max_completion_tokens": 1, "seed": 0, "lr": 0}


def owners_of(key: str) -> tuple[str, ...]:
    """The methods that read a key."""
    for prefix, methods in METHOD_KEYS:
        if key.startswith(prefix):
            return methods
    return METHODS


def validate(cfg, given: set[str]) -> list[str]:
    """The mistakes found without a model: allowed values, ranges, keys of another method."""
    mistakes = []
    for key, allowed in CHOICES.items():
        value = getattr(cfg, key)
        for item in value if isinstance(value, tuple) else [value]:
            if item is not None and item not in allowed:
                mistakes.append(f"{key} = {item!r}: expected one of {', '.join(map(str, allowed))}")
        if value == ():
            mistakes.append(f"{key} is empty: "
                            f"expected one or more of {', '.join(map(str, allowed))}")
    mistakes += [f"{key} = {getattr(cfg, key)}: expected at least {low}"
                 for key, low in AT_LEAST.items() if getattr(cfg, key) < low]
    for key, value in vars(cfg).items():
        if isinstance(value, tuple) and len(set(value)) < len(value):
            mistakes.append(f"{key} = {', '.join(value)}: expected each entry once")
    for key in sorted(given):
        owners = owners_of(key)
        if cfg.method in METHODS and cfg.method not in owners:
            mistakes.append(f"{key} belongs to method {' or '.join(owners)}, and this config has "
                            f"method {cfg.method}; leave {key} out, or take another method")
    if cfg.memory_limit_gib is not None and not 0 < cfg.memory_limit_gib < 2 ** 20:
        mistakes.append(f"memory_limit_gib = {cfg.memory_limit_gib}: expected a number above 0")
    if cfg.lora_alpha <= 0:
        mistakes.append(f"lora_alpha = {cfg.lora_alpha}: expected a number above 0; the update is "
                        "scaled by lora_alpha / lora_rank")
    if not 0 <= cfg.class_weight <= 1:
        mistakes.append(f"class_weight = {cfg.class_weight}: expected a number from 0 to 1")
    if cfg.class_words and (cfg.class_target != "word"
                            or len(set(cfg.class_words)) != len(cfg.data_operations)):
        mistakes.append(f"class_words = {', '.join(cfg.class_words)}: expected class_target: word "
                        f"and {len(cfg.data_operations)} different words, one for each of "
                        f"{', '.join(cfg.data_operations)}")
    if cfg.batch_size % cfg.grad_accum_steps:
        mistakes.append(f"grad_accum_steps = {cfg.grad_accum_steps} "
                        f"does not divide batch_size = {cfg.batch_size}")
    if cfg.method in ON_POLICY:
        mistakes += validate_on_policy(cfg)
    if cfg.bits and (cfg.full or cfg.from_scratch):
        mistakes.append(f"bits = {cfg.bits} freezes the base weights, "
                        "so full and from_scratch must be false")
    if cfg.from_scratch and not cfg.full:
        mistakes.append("from_scratch: true starts from random weights and needs full: true")
    return mistakes


def validate_on_policy(cfg) -> list[str]:
    """Cross-checks of GRPO and Markovian training."""
    mistakes, multiple = [], cfg.grpo_group_size * cfg.grad_accum_steps
    if cfg.batch_size % multiple:
        mistakes.append(
            f"batch_size = {cfg.batch_size}: expected whole groups of completions, a multiple of "
            f"grpo_group_size * grad_accum_steps = {multiple}")
    if cfg.grpo_temperature <= 0:
        mistakes.append(f"grpo_temperature = {cfg.grpo_temperature}: expected a number above 0")
    if cfg.grpo_clip_low >= 1:
        mistakes.append(f"grpo_clip_low = {cfg.grpo_clip_low}: expected a number below 1; the "
                        "ratio, which is above 0, would never be clipped to 1 - grpo_clip_low")
    if 0 < cfg.grpo_dual_clip <= 1:
        mistakes.append(f"grpo_dual_clip = {cfg.grpo_dual_clip}: expected 0 (none) or a number "
                        "above 1; beyond that ratio negative advantages have no gradient, and "
                        "every update starts at ratio 1")
    if cfg.full and (cfg.grpo_kl_weight > 0 or cfg.grpo_ratio == "base"):
        mistakes.append("grpo_kl_weight and grpo_ratio: base compare with the model whose adapters "
                        "are off, and full: true has none; set grpo_kl_weight: 0, or train LoRA")
    if cfg.method == "markovian" and cfg.full:
        mistakes.append("full: true leaves no frozen model, which method markovian measures "
                        "against; train LoRA")
    if cfg.method == "markovian" and not cfg.grpo_kl_weight and cfg.grpo_ratio == "sampler":
        mistakes.append("grpo_kl_weight = 0: method markovian rewards itself, and nothing but the "
                        "KL term holds it; expected above 0 (or grpo_ratio: base, the drill)")
    if cfg.method == "markovian" and cfg.markovian_answer_weight:
        if cfg.markovian_scorer == "frozen":
            mistakes.append("markovian_scorer: frozen is a reward without a gradient of its own; "
                            "set markovian_answer_weight: 0")
        if cfg.grpo_advantage != "none" and not cfg.grpo_std_floor:
            mistakes.append(f"grpo_advantage = {cfg.grpo_advantage} divides the answer term by "
                            "deviations that may be all but 0; give grpo_std_floor, such as 0.1")
    return mistakes
