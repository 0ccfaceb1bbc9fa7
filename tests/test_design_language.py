"""The design language: what a text may look like, and which rows it means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvmlab.design import Condition, Design, shipped
from kvmlab.design.calls import CALLS, DEFAULTED, SECTIONS, Call, known

V8 = Design.load("v8-post-hook")
FLAT = """
kvm_vm_ioctl_set_mem_attributes():
KVM_MMU_LOCK(kvm)
kvm_mmu_invalidate_begin()
...
KVM_MMU_UNLOCK(kvm)
kvm_vm_set_region_attr() // the store
KVM_MMU_LOCK(kvm)
kvm_mem_attrs_changed():
flush |= kvm_unmap_gfn_range()
if (flush)
kvm_flush_remote_tlbs()
kvm_mmu_invalidate_end()
KVM_MMU_UNLOCK(kvm)
"""
PRE_POST = """
if (attr == private)
kvm_unmap_directmap(start, end)
kvm_mem_attrs_changed()
if (attr == shared)
kvm_map_directmap(start, end)
"""


def calls(design: Design, section: str = "ioctl", to: str = "private", platform: str = "snp") -> list[str]:
    return [row.call for row in design.rows(section, to, platform)]


def ioctl(text: str, to: str = "private", platform: str = "snp") -> list[str]:
    """The calls of a text that stores the attributes, without that store."""
    return calls(Design.parse(text + "\nxa_store()"), "ioctl", to, platform)[:-1]


# -- what mail and C add


def test_a_text_without_a_header_is_the_ioctl() -> None:
    assert Design.parse("xa_store()").own == ("ioctl",)


def test_the_function_of_the_ioctl_is_its_header() -> None:
    text = "fault:\n  mmu_seq_snapshot()\nkvm_vm_ioctl_set_mem_attributes():\n  xa_store()"
    assert calls(Design.parse(text)) == ["kvm_vm_set_region_attr"]


@pytest.mark.parametrize("quote", ["> ", "> > ", ">> ", ">", "\t", "    "])
def test_mail_quoting_and_a_common_margin_change_nothing(quote: str) -> None:
    quoted = "\n".join(quote + line for line in FLAT.splitlines())
    assert Design.parse(quoted).sections == Design.parse(FLAT).sections


def test_a_flat_sequence_reads_as_its_indented_form() -> None:
    indented = FLAT.replace("flush |=", "    flush |=").replace("if (fl", "    if (fl")
    indented = indented.replace("\nkvm_flush", "\n        kvm_flush")
    assert Design.parse(indented).sections == Design.parse(FLAT).sections


def test_a_call_with_a_colon_is_a_title_when_its_own_calls_follow() -> None:
    assert calls(Design.parse(FLAT))[5:7] == ["kvm_unmap_gfn_range", "kvm_flush_remote_tlbs"]


def test_a_call_with_a_colon_is_the_call_when_something_else_follows() -> None:
    assert ioctl("kvm_mem_attrs_changed():\nrmpupdate()")[0] == "kvm_unmap_gfn_range"


def test_a_call_with_a_deeper_body_is_that_body() -> None:
    assert ioctl("kvm_mem_attrs_changed():\n  rmpupdate()") == ["rmpupdate"]


def test_a_call_with_a_body_in_braces_is_that_body() -> None:
    assert ioctl("kvm_mem_attrs_changed() {\nrmpupdate();\n}") == ["rmpupdate"]


def test_a_kernel_function_that_only_holds_calls_may_stand_over_them() -> None:
    assert ioctl("kvm_post_mem_attrs_changed():\n  kvm_map_directmap()") == ["kvm_map_directmap"]


def test_an_if_without_a_deeper_body_governs_one_statement() -> None:
    assert ioctl("if (attr == shared)\nrmpupdate()\nkvm_map_directmap()") == ["kvm_map_directmap"]


def test_an_if_with_a_deeper_body_governs_all_of_it() -> None:
    assert ioctl("if (attr == shared)\n  rmpupdate()\n   kvm_map_directmap()\nadjust_direct_map()") == [
        "adjust_direct_map"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "if (attr == shared) {\nrmpupdate();\n} else {\nadjust_direct_map();\n}",
        "if (attr == shared)\n{\n  rmpupdate();\n}\nelse\n{\n  adjust_direct_map();\n};",
        "if (attr == shared)\nrmpupdate()\nelse\nadjust_direct_map()",
        "if (attr == shared) rmpupdate(); else adjust_direct_map();",
        "if ( attr==shared ) { rmpupdate() } else { adjust_direct_map() }",
        "\tif (attr == shared)\n\t\trmpupdate();\n\telse\n\t\tadjust_direct_map();",
        "if (platform == tdx)\n return\nelse if (attr == shared)\n rmpupdate()\nelse\n adjust_direct_map()",
    ],
)
def test_an_else_runs_when_the_if_does_not(text: str) -> None:
    assert ioctl(text) == ["adjust_direct_map"]


def test_an_else_belongs_to_the_nearest_if() -> None:
    text = "if (attr == private)\nif (platform == tdx)\nrmpupdate()\nelse\nadjust_direct_map()"
    assert [ioctl(text, to) for to in ("private", "shared")] == [["adjust_direct_map"], []]


def test_an_else_follows_the_if_above_which_it_stands() -> None:
    text = "if (attr == private)\n  if (platform == tdx)\n    rmpupdate()\nelse\n  adjust_direct_map()"
    assert [ioctl(text, to) for to in ("private", "shared")] == [[], ["adjust_direct_map"]]


@pytest.mark.parametrize(
    "text", ["if (attr == shared) { }", "if (attr == shared) {\n} else {\n // gone\n}", "if (flush) { }"]
)
def test_an_if_from_which_all_was_deleted_is_nothing(text: str) -> None:
    assert ioctl(f"{text}\nadjust_direct_map()") == ["adjust_direct_map"]


def test_an_else_behind_an_empty_if_stays_what_it_was() -> None:
    text = "if (attr == private) { } else { rmpupdate() }"
    assert [ioctl(f"{text}\nxa_store()", to) for to in ("private", "shared")] == [
        ["kvm_vm_set_region_attr"], ["rmpupdate", "kvm_vm_set_region_attr"],
    ]  # fmt: skip


def test_comments_of_every_kind_are_nothing() -> None:
    text = "/* one\n * two\n */\nrmpupdate() // three\n# four\n/* five */ adjust_direct_map() /* six */"
    assert ioctl(text) == ["rmpupdate", "adjust_direct_map"]


@pytest.mark.parametrize("text", ["...", "[...]", "…", "  ...  // and so on", "> ..."])
def test_a_line_of_dots_is_nothing(text: str) -> None:
    assert ioctl(f"{text}\nrmpupdate()\n{text}") == ["rmpupdate"]


@pytest.mark.parametrize(
    "text", ["rmpupdate", "rmpupdate();", "ret = rmpupdate(pfn, &state)", "rmpupdate(a,\n    f(b, g(c)))"]
)
def test_parentheses_arguments_and_semicolons_are_free(text: str) -> None:
    assert ioctl(text) == ["rmpupdate"]


def test_blanks_of_web_archives_are_blanks() -> None:
    assert ioctl("if\u00a0(attr == private)\n\u00a0\u00a0rmpupdate()\n", "shared") == []


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_line_endings_of_other_systems_are_line_endings(ending: str) -> None:
    assert Design.parse(FLAT.replace("\n", ending)).sections == Design.parse(FLAT).sections


@pytest.mark.parametrize("name", ["kvm_x86_update_mem_attr", "kvm_x86_set_mem_attr"])
def test_a_static_call_is_the_call(name: str) -> None:
    assert ioctl(f"static_call({name})(kvm, slot, attrs, start, end)") == ["kvm_unmap_directmap", "rmpupdate"]


@pytest.mark.parametrize("call", [c for c in CALLS if not c.holds_calls], ids=lambda call: call.name)
def test_every_alias_is_its_call(call: Call) -> None:
    assert all(known(alias) is known(call.name) for alias in call.aliases)


@pytest.mark.parametrize("call", [c for c in CALLS if not c.holds_calls], ids=lambda call: call.name)
def test_every_call_says_what_it_is_and_where_its_rule_comes_from(call: Call) -> None:
    assert call.meaning and call.source and (call.step or call.parts)


# -- locks, directions, conditions


@pytest.mark.parametrize(
    "lock", ["slots_lock", "&kvm->slots_lock", "kvm->slots_lock", "& vm->kvm.slots_lock"]
)
def test_a_lock_may_be_named_as_the_kernel_does(lock: str) -> None:
    row = Design.parse(f"mutex_lock({lock})\nxa_store()").rows("ioctl")[0]
    assert (row.call, row.lock) == ("mutex_lock", "slots_lock")


def test_the_macros_take_mmu_lock_for_write() -> None:
    rows = Design.parse("KVM_MMU_LOCK(kvm)\nxa_store()\nKVM_MMU_UNLOCK(kvm)").rows("ioctl")
    assert [(row.call, row.lock) for row in (rows[0], rows[-1])] == [
        ("write_lock", "mmu_lock"),
        ("write_unlock", "mmu_lock"),
    ]


def test_the_calls_on_a_mapping_take_invalidate_lock() -> None:
    row = Design.parse("filemap_invalidate_lock(mapping)\nxa_store()").rows("ioctl")[0]
    assert row.lock == "invalidate_lock"


@pytest.mark.parametrize("to", ["private", "shared"])
def test_rmpupdate_goes_where_the_request_goes_unless_it_says_so(to: str) -> None:
    rows = Design.parse("rmpupdate()\nrmpupdate(shared)\nxa_store()").rows("ioctl", to)
    assert [row.target for row in rows[:2]] == [to, "shared"]


def test_the_helper_unmaps_before_it_makes_private() -> None:
    assert ioctl("kvm_x86_update_mem_attr()") == ["kvm_unmap_directmap", "rmpupdate"]


def test_the_helper_maps_after_it_has_made_shared() -> None:
    assert ioctl("kvm_x86_update_mem_attr()", "shared") == ["rmpupdate", "kvm_map_directmap"]


def test_the_helper_may_be_told_a_direction() -> None:
    assert ioctl("kvm_x86_update_mem_attr(shared)") == ["rmpupdate", "kvm_map_directmap"]


def test_rows_made_from_a_helper_point_at_its_line() -> None:
    rows = Design.parse("xa_store()\n\n  kvm_mem_attrs_changed(kvm)").rows("ioctl")
    assert {(row.line, row.text) for row in rows[1:]} == {(3, "kvm_mem_attrs_changed(kvm)")}


@pytest.mark.parametrize("platform", ["snp", "tdx", "sev", "sw"])
def test_a_platform_may_be_asked_for(platform: str) -> None:
    text = "if (platform == snp)\nrmpupdate()\nif (platform != snp)\nadjust_direct_map()"
    assert ioctl(text, platform=platform) == ["rmpupdate" if platform == "snp" else "adjust_direct_map"]


def test_whether_to_flush_is_left_to_the_run() -> None:
    row = next(row for row in Design.parse(FLAT).rows("ioctl") if row.call == "kvm_flush_remote_tlbs")
    assert row.when == (Condition("flush", ""),)


def test_other_conditions_are_decided() -> None:
    assert not any(row.when for row in Design.parse(PRE_POST).rows("ioctl"))


def test_a_return_ends_the_section_for_its_branch_only() -> None:
    design = Design.parse("xa_store()\nif (attr == private)\n  return\nrmpupdate()")
    assert [len(design.rows("ioctl", to)) for to in ("private", "shared")] == [1, 2]


# -- the fault path


def body(text: str, to: str = "private") -> list[tuple[str, str | None]]:
    row = Design.parse(f"fault:\n{text}").rows("fault", to)[0]
    assert row.body is not None
    return [(part.call, part.target) for part in row.body]


def test_rmp_prepare_splits_the_directmap_and_makes_private() -> None:
    assert body("rmp_prepare()") == [("adjust_direct_map", None), ("rmpupdate", "private")]


def test_rmp_prepare_makes_private_whatever_the_fault_is() -> None:
    assert body("rmp_prepare()", "shared") == body("rmp_prepare()")


def test_rmp_match_unmaps_before_it_makes_private() -> None:
    assert body("rmp_match()") == [("kvm_unmap_directmap", None), ("rmpupdate", "private")]


def test_rmp_match_maps_after_it_has_made_shared() -> None:
    assert body("rmp_match()", "shared") == [("rmpupdate", "shared"), ("kvm_map_directmap", None)]


def test_a_body_given_to_rmp_match_is_what_it_does() -> None:
    text = "rmp_match():\n  if (attr == shared)\n    adjust_direct_map()\n  rmpupdate()"
    assert [body(text, to) for to in ("private", "shared")] == [
        [("rmpupdate", "private")],
        [("adjust_direct_map", None), ("rmpupdate", "shared")],
    ]


# -- holes in guest_memfd, and the SEAMCALLs of a private leaf

KICK_ONCE = """
base: upstream
zap:
    tdx_sept_remove_leaf_spte():
        err = tdh_do_no_vcpus(tdh_mem_range_block, kvm, &kvm_tdx->td, gpa, tdx_level, &entry, &level_state);
        tdx_track(kvm):
            err = tdh_do_no_vcpus(tdh_mem_track, kvm, &kvm_tdx->td);
            kvm_make_all_cpus_request(kvm, KVM_REQ_OUTSIDE_GUEST_MODE);
        err = tdh_do_no_vcpus(tdh_mem_page_remove, kvm, &kvm_tdx->td, gpa, tdx_level, &entry, &level_state);
        err = tdh_phymem_page_wbinvd_hkid((u16)kvm_tdx->hkid, page);
        tdx_quirk_reset_page(page);
"""
AUG = "base: upstream\naug:\n"


def words(text: str, section: str, to: str = "private") -> list[tuple[str, str | None]]:
    return [(row.call, row.target) for row in Design.parse(text).rows(section, to, "tdx")]


def aug(text: str) -> list[str]:
    return [call if word is None else f"{call} {word}" for call, word in words(AUG + text, "aug")]


def test_a_zap_as_the_kernel_writes_it_is_its_seamcalls_in_order() -> None:
    assert words(KICK_ONCE, "zap") == [
        ("tdh_do_no_vcpus", "tdh_mem_range_block"),
        ("tdh_do_no_vcpus", "tdh_mem_track"),
        ("kvm_make_all_cpus_request", None),
        ("tdh_do_no_vcpus", "tdh_mem_page_remove"),
        ("tdh_phymem_page_wbinvd", None),
        ("tdx_clear_page", None),
    ]


def test_a_seamcall_is_retried_without_end_only_where_the_text_says_so() -> None:
    text = "base: upstream\nzap:\n  tdh_mem_track(&kvm_tdx->td)\n  tdh_mem_track(retry)"
    assert words(text, "zap") == [("tdh_mem_track", None), ("tdh_mem_track", "retry")]


@pytest.mark.parametrize("to", ["private", "shared"])
def test_a_zap_may_depend_on_the_direction(to: str) -> None:
    text = "base: upstream\nzap:\n  if (attr == shared)\n    kvm_map_directmap()\n  tdh_mem_track()"
    assert len(words(text, "zap", to)) == (2 if to == "shared" else 1)


def test_an_aug_without_freezing_stands_for_the_kernel_s() -> None:
    assert aug("tdx_mem_page_aug():\n  tdx_clflush_page(page)\n  err = tdh_mem_page_aug(td, gpa)") == [
        "freeze_spte table",
        "tdh_mem_sept_add",
        "write_spte table",
        "freeze_spte leaf",
        "clflush",
        "tdh_mem_page_aug",
        "write_spte leaf",
    ]


def test_an_aug_that_adds_the_table_gets_no_other() -> None:
    assert aug("tdh_mem_sept_add(bit_and)\ntdh_mem_page_aug(bit_and)") == [
        "freeze_spte table",
        "tdh_mem_sept_add bit_and",
        "write_spte table",
        "freeze_spte leaf",
        "tdh_mem_page_aug bit_and",
        "write_spte leaf",
    ]


@pytest.mark.parametrize(
    "text", ["tdh_mem_page_aug()\nwrite_spte(leaf)", "freeze_spte(leaf)\ntdh_mem_page_aug()"]
)
def test_an_aug_that_writes_or_freezes_an_spte_is_taken_as_it_stands(text: str) -> None:
    assert aug(text) == text.replace("()", "").replace("(leaf)", " leaf").split("\n")


def test_the_leaf_is_frozen_and_written_unless_the_table_is_named() -> None:
    text = "try_cmpxchg64(sptep, &old, FROZEN_SPTE)\nwrite_spte(leaf)\nwrite_spte(table)"
    assert aug(text) == ["freeze_spte leaf", "write_spte leaf", "write_spte table"]
    assert Design.parse(AUG + "freeze_spte()").diff(Design.parse(AUG + "freeze_spte(leaf)", "(text)")) == ""


def test_what_freezing_adds_stands_in_no_line() -> None:
    rows = Design.parse(AUG + "tdh_mem_page_aug()").rows("aug")
    assert [row.call for row in rows if row.line] == ["tdh_mem_page_aug"]


def test_an_aug_is_private_whatever_is_asked() -> None:
    assert words(AUG + "if (attr == shared)\n  clflush()\nwrite_spte()", "aug", "shared") == [
        ("write_spte", "leaf")
    ]


def test_a_punch_makes_shared_whatever_is_asked() -> None:
    text = "base: upstream\npunch:\n  sev_gmem_invalidate():\n    psmash()\n    rmpupdate()"
    assert words(text, "punch") == [("psmash", None), ("rmpupdate", "shared")]


def test_a_flush_in_a_punch_may_hang_on_the_zap() -> None:
    text = "punch:\nflush |= kvm_unmap_gfn_range()\nif (flush)\nkvm_flush_remote_tlbs()\ntruncate_inode_pages_range()"
    assert [bool(row.when) for row in Design.parse(text).rows("punch")] == [False, True, False]


@pytest.mark.parametrize("section", DEFAULTED)
def test_what_no_base_gives_of_the_later_sections_is_upstream_s(section: str) -> None:
    design = Design.parse("ioctl:\n  xa_store()\nfault:\n  mmu_seq_snapshot()\nrmp_fault:\n  return")
    assert design.sections[section] == Design.load("upstream").sections[section] != ()
    assert (design.base, section in design.own, design.notes) == (None, False, ())


def test_a_base_that_gives_a_zap_hands_it_on() -> None:
    mine = {"mine": KICK_ONCE}.get
    assert Design.parse("base: mine\naug:\n  clflush()", base_loader=mine).rows("zap") == Design.parse(
        KICK_ONCE
    ).rows("zap")


def test_a_later_section_of_its_own_makes_a_design_another() -> None:
    upstream, other = Design.load("upstream"), Design.parse("base: upstream\nzap:\n  tdh_mem_track(retry)")
    assert other.digest != upstream.digest
    assert "+ tdh_mem_track(retry)" in upstream.diff(other).partition("@@ zap @@")[2]


def test_the_zap_as_merged_is_upstream_s() -> None:
    assert Design.parse(KICK_ONCE).rows("zap") == Design.load("upstream").rows("zap")


def test_lines_of_a_zap_move() -> None:
    design = Design.parse(KICK_ONCE)
    moved, now = design.moved("zap", 7, -1)
    assert (moved.lines("zap")[now], now) == (design.lines("zap")[7], 6)
    assert moved.moved("zap", now, 1)[0].sections == design.sections


def test_the_handler_of_rmp_faults_may_ask_before_it_smashes() -> None:
    text = (
        "rmp_fault:\nnpf_sizem()\nsnp_lookup_rmpentry(warn)\npsmash(recheck_unassigned)\nkvm_zap_gfn_range()"
    )
    assert words(text, "rmp_fault")[1:3] == [
        ("snp_lookup_rmpentry", "warn"),
        ("psmash", "recheck_unassigned"),
    ]


def test_the_ioctl_may_return_early_and_reserve() -> None:
    assert ioctl(
        "kvm_range_has_memory_attributes(kvm, start, end)\nr = xa_reserve(xa, i, GFP_KERNEL_ACCOUNT)"
    ) == [
        "kvm_range_has_memory_attributes",
        "xa_reserve",
    ]


@pytest.mark.parametrize("platform", ["tdx", "sev", "sw"])
def test_any_platform_may_have_expected_verdicts(platform: str) -> None:
    text = f"xa_store()\nexpect {platform}:\n  tiny: host-machine-check Sometimes"
    assert Design.parse(text).expect == {platform: {"tiny": {"host-machine-check": "Sometimes"}}}


# -- what is inherited


def test_sections_that_are_not_given_are_those_of_the_base() -> None:
    design = Design.parse("base: upstream\nfault:\n  mmu_seq_snapshot()")
    assert design.rows("ioctl") == Design.load("upstream").rows("ioctl")


def test_a_text_with_a_base_and_no_ioctl_is_no_fragment() -> None:
    assert Design.parse("base: upstream\nfault:\n  mmu_seq_snapshot()").notes == ()


def test_without_a_base_the_rest_is_v8_and_a_note_says_so() -> None:
    design = Design.parse("xa_store()")
    assert design.sections["fault"] == V8.sections["fault"]
    assert any("v8-post-hook" in note for note in design.notes)


def test_a_text_that_never_stores_takes_the_place_of_the_zap() -> None:
    plain = "zap\n".join(calls(V8)).replace("kvm_unmap_gfn_rangezap\nkvm_flush_remote_tlbs", "rmpupdate")
    assert calls(Design.parse("rmpupdate()")) == plain.split("zap\n")


def test_a_fragment_says_that_it_is_one() -> None:
    (note,) = Design.parse(PRE_POST).notes
    assert "kvm_mem_attrs_changed()" in note
    assert "v8-post-hook" in note


def test_the_four_lines_as_typed_are_the_shipped_design() -> None:
    assert Design.parse(PRE_POST).sections == Design.load("pre-post-as-typed").sections


def test_a_fragment_replaces_the_call_with_its_body_too() -> None:
    assert "rmpupdate" not in calls(Design.parse("base: v7-under-lock\nkvm_mem_attrs_changed()"))


def test_a_base_may_come_from_a_loader() -> None:
    design = Design.parse("base: mine\nfault:\n  mmu_seq_snapshot()", base_loader={"mine": "xa_store()"}.get)
    assert calls(design) == ["kvm_vm_set_region_attr"]


def test_a_window_left_open_is_noted() -> None:
    assert any("never ends" in note for note in Design.parse("kvm_mmu_invalidate_begin()\nxa_store()").notes)


# -- expected verdicts


def test_expected_verdicts_are_read_as_they_stand() -> None:
    text = """
    xa_store()
    expect snp:
        tiny: sleep-in-atomic Always,
              livelock Sometimes
        to-private/in-place: all Never
    expect sw:
        round-trip: stale-mapping Never
    """
    assert Design.parse(text).expect == {
        "snp": {"tiny": {"sleep-in-atomic": "Always", "livelock": "Sometimes"}, "to-private/in-place": {}},
        "sw": {"round-trip": {"stale-mapping": "Never"}},
    }


def test_canonical_text_keeps_the_expected_verdicts() -> None:
    text = "xa_store()\nexpect snp:\n to-private: livelock Sometimes\n tiny: all Never"
    assert Design.parse(Design.parse(text).canonical()).expect == Design.parse(text).expect


# -- the designs that ship


def test_the_thread_s_designs_come_first_in_the_order_of_the_claims() -> None:
    assert shipped("thread") == shipped()[:9]
    assert (shipped()[0], shipped()[8]) == ("v7-under-lock", "upstream")


def test_planted_designs_are_listed_only_when_asked_for() -> None:
    assert set(shipped("all")) - set(shipped()) == set(shipped("planted")) != set()


@pytest.mark.parametrize("name", shipped("all"))
def test_a_shipped_design_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    design = Design.load(name)
    assert design.title != name
    assert design.source or name in shipped("planted")


@pytest.mark.parametrize("name", shipped("all"))
def test_canonical_text_means_the_same_rows(name: str) -> None:
    design = Design.load(name)
    again = Design.parse(design.canonical(), name)
    assert (again.sections, again.digest) == (design.sections, design.digest)
    assert again.own == tuple(section for section in SECTIONS if design.lines(section))


@pytest.mark.parametrize("name", shipped("all"))
def test_the_displayed_lines_parse_to_the_same_rows(name: str) -> None:
    design = Design.load(name)
    text = "\n".join(f"{s}:\n" + "\n".join(design.lines(s)) for s in SECTIONS if design.lines(s))
    assert Design.parse(text).sections == design.sections


def test_no_two_shipped_designs_are_the_same() -> None:
    assert len({Design.load(name).digest for name in shipped("all")}) == len(shipped("all"))


def test_v7_does_the_directmap_under_mmu_lock() -> None:
    rows = calls(Design.load("v7-under-lock"))
    assert rows.index("kvm_unmap_directmap") < rows.index("kvm_mmu_invalidate_end")


def test_pre_post_unmaps_before_the_first_hold_of_mmu_lock() -> None:
    rows = calls(Design.load("pre-post-directmap"))
    assert rows.index("kvm_unmap_directmap") < rows.index("write_lock")


def test_pre_post_changes_the_rmp_inside_the_window_after_the_store() -> None:
    rows = calls(Design.load("pre-post-directmap"))
    order = ["kvm_vm_set_region_attr", "kvm_flush_remote_tlbs", "rmpupdate", "kvm_mmu_invalidate_end"]
    assert sorted(order, key=rows.index) == order


def test_upstream_leaves_the_rmp_to_the_fault() -> None:
    design = Design.load("upstream")
    assert "rmpupdate" not in calls(design)
    assert calls(design, "fault")[5:7] == ["rmp_prepare", "read_lock"]


@pytest.mark.parametrize(("platform", "to"), [("snp", "private"), ("sev", "private"), ("sev", "shared")])
def test_the_op_asked_by_direction_spares_one_direction_on_snp(platform: str, to: str) -> None:
    design = Design.load("zap-by-op-direction")
    assert calls(design, "ioctl", to, platform).count("kvm_unmap_gfn_range") == 1
    assert "kvm_unmap_gfn_range" not in calls(design, "ioctl", "shared", "snp")


# -- comparing and editing


def test_a_design_does_not_differ_from_its_own_comments_and_aliases() -> None:
    text = V8.text.replace("KVM_MMU_LOCK(kvm)", "write_lock(mmu_lock)  // plain")
    assert V8.diff(Design.parse(text)) == ""


def test_the_digest_stands_for_the_rows() -> None:
    assert Design.parse("xa_store() // a").digest == Design.parse("kvm_vm_set_region_attr(x)").digest
    assert Design.parse("xa_store()").digest != V8.digest


def test_a_diff_shows_the_lines_that_differ_by_section() -> None:
    diff = V8.diff(Design.load("defer-to-fault"))
    changed = [line for line in diff.splitlines()[2:] if line[0] in "+-@"]
    assert changed == [
        "@@ ioctl @@",
        "- kvm_post_mem_attrs_changed():",
        "-     static_call(kvm_x86_update_mem_attr)()",
        "@@ fault @@",
        "+ rmp_match()",
    ]


def test_alignment_loses_no_line_of_either_side() -> None:
    other = Design.load("pre-post-directmap")
    rows = [row for row in V8.aligned(other) if row[0] == "ioctl"]
    assert tuple(left for _, _, left, _ in rows if left is not None) == V8.lines("ioctl")
    assert tuple(right for _, _, _, right in rows if right is not None) == other.lines("ioctl")


TEXT = """// Title
// From: me
// More.

ioctl:
    xa_store()      // the store
    // a comment of its own
    if (attr == private)
        rmpupdate()
        adjust_direct_map()
    kvm_mem_attrs_changed():
        kvm_unmap_gfn_range()
    kvm_update_lpage_mixed_flag()
"""
IF_FIRST = ["if (attr == private)", "rmpupdate()", "adjust_direct_map()", "xa_store()"]


def moved(line: str, by: int) -> list[str]:
    design = Design.parse(TEXT)
    (at,) = [n for n, text in enumerate(design.lines("ioctl")) if text.strip() == line]
    after, now = design.moved("ioctl", at, by)
    assert after.lines("ioctl")[now].strip() == line
    return [text.strip() for text in after.lines("ioctl")]


def test_a_line_moves_past_its_neighbour() -> None:
    assert moved("adjust_direct_map()", -1)[2:4] == ["adjust_direct_map()", "rmpupdate()"]


def test_a_line_steps_over_an_if_whole() -> None:
    assert moved("xa_store()", 1)[:4] == IF_FIRST


def test_an_if_moves_with_what_it_governs() -> None:
    assert moved("if (attr == private)", -1)[:4] == IF_FIRST


def test_a_line_stays_inside_its_if() -> None:
    assert Design.parse(TEXT).move("ioctl", 3, 1) == Design.parse(TEXT)


def test_a_line_enters_and_leaves_a_body_that_only_spells_out_a_call() -> None:
    line = "kvm_update_lpage_mixed_flag()"
    assert moved(line, -1)[-2:] == ["kvm_unmap_gfn_range()", line]
    assert moved(line, -2)[-3:] == ["kvm_mem_attrs_changed():", line, "kvm_unmap_gfn_range()"]
    assert moved(line, -3)[-3:] == [line, "kvm_mem_attrs_changed():", "kvm_unmap_gfn_range()"]


def test_the_only_line_of_such_a_body_takes_it_along() -> None:
    assert moved("kvm_unmap_gfn_range()", 1)[-2:] == ["kvm_mem_attrs_changed():", "kvm_unmap_gfn_range()"]


@pytest.mark.parametrize(
    ("line", "by", "why"),
    [
        (0, -1, "xa_store() cannot move up: it is the first of its section."),
        (6, 1, "kvm_update_lpage_mixed_flag() cannot move down: it is the last of its section."),
        (
            3,
            1,
            "adjust_direct_map() cannot move down: it stays inside if (attr == private). "
            "Move if (attr == private), and it goes along.",
        ),
        (3, -1, ""),
        (5, -1, ""),
    ],
)
def test_a_line_that_cannot_move_says_why(line: int, by: int, why: str) -> None:
    assert Design.parse(TEXT).why_stuck("ioctl", line, by) == why


@given(st.sampled_from(shipped("all")), st.sampled_from(["ioctl", "fault", "punch", "zap"]), st.data())
def test_a_line_moves_or_says_why_not(name: str, section: str, data: Any) -> None:
    design = Design.load(name)
    assume(design.lines(section))
    at, by = data.draw(st.integers(0, len(design.lines(section)) - 1)), data.draw(st.sampled_from([-1, 1]))
    assert (design.move(section, at, by) is design) == bool(design.why_stuck(section, at, by))


def test_a_moved_design_keeps_its_comments_and_is_marked() -> None:
    design = Design.parse(TEXT, "mine").move("ioctl", 0, 1)
    assert (design.name, design.title, design.source, design.about) == ("mine*", "Title", "me", "More.")
    assert "// the store" in design.text
    assert "    // a comment of its own\n    if (attr == private)" in design.text


def test_moving_in_an_inherited_section_makes_it_the_design_s_own() -> None:
    design = Design.load("v7-under-lock").move("fault", 1, -1)
    assert design.lines("fault")[:2] == ("kvm_mem_is_private()", "mmu_seq_snapshot()")
    assert design.lines("ioctl") == Design.load("v7-under-lock").lines("ioctl")


@given(st.sampled_from(shipped("all")), st.sampled_from(["ioctl", "fault", "zap", "aug"]), st.data())
def test_a_move_keeps_every_call_and_what_moved_can_move_back(name: str, section: str, data: Any) -> None:
    design = Design.load(name)
    assume(design.lines(section))
    at = data.draw(st.integers(0, len(design.lines(section)) - 1))
    there, now = design.moved(section, at, 1)
    back, _ = there.moved(section, now, -1)
    assert sorted(calls(there, section)) == sorted(calls(design, section))
    assert there is design or back.sections == design.sections


def test_replacing_the_text_by_itself_changes_nothing() -> None:
    assert V8.replace_text(V8.text) is V8


# -- where designs come from


def test_a_file_is_named_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my.kvm").write_text("\ufeffxa_store()\n", encoding="utf-8")
    assert Design.load(tmp_path / "my.kvm").name == "my.kvm"


def test_a_file_may_build_on_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.kvm").write_text("base: b\nfault:\n  mmu_seq_snapshot()\n")
    (tmp_path / "b.kvm").write_text("xa_store()\n")
    assert calls(Design.load(tmp_path / "a.kvm")) == ["kvm_vm_set_region_attr"]


def test_standard_input_is_a_dash() -> None:
    script = "from kvmlab.design import Design; print(Design.load('-').name)"
    ran = subprocess.run([sys.executable, "-c", script], input=b"xa_store()", capture_output=True, check=True)
    assert ran.stdout.split() == [b"(stdin)"]


def test_the_parser_is_loaded_only_when_a_design_is_read() -> None:
    script = "import sys, kvmlab.design; print('lark' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert ran.stdout.split() == [b"False"]
