"""What the commands of the root may be told: their words, and the values that are out of range.

Every command's parser is a `Parser`, whose mistakes are bad input like any other: one line, exit
code 2. A command's own file holds what it does with the words.
"""
import argparse
import math
from pathlib import Path

from files.disk import check_target
from files.keys import CHOICES, BadInput


class Parser(argparse.ArgumentParser):
    def add_checkpoint(self) -> None:
        """What most commands look at: --ckpt, and --adapter on top of it."""
        self.add_argument("--ckpt", required=True, help="run folder, model folder or Hub name")
        self.add_argument("--adapter", metavar="FOLDER",
                          help="take this adapter, ours, mlx-lm's or peft's, on top of --ckpt")

    def add_template(self) -> None:
        """Of commands that take a prompt: what it is put in."""
        self.add_argument("--template", choices=CHOICES["template"],
                          help="chat: the model's own; default: as the run was trained, otherwise "
                               "none (of generate.py --chat: chat)")

    def add_output(self, name: str, what: str) -> None:
        """A file to write: refused before any work is done if it is a link, a pipe or a device."""
        def new_file(path: str) -> str:
            try:
                check_target(path)
                check_target(Path(path).parent.resolve(), is_folder=True)
            except (BadInput, OSError, RuntimeError) as error:  # resolve: a loop of links
                raise argparse.ArgumentTypeError(str(error)) from None
            return path

        self.add_argument(name, metavar="FILE", type=new_file, help=what)

    def error(self, message: str):
        raise BadInput(f"{message}; --help shows what {self.prog} expects")


def lens_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Show what every block would answer, by the logit lens.")
    parser.add_checkpoint()
    parser.add_argument("--prompt", required=True)
    parser.add_template()
    parser.add_argument("--words", nargs="*", default=[],
                        help="words to follow at the last position, one token each: all with a "
                        "leading space or all without, whichever fits the prompt's end; an "
                        "operation's name as dual-reward trains it")
    parser.add_output("--png", "the table as a picture")
    parser.add_output("--html", "one self-contained page; a cell shows its ten top tokens on hover")
    parser.add_output("--json", "the numbers behind the pictures")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise BadInput("--prompt is empty; give a text such as '7 * 8 = '")
    return args


def generate_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Complete prompts, printing as they grow.")
    parser.add_checkpoint()
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", help="may be given repeatedly")
    given.add_argument("--chat", action="store_true", help="a conversation, line by line, up to "
                       "an empty line or the end of the input")
    parser.add_template()
    parser.add_argument("--system", metavar="TEXT", help="of a conversation: who the model is")
    parser.add_argument("--max-tokens", type=int, help="default 32; of a reply in a template 512")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: most probable token")
    parser.add_argument("--top-k", type=int, default=0, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    # in this form NaN is refused too: no comparison holds for it
    if not (0 <= args.temperature < math.inf and args.top_k >= 0 and 0 < args.top_p <= 1
            and (args.max_tokens is None or args.max_tokens >= 1)
            and 0 <= args.seed < 2 ** 64):
        raise BadInput(f"--temperature {args.temperature} (expected at least 0), "
                       f"--top-k {args.top_k} (at least 0), --top-p {args.top_p} (above 0, at most "
                       f"1), --max-tokens {args.max_tokens} (at least 1), --seed {args.seed} (0 to "
                       "2 ** 64 - 1): one is out of range")
    return args


def eval_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Accuracy and classifier report of a run or model.")
    parser.add_checkpoint()
    parser.add_argument("--base", action="store_true",
                        help="evaluate the model it was trained from as well")
    parser.add_argument("--compare", metavar="RUN2",
                        help="another run or model, on the same problems")
    parser.add_output("--json", "where to write the report; a run folder's report.json is left "
                      "as it is")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="config keys, such as data_wordings=worded")
    return parser.parse_args(argv)


def export_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Fuse a run's adapter into its base model, or write the adapter alone.")
    parser.add_checkpoint()
    parser.add_argument("--out", required=True, type=Path, help="folder to write, new or empty")
    parser.add_argument("--format", choices=("hub", "peft", "mlx"), default="hub",
                        help="hub: base and adapter fused, in the Hub's layout (default); peft, "
                             "mlx: the adapter alone, for peft or mlx-lm")
    return parser.parse_args(argv)
