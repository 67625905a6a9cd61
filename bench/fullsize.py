"""The real path on the real shapes: random weights of exactly a published model's, on this machine.

    python -m bench.fullsize                            # make fullsize: all, half an hour
    python -m bench.fullsize sft grpo recompute=mlp     # some works, any key

For Llama-3.2-1B's shapes (1.24 B parameters, 128,256 tokens): load, a step each of SFT,
dual-reward and GRPO, the lens, generation; plain, with activations recomputed, and in 4 bits. Then
Llama-3.1-8B's and Qwen2.5-32B's, in 4 bits and with a few of their blocks, and the arithmetic for
the rest. Every work runs in a process of its own: its peak memory is its own. (Beside transformers
and peft: `python -m bench --shape 1b`.)
"""
import json
import sys
from pathlib import Path

from bench.ours import TRAINING, llama_config, own_command, run_other, write_random_model
from config import Config, run_main
from engine import memory
from files.keys import BadInput
from files.model_folder import parse_args
from files.options import Parser

UNTIED = {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
SHAPES = {  # width, blocks, heads, key-value heads, MLP, vocabulary
    "Llama-3.2-1B": llama_config(2048, 16, 32, 8, 8192, 128256) | {"torch_dtype": "bfloat16"},
    "Llama-3.1-8B": llama_config(4096, 32, 32, 8, 14336, 128256) | UNTIED,
    "Qwen2.5-32B": llama_config(5120, 64, 40, 8, 27648, 152064) | UNTIED | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0},
}
BLOCKS = {"Llama-3.2-1B": 16, "Llama-3.1-8B": 4, "Qwen2.5-32B": 2}  # on disk and in memory here
ROWS = {"rows": 8, "tokens": 64, "answer": 8}
WORKS = {   # and what one call of each is given
    "load": {}, "sft": ROWS, "dual_reward": ROWS,
    "grpo": {"rows": 2, "group": 4, "tokens": 56, "completion": 4},
    "lens": {"rows": 8, "tokens": 4},
    "generate": {"rows": 2, "group": 1, "tokens": 4, "completion": 8}}


def arithmetic() -> list[str]:
    """Estimated peaks at full depth: LoRA on q, k, v, o, 8 rows of 64 tokens."""
    lines = []
    for name, raw in SHAPES.items():
        args = parse_args(raw, name)
        for label, keys in (("float32", {"dtype": "float32"}), ("16 bits", {"dtype": "bfloat16"}),
                            ("4 bits", {"bits": 4})):
            found = [memory.estimate(args, cfg, memory.Load(512, 64, 64),
                                     memory.weight_bytes(args, raw, cfg))
                     for cfg in (Config(**keys), Config(recompute="block", **keys))]
            lines.append(f"{name:13}  {label:8}  weights {found[0]['weights']:6.1f}  peak "
                         f"{found[0]['peak']:6.1f}, recompute=block {found[1]['peak']:6.1f} GiB")
    return lines


def main(argv: list[str]) -> None:
    parser = Parser(description="Full-size shapes with random weights.")
    parser.add_argument("words", nargs="*", metavar="WORK or key=value",
                        help=f"{', '.join(WORKS)}; none: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/fullsize"),
                        help="where checkpoints are written, 2 to 6 GB each")
    parser.add_argument("--only", choices=SHAPES, help="one model's shapes")
    args = parser.parse_intermixed_args(argv)   # words may stand behind options
    keys = [word for word in args.words if "=" in word]
    works = [word for word in args.words if "=" not in word] or list(WORKS)
    if wrong := [work for work in works if work not in WORKS]:
        raise BadInput(f"unknown work {', '.join(wrong)}; expected {', '.join(WORKS)}")
    small = ["bits=4", "recompute=block"]
    for name in [args.only] if args.only else SHAPES:
        folder = write_random_model((args.folder / name).resolve(),
                                    SHAPES[name] | {"num_hidden_layers": BLOCKS[name]})
        variants = [[], ["recompute=mlp"], ["recompute=block"], small]
        for more in [keys] if keys else variants if name == "Llama-3.2-1B" else [small]:
            for work in works:
                if more and work not in TRAINING and "bits=4" not in more:
                    continue    # nothing is recomputed there
                found = json.loads(run_other([
                    sys.executable, *own_command(work, folder, WORKS[work], 1, more)]))
                about = (f", estimated {found['estimated_gib']:.2f}; losses {found['losses']}"
                         if work in TRAINING else "")
                print(f"{name:13} {BLOCKS[name]:2} blocks  {' '.join(more) or 'float32':22} "
                      f"{work:11} {found['seconds']:6.1f} s  peak {found['peak_gib']:5.2f} GiB"
                      f"{about}", flush=True)
    print("\nEstimates at full depth, LoRA on q, k, v, o, 8 rows of 64 tokens:")
    print("\n".join(arithmetic()))


if __name__ == "__main__":
    run_main(main)
