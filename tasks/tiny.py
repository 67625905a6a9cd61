"""The text and the tokenizers of the two bundled models, so that both can be trained again.

models/tiny reads single problems and words about them; models/tiny_cot sums and chains of thought
(sums.py). Every number from 0 to 999 and every word of those texts is one token, so that a lens can
read an operation or an answer as a whole.
"""
import io
import random
from pathlib import Path

import sentencepiece

from files.disk import write_bytes
from text.arithmetic import (
    ONES,
    PHRASES,
    SYMBOLS,
    TENS,
    Problem,
    make_problem,
    number_words,
    operand_pairs,
    split_of,
)


def sample_tiny(count: int, seed: int, unnamed: bool = False) -> list[Problem]:
    """The text of models/tiny, all of it over training pairs.

    symbolic 60 %, worded 16 %      the problems themselves
    instructions 8 %                "compute 7 * 8 = 56"
    namings 8 %                     "7 * 8 means multiply": the operation words get a meaning for
                                    the unembedding to share
    spelled numbers 8 %             "56 means fifty six": from these tens and ones are learnt early

    unnamed   the text of models/untaught_*: problems stand where the namings did. The operations'
              words are then inputs alone ("add 7 and 8 = "), one worded line in five
    Sums and differences reach 0..100, as the prior work's nine prompts do.
    """
    rng = random.Random(seed)
    pairs = {
        "add": [(a, b) for a in range(101) for b in range(101)],
        "subtract": [(a, b) for a in range(101) for b in range(a + 1)],
        "multiply": operand_pairs("multiply"),
        "divide": operand_pairs("divide"),
    }
    pairs = {op: [p for p in all_pairs if split_of(*p) == "train"]
             for op, all_pairs in pairs.items()}
    problems = []
    for _ in range(count):
        operation = rng.choices(tuple(SYMBOLS), weights=(40, 40, 14, 6))[0]
        a, b = rng.choice(pairs[operation])
        symbolic = make_problem(operation, a, b)
        worded = make_problem(operation, a, b, rng.choice(PHRASES[operation]))
        body = rng.choice((symbolic, worded)).prompt.removesuffix(" = ")
        form = rng.random()
        if form < 0.6 or unnamed and 0.84 <= form < 0.92:
            problem = symbolic
        elif form < 0.76:
            problem = worded
        elif form < 0.84:
            problem = Problem(f"{rng.choice(('compute', 'calculate'))} {body} = ", symbolic.answer,
                              operation, "instruction", a, b)
        elif form < 0.92:
            prompt = rng.choice(("{} means ", "which operation is {} ? "))
            problem = Problem(prompt.format(body), operation, operation, "naming", a, b)
        else:
            n = rng.choice((rng.randrange(101), rng.randrange(400)))
            spelled = rng.choice(((f"{number_words(n)} = ", str(n)),
                                  (f"{n} means ", number_words(n))))
            problem = Problem(*spelled, "", "spelling")
        problems.append(problem)
    return problems


def write_tiny_tokenizer(folder: Path, chains: bool = False) -> None:
    """Write tokenizer.model: a token per number 0..999 and corpus word, else letters, bytes.

    chains   the words of sums.sample_tiny_cot (models/tiny_cot), not of sample_tiny
    """
    letters = ("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 "
               ". , : ; ! ? ' ( ) + - * / =")
    if chains:
        words = ["Add", "the", "numbers.", "+", "=", "and", "about", "<redacted>"]
        # these three follow a line break, which is a token of its own: no space before them
        bare = ["Question:", "Reasoning:", "Answer:"]
        letters += " < >"
    else:
        words = {word for phrases in PHRASES.values() for phrase in phrases
                 for word in phrase.split() if "{" not in word}
        words = sorted(words | {
            *ONES, *TENS, "hundred", *SYMBOLS, *SYMBOLS.values(), "=", "?",
            "compute", "calculate", "means", "which", "operation", "is", "answer"})
        bare = []
    symbols = [f"▁{n}" for n in range(1000)] + [f"▁{word}" for word in words] + bare
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters] * 20), model_writer=model, model_type="unigram",
        vocab_size=4 + 256 + len(symbols) + (90 if chains else 80), hard_vocab_limit=False,
        user_defined_symbols=symbols, byte_fallback=True,
        normalization_rule_name="identity", minloglevel=2)
    write_bytes(folder / "tokenizer.model", model.getvalue())
