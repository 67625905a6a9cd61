"""Replies that a careless matcher gets wrong, each with the verdict that a careful reader gives.

The cases are worked by hand: negations, near misses, plurals, number words, history, half answers.
"""
import random

import pytest

from gate.checks import CHECKS, check_turn, normalise, validate_check
from text.arithmetic import number_words

MEAT = {"type": "forbid", "lexicon": ["chicken", "ham", "anchovy", "egg", "milk"],
        "allow": ["coconut milk", "eggplant"]}
CITY = {"type": "recall", "values": ["Graz"], "wrong": ["Oslo"]}
PLAN = {"type": "current", "present": ["7 pm", "Friday"], "superseded": ["5 pm", "Monday"]}
COUNT = {"type": "recall", "values": ["23"]}
BUDGET = {"type": "number", "op": "<=", "value": 60, "unit": ["$", "dollar", "usd"]}

CASES = [  # check, reply, verdict and why
    # forbidden things, negated or not
    (MEAT, "Roast the chicken.", "fail:forbidden"),
    (MEAT, "A soup with no chicken.", "pass"),
    (MEAT, "It is chicken-free.", "pass"),
    (MEAT, "A stew without any ham or chicken in it.", "pass"),
    (MEAT, "Use tofu instead of chicken.", "pass"),
    (MEAT, "Instead, use chicken.", "fail:forbidden"),
    (MEAT, "Replace the chicken with beans.", "pass"),
    (MEAT, "Replace the beans with chicken.", "fail:forbidden"),
    (MEAT, "No beef, but chicken.", "fail:forbidden"),
    (MEAT, "No. Chicken it is.", "fail:forbidden"),
    (MEAT, "No problem, chicken soup!", "fail:forbidden"),
    (MEAT, "Not only chicken, take rice as well.", "fail:forbidden"),
    (MEAT, "Try vegan chicken.", "pass"),
    (MEAT, "I didn\u2019t put CHICKEN in it.", "pass"),
    (MEAT, "You need not avoid chicken.", "abstain:unclear"),
    (MEAT, "Chicken is not for everyone.", "abstain:unclear"),
    (MEAT, "Pasta with anchovies.", "fail:forbidden"),
    (MEAT, "A hamburger bun and a graham cracker.", "pass"),
    (MEAT, "Eggplant in coconut milk.", "pass"),
    (MEAT, "Eggplant in coconut milk and milk.", "fail:forbidden"),
    (MEAT, "Dice two eggs.", "fail:forbidden"),
    (MEAT | {"literal": True}, "There is no chicken in it.", "fail:forbidden"),
    # recall: whole words, wrong entities, denials
    (CITY, "You live in Graz.", "pass"),
    (CITY, "graz", "pass"),
    (CITY, "You live in **Graz**!", "pass"),
    (CITY, "In Grazer Street.", "fail:missing"),
    (CITY, "You told me your city.", "fail:missing"),
    (CITY, "In Oslo.", "fail:wrong_entity"),
    (CITY, "In Graz or in Oslo.", "abstain:right_and_wrong"),
    (CITY, "Not in Oslo but in Graz.", "pass"),
    (CITY, "You do not live in Graz.", "fail:missing"),
    (CITY, "", "fail:missing"),
    (CITY | {"either_way": True}, "You do not live in Graz.", "pass"),
    ({"type": "recall", "values": ["Noor", "Osman"]}, "That was Noor.", "fail:missing"),
    ({"type": "recall", "values": ["Noor", "Osman"], "mode": "any"}, "That was Noor.", "pass"),
    ({"type": "recall", "values": ["gas"], "aliases": {"gas": ["gaseous"]}}, "Gaseous.", "pass"),
    ({"type": "recall", "values": ["the boathouse"]}, "At your boathouse.", "pass"),
    ({"type": "recall", "values": ["shepherd's pie"]}, "Shepherd\u2019s Pie it is", "pass"),
    ({"type": "recall", "values": ["brother-in-law"]}, "For your brother in law.", "pass"),
    # numbers
    (COUNT, "Twenty-three guests.", "pass"),
    (COUNT, "twenty three", "pass"),
    (COUNT, "There are 23.", "pass"),
    (COUNT, "There are 123.", "fail:missing"),
    (COUNT, "There are 23.5 of them.", "fail:missing"),
    (COUNT, "At 10:23.", "fail:missing"),
    (COUNT, "A hundred and twenty-three.", "fail:missing"),
    (COUNT, "On the 23rd.", "pass"),
    ({"type": "recall", "values": ["1200"]}, "It has 1,200 seats.", "pass"),
    ({"type": "recall", "values": ["105"]}, "one hundred and five", "pass"),
    (BUDGET, "A lamp for $45.", "pass"),
    (BUDGET, "A lamp for forty-five dollars.", "pass"),
    (BUDGET, "Between 40 and 50 dollars.", "pass"),
    (BUDGET, "A lamp for 50 to 70 dollars.", "fail:number"),
    (BUDGET, "A lamp for $1,045.", "fail:number"),
    (BUDGET, "A lamp with 80 little lights.", "abstain:no_number"),
    ({"type": "number", "op": "=", "value": 20, "unit": ["minute", "min"]}, "20 min", "pass"),
    ({"type": "number", "op": "=", "value": 20, "unit": ["minute"]}, "20 hours", "fail:missing"),
    # what was replaced
    (PLAN, "Friday at 7 pm.", "pass"),
    (PLAN, "Friday, 7:00 P.M.", "pass"),
    (PLAN, "Friday at seven pm", "pass"),
    (PLAN, "Friday; the time changed from 5 to 7 pm.", "pass"),
    (PLAN, "Friday; moved from 5 pm to 7 pm.", "pass"),
    (PLAN, "Friday at 7 pm instead of Monday.", "pass"),
    (PLAN, "It was Monday at first, now it is Friday at 7 pm.", "pass"),
    (PLAN, "Friday, no longer Monday, at 7 pm.", "pass"),
    (PLAN, "Friday from 5 pm to 7 pm.", "abstain:unclear"),
    (PLAN, "Friday and Monday at 7 pm.", "fail:superseded"),
    (PLAN, "Friday at 5 pm.", "fail:missing"),
    (PLAN, "Friday at 7 pm, Monday is cancelled.", "pass"),
    (PLAN, "~~Monday~~ Friday, ~~5 pm~~ 7 pm", "pass"),
    (PLAN, "Friday at 7:00 in the evening.", "pass"),
    ({"type": "recall", "values": ["10 am"]}, "At 10:00 in the morning.", "pass"),
    ({"type": "recall", "values": ["10 am"]}, "At 10 o'clock in the evening.", "fail:missing"),
    ({"type": "recall", "values": ["24 kg"]}, "24kg", "pass"),
    ({"type": "recall", "values": ["24 kg"]}, "It weighs 24.0 kg.", "pass"),
    ({"type": "recall", "values": ["24 kg"]}, "24.5 kg", "fail:missing"),
    # what was replaced and what is not known are no values
    (CITY, "Graz or somewhere else.", "fail:hedged"),
    (CITY, "Rome, Graz or Lima?", "fail:hedged"),
    (CITY, "Graz, Paris, Rome, Bergen or Lima?", "fail:hedged"),
    (CITY, "It may be Rome or Graz", "fail:hedged"),
    (CITY, "Graz. You can go by bus or by train.", "pass"),
    (CITY, "Graz, not Rome or Lima: it is Graz.", "pass"),
    # named, and not stated
    (CITY, "Graz? Rome? Lima?", "abstain:doubted"),
    (CITY, "Is it Graz?", "abstain:doubted"),
    (CITY, "Graz/Rome/Lima", "abstain:doubted"),
    (CITY, "Maybe you live in Graz.", "abstain:doubted"),
    (CITY, "It could be Graz.", "abstain:doubted"),
    (CITY, "You said Graz isn't your city.", "abstain:doubted"),
    (CITY, "I wonder whether you live in Graz.", "abstain:doubted"),
    (CITY, "I don't think you live in Graz.", "abstain:doubted"),
    (CITY, "It is wrong to say that you live in Graz.", "abstain:doubted"),
    (CITY, "How about a day in Graz?", "pass"),
    (CITY, "You live in Graz. Shall we go out?", "pass"),
    (CITY, "You live in Graz, so maybe take the tram.", "pass"),
    (CITY, "Yes, in Graz.", "pass"),
    ({"type": "number", "op": "=", "value": 24, "unit": ["kg"]}, "24 kg or 30 kg",
     "abstain:several"),
    ({"type": "number", "op": "=", "value": 24, "unit": ["kg"]}, "not 24 kg", "fail:missing"),
    ({"type": "number", "op": "=", "value": 24, "unit": ["kg"]}, "No, it is not. It is 24 kg.",
     "pass"),
    (MEAT, "I don't know.", "fail:refused"),
    ({"type": "order", "values": ["jay", "owl"]}, "jay, owl or so", "fail:hedged"),
    ({"type": "no_clarify"}, "A piano, or something else.", "fail:hedged"),
    # who refuses has named nothing forbidden, and nothing else
    (MEAT, "I'm sorry, I cannot provide recipes.", "fail:refused"),
    (MEAT, "Sorry. As an AI, I can't help with that.", "fail:refused"),
    (MEAT, "I cannot recommend anything. Ask a cook.", "abstain:unclear"),
    (MEAT, "I'm sorry to hear that. I cannot provide recipes.", "abstain:unclear"),
    # which way
    ({"type": "yes_no", "value": "no"}, "No, it has ham in it.", "pass"),
    ({"type": "yes_no", "value": "no"}, "Unfortunately you can't.", "pass"),
    ({"type": "yes_no", "value": "no"}, "You should not eat that.", "pass"),
    ({"type": "yes_no", "value": "no"}, "Sure, enjoy it!", "fail:other_way"),
    ({"type": "yes_no", "value": "yes"}, "Yes, that fits.", "pass"),
    ({"type": "yes_no", "value": "no"}, "Yes, but you should not.", "abstain:undecided"),
    ({"type": "yes_no", "value": "no"}, "Nobody knows. Notes follow.", "abstain:undecided"),
    # whole replies and shapes
    ({"type": "exact", "value": "68"}, " 68.\n", "pass"),
    ({"type": "exact", "value": "68"}, "sixty-eight", "pass"),
    ({"type": "exact", "value": "68"}, "68 68", "fail:other"),
    ({"type": "exact", "value": "68"}, "-68", "fail:other"),
    ({"type": "exact", "value": "New York"}, "new  york!", "pass"),
    ({"type": "words", "count": 5}, "It's a well-known old song.", "pass"),
    ({"type": "words", "count": 5}, "Four words are here.", "fail:count"),
    ({"type": "words", "count": 12, "op": "<="}, "Yes.", "pass"),
    ({"type": "items", "count": 2, "style": "numbered"}, "Here:\n1. rake\n2) hoe", "pass"),
    ({"type": "items", "count": 2, "style": "numbered"}, "1. rake\n3. hoe", "fail:count"),
    ({"type": "items", "count": 2, "style": "numbered"}, "- rake\n- hoe", "fail:count"),
    ({"type": "items", "count": 2}, "* rake\n* hoe", "pass"),
    ({"type": "format", "json": True, "keys": {"n": "5"}}, '```json\n{"n": 5}\n```', "pass"),
    ({"type": "format", "json": True, "keys": {"n": "5"}}, '{"n": 5, "m": 1}', "fail:json"),
    ({"type": "format", "json": True}, "{n: 5}", "fail:json"),
    ({"type": "format", "case": "upper"}, "LILAC 5", "pass"),
    ({"type": "format", "case": "upper"}, "LILAC", "pass"),
    ({"type": "format", "case": "lower"}, "lilac 5", "pass"),
    ({"type": "format", "case": "upper"}, "LiLAC", "fail:case"),
    ({"type": "format", "case": "upper"}, "55", "fail:case"),
    ({"type": "format", "ends": "ember"}, "It is ice. Ember!", "pass"),
    ({"type": "format", "ends": "ember"}, "It is in December", "fail:end"),
    ({"type": "format", "starts": "ember"}, "\u201cEmber\u201d: ice.", "pass"),
    ({"type": "format", "starts": "ember"}, "Embers glow.", "fail:start"),
    ({"type": "format", "regex": r"\[ember\]"}, "[ember]", "pass"),
    ({"type": "order", "values": ["jay", "owl"]}, "Jay, then owl.", "pass"),
    ({"type": "order", "values": ["jay", "owl"]}, "owl, jay", "fail:order"),
    ({"type": "order", "values": ["jay", "owl"]}, "jay", "fail:missing"),
    # topic, repetition, asking back
    ({"type": "anchor", "terms": ["hive", "bee"]}, "They live in hives.", "pass"),
    ({"type": "anchor", "terms": ["hive", "bee"]}, "They live in trees.", "abstain:no_anchor"),
    ({"type": "nonempty"}, " ...\n", "fail:empty"),
    ({"type": "no_repeat"}, "and so on and so on and so on and so on and so on", "fail:repeats"),
    ({"type": "no_repeat"}, "Take the tram to the old harbour and walk.", "pass"),
    ({"type": "no_clarify"}, "Which one do you mean?", "fail:asks_back"),
    ({"type": "no_clarify"}, "Could you clarify that, please?", "fail:asks_back"),
    ({"type": "no_clarify"}, "The town which you named is Graz.", "pass"),
    ({"type": "no_clarify"}, "It is Graz. What else can I do?", "pass"),
]


KILOS = {"type": "number", "op": "=", "value": 24, "unit": ["kg", "kilogram"]}
YES, NO = ({"type": "yes_no", "value": value} for value in ("yes", "no"))
HONEST = [  # check, and what people say who answer it rightly: all pass
    (CITY, "You live in Graz, and your brother lives in Oslo.", "Graz; Oslo is where he lives.",
     "You live in Graz. I don't know the weather there today, though.", "Graz (not Oslo).",
     "You live in Graz, or at least that's what you told me.", "Graz - a lovely city.",
     "It's Graz, if I remember correctly.", "Your home town is Graz, isn't it?",
     "You said you live in Graz. Would you like to know more?", "If I'm not mistaken, Graz."),
    (MEAT, "Sorry, I forgot. Try tofu.", "I can't recommend a lentil soup enough!",
     "A salad. You do not have to worry about eggs.", "A dal (contains neither milk nor egg).",
     "I'm sorry to hear that. How about a vegetable curry?", "A salad; I left out the ham.",
     "You're allergic to eggs, so try a tofu scramble.", "Since you eat no chicken, lentils.",
     "I don't have a favourite, but a lentil soup is good.", "You can't go wrong with a curry.",
     "Sorry to hear it: take a lentil soup. It has no chicken."),
    (PLAN, "You changed the day from Monday to Friday and the time from 5 pm to 7 pm.",
     "Friday at 19:00.", "- Day: Friday\n- Time: 7 pm", "Friday, 7:00 PM.",
     "Day: Friday (previously Monday), time: 7 pm (previously 5 pm).",
     "It was moved from Monday at 5 pm to Friday at 7 pm.", "You moved it to Friday, 7 pm.",
     "Friday at 7 pm. Monday is no longer an option.", "It is now Friday, 7 pm (was Monday).",
     "Instead of Monday at 5 pm, it is Friday at 7 pm."),
    (KILOS, "24 kg, up from 20 kg.", "The box weighs 24 kg, I think you said.", "24kg",
     "24kg, which is about 53 pounds.", "24 kg in total (2 boxes).", "About 24 kg.",
     "The box is 24 kg; not 30 kg.", "Twenty-four kilograms.", "You told me 24 kg.",
     "It is 24 kg, so two people can carry it."),
    (BUDGET, "A lamp for $45 - it used to be $80.", "A lamp at 45 dollars, not the 80 dollar one.",
     "A 45 dollar lamp.", "For under $60 you get a desk lamp.", "A desk lamp, $39.99.",
     "Two lamps at $25 each, $50 in total.", "A lamp for about $45, which leaves $15.",
     "This lamp costs 45 USD and is within your 60 dollar budget.", "A lamp, 45 dollars.",
     "Your limit is $60, so a $45 lamp would do."),
    ({"type": "order", "values": ["jay", "owl"]}, "Jay and owl, in that order.", "jay; owl",
     "First the jay, then the owl.", "1. jay\n2. owl", "jay -> owl", "The jay came before the owl.",
     "You saw a jay, and then an owl.", "A jay; after that an owl.", "jay, owl",
     "The jay first, the owl second."),
    (YES, "That works for you.", "Yes, it is fine; it does not contain ham.", "It should be fine.",
     "Yes - you do not have to worry.", "That is fine.", "Yes, it is safe. It has no nuts and "
     "should not cause any trouble.", "Absolutely, there's no ham in it.", "It fits your budget.",
     "Yes.", "You can eat that."),
    (NO, "Better not: there is ham in it.", "Not really, it contains ham.", "I'm afraid not.",
     "It's not a good idea: it contains ham.", "I would not; it has ham.", "No, sorry, it has ham.",
     "I wouldn't recommend it, as it contains ham.", "That wouldn't work, since it has ham.",
     "It is not suitable for you.", "It contains ham, so you should avoid it."),
    ({"type": "exact", "value": "68"}, "68", "68.", "Sixty-eight", " 68 ", "**68**", '"68"', "`68`",
     "sixty eight", "68!", "(68)"),
    ({"type": "no_clarify"}, "It is Graz. Would you like to know more?", "That's the piano.",
     "You meant the piano, I think.", "The piano. Do you want the others as well?", "A piano.",
     "The piano, as you asked.", "The piano. Is that the one you meant?", "The flute.",
     "What you mean is the piano.", "That's the piano. Anything else?"),
]


@pytest.mark.parametrize("check, replies", [(check, replies) for check, *replies in HONEST])
def test_honest_replies_pass(check, replies):
    """Ten of each kind of check. What is not mended: "Graz, Austria", which might be a list."""
    assert len(replies) >= 10
    assert [r for r in replies if check_turn([check], r).verdict != "pass"] == []


def test_what_honest_replies_say_is_no_way_around():
    """The same words in the mouth of who does not answer."""
    for check, reply in (
            (CITY, "Your brother lives in Oslo. Your brother lives in Graz."),
            (CITY, "You live in Graz. You live in Oslo."), (CITY, "Graz or so."),
            (CITY, "You live in Rome. You live in Graz. You live in Lima."),
            (CITY, "I don't know the weather. I don't know your city. Graz?"),
            (CITY, "I don't know more than that: Graz."),
            (MEAT, "I do not have any recipes."), (MEAT, "Sorry."), (MEAT, "I'm sorry, I can't."),
            (MEAT, "You're allergic to eggs. Try eggs."), (MEAT, "Neither milk, but egg."),
            (PLAN, "Friday from 5 pm to 7 pm."), (PLAN, "Friday at 17:00."),
            (KILOS, "24 kg or 30 kg."), (KILOS, "It used to be 24 kg."),
            (BUDGET, "It used to be $45."), (BUDGET, "A lamp for $80, up from $45."),
            (YES, "It does not contain anything."), (NO, "It does not contain ham."),
            (YES, "You should not worry, but avoid it."), (NO, "Not really sure.")):
        assert check_turn([check], reply).verdict != "pass", reply


@pytest.mark.parametrize("check, reply, expected", CASES)
def test_matchers(check, reply, expected):
    verdict, decided = check_turn([check], reply)
    wanted, _, why = expected.partition(":")
    assert (verdict, decided) == (wanted, f"{check['type']}:{why}" if why else "")


def test_every_check_has_cases():
    assert {check["type"] for check, _, _ in CASES} == set(CHECKS)


def test_one_failure_decides_and_doubt_beats_a_pass():
    unclear, wrong = "In Graz or in Oslo.", "In Bergen."
    assert check_turn([CITY, {"type": "nonempty"}], unclear).verdict == "abstain"
    assert check_turn([CITY, {"type": "exact", "value": "Graz"}], unclear).verdict == "fail"
    assert check_turn([{"type": "nonempty"}, CITY], wrong) == ("fail", "recall:missing")
    assert check_turn([], "anything") == ("pass", "")


def test_an_earlier_reply_again():
    check, reply = [{"type": "no_repeat"}], "How about a mushroom omelette?"
    assert check_turn(check, reply, ["Graz."]).verdict == "pass"
    assert check_turn(check, "How about a mushroom  omelette", ["Graz.", reply]) == (
        "fail", "no_repeat:said_before")


def test_who_copies_the_user_has_not_answered():
    said = ["I live in Graz and I keep four hens on the roof.", "Do you know the weather?"]
    parrot = "I live in Graz, and I keep FOUR hens on the roof. Do you know the weather?"
    assert check_turn([CITY], parrot, said=said) == ("fail", "parrot")
    assert check_turn([CITY], "You live in Graz and keep four hens.", said=said).verdict == "pass"
    assert check_turn([CITY], "Graz. Do you know the weather?", said=said).verdict == "pass"
    assert check_turn([], parrot, said=said) == ("pass", "")      # nothing was asked


def test_who_copies_in_part_is_not_decided():
    """Without its first word, or turned round; asked for several things, one may repeat them."""
    said = ["Music news from me! I play the saxophone in a band. We rehearse every Monday in Graz."]
    for parrot in (said[0].partition(" ")[2], said[0].replace("I ", "You ")):
        assert check_turn([CITY], parrot, said=said) == ("abstain", "copied")
        assert check_turn([CITY | {"values": ["Graz", "Monday"]}], parrot, said=said).verdict == (
            "pass")
    assert check_turn([CITY], "You rehearse in Graz, every Monday.", said=said).verdict == "pass"


def test_who_names_more_than_was_asked_is_not_decided():
    river = {"type": "recall", "values": ["Rhine"]}
    for reply in ("Rome, Graz, Lima, Bonn.", "Graz and the Rhine", "Rome; Graz", "Sure: Graz, 23"):
        assert check_turn([CITY], reply) == ("abstain", "list"), reply
    assert check_turn([CITY, river], "Graz and the Rhine").verdict == "pass"    # asked for both
    for reply in ("Yes, Graz.", "Graz, as you said.", "Graz, not Rome"):
        assert check_turn([CITY], reply).verdict == "pass", reply
    assert check_turn([PLAN], "Friday, no longer Monday, at 7 pm.").verdict == "pass"


def test_who_does_not_know_is_not_decided():
    """Whatever else it says; a user who does not know is another matter."""
    for reply in ("Graz, but I am not sure.", "I'm really not sure. Graz.", "No idea. Graz?",
                  "I don't know. You live in Graz.",
                  "I'm sorry, I cannot say whether you live in Graz."):
        assert check_turn([CITY], reply) == ("abstain", "not_knowing"), reply
    no = {"type": "yes_no", "value": "no"}
    assert check_turn([no], "I cannot say.") == ("abstain", "not_knowing")
    assert check_turn([CITY], "You live in Graz; you do not know the trams.").verdict == "pass"


def test_length_never_fails():
    """The published failure was a score of length; here a right reply passes at any length."""
    filler = [f"Remark {i} is about weather, trains and the number {i + 1000}." for i in range(400)]
    random.Random(0).shuffle(filler)
    for check, reply, expected in CASES:
        if expected == "pass" and check["type"] in ("recall", "current", "anchor", "forbid"):
            long = f"{reply.rstrip('.!')}. {' '.join(filler)}"
            assert check_turn([check], long).verdict == "pass", (check, reply)


def test_number_words_against_the_projects_own():
    """Every number 0..999 as data.number_words writes it, with hyphen and "and" too."""
    for n in range(1000):
        words = number_words(n)
        forms = {words, words.replace("hundred ", "hundred and ")}
        if n > 20 and n % 10:
            forms.add("-".join(words.rsplit(" ", 1)) if n % 100 > 20 else words)
        for form in forms:
            assert normalise(f"about {form} people") == f"about {n} people", form


def test_normalise():
    assert normalise("They won\u2019t come at 7 P.M., all **twenty-three**") == (
        "they will not come at 7 pm, all 23")
    assert normalise("can\u2019t, cannot, isn't: a\u2013b \u201cx\u201d") == (
        'can not, can not, is not: a-b "x"')
    assert normalise("\ufb01ve \uff15 apples, 1,234,567") == "5 5 apples, 1234567"


@pytest.mark.parametrize("check, word", [
    ({"type": "recal", "values": []}, "recal"), ({"values": ["x"]}, "type"),
    ({"type": "recall"}, "values"), ({"type": "exact", "value": "1", "unit": "x"}, "unit"),
    ("recall", "recall"),
])
def test_mistakes_in_a_file(check, word):
    validate_check(CITY)
    with pytest.raises((ValueError, TypeError), match=word):
        validate_check(check)
