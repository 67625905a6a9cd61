"""The simulated gate is the gate; and it says GO where it must not in at most 2 of 100."""
import numpy as np
from gate_simulation import (
    EDGE,
    TAIL,
    asked_again,
    blind_rates,
    draw,
    fast_go,
    go_rates,
    is_wrong,
    slow_verdict,
)


def test_the_simulated_gate_is_the_gate():
    """Counts in arrays and gate.verdict.decide on the same outcomes, GO and not."""
    said = []
    for number, scenario in enumerate(((100, .05, .95, .05, 1.), (80, .1, .95, .02, .95),
                                       (200, .1, .97, 0., .95), (60, .2, .9, 0., .9),
                                       (40, 0., 1., 0., 1.), (20, 0., 1., 0., .99))):
        counts = draw(np.random.default_rng(number), 6, *scenario)
        for fast, gate in zip(fast_go(counts), counts):
            assert bool(fast) == (slow_verdict(gate) == "GO, not signed off")
            said.append(bool(fast))
    assert 6 < sum(said) < 30


def test_wrong_go_is_rare_and_a_true_gap_is_found(monkeypatch):
    """A part of `python tests/gate_simulation.py`: no wrong scenario above 2 %, by its interval."""
    monkeypatch.setattr("gate_simulation.SIZES", (60, 300))
    monkeypatch.setattr("gate_simulation.UNDECIDED", (0.,))
    monkeypatch.setattr("gate_simulation.RIGHT", (.9, 1.))
    found = go_rates(1000)
    assert {(f["base"], f["instruct"]) for f in found if is_wrong(f)} >= set(EDGE)
    assert max(f["go"] for f in found if is_wrong(f)) <= 30     # 20 expected at most, sd 4.4
    true, = (f["go"] for f in found if (f["base"], f["instruct"], f["n"], f["right"])
             == (.2, .95, 300, 1.))
    assert true > 900


def test_scorers_blind_to_the_base_are_seen_by_people_alone(monkeypatch):
    """A base truly at 35 %, of which both scorers miss the same 60 %: nothing of theirs tells."""
    monkeypatch.setattr("gate_simulation.BLIND", ((.35, .4, True), (.35, .4, False)))
    alike, apart = blind_rates(300)
    assert alike["go"] > 290 and apart["go"] > 200
    assert alike["signed"] <= 6 and apart["signed"] <= 6       # 2 % and its error, of 300


def test_asking_until_it_pleases():
    """Ten looks with other conversations, 500 gates a hair beyond a threshold: all looks together
    stay below TAIL, and would not if each had the limits of the first."""
    assert max(asked_again(pair, 10) for pair in EDGE) <= TAIL * 500
    assert asked_again(EDGE[0], 10, free=True) > TAIL * 500
