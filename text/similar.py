"""Texts that are the same, or nearly: by runs of words, exact, with an inverted index.

Two texts are one from a Jaccard similarity of 0.7 of their 5-grams on; a text with eight words in a
row of a held-out one is too close to be trained on.
"""
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

NEAR = 0.7      # Jaccard similarity of word 5-grams from which two texts are one


def words_of(text: str) -> tuple[str, ...]:
    """Words, whatever their case and letter forms: "What is 3 + 4?" -> (what, is, 3, +, 4)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return tuple(re.findall(r"\w+|[+*/=<>^%×÷]|-(?=\s*\d)", text))


def grams(words: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
    """All runs of n words; of a shorter text itself."""
    return {words[i:i + n] for i in range(max(1, len(words) - n + 1))}


class Similar:
    """Texts that can be asked for one nearly like another: exact, by an inverted index."""
    def __init__(self, texts: Iterable[str] = ()):
        self.sizes, self.eights = [], set()
        self.holders: dict[tuple[str, ...], list[int]] = {}     # which texts hold a 5-gram
        for text in texts:
            self.add(words_of(text))

    def add(self, words: tuple[str, ...]) -> None:
        fives = grams(words, 5)
        for gram in fives:
            self.holders.setdefault(gram, []).append(len(self.sizes))
        self.sizes.append(len(fives))
        self.eights |= grams(words, 8)

    def nearest(self, words: tuple[str, ...]) -> float:
        """The largest Jaccard similarity |A and B| / |A or B| of 5-grams."""
        fives = grams(words, 5)
        shared = Counter(i for gram in fives for i in self.holders.get(gram, ()))
        return max((k / (len(fives) + self.sizes[i] - k) for i, k in shared.items()), default=0.0)

    def touches(self, words: tuple[str, ...]) -> bool:
        """Near one of the texts, or with eight words in a row of one: too close to be held out."""
        return self.nearest(words) >= NEAR or not self.eights.isdisjoint(grams(words, 8))
