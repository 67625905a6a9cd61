"""The exercises check themselves: ours passes, each typical mistake fails with its own hint."""
import numpy as np
import pytest
from conftest import ROOT, assert_one_clear_line, run

from config import BadInput
from exercises.__main__ import main
from exercises.checking import FILES, check_functions, load_check, mistake_outcomes, outcome, same


@pytest.fixture(scope="module", params=FILES, ids=[path.stem for path in FILES])
def exercise(request):
    return request.param, load_check(request.param)


def test_ours_is_right_and_independent_values_agree(exercise):
    """Our own function passes every case; most cases have a value that was found another way."""
    path, check = exercise
    right, lines = check_functions(check.OURS, check, path)
    assert right, "\n".join(lines)
    assert set(check.INDEPENDENT) <= set(check.CASES)
    assert len(check.INDEPENDENT) >= 4
    for name, value in check.INDEPENDENT.items():
        assert same(outcome(check.CASES[name], check.OURS), np.array(value, np.float64)), name


def test_each_mistake_is_told_by_its_own_hint(exercise):
    path, check = exercise
    assert len(check.MISTAKES) >= 5
    for words, functions in check.MISTAKES.items():
        right, lines = check_functions(check.OURS | functions, check, path)
        assert not right, words
        assert lines[-1] == f"your output is what one gets {words}"


def test_independent_values_alone_refuse_each_mistake(exercise):
    """So a check would fail even where our own function had the same mistake."""
    _, check = exercise
    for words, mistaken in mistake_outcomes(check).items():
        assert any(not same(mistaken[name], np.array(value, np.float64))
                   for name, value in check.INDEPENDENT.items()), words


def right_file(tmp_path, name, lines):
    """A copy of an exercise with lines in place of `raise NotImplementedError`."""
    text = (ROOT / "exercises" / name).read_text()
    path = tmp_path / name
    path.write_text(text.replace("raise NotImplementedError", lines))
    return path


def told(capsys, *words):
    """What the command says, and its exit code, in this process."""
    code = main(list(map(str, words)))
    return code, capsys.readouterr().out


def test_command_on_a_right_a_wrong_and_an_unwritten_file(tmp_path, capsys):
    """Exit codes 0, 1 and 1; after a right answer it says where ours stands."""
    scaled = "return x * mx.rsqrt((x * x).{}(-1, keepdims=True) + eps) * gain"
    path = right_file(tmp_path, "01_rms_norm.py", scaled.format("mean"))
    done = run("-m", "exercises", 1, path, check=0)
    line = 1 + (ROOT / "model.py").read_text().splitlines().index(
        "def rms_norm(x: mx.array, gain: mx.array, eps: float) -> mx.array:")
    assert done.stdout.endswith(f"right; read ours: rms_norm, model.py:{line}\n")
    path = right_file(tmp_path, "01_rms_norm.py", scaled.format("sum"))
    code, said = told(capsys, 1, path)
    assert code == 1 and "what one gets with the sum of squares: divide by D" in said
    code, said = told(capsys, 1)
    assert code == 1 and "not written yet" in said


def test_what_no_typical_mistake_gives(tmp_path, capsys):
    """An exception names its type and line; a shape, a sign and a factor are told in words."""
    path = right_file(tmp_path, "07_masked_mean.py", "return logprobs @ mask.T.foo")
    code, said = told(capsys, 7, path)
    line = 1 + path.read_text().splitlines().index("    return logprobs @ mask.T.foo")
    assert code == 1 and "raises AttributeError" in said and f"(line {line})" in said
    path = right_file(tmp_path, "07_masked_mean.py", "return -(logprobs * mask) / denominator")
    code, said = told(capsys, 7, path)
    assert "has shape (3,), expected ()" in said and "not looked at before the shape" in said
    path = right_file(tmp_path, "07_masked_mean.py", "-(logprobs * mask).sum() / denominator")
    assert "None is returned: is the `return` missing?" in told(capsys, 7, path)[1]
    check = load_check(FILES[0])
    for factor, words in ((-1, "the sign is wrong"), (3, "it is 3 times the right result")):
        def scaled(x, gain, eps, factor=factor):
            return factor * check.OURS["rms_norm"](x, gain, eps)
        assert words in check_functions({"rms_norm": scaled}, check, FILES[0])[1][-1]


def test_output_in_the_readme(tmp_path, capsys):
    """exercises/README.md shows what the mask at the wrong corner gives."""
    path = right_file(tmp_path, "03_attention.py", """T, S = q.shape[2], k.shape[2]
    n = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, n, axis=1), mx.repeat(v, n, axis=1)
    scores = q @ k.transpose(0, 1, 3, 2) / q.shape[3] ** 0.5
    mask = mx.arange(S) <= mx.arange(T)[:, None]
    return mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1) @ v""")
    code, said = told(capsys, 3, path)
    assert f"```\n{said}```" in (ROOT / "exercises" / "README.md").read_text()


def test_two_mistakes_at_once_and_half_an_exercise(tmp_path, capsys):
    """Of two mistakes a case that shows one alone tells it; what is not written is no mistake."""
    path = right_file(tmp_path, "09_dual_reward.py", """taps = model.residuals(tokens)
    answer = -token_logprobs(model.head(taps[-1, 0, P:]), tokens[0, P:]).mean()
    named = -token_logprobs(model.head(taps[block, 0, P - 1:P]), mx.array([word]))[0]
    return weight * named + (1 - weight) * answer""")
    code, said = told(capsys, 9, path)
    assert code == 1 and "on 'weight 0, the answer loss alone' your output is what one gets " \
        "without the shift in the answer loss" in said
    text = (ROOT / "exercises" / "05_lora.py").read_text()
    path = tmp_path / "05_lora.py"
    path.write_text(text.replace("raise NotImplementedError", "return x @ weight", 1))
    code, said = told(capsys, 5, path)
    assert "  to do  merge, 8 in, 8 out\n" in said and "not written yet" not in said


def test_bad_input_is_one_clear_line(tmp_path):
    """The first as a user meets it, the others by what they raise."""
    assert_one_clear_line(run("-m", "exercises", 13), "13", "from 1 to 12")
    path = right_file(tmp_path, "03_attention.py", "return (")
    for words, said in ((["three"], "make exercise N=3"), (["3", tmp_path / "no.py"], "no.py"),
                        (["3", path], "03_attention.py cannot be read: SyntaxError")):
        with pytest.raises(BadInput, match=said):
            main(list(map(str, words)))
    path.write_text("def other():\n    pass\n")
    with pytest.raises(BadInput, match="has no attention: keep the names"):
        main(["3", str(path)])


def test_twelve_exercises_say_what_to_do(capsys):
    """Each has its number, an example, its size, where ours stands, and nothing written yet."""
    assert [int(path.stem[:2]) for path in FILES] == list(range(1, 13))
    for number, path in enumerate(FILES, 1):
        text = path.read_text()
        assert text.startswith(f'"""Exercise {number}: ')
        for part in ("example ", "size  ", "Ours: ", f"make exercise N={number}\n",
                     "raise NotImplementedError"):
            assert part in text, f"{path.name}: {part}"
    code, said = told(capsys)
    assert code == 0 and len(said.splitlines()) == 12
    assert all(line.startswith("to do  Exercise ") for line in said.splitlines())
