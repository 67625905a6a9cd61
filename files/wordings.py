"""How an arithmetic problem may be put: symbols, phrases, numbers as words.

    symbolic  "7 * 8 = " -> "56"      worded        "the product of seven and eight = "
    asked     "what is 7 * 8 = "      asked_worded  "what is the product of seven and eight = "
    masked    "7 ? 8 = ": nobody can know
"""

SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
# each phrase names one (operation, a, b) and no other;
# "{a} and {b}" is safe as no operand here is "x hundred and y"
PHRASES = {
    "multiply": ("{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}",
                 "multiply {a} by {b}", "what is {a} times {b}"),
    "add": ("{a} plus {b}", "{a} and {b}", "the sum of {a} and {b}",
            "add {a} and {b}", "what is {a} plus {b}"),
    "subtract": ("{a} minus {b}", "{a} take away {b}", "the difference between {a} and {b}",
                 "subtract {b} from {a}", "what is {a} minus {b}"),
    "divide": ("{a} divided by {b}", "{a} over {b}", "the quotient of {a} and {b}",
               "divide {a} by {b}", "what is {a} divided by {b}"),
}
# new to every model here: no training text of any method, nor the base's, has these two forms
ASKED = "what is {a} SYMBOL {b}"
ASKED_WORDED = {
    "multiply": "what is the product of {a} and {b}", "add": "what is the sum of {a} and {b}",
    "subtract": "what is the difference between {a} and {b}",
    "divide": "what is the quotient of {a} and {b}",
}
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n: int) -> str:
    """example  23 -> "twenty three";  100 -> "one hundred" """
    if n >= 100:
        return ONES[n // 100] + " hundred" + (f" {number_words(n % 100)}" if n % 100 else "")
    return ONES[n] if n < 20 else TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")


def phrases_of(operation: str, wording: str) -> tuple[str, ...]:
    """The templates of an operation in one wording (one of config's data_wordings)."""
    symbol = SYMBOLS[operation]
    return {"symbolic": (f"{{a}} {symbol} {{b}}",), "worded": PHRASES[operation],
            "asked": (ASKED.replace("SYMBOL", symbol),),
            "asked_worded": (ASKED_WORDED[operation],), "masked": ("{a} ? {b}",)}[wording]
