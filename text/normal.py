"""One form for what people and models write alike: quotes, case, numbers, times, units.

"They won't come at 7:00 P.M., all **twenty-three**" and "they will not come at 7 pm, all 23" are
one text to whoever looks for words in it.
"""
import re
import unicodedata

from text.arithmetic import ONES, TENS

DAYTIME = re.compile(
    r"\b(\d{1,2}(?::[0-5]\d)?)(?: o'clock)? in the (morning|afternoon|evening)\b")
UNITS = r"(?:kg|g|km|cm|mm|m|ml|l|mins?|h|hrs?|lbs?|oz|mph)\b"   # as written to their numbers
# curly quotes, and the dashes and minus signs, as a keyboard writes them
PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212",
                      "''\"\"------")
TEN = "|".join(TENS)
ONE = "|".join(sorted(ONES, key=len, reverse=True))     # "sixteen" before "six"
NUMBER_WORDS = re.compile(
    rf"\b(?:(?P<hundreds>a|{ONE})[ -]hundred(?:(?: and|-and)?[ -](?=(?:{TEN}|{ONE})\b))?)?"
    rf"(?:(?P<tens>{TEN})(?:[ -](?P<ones>{ONE}))?|(?P<alone>{ONE}))?\b")


def number_of_words(match: re.Match) -> str:
    """example  "twenty-three" -> "23";  "a hundred and five" -> "105";  no number -> as it was"""
    if not match[0]:
        return ""
    hundreds, tens, ones, alone = match.group("hundreds", "tens", "ones", "alone")
    total = (100 * (1 if hundreds == "a" else ONES.index(hundreds)) if hundreds else 0)
    total += 10 * (TENS.index(tens) + 2) if tens else 0
    return str(total + sum(ONES.index(word) for word in (ones, alone) if word))


def normalise(text: str) -> str:
    """example  "They won\u2019t come at 7:00 P.M., all **twenty-three**" -> "they will not come at
    7 pm, all 23" """
    text = unicodedata.normalize("NFKC", text).translate(PLAIN).casefold()
    text = re.sub(r"~~[^~]*~~", " ", text)      # struck out
    text = re.sub(r"(?<!\w)[*_`]+|[*_`]+(?!\w)", "", text)      # decoration, not "a*b"
    text = text.replace("won't", "will not")
    text = re.sub(r"\bcan(?:no|')t\b", "can not", text)
    text = re.sub(r"n't\b", " not", text)
    text = re.sub(r"\b(\d{1,3})((?:,\d{3})+)\b(?![.,]?\d)", lambda m: m[0].replace(",", ""), text)
    text = NUMBER_WORDS.sub(number_of_words, text)
    text = re.sub(r"(\d)(?:st|nd|rd|th)\b", r"\1", text)
    text = re.sub(rf"(?<![\d.])(\d+)(?:\.0+)?(?={UNITS})", r"\1 ", text)
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?![\d.]*\d)", r"\1", text)
    text = re.sub(r"(\d)(?::00)?\s*([ap])(?:\.\s?m\.?|m\b)", r"\1 \2m", text)
    text = re.sub(r"(?<![\d:.])(1[3-9]|2[0-3])(:[0-5]\d)(?![\d:]| ?[ap]m\b)",
                  lambda m: f"{int(m[1]) - 12}{m[2].removeprefix(':00')} pm", text)
    return DAYTIME.sub(lambda m: f"{m[1].removesuffix(':00')} {'ap'[m[2] != 'morning']}m", text)
