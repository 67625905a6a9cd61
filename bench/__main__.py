"""How fast, beside what, and how far from the limit: each work timed in turn with its peers.

    python -m bench --json bench.json           # all works, 40 M random parameters
    python -m bench --shape 1b --only sft       # Llama-3.2-1B's; tiny: bundled
    python -m bench --only lens --model FOLDER --peer-python OTHER/bin/python

Machines are shared and noisy: read the ratios, not the seconds. In every round all sides run in
turn, each in a process of its own (a BLAS cannot be exchanged in a running one), and so does a
matrix product, which says what the machine gives at that moment. The limit of a work is the
operations that it cannot do without (limit.py) over the rate of that product; where tokens are
decoded, the bytes that must be read count too, if they take longer. "Few rows" is what the share
would be if decoding had only the rate that products of so few rows reach here. Peers live in
bench/peers and run in an environment of their own (`make bench-peers`); a missing one is skipped.
Training starts from ids on every side: no text is tokenised and no file written. Quote nothing from
a busy machine, of which a note tells: torch's threads then wait for each other, ours hardly.

Further here: `python -m bench.whole` (a user's whole wait), `python -m bench.fullsize` (the shapes
of published models) and `python -m bench.page`, which writes docs/speed.md's tables.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import engine.blas

from bench import fullsize
from bench.limit import DECODING, limit_seconds, minimal_flops, parameters
from bench.ours import ROOT, llama_config, own_command, run_other, write_random_model
from config import run_main
from files.disk import read_json, write_text
from files.keys import BadInput
from files.model_folder import ModelArgs, find_folder, parse_args
from files.options import Parser
from files.run_folder import provenance

ROUNDS, LENS_PEER_BATCH = 3, 64     # the peers' lens is fastest at 64 prompts
SIZES = {   # what one call of each work is given
    "sft": fullsize.ROWS, "dual_reward": fullsize.ROWS,
    "grpo": {"rows": 4, "group": 8, "tokens": 32, "completion": 16},
    "generate": {"rows": 32, "group": 1, "tokens": 32, "completion": 16},
    "chat": {"rows": 1, "group": 1, "tokens": 32, "completion": 64},
    "lens": {"rows": 256, "tokens": 16},
    "load": {},
}
SHAPES = {  # config.json of the random weights
    "40m": llama_config(512, 8, 8, 4, 1408, 32000), "tiny": llama_config(128, 8, 4, 4, 256, 1394),
    "1b": fullsize.SHAPES["Llama-3.2-1B"]}


# --- peers
@dataclass
class Peer:
    """Another way to do a work: the packages it needs, its command behind the Python."""
    packages: tuple[str, ...]
    command: list
    env: dict = field(default_factory=lambda: {"NANOLENS_BLAS": engine.blas.LOADED or "none"})


def peers_of(work: str, folder: str, args: ModelArgs, sizes: dict, count: int) -> dict[str, Peer]:
    """The peers of a work by name."""
    hf, n = ("torch", "transformers"), list(sizes.values())
    if work == "dual_reward":   # nobody else has it
        return {}
    if work == "lens":
        lens = lambda which: ["bench/peers/lens.py", which, folder, *n, LENS_PEER_BATCH, count]
        return {"transformers": Peer(hf, lens("transformers")),
                "TransformerLens": Peer(("torch", "transformer_lens"), lens("transformer_lens"))}
    if work == "grpo":
        return {"TRL": Peer((*hf, "peft", "trl", "datasets"), [
            "bench/peers/trl_grpo.py", folder, *n, min(count, 3)])}
    n = [size for key, size in sizes.items() if key != "group"]
    theirs, lm = ["bench/peers/hf.py", work, folder, count, *n], "bench/peers/mlxlm.py"
    found = {"mlx-lm": Peer(("mlx_lm",), [lm, work, folder, count, *n])}
    if work == "chat":
        # mlx_lm brings the mlx that writes its file
        found["llama.cpp"] = Peer(("llama_cpp", "mlx_lm"), [
            "bench/peers/llamacpp.py", work, folder, count, *n])
    if work != "sft":
        return {"transformers": Peer(hf, theirs)} | found
    return {"transformers + peft": Peer((*hf, "peft"), theirs)} | found


def packages_in(python: str) -> dict[str, str]:
    """{module: version} of the peers' packages that a Python has."""
    code = ("import importlib.metadata as m, importlib.util as u, json; names = {'torch': 'torch', "
            "'transformers': 'transformers', 'peft': 'peft', 'trl': 'trl', 'datasets': 'datasets', "
            "'transformer_lens': 'transformer-lens', 'mlx_lm': 'mlx-lm', "
            "'llama_cpp': 'llama-cpp-python'}; print(json.dumps("
            "{k: m.version(v) for k, v in names.items() if u.find_spec(k)}))")
    try:
        return json.loads(run_other([python, "-c", code]).splitlines()[-1])
    except (OSError, ValueError) as error:
        raise BadInput(f"--peer-python {python} does not run ({error}); expected a Python, such as "
                       ".venv-bench/bin/python, or none") from None


def find_python(named: str | None) -> tuple[str, dict[str, str]]:
    """The peers' Python and its packages: the one named, .venv-bench's, or this; "none": none."""
    if named == "none":
        return "", {}
    prepared = ROOT / ".venv-bench/bin/python"
    python = named or str(prepared if prepared.exists() else sys.executable)
    return python, packages_in(python)


# --- in turn
def measure(work: str, folder: str, sizes: dict, python: str, packages: dict[str, str],
            rounds: int, keys: list[str]) -> dict:
    """One work beside its peers: {work, seconds, tokens_per_s, peak_gib, limit_share, peers}."""
    args = parse_args(read_json(Path(folder) / "config.json"), folder)
    count = 20 if parameters(args) < 1e7 else 7 if parameters(args) < 1e8 else 3

    def last_line(*words, **env):
        return json.loads(run_other(words, **env).splitlines()[-1])

    def own(*words):    # full float32 on a GPU too, as torch does by itself
        return last_line(sys.executable, *own_command(*words), MLX_ENABLE_TF32="0")

    peers = peers_of(work, folder, args, sizes, count) if python else {}
    for name in [name for name in peers if not packages.keys() >= set(peers[name].packages)]:
        print(f"{name}: not installed, skipped", flush=True)
        del peers[name]
    taken = {"": [], "machine": [], **{name: [] for name in peers}}
    start, others = time.perf_counter(), busy_elsewhere()
    for _ in range(rounds):     # in turn, so that a slow minute of the machine hits all
        taken[""].append(own(work, folder, sizes, count, keys))
        if minimal_flops(work, args, sizes):
            taken["machine"].append(own("machine", folder, {"rows": few_rows(work, sizes)}, 1))
        for name, peer in list(peers.items()):
            try:
                taken[name].append(last_line(python, *peer.command, **peer.env))
            except BadInput as error:   # a peer's own trouble does not end the run
                print(f"{name}: {error}; skipped", flush=True)
                del peers[name], taken[name]
    others = (busy_elsewhere() - others) / (time.perf_counter() - start)
    if others > 0.1:
        print(f"note: other processes took {others:.1f} of {os.cpu_count()} cores while {work} was "
              "timed; repeat on a quiet machine before quoting", flush=True)
    return summarise(work, args, sizes, taken) | {"other_cores": others}


def few_rows(work: str, sizes: dict) -> int:
    """Rows decoded together, for the second limit; 0: none. One waits for bytes alone."""
    rows = sizes["rows"] * sizes["group"] if work in DECODING else 0
    return rows if rows > 1 else 0


def busy_elsewhere() -> float:
    """CPU seconds that all but this process and its ended children have taken; Linux, else 0."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _, _, *more = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    # what the host takes away counts as well
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def summarise(work: str, args: ModelArgs, sizes: dict, taken: dict[str, list[dict]]) -> dict:
    """Medians over rounds; ratios and shares are taken within a round, then their median.

    taken  {"": our rounds, "machine": the machine's, peer: ...}, each [{seconds, peak_gib}, ...]
    """
    ours, machine = taken[""], taken["machine"]
    middle = lambda runs, key: statistics.median(r[key] for r in runs)
    ends = lambda values: [min(values), max(values)]
    tokens = sizes.get("rows", 0) * sizes.get("group", 1) * (
        sizes.get("completion") or sizes.get("tokens", 0))
    share_of = lambda *rate: statistics.median(
        limit_seconds(work, args, sizes, m, *rate) / r["seconds"] for r, m in zip(ours, machine))
    result = {"work": work, "seconds": middle(ours, "seconds"),
              "spread": ends([r["seconds"] for r in ours]), "rounds": len(ours),
              "tokens_per_s": tokens / middle(ours, "seconds") if tokens else None,
              "peak_gib": middle(ours, "peak_gib"),
              "limit_share": share_of() if machine else None,
              "few_rows_share": (share_of("few_rows_flops_per_s") if few_rows(work, sizes)
                                 else None),
              "minimal_flops": minimal_flops(work, args, sizes), "sizes": sizes, "peers": {}}
    if machine:
        result["machine"] = {key: middle(machine, key) for key in machine[0]}
    for name, runs in taken.items():
        if name in ("", "machine") or not runs:
            continue
        ratios = [p["seconds"] / r["seconds"] for p, r in zip(runs, ours)]
        result["peers"][name] = {
            "seconds": middle(runs, "seconds"), "spread": ends([p["seconds"] for p in runs]),
            "peak_gib": middle(runs, "peak_gib"), "ratio": statistics.median(ratios),
            "ratio_spread": ends(ratios), "rounds": len(runs)}
    return result


# --- for a person
def table(results: list[dict]) -> str:
    """Lines of one width: ours first, then each peer with how many times as fast ours is."""
    lines = [f"{'':34}{'ms':>9}  {'low - high':>19}{'tokens/s':>10}{'GiB':>7}{'of limit':>10}"
             f"{'few rows':>10}{'ours is':>9}"]
    percent = lambda share: f"{100 * share:.0f} %" if share else ""
    for result in results:
        speed = result["tokens_per_s"]
        lines.append(f"{result['work'] + ', ' + result['shape']:34}{times(result)}"
                     f"{f'{speed:,.0f}' if speed else '':>10}{result['peak_gib']:7.2f}"
                     f"{percent(result['limit_share']):>10}{percent(result['few_rows_share']):>10}")
        lines += [f"{'  ' + name:34}{times(peer)}{'':10}{peer['peak_gib']:7.2f}{'':20}"
                  f"{peer['ratio']:8.2f}x" for name, peer in result["peers"].items()]
    return "\n".join(lines)


def times(side: dict) -> str:
    low, high = (f"{1000 * s:,.1f}" for s in side["spread"])
    return f"{1000 * side['seconds']:9,.1f}  {low + ' - ' + high:>19}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Measure speed and memory, ours and peers'.")
    parser.add_output("--json", "the numbers")
    parser.add_argument("--only", metavar="WORK", action="append",
                        help=f"of {', '.join(SIZES)}; may be given repeatedly")
    parser.add_argument("--shape", choices=SHAPES, default="40m", help="of the random weights")
    parser.add_argument("--model", help="a folder in the Hub's layout instead")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peer-python", help="a Python that has the peers' packages (default: "
                        ".venv-bench's where it exists, then this one); none: ours alone")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="config keys of our side")
    args = parser.parse_intermixed_args(argv)
    if wrong := [work for work in args.only or () if work not in SIZES]:
        raise BadInput(f"unknown work {', '.join(wrong)}; expected {', '.join(SIZES)}")
    if args.rounds < 1:
        raise BadInput(f"--rounds {args.rounds}: expected at least 1")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    python, packages = find_python(args.peer_python)
    versions = provenance() | packages
    device = f"{versions['device']}, {os.cpu_count()} cores"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        # the large one is kept
        own = ROOT / "runs/fullsize/Llama-3.2-1B" if args.shape == "1b" else Path(scratch)
        folder = find_folder(args.model) if args.model else write_random_model(
            own, SHAPES[args.shape])
        for work in dict.fromkeys(args.only or SIZES):
            found = measure(work, str(folder.resolve()), SIZES[work], python, packages,
                            args.rounds, args.keys)
            results.append(found | {"shape": args.model or args.shape, "device": device,
                                    "versions": versions})
            print(table(results[-1:]), flush=True)
    if len(results) > 1:
        print(f"\n{table(results)}")
    if args.json:
        write_text(Path(args.json), json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
