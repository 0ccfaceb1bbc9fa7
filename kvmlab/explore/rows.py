"""The dict engine: breadth-first search that applies learned rows to packed states, one at a time.

It is the reference for the array engine, and the faster of the two while levels are narrow.
"""

from __future__ import annotations

from ..model.step import Learner, Model
from .graph import END, Graph, Hit, Label, Watch

WATCHED = 1024  # states between two calls of the watch


def search(
    model: Model,
    limit: int | None = None,
    watch: Watch | None = None,
    learner: Learner | None = None,
    wide: int | None = None,
    shun: str | None = None,
) -> Graph:
    """Explore `model` completely, or until `limit` states are known or `watch` says so (then not `complete`).

    Before a level of `wide` states or more it stops, with a graph that is `begun`: for the array engine to go on.
    Steps that violate the property to `shun` are not followed: they lead to END as fatal ones do.
    """
    learner = learner or Learner(model)
    graph = Graph(model, learner)
    states, depth, start = [model.initial], [0], [0]
    actor: list[int] = []
    dst: list[int] = []
    label: list[int] = []
    quiet: list[bool] = []
    labels: dict[Label, int] = {}
    index = {model.initial: 0}
    edges: dict[int, list[tuple[int, int, int, tuple[str, ...], int, bool]]] = {}  # of a row, by its identity
    d = 0
    lanes = [(a, cell.mask, cell.shift, learner.tables[a]) for a, cell in enumerate(learner.pc)]
    for i, x in enumerate(states):  # grows while we go
        stop = watch is not None and not i % WATCHED and watch(len(states))
        inside = moved = False
        if wide is not None and depth[i] > d and len(states) - i >= wide:
            graph.complete, graph.begun = False, True
            break
        d = depth[i]
        for a, mask, shift, tables in lanes:
            table = tables[(x & mask) >> shift]
            for footprint, rows in table.footprints:
                row = rows.get(x & footprint)
                if row is not None:
                    break
            else:
                row = learner.outcomes(a, x)
            if not table.idle:
                inside = True
                moved = moved or bool(row)
            known = edges.get(id(row))
            if known is None:
                known = edges[id(row)] = [
                    (
                        out.keep,
                        out.put,
                        labels.setdefault(Label(*out[2:]), len(labels)),
                        out.violations,
                        out.choice,
                        out.fatal or shun in out.violations,
                    )
                    for out in row
                ]
            for keep, put, number, violations, choice, over in known:
                label.append(number)
                actor.append(a)
                for prop in violations:
                    graph.hit(prop, d + 1, Hit(i, a, choice))
                if over:
                    dst.append(END)
                    continue
                y = x & keep | put
                j = index.get(y)
                if j is None:
                    j = index[y] = len(states)
                    states.append(y)
                    depth.append(d + 1)
                dst.append(j)
        start.append(len(dst))
        quiet.append(not inside)
        if not inside:
            found = learner.quiet(x)
            if found != ((), ()):
                graph.quiet_found[i] = found
                for prop in found[0]:
                    graph.hit(prop, d, Hit(i, None, None))
        elif not moved:
            graph.hit("deadlock", d, Hit(i, None, None))
        if stop or (limit is not None and len(states) > limit):
            graph.complete = False
            del states[i + 1 :], depth[i + 1 :]
            dst = [j if j <= i else END for j in dst]
            break
    graph.states, graph.depth, graph.start = states, depth, start
    graph.actor, graph.dst, graph.label, graph.labels = actor, dst, label, list(labels)
    graph.quiet = quiet
    return graph
