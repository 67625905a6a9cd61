"""The exercises' command: check one, or list all twelve and say which are done.

    python -m exercises            # the list
    python -m exercises 3          # check exercises/03_attention.py (make exercise N=3)
    python -m exercises 3 MY.py    # check another file with the same function names

Exit code 0: right (or the list), 1: not yet, 2: bad input.
"""
import ast
from pathlib import Path

from config import BadInput, run_main
from exercises.checking import FILES, check_file


def show_list() -> None:
    """One line an exercise: its number, its state, its title."""
    for number, path in enumerate(FILES, 1):
        title = f"Exercise {number}"
        try:
            title = (ast.get_docstring(ast.parse(path.read_text())) or title).splitlines()[0]
            right, lines = check_file(number)
            state = "right" if right else "to do" if "not written" in lines[-1] else "wrong"
        except (BadInput, SyntaxError):     # a file that is half written, or empty
            state = "wrong"
        print(f"{state}  {title}  ({path.parent.name}/{path.name})")


def main(argv: list[str]) -> int:
    if not argv:
        show_list()
        return 0
    if not argv[0].isdecimal() or len(argv) > 2:
        raise BadInput(f"got {' '.join(argv)!r}: expected `python -m exercises [NUMBER [FILE]]`, "
                       "or `make exercise N=3`")
    number = int(argv[0])
    right, lines = check_file(number, Path(argv[1]).resolve() if argv[1:] else None)
    print(f"exercise {number}, {FILES[number - 1].stem[3:].replace('_', ' ')}")
    print("\n".join(lines))
    return 0 if right else 1


if __name__ == "__main__":
    run_main(main)
