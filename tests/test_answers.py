"""Hostile completions; whole solutions, and those that GSM8K's authors graded; prior methods."""
from fractions import Fraction

import pytest
from conftest import PUBLISHED

from tasks.published import read_rows
from text.answers import extract, final_answer, is_right, parse_number

NUMBERS = [  # completion -> the number in it; None: no answer to read
    (" 18", 18), ("18.", 18), ("18...", 18), (" $18", 18), ("**18**", 18), ("(18)", 18),
    ("~18", 18), ("\\boxed{18}", 18), ("$\\boxed{1,080}$", 1080), ("1,080", 1080),
    ("1,080.00", 1080),
    ("18.0", 18), ("42.5", Fraction(85, 2)), (".5", Fraction(1, 2)), ("$18.50", Fraction(37, 2)),
    ("1.080", Fraction(27, 25)), ("1/2", Fraction(1, 2)), ("50%", 50), ("1e3", 1000), ("007", 7),
    ("\\frac{1}{2}", Fraction(1, 2)),
    ("+7", 7), ("-0", 0), ("-5", -5), ("\N{MINUS SIGN}5", -5), ("- 5", -5), ("-$5", -5),
    ("$-5", -5), ("x = 18", 18), ("12 - 5 = 7", 7), ("5 apples + 3 apples = 8 apples", 8),
    ("2^10 = 1024", 1024), ("= 18", 18), ("The answer is 18", 18), ("The answer is: 18", 18),
    ("Answer: 18", 18), ("#### 18", 18), ("18 dollars", 18), ("18kg", 18), ("18 (18)", 18),
    ("18 18", 18), ("18. She sells 9 eggs.", 18), ("18\nExplanation = 5", 18), ("\n18", 18),
    ("18!", 18), ("373737", 373737),
    # no answer, or more than one
    ("", None), ("   ", None), ("eighteen", None), ("NaN", None), ("inf", None), ("None", None),
    ("18 or 19", None), ("18, 19", None), ("3 7", None), ("12-5", None), ("12 - 5", None),
    ("18 = 9 * 2", None), ("18=", None), ("18 dollars per day for 5 days", None), ("1,2,3", None),
    ("12,34", None), ("1,0800", None), ("1.2.3", None), ("1 080", None), ("3:30", None),
    ("3 1/2", None), ("1/0", None), ("0x12", None), ("x2", None), ("GPT-4 says 18", None),
    ("9" * 400, None), ("\u0661\u0668", None), ("-(5)", None), ("7*8", None), ("18 = 9*2", None),
    ("3_4", None), ("2\\frac{1}{2}", None), ("\\frac{1}{0}", None),
]
LETTERS = [  # completion -> the letter out of A to D
    (" B", "B"), ("B.", "B"), ("(B)", "B"), ("B) 12", "B"), ("B: 12 apples and A", "B"),
    ("**B**", "B"), ("$\\boxed{C}$", "C"), ("The answer is D", "D"), ("the answer is (C).", "C"),
    ("The answer is A because it is", "A"), ("Answer: B", "B"), ("Option B", "B"),
    ("Choice: A", "A"), ("A", "A"), ("A.", "A"), ("A) B", "A"), ("B. A cat", "B"),
    ("B because A is wrong", "B"), ("I'd say D", "D"), ("e.g. B", "B"), ("Vitamin C", "C"),
    ("B\nC", "B"), ("\nC", "C"),
    ("", None), ("a cat", None), ("A cat sat", None), ("b", None), ("F", None), ("E", None),
    ("ABCD", None), ("A or B", None), ("A & B", None), ("both A and B", None), ("A, B", None),
    ("I'd say", None), ("D'oh", None), ("A\N{RIGHT SINGLE QUOTATION MARK}s", None),
    ("C-3PO", None), ("A-", None), ("None", None),
]


@pytest.mark.parametrize("text, number", NUMBERS)
def test_hostile_numbers(text, number):
    assert extract(text) == number


@pytest.mark.parametrize("text, letter", LETTERS)
def test_hostile_letters(text, letter):
    assert extract(text, "ABCD") == letter


def test_a_cut_number_is_no_answer():
    """"18" may have been on its way to "180"; behind it a word, it is whole."""
    assert extract("18", finished=False) is None
    assert extract("1,0", finished=False) is None
    assert extract("18 dollars in", finished=False) == 18
    assert extract("18\nand so", finished=False) == 18


def test_only_an_items_own_letters():
    assert extract("E", "ABCDE") == "E" and extract("E", "ABCD") is None
    assert extract("D", "ABC") is None


def test_right_is_by_value():
    """Gold "1,080" can be matched; 42.5 is not 42; nothing is not right."""
    for text in ("1080", "1,080", "$1,080.00", "1080 dollars"):
        assert is_right(extract(text), "1,080"), text
    assert not is_right(extract("42.5"), "42") and not is_right(None, "42")
    assert is_right(extract("-5"), "-5") and not is_right(extract("5"), "-5")
    assert parse_number("145.0") == 145


SOLUTIONS = [   # whole solutions -> the number behind the last header
    ("9 * 2 = 18\nA: 18", 18), ("A: 18", 18), ("so <<9*2=18>>18.\n#### 1,080", 1080),
    ("The answer is 18.", 18), ("Hence THE ANSWER IS: $18", 18), ("The answer is\n\n18", 18),
    ("so the final answer is 3/4.", Fraction(3, 4)), ("Answer: 18", 18), ("answer: 18 eggs", 18),
    ("**Answer:** 18", 18), ("**Answer**: 18", 18), ("**A:** 18", 18), ("  A: -5", -5),
    ("Final Answer: $\\boxed{1,080}$", 1080), ("so \\boxed{18} eggs in 2 days", 18),
    ("The answer is $\\boxed{\\frac{1}{2}}$ of 3.", Fraction(1, 2)), ("\\boxed{x = 18}.", 18),
    # the last header counts, whatever it says
    ("A: 5\nNo, that is wrong.\nA: 18", 18), ("The answer is 5.\nAnswer: 18\nDone in 3", 18),
    ("\\boxed{5} or rather \\boxed{6}", 6), ("#### 5\nI hope the answer is right.", None),
    # as strict behind it as `anchored`: two numbers, words, a cut, nothing
    ("A: 18 or 19", None), ("The answer is eighteen.", None), ("9 eggs.\nA:", None),
    ("the answer is \\boxed{18, 19}", None), ("#### It is so\n18", None),
    # no header: not in the middle of a line, a word or a name; in no other case
    ("", None), ("18", None), ("So 9 * 2 = 18.", None), ("Plan A: 18", None), ("USA: 18", None),
    ("a: 18", None), ("### 18", None), ("boxed{18}", None), ("\\boxed 18", None),
    ("The answer isn't 18", None), ("An answer is 18", None), ("Manswer: 18", None),
]


@pytest.mark.parametrize("text, number", SOLUTIONS)
def test_the_final_answer_of_a_solution(text, number):
    assert final_answer(text) == number


def test_the_final_letter_and_a_cut_solution():
    for text, letter in (("12 + 9 = 21\nThe answer is B.", "B"), ("\\boxed{\\text{C}}", "C"),
                         ("Answer: (D) 12", "D"), ("A: B", "B"), ("B", None),
                         ("A: 12\nB: 15\nI take B", None), ("The answer is B or C", None)):
        assert final_answer(text, "ABCD") == letter, text
    for text in ("A: 18", "A:\n18", "The answer is", "so \\boxed{1", "#### 1,0"):
        assert final_answer(text, finished=False) is None, text
    for text in ("A: 18 eggs", "so \\boxed{18}", "A: 18\nnow"):
        assert final_answer(text, finished=False) == 18, text


def test_solutions_that_were_graded_by_others(published):
    """GSM8K's four models: with the whole solution, and behind its "A:", graded as its authors did.

    Those without a header are wrong for them too: there were no numbers to compare.
    """
    agree, right = {"whole": 0, "behind": 0}, 0
    for row in read_rows(published / "gsm8k" / "example_model_solutions.jsonl"):
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for told in (value for value in row.values() if isinstance(value, dict)):
            text = told["solution"]
            right += told["is_correct"]
            answers = {"whole": final_answer(text), "behind": extract(text.rpartition("A:")[2])}
            for name, answer in answers.items():
                agree[name] += is_right(answer, gold) == told["is_correct"]
    count, known = (5276, 2001) if published == PUBLISHED["whole"] else (80, right)
    assert agree == {"whole": count, "behind": count} and right == known > count / 5


def test_every_gold_of_gsm8k_is_read(published):
    texts = [row["answer"] for split in ("train", "test")
             for row in read_rows(published / "gsm8k" / f"{split}.jsonl")]
    assert len(texts) == (8792 if published == PUBLISHED["whole"] else 40)
    for text in texts:
        gold = text.rpartition("####")[2].strip().replace(",", "")
        assert final_answer(text) == int(gold)


@pytest.mark.parametrize("method, text, expected", [
    # first number behind the last "="; text behind the answer hijacks it
    ("simple", "18", "18"), ("simple", "1,080", "1080"), ("simple", "12-5", "12"),
    ("simple", "18\nExplanation = 5", "5"), ("simple", "42.5", "42"), ("simple", "no", None),
    ("simple", "a = 3 = 7 apples", "7"),
    # "answer" leads; else pieces behind "=", from the last; else the first integer
    ("anchor", "The final answer is 18, not 5", "18"), ("anchor", "ANSWER = 7 or 8", "7"),
    ("anchor", "answer 4 answer 5", "4"), ("anchor", "18\nExplanation = 5", "5"),
    ("anchor", "x = 3 = so", "3"), ("anchor", "The answer is: 18", "18"),
    ("anchor", "Answer: $18", "18"), ("anchor", "0.5", "0"), ("anchor", "none", None),
])
def test_prior_number_methods(method, text, expected):
    assert extract(text, method=method) == expected


@pytest.mark.parametrize("method, text, expected", [
    ("legacy", "The answer is D", "E"), ("legacy", "b", "B"), ("legacy", "xyz", None),
    ("word_boundary", "The answer is D", "D"),
    ("word_boundary", "a cat is B", "A"),
    ("word_boundary", "I'd say C", "D"),
    ("word_boundary", "e.g. B", "E"), ("word_boundary", "cat", None),
])
def test_prior_letter_methods(method, text, expected):
    assert extract(text, "ABCDE", method) == expected


def test_prior_comparison_keeps_commas():
    """So that 14 golds of GSM8K's test can never be right, as published; boxes and $ go."""
    assert not is_right(extract("1,080", method="simple"), "1,080")
    assert is_right("18", "$\\boxed{18}$ ")
