"""One dataclass holds every default; a YAML file and `key=value` arguments change some of them.

    python train.py configs/sft.yaml lr=1e-3 steps=100

Precedence: dataclass < file < command line. Every mistake is collected and reported at once.
`BadInput` is what all files raise for something the user can mend; `run_main` turns it into one
line and exit code 2.
"""
import dataclasses
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from files.disk import check_words, describe, steady_output
from files.keys import ON_POLICY, BadInput, Stopped, owners_of, read_keys, validate


@dataclass
class Config:
    # --- what is trained, and where it goes
    model: str = "models/tiny"      # a folder in the Hub's layout, a .gguf file, or a Hub name
    method: str = "sft"             # sft | dual_reward | grpo | markovian
    run_dir: str = ""               # empty: runs/<name of the config file>
    overwrite: bool = False         # start over in a run folder that holds another run
    # a gate.json (python -m gate) that must say GO for this model before training starts
    require_gate: str = ""
    seed: int = 0                   # LoRA's start, data sampling and order
    # float32 | bfloat16 | float16; null: float32 on CPU, the checkpoint's on GPU
    dtype: str | None = None
    bits: int | None = None         # 2, 3, 4, 5, 6 or 8: quantise the frozen base (QLoRA)
    # random weights of model's config.json instead of its checkpoint
    from_scratch: bool = False

    # --- data
    # arithmetic | a file of rows, or a folder of train.jsonl and perhaps valid.jsonl and test.jsonl
    data: str = "arithmetic"
    data_samples: int = 5000        # training rows drawn of arithmetic
    data_operations: tuple[str, ...] = ("add", "subtract", "multiply")
    # symbolic, worded; asked, asked_worded, masked: only to look at. Examples: text/arithmetic.py
    data_wordings: tuple[str, ...] = ("symbolic",)
    mask_prompt: bool = True        # loss on answer and EOS only; false: on every token
    # what rows are put in: none (as they are) | lines | plain | cued | chat (text/chat.py's top);
    # sft's loss is then on every reply. Rows {"messages": [...]} of a data folder need one; none is
    # then chat, where the model has a chat template
    template: str = "none"

    # --- optimisation (AdamW)
    steps: int = 500
    batch_size: int = 32            # rows per optimizer step
    # the step's rows in so many equal parts: less memory, same gradient
    grad_accum_steps: int = 1
    lr: float = 1e-3
    lr_warmup_steps: int = 0        # linear: lr / n at the first step, lr at the n-th
    lr_schedule: str = "cosine"     # cosine (towards 0 after the last step) | constant
    weight_decay: float = 0.0
    grad_clip: float = 1.0          # largest global norm of the gradient; 0: no clipping

    # --- LoRA, or everything
    full: bool = False              # train all weights; lora_* are then unused
    lora_rank: int = 16
    lora_alpha: float = 32.0        # the update is scaled by alpha / rank
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o")

    # --- dual-reward:
    # class_weight * CE(lens at class_layer, operation word) + (1 - class_weight) * CE(answer)
    class_weight: float = 0.7
    class_layer: int | None = None  # 0-based block whose output is read; null: int(0.55 * blocks)
    # wanted in place of the operations' own words, in the order of data_operations
    class_words: tuple[str, ...] = ()
    # prompt: last prompt token | answer: last answer token (prior code's error B)
    class_position: str = "prompt"
    # false: the prior code's error A, each position told to repeat its own input
    answer_shift: bool = True

    # --- GRPO and Markovian training: batch_size completions a step, in groups of one prompt each
    grpo_group_size: int = 8
    grpo_temperature: float = 1.0
    # added up: correct | FILE.py:FUNCTION of (problem, completion), each with *WEIGHT or without
    grpo_reward: tuple[str, ...] = ("correct",)     # files/user_reward.py
    grpo_advantage: str = "none"    # what divides R - mean: none | batch | group (their std)
    grpo_std_floor: float = 0.0     # the least that an std divides by
    grpo_norm: str = "constant"     # constant | token | sequence; see grpo.token_weights
    grpo_clip_low: float = 0.2      # the ratio to the old policy is clipped to 1 - low, 1 + high
    grpo_clip_high: float = 0.28
    grpo_dual_clip: float = 3.0     # bound of the loss where the advantage is negative; 0: none
    grpo_kl_weight: float = 0.02    # of KL(policy || adapters off), by k2; 0: none
    grpo_epochs: int = 1            # updates from one step's samples
    grpo_kl_stop: float = 0.02      # KL(old || policy) that ends a step's passes; 0: never
    grpo_guard: bool = True         # on collapse: best weights back, half the learning rate
    # sampler | base: the published error, ratio against the frozen base (there with no KL term)
    grpo_ratio: str = "sampler"

    # --- Markovian training: the completion is a chain, the reward log p(answer | chain)
    markovian: bool = True          # hide the question from the scorer; false: show it
    markovian_scorer: str = "actor"     # whose log p it is: actor | frozen (adapters off)
    markovian_answer_weight: float = 1.0    # of the reward's own gradient; 0: the policy term alone
    markovian_ramp_steps: int = 0   # that weight grows from 0 over so many steps
    chain_tokens: int = 100         # longest chain; EOS may end it earlier
    # how a test answer is read: anchored, or a prior work's simple | anchor (numbers) | legacy |
    # word_boundary (letters)
    chain_extraction: str = "anchored"

    # --- memory
    # activations that the backward pass computes again: none | mlp (a quarter more time) | block
    # (a third more); where all weights train, both also bound the logits that exist at once
    recompute: str = "none"
    memory_limit_gib: float | None = None   # what a run may take; null: what the machine has

    # --- looking inside, and saving
    eval_every_steps: int = 50      # validation accuracy, of own data the loss too; 0: never
    eval_prompts: int = 200         # validation prompts for that; the lens reads at most 64
    # the lens on validation prompts, for the emergence curve; 0: never
    lens_every_steps: int = 50
    save_every_steps: int = 100     # resumable state; 0: only at the end
    max_completion_tokens: int = 8

    @property
    def rollout_tokens(self) -> int:
        """The longest sample that training takes: a chain, or an answer."""
        return self.chain_tokens if self.method == "markovian" else self.max_completion_tokens

    @property
    def has_loss(self) -> bool:
        """Whether rows are a user's, and training is on their answers: then their loss tells."""
        return self.data != "arithmetic" and self.method not in ON_POLICY

    @property
    def needs_answers(self) -> bool:
        """False where rewards of the user's own judge replies: there may be no right one."""
        names = [entry.partition("*")[0].strip() for entry in self.grpo_reward]
        return self.method != "grpo" or "correct" in names

    def class_block(self, args) -> int:
        """The 0-based block whose output the class loss reads; args: a ModelArgs."""
        L = args.num_hidden_layers
        block = int(0.55 * L) if self.class_layer is None else self.class_layer     # prior work's
        if not 0 <= block < L:
            raise BadInput(f"class_layer = {block}: expected a block from 0 to {L - 1} of "
                           f"{self.model}")
        return block


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and `key=value` words into a Config; raises BadInput with all mistakes."""
    values, mistakes = read_keys(path, overrides, typing.get_type_hints(Config))
    cfg = Config(**values)
    if not cfg.run_dir:
        cfg.run_dir = f"runs/{Path(path).stem}"
    mistakes += validate(cfg, set(values))
    if mistakes:
        raise BadInput("; ".join(mistakes))
    return cfg


def load_overrides(overrides: list[str]) -> Config:
    """A Config of defaults and `key=value` words, for entry points that need no file."""
    return load_config(os.devnull, overrides)


def resolved(cfg: Config) -> dict:
    """The keys this method reads, with their values: stored with a run, itself a valid config file.

    `overwrite` is a command, not a property of the run: stored, it would delete the run when its
    own file is given again.
    """
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)
            if f.name != "overwrite" and cfg.method in owners_of(f.name)}


def run_main(main) -> None:
    """Call an entry point and exit with a code: 0 done, 2 bad input, 3 Stopped, 130 interrupted."""
    steady_output()
    try:
        code = main(check_words(sys.argv[1:]))
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        code = 3
    except (BadInput, MemoryError, RuntimeError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)
