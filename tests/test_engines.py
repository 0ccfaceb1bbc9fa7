"""The two engines are one search: whatever the model, they give the same graph."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlab.compile.build import build, with_forgetful_tlbs
from kvmlab.design import Design
from kvmlab.design.files import shipped
from kvmlab.errors import NotApplicable
from kvmlab.explore import arrays, liveness, rows
from kvmlab.explore.dedup import Lookup, StateSet
from kvmlab.explore.graph import END, Graph, joined
from kvmlab.machine.conf import Switches
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.model.state import Field, Layout, View
from kvmlab.model.step import Actor, Instr, Learner, Model, Table, run_step


def model(fields: list[Field], programs: dict[str, list[Instr]], **more: Any) -> Model:
    pcs = [Field("pc", tuple(range(len(program))), (key,)) for key, program in programs.items()]
    actors = tuple(Actor(key, "test", tuple(program)) for key, program in programs.items())
    return Model(Layout([*fields, *pcs]), actors, 0, **more)


# -- steps


def lock(s: View, me: str, name: str = "a") -> None:
    s.wait(s.lock[name] == "free")
    s.lock[name] = me


def unlock(s: View, me: str, name: str = "a") -> None:
    s.lock[name] = "free"


def stop(s: View, me: str) -> None:
    s.wait(False)


def roll(s: View, me: str) -> str:
    low, high = s.choose("xy"), s.choose(range(3))
    s.dice = (low, high)
    s.count("rolls")
    if low == "y" and high == 2:
        s.violate("unlucky", "y2")
    return "again" if high else "done"


def press(s: View, me: str) -> None:
    s.pressed[me] = True
    if all(s.pressed[k] for k in s.pressed):
        s.violate("both", "both have pressed")
        s.violate("boom", "and that is the end")


def slam(s: View, me: str) -> None:
    s.pressed["p"] = True
    s.violate("boom", "too hard")


def touch(s: View, me: str) -> None:
    s.pressed["p"] = True


def peek(s: View, me: str) -> None:
    """Reads one more cell for each that is set: the footprint grows as the search goes deeper."""
    for n in range(5):
        if not s.bit[n]:
            s.bit[n] = True
            return
    s.violate("full", "all set")
    s.bit[0] = False


def toggle(s: View, me: str, n: int) -> None:
    s.bit[n] = not s.bit[n]


def add(s: View, me: str, n: int) -> None:
    s.counter[n] = (s.counter[n] + 1001) % 4096


def watch(s: View) -> None:
    if s.bit[0] and s.bit[1]:
        s.violate("untidy", "two bits left")
        s.count("left")


# -- models


def two_actors_and_a_lock() -> Model:
    program = [Instr(lock, (), 1), Instr(unlock, (), 0)]
    return model([Field("lock", ("free", "p", "q"), ("a",))], {"p": program, "q": program})


def two_locks_in_opposite_order() -> Model:
    def program(first: str, second: str) -> list[Instr]:
        taken = [Instr(lock, (first,), 1), Instr(lock, (second,), 2), Instr(unlock, (second,), 3)]
        return [*taken, Instr(unlock, (first,), 4), Instr(stop, idle=True)]

    locks = Field("lock", ("free", "p", "q"), ("a", "b"))
    return model([locks], {"p": program("a", "b"), "q": program("b", "a")})


def choices_within_a_step() -> Model:
    dice = Field("dice", tuple((x, n) for x in "xy" for n in range(3)))
    program = [Instr(roll, jumps={"again": 0, "done": 1}), Instr(stop, idle=True)]
    return model([dice], {"p": program, "q": program})


def a_fatal_step() -> Model:
    program = [Instr(press, (), 1, idle=True), Instr(stop, idle=True)]
    pressed = Field("pressed", (False, True), ("p", "q", "r"))
    return model([pressed], dict.fromkeys("pqr", program), fatal=frozenset({"boom"}))


def a_fatal_step_where_a_harmless_one_leads_too() -> Model:
    programs = {"p": [Instr(slam, (), 0)], "q": [Instr(touch, (), 0)]}
    return model([Field("pressed", (False, True), ("p",))], programs, fatal=frozenset({"boom"}))


def a_footprint_that_grows() -> Model:
    programs = {"p": [Instr(peek, (), 0)]} | {f"t{n}": [Instr(toggle, (n,), 0)] for n in (1, 3)}
    return model([Field("bit", (False, True), tuple(range(5)))], programs)


def a_watch_on_quiet_states() -> Model:
    programs = {f"t{n}": [Instr(toggle, (n,), 1, idle=True), Instr(toggle, (n + 3,), 0)] for n in range(3)}
    return model([Field("bit", (False, True), tuple(range(6)))], programs, quiet=watch)


def three_words_of_wide_cells() -> Model:
    counters = Field("counter", tuple(range(4096)), tuple(range(13)))
    wide = model(
        [counters],
        {f"c{n}": [Instr(add, (n,), 1), Instr(add, (n,), 2), Instr(stop, idle=True)] for n in (0, 5, 12)},
    )
    assert wide.layout.words == 3
    return wide


def nobody_can_ever_move() -> Model:
    return model([], {"p": [Instr(stop)], "q": [Instr(stop, idle=True)]})


MODELS = [
    two_actors_and_a_lock,
    two_locks_in_opposite_order,
    choices_within_a_step,
    a_fatal_step,
    a_fatal_step_where_a_harmless_one_leads_too,
    a_footprint_that_grows,
    a_watch_on_quiet_states,
    three_words_of_wide_cells,
    nobody_can_ever_move,
]
some_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


# -- comparing


def facts(g: Graph) -> dict[str, Any]:
    """All that a graph says, in plain Python values."""
    columns = {name: list(getattr(g, name)) for name in ("depth", "start", "actor", "dst", "label", "quiet")}
    states = [g.packed(i) for i in range(len(g.states))]
    found = {"hits": g.hits, "hit_depth": g.hit_depth, "quiet_found": g.quiet_found}
    return {"states": states, "labels": g.labels, "complete": g.complete, **columns, **found}


def edges(g: Graph) -> list[tuple[int, int, int, Any]]:
    """The edges of a graph as (source, actor, successor or -1, label), sorted: no numbering matters."""
    ends = [
        (g.packed(i), int(g.actor[e]), -1 if g.dst[e] < 0 else g.packed(g.dst[e]), g.labels[g.label[e]])
        for i in range(len(g.states))
        for e in range(g.start[i], g.start[i + 1])
    ]
    return sorted(ends)


@some_model
def test_both_engines_reach_the_same_states_by_the_same_edges(make: Any) -> None:
    a, b = arrays.search(make()), rows.search(make())
    assert edges(a) == edges(b)
    assert len(set(facts(a)["states"])) == len(b.states)


@some_model
def test_the_graphs_are_equal_column_by_column(make: Any) -> None:
    assert facts(arrays.search(make())) == facts(rows.search(make()))


@some_model
def test_a_hash_that_always_collides_changes_nothing(make: Any) -> None:
    assert facts(arrays.search(make(), multipliers=(0,))) == facts(rows.search(make()))


@some_model
@pytest.mark.parametrize("limit", [0, 1, 2, 5, 17])
def test_a_search_with_a_limit_stops_at_the_same_state(make: Any, limit: int) -> None:
    assert facts(arrays.search(make(), limit)) == facts(rows.search(make(), limit))


@some_model
def test_rows_already_learned_can_be_lent(make: Any) -> None:
    lent = rows.search(make(), 3).learner
    assert facts(arrays.search(lent.model, learner=lent)) == facts(rows.search(make()))


@some_model
@pytest.mark.parametrize("wide", [1, 2, 5])
def test_the_array_engine_goes_on_where_the_dict_engine_stopped(make: Any, wide: int) -> None:
    begun = rows.search(make(), wide=wide)
    whole = arrays.search(begun.model, begun=begun) if begun.begun else begun
    assert facts(whole) == facts(rows.search(make()))


@some_model
@pytest.mark.parametrize("limit", [2, 5, 17])
def test_it_stops_at_the_same_limit_then(make: Any, limit: int) -> None:
    begun = rows.search(make(), limit, wide=2)
    whole = arrays.search(begun.model, limit, begun=begun) if begun.begun else begun
    assert facts(whole) == facts(rows.search(make(), limit))


@some_model
def test_what_follows_a_violation_of_the_property_to_shun_is_left_out_by_both(make: Any) -> None:
    for prop in rows.search(make()).hits:
        shunned = rows.search(make(), shun=prop)
        assert facts(arrays.search(make(), shun=prop)) == facts(shunned)
        assert liveness.avoidable(shunned, prop) == liveness.avoidable(rows.search(make()), prop)
        assert all(j == END for j, n in zip(shunned.dst, shunned.label, strict=True)
                   if prop in shunned.labels[n].violations)  # fmt: skip


@some_model
@pytest.mark.parametrize("limit", [None, 7])
def test_a_sweep_without_edges_finds_what_the_search_finds(make: Any, limit: int | None) -> None:
    lean, full = arrays.sweep(make(), limit), arrays.search(make(), limit)
    assert [lean.packed(i) for i in range(len(lean.states))] == facts(full)["states"]
    assert [lean.depth_of(i) for i in range(len(lean.states))] == list(full.depth)
    assert (lean.hits, lean.complete) == (full.hits, full.complete)
    assert (lean.transitions, lean.max_depth) == (full.transitions, full.max_depth)


@some_model
def test_a_sweep_can_tell_every_edge_into_some_states(make: Any) -> None:
    lean, full = arrays.sweep(make()), rows.search(make())
    for depth in range(1, lean.max_depth + 1):
        level = [i for i in range(len(full.states)) if full.depth[i] == depth]
        into = {full.packed(i) for i in level[::2]}
        known = [
            (full.packed(i), full.actor[e], full.labels[full.label[e]].choice, full.packed(full.dst[e]))
            for i in range(len(full.states))
            for e in range(full.start[i], full.start[i + 1])
            if full.depth[i] == depth - 1 and full.dst[e] in level[::2]
        ]
        assert sorted(lean.predecessors(depth, into)) == sorted(known)


def test_chunks_of_a_level_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmlab.explore.levels.CHUNK", 3)
    assert facts(arrays.search(a_footprint_that_grows())) == facts(rows.search(a_footprint_that_grows()))


# -- little models of any kind

CELLS = st.lists(st.integers(1, 4), min_size=2, max_size=4)
ACT = st.tuples(
    st.sampled_from(["wait", "set", "copy", "choose", "violate", "count", "jump"]), *[st.integers(0, 9)] * 3
)
PROGRAMS = st.lists(st.lists(st.lists(ACT, max_size=3), min_size=1, max_size=4), min_size=1, max_size=3)


def interpret(s: View, me: str, acts: list[tuple[str, int, int, int]]) -> str | None:
    """A step made of data: each act reads or writes cells picked by its numbers."""
    sizes = s.conf
    for what, i, j, n in acts:
        i, j = i % len(sizes), j % len(sizes)
        if what == "wait":
            s.wait(s.cell[i] != n % sizes[i])
        elif what == "set":
            s.cell[i] = n % sizes[i]
        elif what == "copy":
            s.cell[i] = s.cell[j] % sizes[i]
        elif what == "choose":
            s.cell[i] = s.choose(range(n % (sizes[i] + 1)))
        elif s.cell[i] == n % sizes[i]:
            if what == "jump":
                return "first"
            if what == "violate":
                s.violate(f"p{j}", "")
            else:
                s.count(f"m{j}")
    return None


def of_data(sizes: list[int], programs: list[Any], fatal: int, idle: int, pad: int) -> Model:
    """Idle are the instructions whose bit is set in `idle`; padding moves the last cells to other words."""
    cells = [Field("cell", tuple(range(size)), (i,)) for i, size in enumerate(sizes)]
    padding = [Field("padding", tuple(range(16)), tuple(range(pad)))]
    built = {
        f"a{a}": [
            Instr(interpret, (acts,), (n + 1) % len(program), {"first": 0}, bool(idle >> n & 1))
            for n, acts in enumerate(program)
        ]
        for a, program in enumerate(programs)
    }

    def quiet(s: View) -> None:
        interpret(s, "", [("violate", 0, 1, 1), ("count", 1, 0, 0)])

    fields = [*cells[:1], *padding, *cells[1:]]
    return model(fields, built, conf=sizes, fatal=frozenset({f"p{fatal}"}), quiet=quiet)


@given(CELLS, PROGRAMS, st.integers(0, 4), st.integers(0, 15), st.sampled_from([0, 15, 40]))
def test_both_engines_agree_on_models_of_any_kind(
    sizes: Any, programs: Any, fatal: int, idle: int, pad: int
) -> None:
    made = of_data(sizes, programs, fatal, idle, pad)
    full, lean = rows.search(made), arrays.sweep(made)
    assert facts(arrays.search(made)) == facts(full)
    assert (lean.hits, lean.transitions) == (full.hits, full.transitions)


@given(CELLS, PROGRAMS, st.randoms(use_true_random=False))
def test_a_learned_row_is_what_the_step_does(sizes: Any, programs: Any, pick: random.Random) -> None:
    graph = rows.search(of_data(sizes, programs, 1, 5, 0))
    assert wrong_rows(graph, pick.sample(range(len(graph.states)), min(5, len(graph.states)))) == []


@pytest.mark.parametrize("make", [two_actors_and_a_lock, a_footprint_that_grows, choices_within_a_step])
def test_a_row_that_forgets_a_bit_of_what_was_read_would_be_seen(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Table.add
    monkeypatch.setattr(Table, "add", lambda table, x, reads, row: add(table, x, reads & (reads - 1), row))
    graph = arrays.search(make())
    assert wrong_rows(graph, range(len(graph.states))) or all(
        mask == 0 for tables in graph.learner.tables for table in tables for mask, _ in table.footprints
    )


def wrong_rows(graph: Graph, states: Any) -> list[tuple[int, int]]:
    """The (state, actor) places at which a learned row is not what the step does."""
    return [
        (i, a)
        for i in states
        for a in range(len(graph.model.actors))
        if by_row(graph.learner, a, graph.packed(i)) != directly(graph.learner, a, graph.packed(i))
    ]


def by_row(learner: Learner, a: int, x: int) -> list[Any]:
    return [
        (None if out.fatal else x & out.keep | out.put, out.violations, out.counts)
        for out in learner.outcomes(a, x)
    ]


def directly(learner: Learner, a: int, x: int) -> list[Any]:
    done: list[Any] = []
    made = learner.model
    prefix: tuple[int, ...] | None = ()
    while prefix is not None:
        view, enabled = run_step(made, made.actors[a], learner.pc[a], x, prefix)
        if enabled:
            violated = tuple(dict.fromkeys(view.violations))
            fatal = tuple(p for p in violated if p in made.fatal)[:1]
            done.append((None if fatal else view.after, fatal or violated, tuple(view.counts)))
        prefix = view.next_prefix()
    return done


# -- the set of states


@given(
    st.lists(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=40), max_size=6),
    st.sampled_from([0, 1, 1 << 62]),
)
def test_a_set_of_states_numbers_them_as_a_dict_would(
    batches: list[list[tuple[int, ...]]], multiplier: int
) -> None:
    known: dict[tuple[int, ...], int] = {}
    seen = StateSet(3, (multiplier,), slots_log2=2)
    for batch in batches:
        seen.tail(len(batch))[:] = np.array(batch, np.uint64).reshape(-1, 3)
        assert seen.intern(len(batch)).tolist() == [known.setdefault(x, len(known)) for x in batch]
    assert [tuple(row) for row in seen.states.tolist()] == list(known)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=60, unique=True))
def test_a_crowded_lookup_finds_each_key_in_its_own_place(known: list[tuple[int, int]]) -> None:
    lookup = Lookup(1, spare=1)
    for some in (known[:7], known[7:8], known[8:]):
        lookup.extend(np.array([key for _, key in some], np.uint64)[:, None], [place for place, _ in some])
    keys = np.array([[[key] for key in range(61)]] * 3, np.uint64)
    row = lookup.find(keys, np.repeat(np.arange(3), 61).reshape(3, 61))
    expected = {where: number for number, where in enumerate(known, 1)}
    assert row.tolist() == [[expected.get((place, key), 0) for key in range(61)] for place in range(3)]


def test_a_state_is_joined_from_its_words_low_to_high() -> None:
    assert joined(np.array([5, 1 << 63], np.uint64)) == 5 | 1 << 127


# -- what kvmlab is for


def applicable(platform: str, scenario: str) -> list[Model]:
    """The model of each design that ships, planted ones included, in a scenario."""
    found = []
    for name in shipped("all"):
        with suppress(NotApplicable):
            found.append(build(Design.load(name), SCENARIOS[scenario], platform))
    return found


def edited(name: str, platform: str, scenario: str) -> list[Model]:
    """The models of a design before and after each of its lines is moved down."""
    design = Design.load(name)
    moved = [design.move("ioctl", line, 1) for line in range(len(design.lines("ioctl")))]
    return [build(each, SCENARIOS[scenario], platform) for each in (design, *moved)]


@pytest.mark.parametrize(
    ("platform", "scenario"),
    [("snp", "tiny"), ("tdx", "tiny"), ("snp", "hook-fails"), ("tdx", "seamcall-busy")],
)
def test_rows_lent_by_another_design_change_no_graph(platform: str, scenario: str) -> None:
    models = [*applicable(platform, scenario), *edited("v8-post-hook", platform, scenario)]
    alone = [rows.search(made, 1_000) for made in models]
    expected = {id(graph.model): facts(graph) for graph in alone}
    calls = 0
    for order in (models, models[::-1]):
        earlier = None
        for made in order:
            found = rows.search(made, 1_000, learner=Learner(made, earlier))
            assert facts(found) == expected[id(made)]
            earlier, calls = found.learner, calls + found.learner.calls
    assert calls < 2 * sum(graph.learner.calls for graph in alone)


@pytest.mark.parametrize("platform", ["snp", "tdx"])
def test_rows_lent_to_the_array_engine_change_no_graph(platform: str) -> None:
    earlier = None
    for made in edited("no-zap", platform, "tiny"):
        learner = Learner(made, earlier)
        begun = rows.search(made, learner=learner, wide=20)
        assert facts(arrays.search(made, begun=begun)) == facts(rows.search(made))
        forgetful = with_forgetful_tlbs(made)
        lent = arrays.search(forgetful, learner=Learner(forgetful, learner))
        assert facts(lent) == facts(rows.search(forgetful))
        earlier = learner


def test_rows_are_lent_where_machine_and_instruction_are_the_same_only() -> None:
    before, *moved = edited("v8-post-hook", "snp", "tiny")
    learner = rows.search(before).learner
    calls = [rows.search(made, learner=Learner(made, learner)).learner.calls for made in (before, *moved)]
    assert calls[0] == 0
    assert max(calls[2:]) < learner.calls / 10
    # Moving mutex_lock() below KVM_MMU_LOCK() makes locks nest both ways: that is another machine.
    assert calls[1] == rows.search(moved[0]).learner.calls
    other = build(Design.load("v8-post-hook"), SCENARIOS["tiny"], switches=Switches(rmpupdate_flushes=False))
    assert not other.is_machine_of(before)
    assert (
        rows.search(other, learner=Learner(other, learner)).learner.calls == rows.search(other).learner.calls
    )


@pytest.mark.parametrize("name", ["v8-post-hook", "no-zap", "tdx-no-track", "keeps-mmu-lock"])
@pytest.mark.parametrize("platform", ["snp", "tdx"])
def test_a_learned_row_of_a_design_is_what_the_step_does(name: str, platform: str) -> None:
    graph = arrays.search(build(Design.load(name), SCENARIOS["to-private"], platform), 20_000)
    assert wrong_rows(graph, random.Random(1).sample(range(len(graph.states)), 100)) == []


@pytest.mark.parametrize("name", ["v8-post-hook", "v8-as-posted", "upstream"])
@pytest.mark.parametrize("scenario", ["tiny", "careless", "round-trip"])
def test_both_engines_agree_on_designs(name: str, scenario: str) -> None:
    made = build(Design.load(name), SCENARIOS[scenario])
    full, lean = rows.search(made), arrays.sweep(replace(made, title="again"))
    assert facts(arrays.search(made)) == facts(full)
    assert (lean.hits, lean.transitions) == (full.hits, full.transitions)
