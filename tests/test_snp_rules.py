"""The SNP hardware, rule by rule, without a VM."""

import pytest

from kvmlab.hw import snp
from kvmlab.hw.memory import GUEST_KEY, Content, readable_by_host, seen_by_guest
from kvmlab.hw.rules import ANY, Rules
from kvmlab.hw.snp import HYPERVISOR, Npf, Pvalidate, RmpEntry, Rmpupdate

OURS = snp.assigned_to(asid=1, gpa=7)
VALIDATED = OURS._replace(validated=True)


def guest(entry, enc, op, size="4K"):
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
def test_a_guest_access_is_checked_as_the_apm_table_says(entry, enc, op, outcome):
    assert guest(entry, enc, op) == outcome


def test_ownership_is_checked_before_validated():
    assert guest(OURS._replace(gpa=8), True, "read") == snp.NPF_RMP


def test_the_size_check_works_both_ways():
    assert guest(VALIDATED, True, "read", size="2M") == snp.NPF_RMP
    assert guest(VALIDATED._replace(size="2M"), True, "read", size="2M") == snp.OK


@pytest.mark.parametrize("mapping", ["4K", "2M"])
def test_a_host_read_is_never_checked(mapping):
    assert snp.host_access("read", mapping=mapping, page=VALIDATED, region_assigned=True) == snp.OK


def test_a_host_write_through_a_4k_mapping_asks_only_for_its_page():
    assert snp.host_access("write", mapping="4K", page=HYPERVISOR, region_assigned=True) == snp.OK
    assert snp.host_access("write", mapping="4K", page=OURS, region_assigned=True) == snp.HOST_PF


def test_a_host_write_through_a_2m_mapping_asks_for_the_whole_region():
    assert snp.host_access("write", mapping="2M", page=HYPERVISOR, region_assigned=True) == snp.HOST_PF
    assert snp.host_access("write", mapping="2M", page=HYPERVISOR, region_assigned=False) == snp.OK


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (VALIDATED, HYPERVISOR),
        (VALIDATED, OURS._replace(gpa=8)),
        (VALIDATED, OURS._replace(size="2M")),
        (VALIDATED, OURS._replace(asid=2)),
    ],
)
def test_rmpupdate_to_another_state_clears_validated(old, new):
    assert snp.rmpupdate(old, new) == (Rmpupdate.OK, new)


def test_an_identical_rmpupdate_keeps_validated_unless_switched():
    assert snp.rmpupdate(VALIDATED, OURS) == (Rmpupdate.OK, VALIDATED)
    assert snp.rmpupdate(VALIDATED, OURS, identical_keeps_validated=False) == (Rmpupdate.OK, OURS)


def test_rmpupdate_of_an_immutable_entry_is_fail_permission():
    assert snp.rmpupdate(RmpEntry(immutable=True, assigned=True, gpa=0), OURS)[0] == Rmpupdate.FAIL_PERMISSION


def test_rmpupdate_with_reserved_input_is_fail_input():
    assert snp.rmpupdate(HYPERVISOR, RmpEntry(assigned=True))[0] == Rmpupdate.FAIL_INPUT
    assert snp.rmpupdate(HYPERVISOR, RmpEntry(asid=1))[0] == Rmpupdate.FAIL_INPUT
    assert snp.rmpupdate(HYPERVISOR, VALIDATED)[0] == Rmpupdate.FAIL_INPUT


def test_psmash_keeps_owner_and_validated_and_wants_a_2m_entry():
    assert snp.psmash(VALIDATED._replace(size="2M")) == (Rmpupdate.OK, VALIDATED)
    assert snp.psmash(VALIDATED)[0] == Rmpupdate.FAIL_INPUT


def test_pvalidate_sets_and_rescinds_and_reports_no_update():
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
def test_npf_error_code_bits_have_their_numbers(bit, number):
    assert bit == 1 << number


def test_an_rmp_fault_on_a_private_write_has_this_error_code():
    assert snp.npf_error_code(present=True, write=True, enc=True, rmp=True) == 0x5_8000_0007


def test_a_miss_on_a_shared_read_has_this_error_code():
    assert snp.npf_error_code(present=False, write=False, enc=False, rmp=False) == 0x1_0000_0004


@pytest.mark.parametrize("table", [snp.GUEST_ACCESS, snp.HOST_ACCESS])
def test_an_access_table_names_its_source_and_prints_every_row(table):
    assert "APM" in table.source
    assert len(table.text().splitlines()) == len(table.rows) + 3


def test_a_table_with_a_forgotten_case_is_refused():
    with pytest.raises(ValueError, match="0 rows decide a=True"):
        Rules("spec", {"a": (False, True)}, [(False, "x")])


def test_a_table_with_a_case_decided_twice_is_refused():
    with pytest.raises(ValueError, match="2 rows decide a=True"):
        Rules("spec", {"a": (False, True)}, [(ANY, "x"), (True, "y")])


def test_a_read_with_the_wrong_c_bit_returns_noise():
    private, shared = Content("guest", GUEST_KEY, 0), Content("guest", "plain", 0)
    assert seen_by_guest(private, enc=True, encrypts=True) == "data"
    assert seen_by_guest(private, enc=False, encrypts=True) == "noise"
    assert seen_by_guest(shared, enc=True, encrypts=True) == "noise"
    assert seen_by_guest(shared, enc=True, encrypts=False) == "data"


def test_the_host_reads_ciphertext_of_what_the_guest_key_wrote():
    assert not readable_by_host(Content("guest", GUEST_KEY, 0))
    assert readable_by_host(Content("guest", "plain", 0))
