"""The SNP hardware, rule by rule, without a VM."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlab.hw import snp
from kvmlab.hw.memory import EMPTY, GUEST_KEY, Content, readable_by_host, seen_by_guest
from kvmlab.hw.rules import ANY, Rules
from kvmlab.hw.snp import HYPERVISOR, Npf, Pvalidate, RmpEntry, Rmpupdate
from kvmlab.hw.snp import entry as snp_entry
from kvmlab.hw.snp import pages as snp_pages

OURS = snp.assigned_to(asid=1, gpa=7)
VALIDATED = OURS._replace(validated=True)


def guest(entry: RmpEntry, enc: bool, op: str, size: str = "4K") -> str:
    return snp.guest_access(entry, enc=enc, op=op, asid=1, gpa=7, size=size)


@pytest.mark.parametrize(
    ("entry", "enc", "op", "outcome"),
    [
        (HYPERVISOR, False, "read", snp.OK),
        (VALIDATED, False, "read", snp.OK),
        (HYPERVISOR, False, "write", snp.OK),
        (VALIDATED, False, "write", snp.NPF_RMP),
        (HYPERVISOR, True, "read", snp.NPF_RMP),
        (HYPERVISOR, True, "write", snp.NPF_RMP),
        (HYPERVISOR, True, "pvalidate", snp.NPF_RMP),
        (OURS, True, "read", snp.VC),
        (OURS, True, "write", snp.VC),
        (OURS, True, "pvalidate", snp.OK),
        (VALIDATED, True, "read", snp.OK),
        (VALIDATED, True, "write", snp.OK),
        (VALIDATED._replace(asid=2), True, "read", snp.NPF_RMP),
        (VALIDATED._replace(gpa=8), True, "read", snp.NPF_RMP),
        (VALIDATED._replace(immutable=True), True, "read", snp.NPF_RMP),
        (VALIDATED._replace(size="2M"), True, "read", snp.NPF_RMP),
    ],
)
def test_a_guest_access_is_checked_as_the_apm_table_says(
    entry: RmpEntry, enc: bool, op: str, outcome: str
) -> None:
    assert guest(entry, enc, op) == outcome


def test_ownership_is_checked_before_validated() -> None:
    assert guest(OURS._replace(gpa=8), True, "read") == snp.NPF_RMP


def test_the_size_check_works_both_ways() -> None:
    assert guest(VALIDATED, True, "read", size="2M") == snp.NPF_RMP
    assert guest(VALIDATED._replace(size="2M"), True, "read", size="2M") == snp.OK


@pytest.mark.parametrize("mapping", ["4K", "2M"])
def test_a_host_read_is_never_checked(mapping: str) -> None:
    assert snp.host_access("read", mapping=mapping, page=VALIDATED, region_assigned=True) == snp.OK


def test_a_host_write_through_a_4k_mapping_asks_only_for_its_page() -> None:
    assert snp.host_access("write", mapping="4K", page=HYPERVISOR, region_assigned=True) == snp.OK
    assert snp.host_access("write", mapping="4K", page=OURS, region_assigned=True) == snp.HOST_PF


@pytest.mark.parametrize("op", ["write", "page-table"])
@pytest.mark.parametrize("mapping", ["2M", "1G"])
def test_a_host_write_through_a_large_mapping_asks_for_the_whole_region(mapping: str, op: str) -> None:
    assert snp.host_access(op, mapping=mapping, page=HYPERVISOR, region_assigned=True) == snp.HOST_PF
    assert snp.host_access(op, mapping=mapping, page=HYPERVISOR, region_assigned=False) == snp.OK


def test_the_written_page_is_a_part_of_its_region() -> None:
    assert snp.host_access("write", mapping="2M", page=OURS, region_assigned=False) == snp.HOST_PF


@pytest.mark.parametrize(("mapping", "outcome"), [("4K", snp.OK), ("2M", snp.NPF_RMP), ("1G", snp.NPF_RMP)])
def test_a_shared_guest_write_through_a_large_mapping_asks_for_the_whole_region(
    mapping: str, outcome: str
) -> None:
    write = dict(enc=False, op="write", asid=1, gpa=7, size=mapping)
    assert snp.guest_access(HYPERVISOR, **write, region_assigned=True) == outcome
    assert snp.guest_access(HYPERVISOR, **write) == snp.OK


@pytest.mark.parametrize("mapping", ["4K", "2M", "1G"])
def test_a_shared_guest_write_to_an_assigned_page_faults_through_any_mapping(mapping: str) -> None:
    assert guest(OURS, False, "write", mapping) == snp.NPF_RMP


@pytest.mark.parametrize(("op", "entry"), [("read", VALIDATED), ("pvalidate", OURS)])
def test_an_access_that_must_be_private_does_not_ask_for_the_region(op: str, entry: RmpEntry) -> None:
    assert snp.guest_access(entry, enc=True, op=op, asid=1, gpa=7, region_assigned=True) == snp.OK


def test_a_1g_mapping_is_taken_as_a_2m_one() -> None:
    assert guest(VALIDATED._replace(size="2M"), True, "read", "1G") == snp.OK
    assert guest(VALIDATED, True, "read", "1G") == snp.NPF_RMP


def test_pvalidate_through_a_shared_mapping_is_a_nested_fault() -> None:
    assert guest(OURS, False, "pvalidate") == guest(HYPERVISOR, False, "pvalidate") == snp.NPF_RMP


@pytest.mark.parametrize(
    ("entry", "enc", "op", "more", "alone"),
    [
        (VALIDATED, True, "read", {"size": "2M"}, True),
        (VALIDATED, True, "read", {"size": "1G"}, True),
        (VALIDATED, True, "read", {"size": "4K"}, False),
        (OURS, True, "write", {"size": "2M"}, True),  # what comes after the size is #VC
        (VALIDATED._replace(gpa=8), True, "read", {"size": "2M"}, False),
        (VALIDATED, False, "read", {"size": "2M"}, False),
        (VALIDATED, False, "write", {"size": "2M"}, False),
        (HYPERVISOR, False, "write", {"size": "2M", "region_assigned": True}, True),
        (HYPERVISOR, False, "write", {"size": "2M"}, False),
    ],
)
def test_an_access_fails_for_its_size_alone_or_for_more(
    entry: RmpEntry, enc: bool, op: str, more: dict[str, Any], alone: bool
) -> None:
    assert snp.fails_for_size(entry, enc=enc, op=op, asid=1, gpa=7, **more) is alone


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (VALIDATED, HYPERVISOR),
        (VALIDATED, OURS._replace(gpa=8)),
        (VALIDATED, OURS._replace(size="2M")),
        (VALIDATED, OURS._replace(asid=2)),
    ],
)
def test_rmpupdate_to_another_state_clears_validated(old: RmpEntry, new: RmpEntry) -> None:
    assert snp.rmpupdate(old, new) == (Rmpupdate.OK, new)


def test_an_identical_rmpupdate_keeps_validated_unless_switched() -> None:
    assert snp.rmpupdate(VALIDATED, OURS) == (Rmpupdate.OK, VALIDATED)
    assert snp.rmpupdate(VALIDATED, OURS, identical_keeps_validated=False) == (Rmpupdate.OK, OURS)


def test_an_identical_rmpupdate_keeps_vmsa_and_takes_immutable_from_the_new_state() -> None:
    old = VALIDATED._replace(vmsa=True)
    assert snp.rmpupdate(old, OURS) == (Rmpupdate.OK, old)
    assert snp.rmpupdate(old, OURS._replace(immutable=True)) == (Rmpupdate.OK, old._replace(immutable=True))


def test_rmpupdate_to_another_state_clears_vmsa() -> None:
    assert snp.rmpupdate(VALIDATED._replace(vmsa=True), OURS._replace(gpa=8))[1] == OURS._replace(gpa=8)


def test_rmpupdate_of_an_immutable_entry_is_fail_permission() -> None:
    assert snp.rmpupdate(RmpEntry(immutable=True, assigned=True, gpa=0), OURS)[0] == Rmpupdate.FAIL_PERMISSION
    assert snp.rmpupdate(OURS._replace(immutable=True), HYPERVISOR) == (
        Rmpupdate.FAIL_PERMISSION,
        OURS._replace(immutable=True),
    )


@pytest.mark.parametrize(
    "new",
    [
        RmpEntry(assigned=True),  # no GPA
        RmpEntry(asid=1),
        RmpEntry(immutable=True),
        OURS._replace(validated=True),
        OURS._replace(vmsa=True),
        RmpEntry(vmsa=True),
    ],
)
@pytest.mark.parametrize("old", [HYPERVISOR, VALIDATED, OURS._replace(immutable=True)])
def test_rmpupdate_of_what_cannot_be_asked_for_is_fail_input_and_changes_nothing(
    old: RmpEntry, new: RmpEntry
) -> None:
    assert snp.rmpupdate(old, new) == (Rmpupdate.FAIL_INPUT, old)


@pytest.mark.parametrize("new", [HYPERVISOR, RmpEntry(gpa=0), RmpEntry(gpa=7, size="2M")])
def test_deassigning_leaves_the_hypervisors_entry_whatever_gpa_and_size_say(new: RmpEntry) -> None:
    assert snp.rmpupdate(VALIDATED, new) == (Rmpupdate.OK, HYPERVISOR)


def test_firmware_owns_what_is_assigned_without_an_asid() -> None:
    firmware = RmpEntry(assigned=True, gpa=0, immutable=True)
    assert snp.rmpupdate(OURS, firmware) == (Rmpupdate.OK, firmware)


@pytest.mark.parametrize("size", ["4K", "2M"])
def test_kvm_asks_for_a_guests_page_of_the_size_it_names(size: str) -> None:
    assert snp.assigned_to(1, 7, size) == RmpEntry(True, 1, 7, size)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (HYPERVISOR, "hypervisor"),
        (OURS, "guest gpa=7"),
        (VALIDATED._replace(size="2M"), "guest gpa=7 2M validated"),
        (VALIDATED._replace(vmsa=True), "guest gpa=7 VMSA validated"),
        (RmpEntry(True, 0, 0, immutable=True), "firmware immutable"),
    ],
)
def test_a_printed_entry_shows_every_flag_that_is_set(entry: RmpEntry, text: str) -> None:
    assert str(entry) == text


@pytest.mark.parametrize(
    ("code", "number"),
    [
        (Rmpupdate.OK, 0),
        (Rmpupdate.FAIL_INPUT, 1),
        (Rmpupdate.FAIL_PERMISSION, 2),
        (Rmpupdate.FAIL_INUSE, 3),
        (Rmpupdate.FAIL_OVERLAP, 4),
        (Pvalidate.OK, 0),
        (Pvalidate.FAIL_INPUT, 1),
        (Pvalidate.FAIL_SIZEMISMATCH, 6),
        (Pvalidate.NOUPDATE, 255),
    ],
)
def test_a_result_has_its_number(code: Pvalidate | Rmpupdate, number: int) -> None:
    assert code == number


def test_psmash_keeps_owner_and_validated_and_wants_a_2m_entry() -> None:
    assert snp.psmash(VALIDATED._replace(size="2M")) == (Rmpupdate.OK, VALIDATED)
    assert snp.psmash(VALIDATED)[0] == Rmpupdate.FAIL_INPUT
    assert snp.psmash(RmpEntry(size="2M"))[0] == Rmpupdate.FAIL_INPUT  # of nobody


def test_pvalidate_sets_and_rescinds_and_reports_no_update() -> None:
    assert snp.pvalidate(OURS, True) == (Pvalidate.OK, VALIDATED)
    assert snp.pvalidate(VALIDATED, False) == (Pvalidate.OK, OURS)
    assert snp.pvalidate(VALIDATED, True) == (Pvalidate.NOUPDATE, VALIDATED)
    assert snp.pvalidate(OURS, False)[0] == Pvalidate.NOUPDATE


@pytest.mark.parametrize(
    ("bit", "number"),
    [
        (Npf.RMP, 31),
        (Npf.GUEST_FINAL, 32),
        (Npf.GUEST_PAGE, 33),
        (Npf.ENC, 34),
        (Npf.SIZEM, 35),
        (Npf.VMPL, 36),
    ],
)
def test_npf_error_code_bits_have_their_numbers(bit: Npf, number: int) -> None:
    assert bit == 1 << number


def test_an_rmp_fault_on_a_private_write_has_this_error_code() -> None:
    assert snp.npf_error_code(present=True, write=True, enc=True, rmp=True) == 0x5_8000_0007


def test_a_miss_on_a_shared_read_has_this_error_code() -> None:
    assert snp.npf_error_code(present=False, write=False, enc=False, rmp=False) == 0x1_0000_0004


@pytest.mark.parametrize("table", [snp.GUEST_ACCESS, snp.HOST_ACCESS])
def test_an_access_table_names_its_source_and_prints_every_row(table: Rules) -> None:
    assert "APM" in table.source
    assert len(table.text().splitlines()) == len(table.rows) + 3


@pytest.mark.parametrize("module", [snp_entry, snp_pages])
def test_every_rule_can_be_imported_from_the_face(module: Any) -> None:
    rules = {
        name: rule
        for name, rule in vars(module).items()
        if isinstance(rule, Rules) or getattr(rule, "__module__", "") == module.__name__
    }
    public = [name for name in rules if not name.startswith("_")]
    assert len(public) > 8 and all(getattr(snp, name) is rules[name] for name in public)


def test_a_question_that_no_row_can_answer_names_what_would_be_allowed() -> None:
    with pytest.raises(ValueError, match="no op is fetch; it is one of read, write, page-table"):
        snp.host_access("fetch", mapping="4K", page=HYPERVISOR, region_assigned=False)
    with pytest.raises(ValueError, match="the inputs are a, not b"):
        Rules("spec", {"a": (1,)}, [(1, "x")])(b=1)


def test_a_table_is_printed_as_the_manual_prints_it() -> None:
    table = Rules(
        "spec", {"a": (False, True), "b": (1, 2)}, [(False, ANY, "x"), (True, frozenset({2, 1}), "y")]
    )
    assert table.text().splitlines() == [
        "spec",
        "a    b    outcome",
        "---  ---  -------",
        "no   -    x",
        "yes  1/2  y",
    ]


@pytest.mark.parametrize("row", [(True, "x", "y"), (True,)])
def test_a_row_of_another_length_is_refused(row: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="does not have 1 inputs and an outcome"):
        Rules("spec", {"a": (False, True)}, [(False, "z"), row])


def test_a_table_with_a_forgotten_case_is_refused() -> None:
    with pytest.raises(ValueError, match="0 rows decide a=True"):
        Rules("spec", {"a": (False, True)}, [(False, "x")])


def test_a_table_with_a_case_decided_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows decide a=True"):
        Rules("spec", {"a": (False, True)}, [(ANY, "x"), (True, "y")])


def test_a_page_as_allocated_was_written_by_nobody_in_the_first_era() -> None:
    assert Content("nobody", "plain", 0) == EMPTY and seen_by_guest(EMPTY, enc=True, encrypts=True) == "data"


def test_a_read_with_the_wrong_c_bit_returns_noise() -> None:
    private, shared = Content("guest", GUEST_KEY, 0), Content("guest", "plain", 0)
    assert seen_by_guest(private, enc=True, encrypts=True) == "data"
    assert seen_by_guest(private, enc=False, encrypts=True) == "noise"
    assert seen_by_guest(shared, enc=True, encrypts=True) == "noise"
    assert seen_by_guest(shared, enc=True, encrypts=False) == "data"


def test_the_host_reads_ciphertext_of_what_the_guest_key_wrote() -> None:
    assert not readable_by_host(Content("guest", GUEST_KEY, 0))
    assert readable_by_host(Content("guest", "plain", 0))
