"""Whatever is given as a design, the answer is a design or a DesignError that says where and what instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlab.design import Design, DesignError
from kvmlab.design.calls import CALLS

ZAP = "kvm_mem_attrs_changed()"


def error(text: str, **more: object) -> DesignError:
    with pytest.raises(DesignError) as caught:
        Design.parse(text, **more)
    return caught.value


def test_an_unknown_call_is_shown_with_its_line_a_caret_and_near_names() -> None:
    text = f"\n{ZAP}\n\n  > > rmpupdat(pfn)\n"
    assert str(error(text, name="my.kvm")) == (
        "my.kvm:4: unknown call 'rmpupdat'\n"
        "    > > rmpupdat(pfn)\n"
        "        ^\n"
        "nearest known: rmpupdate, rmp_match"
    )


BAD = {
    "rmpupdat()": ("unknown call", 1, "rmpupdate"),
    "iotcl:\n  rmpupdate()": ("unknown section", 1, "ioctl:"),
    "augg:\n  clflush()": ("unknown section", 1, "aug:"),
    "aug:\n  rmpupdate()": ("cannot stand in aug:", 2, "ioctl:"),
    "zap:": ("is empty", 1, "a call"),
    "zap:\n  tdh_mem_trak()": ("unknown call", 2, "tdh_mem_track"),
    "zap:\n  tdh_mem_page_aug()": ("cannot stand in zap:", 2, "aug:"),
    "zap:\n  adjust_direct_map()": ("cannot stand in zap:", 2, "punch:"),
    "zap:\n  mutex_lock(slots_lock)": ("cannot stand in zap:", 2, "ioctl:"),
    "zap:\n  if (flush)\n    tdh_mem_track()": ("follows a zap by kvm_unmap", 2, "punch:"),
    "zap:\n  tdx_no_vcpus_enter_start(kvm)": ("unknown call", 2, "tdh_do_no_vcpus(tdh_mem_track)"),
    "zap:\n  tdx_track(kvm)": ("only holds other calls", 2, None),
    "zap:\n  tdh_do_no_vcpus()": ("has to name its SEAMCALL", 2, "tdh_mem_track"),
    "zap:\n  tdh_do_no_vcpus(tdh_vp_flush, kvm)": ("has to name its SEAMCALL", 2, "tdh_mem_page_remove"),
    "zap:\n  tdh_do_no_vcpus(tdh_mem_track, tdh_mem_page_remove)": (
        "only one of its words",
        2,
        "tdh_mem_track",
    ),
    "zap:\n  tdh_mem_track(rety)": ("does not know 'rety'", 2, "retry"),
    "aug:\n  write_spte(leav)": ("does not know 'leav'", 2, "table"),
    "aug:\n  freeze_spte(leaf, table)": ("only one of its words", 2, "leaf"),
    "punch:\n  xa_store()": ("cannot stand in punch:", 2, "ioctl:"),
    "punch:\n  read_lock(mmu_lock)": ("cannot stand in punch:", 2, "fault:"),
    "ioctl:\n  kvm_x86_update_mem_attr(inclusive)": ("takes 'inclusive' only in punch:", 2, "private"),
    "punch:\n  kvm_unmap_gfn_range(kvm_memslots)": ("takes 'kvm_memslots' only in ioctl:", 2, None),
    "punch:\n  psmash(recheck)": ("takes 'recheck' only in rmp_fault:", 2, None),
    "punch:\n  truncate_inode_pages()": ("unknown call", 2, "truncate_inode_pages_range"),
    "rmp_fault:\n  psmash(rechek)": ("does not know 'rechek'", 2, "recheck_unassigned"),
    "rmpupdate(privat)": ("does not know 'privat'", 1, "private"),
    "npf_sizem()": ("cannot stand in ioctl:", 1, "rmp_fault:"),
    "ioctl:\nfault:\n  mmu_seq_snapshot()": ("is empty", 1, "a call"),
    "ioctl:\n  xa_store()\nioctl:\n  xa_store()": ("given twice", 3, None),
    "": ("no statement", 0, "one call a line"),
    "// only a comment": ("no statement", 0, "one call a line"),
    "expect snp:\n  tiny: all Never": ("no statement", 0, None),
    f"In general, the zap comes first.\n{ZAP}": ("not a statement", 1, "one call a line"),
    f"{ZAP} rmpupdate()": ("not a statement", 1, None),
    f"{ZAP}\nThanks!": ("not a statement", 2, None),
    "Thanks": ("unknown call", 1, None),
    "    if (attr == private)\n\trmpupdate()": ("tabs and spaces", 2, None),
    "mutex_lock(&kvm->mmu_lock)": ("does not take 'mmu_lock'", 1, "slots_lock"),
    "write_lock(slots_lock)": ("does not take 'slots_lock'", 1, "mmu_lock"),
    "mutex_lock()": ("has to name its lock", 1, "slots_lock"),
    "mutex_lock(slots_lock):\n  rmpupdate()": ("has no body", 1, None),
    "spin_lock(mmu_lock)": ("unknown call", 1, "write_lock(mmu_lock)"),
    "kvm_arch_set_memory_attributes()": ("only holds other calls", 1, None),
    "rmpupdate(private, shared)": ("one way", 1, "private"),
    "static_call(rmpupdate)(a)(b)": ("not a statement", 1, None),
    "rmpupdate()()": ("two argument lists", 1, None),
    "x = rmpupdate()": ("nothing keeps 'x'", 1, "ret ="),
    "kvm_tdp_mmu_map()": ("cannot stand in ioctl:", 1, "fault:"),
    "psmash()": ("cannot stand in ioctl:", 1, "rmp_fault:"),
    "fault:\n  kvm_unmap_gfn_range()": ("cannot stand in fault:", 2, "ioctl:"),
    "rmp_fault:\n  kvm_gmem_get_pfn()": ("cannot stand in rmp_fault:", 2, "fault:"),
    "fault:\n  rmp_match():\n    read_lock(mmu_lock)": ("inside rmp_match()", 3, "rmpupdate"),
    "fault:\n  rmp_match():\n    return": ("no return inside", 3, None),
    "fault:\nrmp_prepare():\nrmpupdate()": ("has to stand deeper", 2, None),
    "fault:\nif (flush)\nrmpupdate()": ("follows a zap", 2, "ioctl:"),
    "if (attr == private)\nkvm_mem_attrs_changed():\nkvm_unmap_gfn_range()": ("Indent them", 2, None),
    "else\n  rmpupdate()": ("'else' without an if", 1, None),
    "if (flush)\n  rmpupdate()\nelse\n  rmpupdate()": ("no else", 3, None),
    "if (flush)\n  return": ("no return under", 2, "attr == private"),
    "if (attr == private)": ("no statement of its own", 1, None),
    "if (attr == private)\nfault:\n  mmu_seq_snapshot()": ("no statement of its own", 2, None),
    "if (attr == private) {\nrmpupdate()\nfault:\nmmu_seq_snapshot()\n}": ("inside a block", 3, None),
    "kvm_x86_update_mem_attr() { }": ("no statement in it", 1, None),
    "if (attr == privat)\n  rmpupdate()": ("unknown condition", 1, "attr == private"),
    "if (attr)\n  rmpupdate()": ("unknown condition", 1, "flush"),
    "if (platform == intel)\n  rmpupdate()": ("unknown condition", 1, "platform == snp"),
    "if attr == private\n  rmpupdate()": ("in parentheses", 1, "attr == private"),
    "if (attr == private) {\n  rmpupdate()": ("'{' is never closed", 1, None),
    "rmpupdate()\n}": ("'}' closes nothing", 2, None),
    "rmpupdate(\nxa_store": ("'(' is never closed", 1, None),
    "rmpupdate())": ("')' closes nothing", 1, None),
    "rmpupdate()\n/* and so on": ("'/*' is never closed", 2, None),
    "base: v8-post-hok\nrmpupdate()": ("unknown base", 1, "v8-post-hook"),
    "base: upstream\nbase: no-zap": ("given twice", 2, None),
    "base: no-zap\nrmpupdate()": ("no kvm_mem_attrs_changed() to replace", 1, "base: v8-post-hook"),
    "base: <b>x</b>\nrmpupdate()": ("not a statement", 1, None),
    "base: ../../secret\nrmpupdate()": ("not a statement", 1, None),
    f"{ZAP}\nexpect vax:\n  tiny: all Never": ("unknown platform", 2, "snp"),
    f"{ZAP}\nexpect snp:\n  tiny: livelock Maybe": ("unknown verdict", 3, "Sometimes"),
    f"{ZAP}\nexpect snp:\n  tiny livelock Never": ("not a line of expected verdicts", 3, None),
    f"{ZAP}\nexpect snp:\n  tiny: all Always": ("'all' stands alone", 3, "SCENARIO: all Never"),
    f"{ZAP}\nexpect snp:\n  tiny: all Never\n  tiny: all Never": ("given twice", 4, None),
    f"{ZAP}\nexpect snp:\n  Tiny_1: all Never": ("no scenario's name", 3, None),
    f"{ZAP}\n\0": ("control character", 2, None),
    "if (attr == private)\n" * 500 + "rmpupdate()": ("nested deeper", 16, None),
    "rmpupdate()\n" * 500: ("more than 200 calls", 201, None),
    "rmpupdate()" + " " * 300_000: ("more than 256 kB", 0, None),
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30].replace("\n", "/").replace("\0", "NUL"))
def test_a_bad_text_is_refused_where_it_is_bad(text: str) -> None:
    message, line, allowed = BAD[text]
    wrong = error(text)
    assert message in wrong.message
    assert wrong.line == line
    assert allowed is None or allowed in wrong.allowed


def test_bases_that_go_in_a_circle_are_refused() -> None:
    texts = {"a": "base: b\nrmpupdate()", "b": "base: a\nrmpupdate()"}
    assert "base cycle: a -> b -> a" in str(error("base: a\nrmpupdate()", base_loader=texts.get))


def test_an_error_in_a_base_names_the_base() -> None:
    assert error("base: a\nrmpupdate()", base_loader={"a": "rmpupdat()"}.get).name == "a"


@pytest.mark.parametrize("line", ["x" * 200, "rmpupdate() " + "y" * 200, "é\x1b[31m" * 20, "\t" * 90 + "?"])
def test_what_is_echoed_is_short_and_printable(line: str) -> None:
    text = line.replace("\x1b", "\u009b")
    shown = str(error(f"{ZAP}\n{text}")).splitlines()[1:3]
    assert all(len(part) <= 75 and part.isprintable() for part in shown)


def test_the_caret_stands_under_the_fault_even_in_a_long_line() -> None:
    _, shown, caret, *_ = str(error("rmpupdate(" + "a, " * 60 + ") again()")).splitlines()
    assert shown[caret.index("^") :].startswith("again()")


# -- files and names


def unloadable(which: object) -> DesignError:
    with pytest.raises(DesignError) as caught:
        Design.load(which)
    return caught.value


def test_a_name_that_does_not_exist_gets_near_names() -> None:
    assert "v8-post-hook" in unloadable("v8-post-hok").allowed


@pytest.mark.parametrize("name", ["", "/", "a\0b", "<script>alert(1)</script>", "x" * 9000, "no/such.kvm"])
def test_a_path_that_cannot_be_read_is_refused(name: str) -> None:
    assert unloadable(name).allowed


def test_ten_megabytes_of_noise_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 40_000)
    assert "more than 256 kB" in unloadable(tmp_path / "noise").message


@pytest.mark.parametrize("data", [b"\xff\xfe", b"ok\n\x80", b"\x00" * 100, bytes(range(256))])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "binary.kvm").write_bytes(data)
    assert unloadable(tmp_path / "binary.kvm").message


def test_files_whose_bases_go_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.kvm").write_text("base: a\nrmpupdate()\n")
    assert "base cycle" in unloadable(tmp_path / "a.kvm").message


@pytest.mark.parametrize("asked", [("zip",), ("ioctl", "secret"), ("ioctl", "private", "vax")])
def test_rows_are_given_only_for_what_exists(asked: tuple[str, ...]) -> None:
    with pytest.raises(DesignError):
        Design.load("upstream").rows(*asked)


def test_a_line_that_is_not_there_cannot_be_moved() -> None:
    with pytest.raises(DesignError):
        Design.load("upstream").move("fault", 99, 1)


# -- anything at all


def parses_or_says_why(text: str) -> None:
    try:
        design = Design.parse(text)
    except DesignError:
        return
    assert Design.parse(design.canonical()).digest == design.digest


@given(st.text())
def test_any_text_is_a_design_or_an_error(text: str) -> None:
    parses_or_says_why(text)


PIECES = [
    *("\n", "\n  ", "\n\t", "\n    ", " ", "> ", "{", "}", ";", ":", "()", "(", ")", "...", ",", "/"),
    *("//", "/*", "*/", "#"),
    *("if (attr == private)", "if (flush)", "else", "return", "flush |= ", "static_call", "ioctl:", "fault:"),
    *("punch:", "zap:", "aug:", "(retry)", "(table)"),
    *("base: ", "expect snp:", "no-zap", "tiny: all Never", "slots_lock", "(mmu_lock)"),
    *(call.name for call in CALLS),
]  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_mixture_of_the_language_s_pieces_is_a_design_or_an_error(text: str) -> None:
    parses_or_says_why(text)


LINES = [
    *("if (attr == private)", "if (platform != snp) {", "if (flush)", "} else {", "}", "else", "return"),
    *("rmpupdate()", "xa_store()", "kvm_mem_attrs_changed():", "kvm_x86_update_mem_attr()", "rmp_match():"),
    *("kvm_unmap_gfn_range()", "kvm_post_mem_attrs_changed() {", "kvm_flush_remote_tlbs()", "fault:"),
    *("zap:", "tdh_do_no_vcpus(tdh_mem_track)", "aug:", "write_spte(table)", "clflush()", "punch:"),
]
DEPTHS = ["", "  ", "    "]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(DEPTHS), st.sampled_from(LINES)).map("".join), max_size=20))
def test_lines_in_any_order_and_depth_are_a_design_or_an_error(lines: list[str]) -> None:
    parses_or_says_why("\n".join(lines))


HIDDEN = {
    "reorders a call": ("ioctl:\n    rmpupdate(\u202eetavirp)\n", "U+202E"),
    "reorders a comment, and what is seen of the code": ("// \u2067 //\nioctl:\n    rmpupdate()\n", "U+2067"),
    "splits a word that carries meaning": ("ioctl:\n    rmpupdate(pri\u200dvate)\n", "U+200D"),
    "hides in a quoted line": ("> ioctl:\n>     rmpupdate(pri\u00advate)\n", "U+00AD"),
    "drives a terminal": ("// \x9b31m\nioctl:\n    rmpupdate()\n", "0x9b"),
}


@pytest.mark.parametrize("what", HIDDEN)
def test_a_character_that_hides_what_is_read_is_refused(what: str) -> None:
    text, told = HIDDEN[what]
    with pytest.raises(DesignError) as refused:
        Design.parse(text)
    assert told in str(refused.value)
    assert all(char.isprintable() or char == "\n" for char in str(refused.value))


def test_a_comment_may_be_in_any_script() -> None:
    title = "\u05e9\u05dc\u05d5\u05dd, gr\u00fc\u00dfe"
    assert Design.parse(f"// {title}\nbase: no-zap\n").title == title
