"""The claims of the thread: every one has an answer, the answer comes from the model, and it says no more."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from kvmlab import cli
from kvmlab.design import Design
from kvmlab.errors import InputError
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.verdict.claims import (
    ANSWERED,
    CLAIMS,
    CONFIRMED,
    QUALIFIED,
    REFUTED,
    SOURCE,
    Bench,
    Claim,
    answers,
)
from kvmlab.verdict.claims.mail import out_of_the_file_first

ANSWERS = {
    "C01": QUALIFIED, "C02": CONFIRMED, "C03": CONFIRMED, "C04": CONFIRMED, "C05": REFUTED, "C06": CONFIRMED,
    "C07": QUALIFIED, "C08": QUALIFIED, "C09": SOURCE, "C10": ANSWERED, "C11": ANSWERED, "C12": QUALIFIED,
    "C13": QUALIFIED, "C14": QUALIFIED, "C15": QUALIFIED, "C16": SOURCE, "C17": CONFIRMED, "C18": QUALIFIED,
    "C19": QUALIFIED, "C20": ANSWERED, "C21": CONFIRMED, "C22": QUALIFIED, "C23": QUALIFIED, "C24": QUALIFIED,
    "C25": SOURCE, "C26": QUALIFIED, "C27": REFUTED, "C28": QUALIFIED, "C29": CONFIRMED, "C30": CONFIRMED,
    "C31": QUALIFIED, "C32": CONFIRMED, "C33": QUALIFIED, "C34": CONFIRMED, "C35": CONFIRMED, "C36": QUALIFIED,
    "C37": CONFIRMED, "C38": CONFIRMED, "C39": QUALIFIED, "C40": SOURCE,
}  # fmt: skip
BENCH = Bench()


class Swapped(Bench):
    """A bench on which one design is secretly another."""

    def __init__(self, name: str, other: str) -> None:
        super().__init__(_done=BENCH._done)  # what is known of a design is known of it by any name
        self.name, self.other = name, other

    def design(self, name: str) -> Design:
        return super().design(self.other if name == self.name else name)


@cache
def answer(claim: Any) -> Any:
    return CLAIMS[claim].answer(BENCH)


def test_every_claim_of_the_thread_is_there() -> None:
    assert sorted(CLAIMS) == [f"C{n:02}" for n in range(1, 41)]


@pytest.mark.parametrize("claim", ANSWERS)
def test_a_claim_has_this_answer_and_shows_what_it_looked_at(claim: str) -> None:
    found = answer(claim)
    assert found.word == ANSWERS[claim]
    assert found.evidence


@pytest.mark.parametrize("claim", ANSWERS)
def test_an_answer_names_every_scenario_that_it_looked_at_and_no_other(claim: str) -> None:
    found = answer(claim)
    looked_at = {line.split(", ")[2] for line in found.evidence if line.count(", ") > 2} & set(SCENARIOS)
    cases = found.why.rpartition("[")[2].rstrip("]") if found.why.endswith("]") else ""
    named = {word for part in cases.split("; ") for word in part.rpartition(": ")[2].split(", ")}
    assert named & set(SCENARIOS) == looked_at


def test_the_command_prints_every_claim_with_its_answer_and_evidence_when_asked_by_id(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def claims(*arguments: Any) -> Any:
        return cli.main(["claims", *arguments]), capsys.readouterr().out

    monkeypatch.setattr(Claim, "answer", lambda self, bench: answer(self.id))
    status, out = claims()
    assert status == 0 and len(re.findall(r"^C\d\d ", out, re.M)) == 40
    assert "no-zap, snp, tiny" in claims("C12")[1]
    assert json.loads(claims("C06", "--json")[1])[0]["answer"] == "confirmed"
    assert claims("C99")[0] == 2


def test_a_question_is_answered_and_neither_confirmed_nor_refuted() -> None:
    assert [claim for claim in ANSWERS if answer(claim).word == ANSWERED] == ["C10", "C11", "C20"]


def test_what_only_a_transcription_shows_is_the_source_s_word_and_no_check_stands_behind_it() -> None:
    for claim in ("C09", "C16", "C25", "C40"):
        found = answer(claim)
        assert found.word == SOURCE
        assert not any("states)" in line for line in found.evidence)


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
        ("C07", "never-rmpupdate", "v8-post-hook"),
        ("C08", "upstream", "no-zap"),
        ("C12", "no-zap", "v8-post-hook"),
        ("C13", "no-zap", "v8-post-hook"),
        ("C14", "no-zap", "v8-post-hook"),
        ("C15", "defer-to-fault", "defer-to-fault-takes-back"),
        ("C17", "pre-post-directmap", "v8-post-hook"),
        ("C18", "v8-post-hook", "no-zap"),
        ("C19", "upstream", "v8-post-hook"),
        ("C21", "pre-post-directmap", "v7-under-lock"),
        ("C22", "keeps-directmap", "pre-post-directmap"),
        ("C22", "rmp-under-lock-directmap-post", "pre-post-directmap"),
        ("C23", "v8-as-posted", "v8-post-hook"),
        ("C23", "maps-too-early", "v8-post-hook"),
        ("C24", "pre-post-directmap", "no-zap"),
        ("C26", "pre-post-directmap", "pre-post-as-typed"),
        ("C26", "pre-post-op-looks-up", "pre-post-directmap"),
        ("C27", "rmp-under-lock-directmap-post", "pre-post-snp-only"),
        ("C28", "set-mem-attr-op", "v8-post-hook"),
        ("C29", "upstream", "narrow-hull"),
        ("C29", "hull-of-2m-only", "upstream"),
        ("C30", "flush-without-zap", "v8-post-hook"),
        ("C30", "flush-without-zap", "no-flush"),
        ("C31", "zap-to-shared-only", "v8-post-hook"),
        ("C31", "zap-to-shared-only", "zap-by-op-direction"),
        ("C32", "flush-without-zap", "v8-post-hook"),
        ("C33", "maps-too-early", "v8-post-hook"),
        ("C33", "pre-post-as-typed", "pre-post-directmap"),
        ("C33", "upstream", "keeps-directmap"),
        ("C34", "never-rmpupdate", "no-zap"),
        ("C34", "no-zap", "v8-post-hook"),
        ("C35", "keeps-directmap", "upstream"),
        ("C37", "defer-to-fault", "v8-post-hook"),
        ("C38", "flush-without-zap", "v8-post-hook"),
        ("C39", "defer-to-fault", "defer-to-fault-takes-back"),
    ],
)
def test_another_design_in_its_place_changes_the_answer(claim: str, design: str, instead: str) -> None:
    assert CLAIMS[claim].answer(Swapped(design, instead)).word != ANSWERS[claim]


@pytest.mark.parametrize(
    ("claim", "design", "instead", "says"),
    [
        ("C10", "v8-post-hook", "no-zap", "trouble: stale-mapping and out-of-sync"),
        ("C11", "no-zap", "v8-post-hook", "with two backings: no"),
        ("C16", "v8-post-hook", "upstream", "those of v8-post-hook, defer-to-fault and upstream"),
        ("C20", "no-zap", "zap-by-op", "tdx would have to say yes (nothing)"),
        ("C40", "upstream", "v8-post-hook", "has it elsewhere"),
    ],
)
def test_another_design_in_its_place_changes_what_is_said_to_a_question_or_of_a_source(
    claim: str, design: str, instead: str, says: str
) -> None:
    assert says not in answer(claim).why
    assert says in CLAIMS[claim].answer(Swapped(design, instead)).why


def test_the_hardware_test_going_private_is_an_rmp_fault_with_the_c_bit_and_a_shared_access_takes_no_fault() -> (
    None
):
    why = answer("C30").why
    assert "going shared a C=0 access after the return lands in restrictedmem's page, without an #NPF" in why
    assert "going private the first C=1 access takes #NPF 0x580000005 (RMP and ENC set)" in why


def test_the_worst_case_for_16_gib_is_a_count_at_the_quoted_price() -> None:
    why = answer("C36").why
    assert "4,194,304 RMPUPDATEs for 16 GiB in 4K" in why
    assert "if one takes the quoted 1 us, that is 4.2 s" in why


def test_at_another_price_the_two_figures_do_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmlab.emulator.costs.RMPUPDATE_SECONDS", 5e-6)
    assert CLAIMS["C36"].answer(Bench()).word == REFUTED


def test_deferral_saves_nothing_of_what_the_guest_accepts() -> None:
    assert (
        "0 where the guest accepts all memory at once, 0 where it accepts 2M at a time" in answer("C37").why
    )


@pytest.mark.parametrize("scenario", ["discard", "discard-first", "discard-races"])
def test_deferral_goes_with_a_discard_that_takes_the_page_out_of_the_file_before_it_makes_it_shared(
    scenario: str,
) -> None:
    design = BENCH.design("defer-to-fault")
    assert "host-rmp-fault" in BENCH.bad(design, scenario)
    assert BENCH.clean(out_of_the_file_first(design), scenario)


def test_a_price_that_is_not_published_is_not_guessed() -> None:
    assert "No other price is published" in answer("C19").why
    assert "What a zap costs nobody has published" in answer("C31").why


def test_an_unknown_claim_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InputError, match="unknown claim 'C99'; there are C01 to C40"):
        answers(["C99"])


def test_an_answer_as_json_has_the_fields_that_scripts_know() -> None:
    assert list(answer("C06").as_json()) == ["id", "who", "text", "answer", "why", "evidence"]
