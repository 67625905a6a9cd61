"""Hostile completions; and the prior methods, with the mistakes that made their numbers."""
from fractions import Fraction

import pytest

from text.answers import extract, is_right, parse_number

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
