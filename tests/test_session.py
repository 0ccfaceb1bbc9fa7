"""The workbench without a browser."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest

import kvmlab
from kvmlab.errors import InputError
from kvmlab.verdict.session import Session


@pytest.fixture
def session() -> Session:
    return kvmlab.Session("v8-post-hook", scenario="tiny")


def test_it_opens_with_a_report_and_a_run_at_its_start(session: Session) -> None:
    assert session.report.violated == []
    assert (session.position, session.frame.event) == (0, None)


def test_an_edit_gives_a_new_verdict(session: Session) -> None:
    session.edit(session.design.text.replace("static_call(kvm_x86_update_mem_attr)()", "rmpupdate()"))
    assert "host-rmp-fault" in session.report.violated
    assert session.trace.why == "host-rmp-fault"


def test_removing_rmpupdate_gives_the_endless_loop(session: Session) -> None:
    session.edit(
        session.design.text.replace(
            "    kvm_post_mem_attrs_changed():\n        static_call(kvm_x86_update_mem_attr)()\n", ""
        )
    )
    assert session.report.violated == ["livelock"]


def test_moving_the_op_under_the_lock_gives_scheduling_while_atomic(session: Session) -> None:
    last_unlock = max(n for n, line in enumerate(session.design.lines("ioctl")) if "KVM_MMU_UNLOCK" in line)
    session.move("ioctl", last_unlock, 3)
    assert session.report.violated == ["sleep-in-atomic"]


def test_a_bad_text_says_where_and_keeps_the_report_and_the_draft(session: Session) -> None:
    before = session.report
    session.edit("ioctl:\n    rmpupdat()\n")
    assert session.report is before
    assert "unknown call 'rmpupdat'" in session.problem and "^" in session.problem
    assert session.draft == "ioctl:\n    rmpupdat()\n"


def test_the_next_good_edit_clears_the_problem(session: Session) -> None:
    session.edit("nonsense(")
    session.edit(session.design.text)
    assert session.problem is None and session.draft is None


def test_a_case_that_does_not_exist_says_so_and_changes_nothing(session: Session) -> None:
    session.load("upstream")
    session.choose(backing="in-place")
    assert "split backing" in session.problem
    assert session.case.backing == "split"


def test_steps_go_forward_back_and_stop_at_both_ends(session: Session) -> None:
    session.back()
    assert session.position == 0
    session.step()
    assert session.position == 1
    session.jump(10_000)
    assert session.position == len(session.frames) - 1
    session.step()
    assert session.position == len(session.frames) - 1


def test_taking_over_drops_what_followed_and_goes_on_by_hand(session: Session) -> None:
    session.jump(3)
    option = next(o for o in session.enabled() if o.actor == "CPU1")
    session.take("CPU1", option.choice)
    assert session.by_hand and session.position == 4 == len(session.trace.schedule)


def test_a_hand_made_run_has_a_code_that_replays(session: Session) -> None:
    session.take("CPU0")
    session.take("CPU1")
    assert kvmlab.replay(session.trace.code).frames[-1].state == session.frame.state


def test_an_actor_that_cannot_move_is_refused_with_those_that_can(session: Session) -> None:
    with pytest.raises(InputError, match="able to move: CPU0"):
        session.take("CPU7")


def test_a_waiting_vcpu_is_shown_as_blocked(session: Session) -> None:
    def until(actor: Any, call: Any) -> None:
        while not any(call in o.event.call for o in session.enabled() if o.actor == actor):
            session.take(actor)

    until("CPU1", "read_lock")
    until("CPU0", "kvm_mmu_invalidate_begin")
    assert session.blocked() == ["CPU1"]


def test_after_a_fatal_step_nobody_can_move() -> None:
    session = kvmlab.Session("rmp-under-lock-directmap-post", scenario="tiny")
    session.jump(len(session.frames))
    assert session.enabled() == []
    with pytest.raises(InputError, match="the run has ended"):
        session.take("CPU0")


def test_each_state_tells_which_properties_hold_so_far() -> None:
    session = kvmlab.Session("v7-under-lock", scenario="tiny")
    assert all(session.so_far().values())
    session.jump(len(session.frames))
    assert session.so_far()["sleep-in-atomic"] is False
    assert session.so_far()["host-rmp-fault"] is True


def test_another_counterexample_can_be_asked_for() -> None:
    session = kvmlab.Session("no-zap", scenario="tiny")
    assert session.trace.why == "kernel-bug"
    assert session.show("out-of-sync").why == "out-of-sync"


def test_a_step_that_cannot_be_taken_elsewhere_leaves_the_position_where_it_was(session: Session) -> None:
    session.jump(2)
    with pytest.raises(InputError):
        session.take("CPU1", choice=99, at=5)
    assert session.position == 2


def test_a_check_that_runs_out_of_memory_leaves_everything_and_says_so(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise MemoryError

    before = session.report
    monkeypatch.setattr("kvmlab.verdict.report.explore", exhausted)
    session.choose(scenario="to-private")
    assert session.report is before
    assert "out of memory; a limit on states" in session.problem


def test_several_threads_may_use_one_session(session: Session) -> None:
    failed = []

    def use(seed: Any) -> None:
        try:
            for n in range(60):
                session.jump(n * seed % 40)
                session.show()
                for option in session.enabled()[:1]:
                    session.take(option.actor, option.choice, at=0)
                session.blocked(), session.so_far(), session.frame
        except InputError:
            pass  # another thread has moved the run meanwhile
        except Exception as problem:
            failed.append(problem)

    threads = [Thread(target=use, args=(seed,)) for seed in (1, 3, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_mailed_run_is_opened_with_its_case_and_its_verdicts(session: Session) -> None:
    run = kvmlab.check("no-zap", scenario="tiny").trace()
    session.open(run.text())
    assert (session.design.name, session.report.violated[0], session.position) == ("no-zap", run.why, 0)
    assert session.trace.schedule == run.schedule


def test_a_text_without_a_code_is_refused_and_nothing_changes(session: Session) -> None:
    session.open("nothing of the kind")
    assert "there is no kvmlab code" in session.problem
    assert session.design.name == "v8-post-hook"
