"""docs/speed.md's tables: what was measured and committed, as `python -m bench` prints it.

    python -m bench.page    # between <!-- FILE --> and <!-- end -->; `make speed` measures first
"""
import json
import re

from bench.__main__ import table
from bench.ours import ROOT
from config import run_main
from files.disk import write_text

PAGE = ROOT / "docs/speed.md"
PACKAGES = ("mlx", "mlx_lm", "torch", "transformers", "peft", "trl", "transformer_lens",
            "llama_cpp")
MARKS = re.compile(r"(<!-- (\w+\.json) -->\n).*?(<!-- end -->)", re.S)


def fill(text: str) -> str:
    def block(mark: re.Match) -> str:
        results = json.loads((PAGE.parent / mark[2]).read_text())
        about, busy = results[0], max(result["other_cores"] for result in results)
        rounds = " to ".join(map(str, sorted({result["rounds"] for result in results})))
        packages = [f"{name} {about['versions'][name]}" for name in PACKAGES
                    if name in about["versions"]]
        return (f"{mark[1]}```text bench\n{table(results)}\n{about['device']}, {rounds} rounds; "
                f"{', '.join(packages)}; others took at most {busy:.2f} cores\n```\n{mark[3]}")

    return MARKS.sub(block, text)


def main(argv: list[str]) -> None:
    write_text(PAGE, fill(PAGE.read_text()))


if __name__ == "__main__":
    run_main(main)
