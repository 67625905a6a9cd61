"""SmolLM2-135M's part of docs/real_models.md: every method on a real Llama, each problem once.

    python -m study.real        # needs models/smollm2 (make smollm2); two hours on two cores

One-digit results: about 150 problems exist, so there are four folds (tasks/few_shot.py), each with
its own training pairs, worked examples and seed. Over the folds every problem is tested once, by a
run that never saw its pair. Two-digit results and chains: one split, several seeds. Finished runs
are not repeated, so an interrupted command continues; a part is written when its runs are done.
"""
import statistics
from pathlib import Path

from config import run_main
from files.disk import write_text
from report.stats import interval_text, mcnemar, paired_bootstrap, wilson
from study.document import fill, seeds_text, table
from study.results import CHAINS, chains_table, finished_run, machine_text, run_script, take_numbers

DOCUMENT = Path("docs/real_models.md")
HEADING = "\n## SmolLM2-135M"       # what stands below it is this file's
FOLDS = 4
ONE_DIGIT = {   # name: (label, config, overrides)
    "sft": ("SFT", "sft", []),
    "dual_reward": ("dual-reward, w 0.2", "dual_reward", []),
    "grpo": ("GRPO, 40 steps of 8 prompts by 8", "grpo", []),
}
PRIOR_WEIGHT = {
    "sft": ONE_DIGIT["sft"],
    "dual_reward_w07": ("dual-reward, w 0.7, 500 steps of 4 rows", "dual_reward",
                        ["class_weight=0.7", "steps=500", "batch_size=4"]),
}
TWO_DIGITS = {"sft": ONE_DIGIT["sft"], "dual_reward": ONE_DIGIT["dual_reward"]}
NO_LOOKS = ["eval_every_steps=0", "lens_every_steps=0"]     # on the way: the report is enough
SEEDS = (0, 1, 2)
CHAIN_SEEDS = (0, 1)
Reports = dict[str, list[dict]]     # arm -> report.json of each fold or seed


def runs_of(task: str, arms: dict, folds: dict[int, Path]) -> Reports:
    """Train every arm on every fold's or seed's data."""
    return {name: [finished_run(f"{task}_{name}", seed, f"smollm2_{config}",
                                [*overrides, *NO_LOOKS, f"data={data}"])
                   for seed, data in folds.items()]
            for name, (_, config, overrides) in arms.items()}


def rights(reports: list[dict]) -> dict[str, float]:
    """{problem: share of the runs that solve it}: the unit is the problem, not the run."""
    solved = {}
    for report in reports:
        for row in report["prompts"]:
            question = row["prompt"].splitlines()[-1]       # the shots differ from fold to fold
            solved.setdefault((row["operation"], question), []).append(row["correct"])
    return {problem: statistics.mean(each) for problem, each in sorted(solved.items())}


def share(values: list[float]) -> str:
    """The mean with a Wilson interval as of so many problems tested once."""
    n, mean = len(values), statistics.mean(values)
    return interval_text({**wilson(round(n * mean), n), "value": mean}, 100, 1)


def word_top1(reports: list[dict]) -> str:
    """The operation's word at the trained block: over folds all problems, over seeds the mean."""
    values = [report["class"]["top1"]["value"] for report in reports]
    n = len(rights(reports))
    weights = [report["class"]["top1"]["n"] for report in reports]
    mean = sum(v * w for v, w in zip(values, weights)) / sum(weights)
    return interval_text({**wilson(round(n * mean), n), "value": mean}, 100, 1)


def arms_table(reports: Reports, labels: dict) -> str:
    """One row an arm, the base first; differences are paired over the same problems."""
    first = next(iter(reports.values()))
    base = [report["base"] for report in first]
    solved = lambda runs: list(rights(runs).values())
    rows = [["base", share(solved(base)), seeds_text([r["accuracy"]["value"] for r in base]),
             "", "", word_top1(base), ""]]
    for name, of_arm in reports.items():
        own = solved(of_arm)
        gap = lambda other, own=own: interval_text(
            paired_bootstrap(solved(other), own), 100, 1, "+")
        rows.append([labels[name][0], share(own),
                     seeds_text([r["accuracy"]["value"] for r in of_arm]), gap(base),
                     "" if name == "sft" else gap(reports["sft"]), word_top1(of_arm),
                     f"{max(r['peak_gib'] for r in of_arm):.2f}"])
    return table(["", "right, %", "each", "over the base, points", "over SFT, points",
                  "word top-1 at L16, %", "GiB"], rows)


def against_sft(reports: Reports) -> str:
    """McNemar: each problem is tested once, so an arm solves it or does not."""
    dual, sft = (list(map(bool, rights(reports[name]).values())) for name in ("dual_reward", "sft"))
    test = mcnemar(dual, sft)
    return (f"{test['only_first']} problems only dual-reward (w 0.2) solves, {test['only_second']} "
            f"only SFT; McNemar exact p = {test['p']:.2g}")


def chain_gains(reports: Reports) -> str:
    """Points over the base on the same questions, each seed: by its own answers, by the base's."""
    def gains(runs: list[dict], key: str) -> str:
        right = lambda report: [row[key] for row in report["prompts"]]
        return ", ".join(interval_text(paired_bootstrap(right(r["base"]), right(r)), 100, 1, "+")
                         for r in runs)
    return "\n".join(f"- {CHAINS[name][0]}: own answers {gains(runs, 'correct')}; the base's "
                     f"answers from its chains {gains(runs, 'correct_frozen')}"
                     for name, runs in reports.items())


def write_part(text: str) -> None:
    """Put a part of the document below those that are written, in place of what stood there."""
    above, heading, below = DOCUMENT.read_text().partition(HEADING)
    title = text.strip().splitlines()[0]
    parts = (heading + below).partition(f"\n{title}")[0]
    write_text(DOCUMENT, above.rstrip("\n") + "\n" + parts.rstrip("\n") + f"\n\n{text.strip()}\n")
    print(text)


def main(argv: list[str]) -> None:
    folds = {fold: Path(f"runs/real_data/one_digit_{fold}") for fold in range(FOLDS)}
    for fold, data in folds.items():
        run_script(["-m", "tasks", "few_shot", str(data), "--fold", str(fold)])
    one = runs_of("one_digit", ONE_DIGIT, folds)
    write_part(fill("smollm2", machine=machine_text(one["sft"][0]), n=len(rights(one["sft"])),
                    table=arms_table(one, ONE_DIGIT), paired=against_sft(one)))
    write_part(fill("smollm2_prior_weight",
                    table=arms_table(runs_of("one_digit", PRIOR_WEIGHT, folds), PRIOR_WEIGHT)))
    two, sums = Path("runs/real_data/two_digits"), Path("runs/sums_of_three")
    run_script(["-m", "tasks", "few_shot", str(two), "--digits", "2"])
    two_digits = runs_of("two_digits", TWO_DIGITS, dict.fromkeys(SEEDS, two))
    write_part(fill("smollm2_two_digits", n=len(rights(two_digits["sft"])),
                    seeds=", ".join(map(str, SEEDS)), table=arms_table(two_digits, TWO_DIGITS)))
    run_script(["-m", "tasks", "sums", str(sums), "--terms", "3", "--largest", "20",
                "--shots", "3", "--test", "100"])
    # scored by the frozen base, as the config says
    chains = {"markovian_frozen": [finished_run("real_markovian_frozen", seed, "smollm2_markovian",
                                                NO_LOOKS) for seed in CHAIN_SEEDS]}
    write_part(fill("smollm2_chains", n=len(chains["markovian_frozen"][0]["prompts"]),
                    seeds=", ".join(map(str, CHAIN_SEEDS)), table=chains_table(chains),
                    gains=chain_gains(chains)))
    take_numbers(DOCUMENT)


if __name__ == "__main__":
    run_main(main)
