"""How an exercise is checked: a reader's functions beside ours, and beside numbers of neither.

A file of checks/ holds, for the exercise of the same name:

    OURS         {name: the project's own function}
    CASES        {what is tried: function of the functions -> array}
    INDEPENDENT  {what is tried: what it gives by another way: numpy, by hand, published}
    MISTAKES     {a hint: {name: a typical wrong function}}

A wrong answer is compared with the typical ones. The one with the same numbers names the hint. What
is not written yet is no mistake.
"""
import importlib.util
import inspect
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import BadInput

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def load_file(path: Path) -> ModuleType:
    """A Python file as a module; raises BadInput where Python cannot read it."""
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:      # whatever a reader's file does while it is read
        raise BadInput(f"{path} cannot be read: {describe_error(error, path)}") from None
    return module


def load_check(path: Path) -> ModuleType:
    """The file of checks/ for an exercise, such as 03_attention.py."""
    return load_file(FOLDER / "checks" / path.name)


def describe_error(error: Exception, path: Path) -> str:
    """An exception in one line, with the last line of the reader's own file that led to it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    said = str(error).split("\n")[0]
    return f"{type(error).__name__}: {said}" + (f" (line {line})" if line else "")


def outcome(case, functions: dict) -> np.ndarray | Exception:
    """What a case gives with these functions: float64 numbers, or the exception that it raised."""
    try:
        with np.errstate(all="ignore"):
            value = case(SimpleNamespace(**functions))
            if value is None:
                raise TypeError("None is returned: is the `return` missing?")
            if isinstance(value, mx.array):
                value = value.astype(mx.float32)
            return np.array(value, np.float64)
    except Exception as error:
        return error


def same(a: np.ndarray | Exception, b: np.ndarray | Exception) -> bool:
    """Numbers of one shape, equal to float32's rounding; of exceptions, of one type."""
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b)
    return a.shape == b.shape and np.allclose(a, b, rtol=2e-4, atol=2e-5, equal_nan=True)


def difference(got: np.ndarray | Exception, expected: np.ndarray, path: Path) -> str:
    """In words: how a result differs from the expected one."""
    if isinstance(got, Exception):
        return f"raises {describe_error(got, path)}"
    if got.shape != expected.shape:
        return f"has shape {got.shape}, expected {expected.shape}"
    wrong = ~np.isclose(got, expected, rtol=2e-4, atol=2e-5)
    where = np.unravel_index(np.argmax(wrong), got.shape)
    place = f"entry {[int(i) for i in where]}" if where else "the value"
    return (f"{wrong.sum()} of {got.size} entries are wrong; {place} is {got[where]:.5g}, "
            f"expected {expected[where]:.5g}")


def general_hint(got: list, expected: list[np.ndarray]) -> str:
    """What can be said of wrong results, case by case, that no typical mistake gives."""
    first = got[0]
    if not isinstance(first, Exception) and first.shape != expected[0].shape:
        return ("the numbers are not looked at before the shape is right: which axis is too many, "
                "or summed or picked that should stay?")
    raised = [value for value in got if isinstance(value, Exception)]
    if any(isinstance(error, (NameError, AttributeError, TypeError)) for error in raised):
        return "a name, or an argument's name or type, is not what the called function knows"
    if raised:
        return ("print the shapes and compare them with those of the statement. A sum or mean "
                "drops its axis without keepdims=True")
    if not np.isfinite(first).all():
        return "it has inf or nan: a division by 0, exp of a large number, or log of a small one?"
    pairs = [(g.ravel(), e.ravel()) for g, e in zip(got, expected)
             if not isinstance(g, Exception) and g.shape == e.shape]
    g, e = (np.concatenate(side) for side in zip(*pairs))
    ratios = g[e != 0] / e[e != 0]
    if len(ratios) > 1 and np.ptp(ratios) < 1e-3 * abs(ratios[0]):
        return ("the sign is wrong, everywhere" if abs(ratios[0] + 1) < 1e-3 else
                f"it is {ratios[0]:.4g} times the right result, everywhere: a factor is missing")
    return ("no typical mistake gives these numbers; do the statement's example by hand, or where "
            "it is right the first case marked wrong")


@cache
def mistake_outcomes(check: ModuleType) -> dict[str, dict]:
    """{hint: {what is tried: what the mistake gives}}; made once, when first needed."""
    return {words: {name: outcome(case, check.OURS | functions)
                    for name, case in check.CASES.items()}
            for words, functions in check.MISTAKES.items()}


def tells(value: np.ndarray | Exception) -> bool:
    """Whether agreeing on this is no coincidence: numbers, and not all of them round ones."""
    return not isinstance(value, Exception) and not np.allclose(100 * value, np.round(100 * value),
                                                                atol=1e-6, equal_nan=True)


def find_hint(outcomes: dict, wrong: list[str], check: ModuleType) -> str | None:
    """The typical mistake that gives the same on all cases, else on some of the wrong ones."""
    partly = None
    for words, mistaken in mistake_outcomes(check).items():
        agrees = [name for name in outcomes if same(mistaken[name], outcomes[name])]
        if len(agrees) == len(outcomes):
            return f"your output is what one gets {words}"
        telling = [name for name in agrees if name in wrong and tells(outcomes[name])]
        if telling and not partly:
            partly = f"on '{telling[0]}' your output is what one gets {words}"
    return partly


def check_functions(functions: dict, check: ModuleType, path: Path) -> tuple[bool, list[str]]:
    """Whether all cases are right, and what to say: a line a case, and a hint where one is wrong.

    functions  {name: a reader's function};  path: their file, whose lines are named
    """
    lines, outcomes, wrong = [], {}, {}
    for name, case in check.CASES.items():
        outcomes[name] = got = outcome(case, functions)
        # ours, and where there is one, the value that was found another way
        expected = [outcome(case, check.OURS)]
        if name in check.INDEPENDENT:
            expected.append(np.array(check.INDEPENDENT[name], np.float64))
        missed = [value for value in expected if not same(got, value)]
        if isinstance(got, NotImplementedError):
            wrong[name] = missed[0]
            lines.append(f"  to do  {name}")
        elif missed:
            wrong[name] = missed[0]
            lines.append(f"  wrong  {name}: {difference(got, missed[0], path)}")
        else:
            lines.append(f"  right  {name}")
    written = [name for name in wrong if not isinstance(outcomes[name], NotImplementedError)]
    if written:
        hint = find_hint(outcomes, written, check)
        lines.append(hint or "hint: " + general_hint([outcomes[name] for name in written],
                                                     [wrong[name] for name in written]))
    elif wrong:
        lines.append("not written yet: put your lines in place of `raise NotImplementedError`")
    return not wrong, lines


def check_file(number: int, path: Path | None = None) -> tuple[bool, list[str]]:
    """Check an exercise's file, or another with the same names; raises BadInput."""
    if not 1 <= number <= len(FILES):
        raise BadInput(f"exercise {number}: expected a number from 1 to {len(FILES)}")
    exercise = FILES[number - 1]
    path = path or exercise
    if not path.is_file():
        raise BadInput(f"no file {path}: expected a copy of {exercise.name} with your functions")
    check, theirs = load_check(exercise), load_file(path)
    missing = [name for name in check.OURS if not hasattr(theirs, name)]
    if missing:
        raise BadInput(f"{path} has no {', '.join(missing)}: keep the names of {exercise.name}")
    right, lines = check_functions({n: getattr(theirs, n) for n in check.OURS}, check, path)
    if right:
        for function in check.READ:
            file = Path(inspect.getsourcefile(function)).relative_to(FOLDER.parent)
            line = inspect.getsourcelines(function)[1]
            lines.append(f"right; read ours: {function.__qualname__}, {file}:{line}")
    return right, lines
