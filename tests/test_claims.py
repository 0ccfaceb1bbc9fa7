"""The claims of the thread: every one has an answer, and the answer comes from the model."""

import pytest

from kvmlab.claims import BEYOND, CLAIMS, CONFIRMED, QUALIFIED, REFUTED, Bench, answers
from kvmlab.scenario import InputError

ANSWERS = {
    "C01": CONFIRMED, "C02": CONFIRMED, "C03": CONFIRMED, "C04": CONFIRMED, "C05": REFUTED, "C06": CONFIRMED,
    "C07": QUALIFIED, "C08": QUALIFIED, "C09": CONFIRMED, "C10": REFUTED, "C11": QUALIFIED, "C12": QUALIFIED,
    "C13": CONFIRMED, "C14": CONFIRMED, "C15": QUALIFIED, "C16": CONFIRMED, "C17": CONFIRMED, "C18": QUALIFIED,
    "C19": QUALIFIED, "C20": REFUTED, "C21": CONFIRMED, "C22": QUALIFIED, "C23": QUALIFIED, "C24": QUALIFIED,
    "C25": BEYOND, "C26": CONFIRMED, "C27": REFUTED, "C28": QUALIFIED, "C29": CONFIRMED,
}  # fmt: skip


class Swapped(Bench):
    """A bench on which one design is secretly another."""

    def __init__(self, name, other):
        super().__init__()
        self.name, self.other = name, other

    def report(self, design, *args, **kwargs):
        return super().report(self.other if design == self.name else design, *args, **kwargs)


def test_every_claim_of_the_thread_is_there():
    assert sorted(CLAIMS) == [f"C{n:02}" for n in range(1, 30)]


@pytest.mark.parametrize("claim", ANSWERS)
def test_a_claim_has_this_answer_and_shows_what_it_looked_at(claim):
    (answer,) = answers([claim])
    assert answer.word == ANSWERS[claim]
    assert bool(answer.evidence) == (answer.word != BEYOND)


@pytest.mark.parametrize(
    ("claim", "design", "instead"),
    [
        ("C01", "v8-post-hook", "no-zap"),
        ("C02", "v8-post-hook", "first-memslot-only"),
        ("C02", "zaps-one-address-space", "v8-post-hook"),
        ("C03", "v8-post-hook", "no-zap"),
        ("C04", "upstream", "v8-post-hook"),
        ("C05", "set-mem-attr-op", "v8-post-hook"),
        ("C06", "v7-under-lock", "v8-post-hook"),
        ("C07", "no-zap", "v8-post-hook"),
        ("C08", "upstream", "no-zap"),
        ("C10", "v8-post-hook", "no-zap"),
        ("C11", "no-zap", "v8-post-hook"),
        ("C12", "no-zap", "v8-post-hook"),
        ("C13", "no-zap", "v8-post-hook"),
        ("C14", "no-zap", "v8-post-hook"),
        ("C15", "upstream", "no-zap"),
        ("C17", "pre-post-directmap", "v8-post-hook"),
        ("C18", "v8-post-hook", "no-zap"),
        ("C20", "zap-by-op", "v8-post-hook"),
        ("C21", "pre-post-directmap", "v7-under-lock"),
        ("C22", "upstream", "keeps-directmap"),
        ("C24", "pre-post-as-typed", "pre-post-directmap"),
        ("C26", "pre-post-directmap", "pre-post-as-typed"),
        ("C27", "rmp-under-lock-directmap-post", "pre-post-snp-only"),
        ("C29", "upstream", "narrow-hull"),
        ("C29", "hull-of-2m-only", "upstream"),
        ("C28", "set-mem-attr-op", "v8-post-hook"),
    ],
)
def test_another_design_in_its_place_changes_the_answer(claim, design, instead):
    assert CLAIMS[claim].answer(Swapped(design, instead)).word != ANSWERS[claim]


def test_an_unknown_claim_is_refused_with_those_that_exist():
    with pytest.raises(InputError, match="unknown claim 'C99'; there are C01 to C29"):
        answers(["C99"])
