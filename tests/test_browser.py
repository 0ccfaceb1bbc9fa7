"""The workbench in a real JupyterLab: one server, a few journeys.  Pictures go to KVMLAB_SHOTS if that is set."""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest

if os.environ.get("KVMLAB_REQUIRE_BROWSER") != "1":
    pytest.importorskip("jupyterlab", reason="needs JupyterLab")
    pytest.importorskip("anywidget", reason="needs anywidget")

HOSTILE = '<img src=x onerror="window.pwned=1">'
LOAD = 60_000  # milliseconds; only a hang reaches it
FAULTY = "rmp-under-lock-directmap-post"
DONE = "print('all cells ran')"
CELLS = [f"import kvmlab\nw = kvmlab.workbench({FAULTY!r})\nw", "assert w.report.complete", DONE]
# A check that goes on until it is given up.
ENDLESS = """import itertools, time
import kvmlab.show.widget as bench
def check_case(case, watch=None, **more):
    for n in itertools.count(1000, 1000):
        time.sleep(0.01)
        watch(n)
bench.check_case = check_case"""
SERVER_SAYS_READY = "is running at"
DARK = "JupyterLab Dark"
MODEL = "window.jupyterapp.shell.currentWidget.context.model"
# The contrast of each cell's text: colours and opacities of all that it stands in, one over the other.
CONTRAST = """(cells) => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const cell of cells) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    for (let text; (text = walker.nextNode());) {
      if (!text.data.trim()) continue;
      const way = [];
      for (let el = text.parentElement; el; el = el.parentElement) way.unshift(getComputedStyle(el));
      let paper = [255, 255, 255], opacity = 1;
      for (const style of way) {
        opacity *= Number(style.opacity);
        const [r, g, b, a] = parse(style.backgroundColor);
        paper = over([r, g, b, a * opacity], paper);
      }
      const [r, g, b, a] = parse(way.at(-1).color);
      const [x, y] = [light(over([r, g, b, a * opacity], paper)), light(paper)];
      found.push((Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05));
    }
  }
  return found;
}"""
STEP = """() => new Promise((done) => {
  const root = document.querySelector('.kvmlab'), began = performance.now();
  root.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
})"""


class Lab(NamedTuple):
    """A running server: its address, its token, and the folder that it shows."""

    address: str
    token: str
    folder: Path

    def url(self, notebook: str) -> str:
        """The page of a notebook, in a fresh workspace."""
        return f"{self.address}/lab/tree/{notebook}?reset&token={self.token}"


def notebook(outputs: dict[str, str] | None = None, cells: Sequence[str] = CELLS) -> str:
    """A small notebook of the test's own; `outputs` are stored with its first cell."""
    import nbformat

    node = nbformat.v4
    made = [node.new_code_cell(source) for source in cells]
    if outputs:
        made[0].execution_count = 1
        made[0].outputs = [node.new_output("execute_result", data=outputs, execution_count=1)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return str(nbformat.writes(node.new_notebook(cells=made, metadata=kernel)))


def stored_outputs() -> dict[str, str]:
    """What a committed notebook holds of the workbench: everything but the live view."""
    import kvmlab

    bundle, _ = kvmlab.workbench(FAULTY)._repr_mimebundle_()
    return {mime: data for mime, data in bundle.items() if mime.startswith("text/")}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, root: Path, chromium: str) -> Iterator[Lab]:
    """JupyterLab on a folder of its own, ended by its process id."""
    home = tmp_path_factory.mktemp("lab")
    work = home / "work"
    work.mkdir()
    (work / "live.ipynb").write_text(notebook(), encoding="utf-8")
    (work / "stored.ipynb").write_text(notebook(stored_outputs()), encoding="utf-8")
    config = home / "config" / "labconfig"
    config.mkdir(parents=True)
    news = {
        "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}
    }  # its toast hides buttons
    (config / "page_config.json").write_text(json.dumps(news))
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    python = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    env = os.environ | {name: str(home / folder) for name, folder in folders.items()} | {"PYTHONPATH": python}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        *(sys.executable, str(root / "tests/workbook/notebook_server.py")),  # as `kvmlab lab` starts it
        *("--no-browser", "--allow-root", f"--notebook-dir={work}"),
        *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"),
        *(f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"),
    ]
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    ready = threading.Event()
    reader = threading.Thread(target=read, args=(server.stderr, ready), daemon=True)
    reader.start()
    try:
        assert ready.wait(timeout=60), "JupyterLab has not started"
        yield Lab(f"http://127.0.0.1:{port}", token, work)
    finally:
        server.terminate()
        server.wait(timeout=60)
        reader.join(timeout=60)


def read(log: TextIO, ready: threading.Event) -> None:
    """Read the log to its end, lest the server wait for a reader; `ready` is set when it can answer."""
    with log:
        for line in log:
            if SERVER_SAYS_READY in line:
                ready.set()


def command(page: Any, name: str, **arguments: Any) -> None:
    """Run a command of JupyterLab's."""
    page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args)", [name, arguments])


def open_notebook(page: Any, lab: Lab, name: str) -> None:
    """Open a notebook without running it."""
    page.goto(lab.url(name), timeout=LOAD)
    assert "/login" not in page.url
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=LOAD)
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady", timeout=LOAD
    )


def cell_sources(page: Any) -> list[str]:
    """The sources of all cells, seen or not."""
    cells = "window.jupyterapp.shell.currentWidget.content.widgets"
    return list(page.evaluate(f"() => {cells}.map((cell) => cell.model.sharedModel.source)"))


def shot(page: Any, name: str) -> None:
    """Keep a picture, if somebody wants them."""
    if folder := os.environ.get("KVMLAB_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


@pytest.fixture(scope="module")
def desk(browser: Any, lab: Lab) -> Iterator[Any]:
    """One page for all that is live, with the notebook open; errors in it fail the last test."""
    size = {"width": 1280, "height": 1000}
    allowed = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(permissions=allowed, viewport=size, reduced_motion="reduce")
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    open_notebook(page, lab, "live.ipynb")
    yield page
    context.close()
    assert not errors, f"the page raised {errors}"


@pytest.fixture
def live(desk: Any) -> Any:
    """A fresh widget: the notebook has run once more, to its end."""
    desk.evaluate("() => document.querySelector('.kvmlab')?.classList.add('old')")
    command(desk, "notebook:run-all-cells")
    desk.locator(".kvmlab:not(.old)").wait_for(timeout=LOAD)
    desk.get_by_text("all cells ran", exact=True).wait_for(timeout=LOAD)
    return desk.locator(".kvmlab")


def line(widget: Any, text: str) -> Any:
    """The first line of the ordering with this text."""
    return widget.locator(".kvmlab-lines li", has_text=text).first


def name(widget: Any) -> Any:
    """Where the ordering's name stands."""
    return widget.locator(".kvmlab-order .kvmlab-title b")


def chip(widget: Any, prop: str) -> Any:
    """The verdict of a property that is violated."""
    return widget.locator(".kvmlab-chip", has_text=f"!! {prop}")


def step(widget: Any, text: str) -> None:
    """Wait until the player says where it is."""
    widget.locator(".kvmlab-count", has_text=text).wait_for()


def dirty(page: Any) -> bool:
    """Whether the notebook has changed since it was saved."""
    return bool(page.evaluate(f"() => {MODEL}.dirty"))


def overflows(page: Any) -> bool:
    """Whether the page, or the notebook in it, would have to be scrolled sideways."""
    wide = "(el) => el && el.scrollWidth > el.clientWidth + 1"
    places = "['html', '.jp-WindowedPanel-outer', '.jp-Notebook', '.kvmlab']"
    return bool(page.evaluate(f"() => {places}.some((each) => ({wide})(document.querySelector(each)))"))


def test_moving_a_line_explores_again_and_changes_the_verdict(live: Any, desk: Any) -> None:
    chip(live, "host-rmp-fault").wait_for()
    shot(desk, "live-light")
    line(live, "kvm_unmap_directmap()").hover()
    shot(desk, "live-hover")
    line(live, "KVM_MMU_LOCK(kvm)").focus()
    desk.keyboard.press("Alt+ArrowDown")
    chip(live, "lock-misuse").wait_for()
    assert name(live).inner_text() == f"{FAULTY}*"
    assert live.locator(".kvmlab-lines li:focus").inner_text().startswith("KVM_MMU_LOCK(kvm)")
    live.get_by_role("button", name="Undo").click()
    chip(live, "lock-misuse").wait_for(state="detached")
    assert name(live).inner_text() == FAULTY


def test_a_bad_text_is_told_with_its_line_and_nothing_is_lost(live: Any, desk: Any) -> None:
    live.get_by_role("button", name="Edit as text").click()
    live.locator("textarea").fill("ioctl:\n    oops()\n")
    desk.keyboard.press("Control+Enter")
    problem = live.locator(".kvmlab-problem")
    problem.wait_for()
    shot(desk, "live-problem")
    assert "unknown call 'oops'" in problem.inner_text()
    assert "oops()" in live.locator("textarea").input_value()
    assert chip(live, "host-rmp-fault").is_visible()


def test_markup_in_a_text_stays_text(live: Any, desk: Any) -> None:
    live.get_by_role("button", name="Edit as text").click()
    text = live.locator("textarea")
    text.fill(f"// {HOSTILE}\n" + text.input_value())
    live.get_by_role("button", name="Check").click()
    live.locator(".kvmlab-title", has_text=HOSTILE).wait_for()
    assert live.locator("img").count() == 0
    assert desk.evaluate("() => window.pwned") is None


def test_keys_walk_the_run_and_do_not_reach_the_notebook(live: Any, desk: Any) -> None:
    before = cell_sources(desk)
    live.focus()
    desk.keyboard.press("Home")
    desk.keyboard.press("ArrowRight")
    step(live, "step 1 of 11")
    for key in ("x", "j", "d", "d", "a", "ArrowDown"):
        desk.keyboard.press(key)
    desk.keyboard.press("End")
    step(live, "step 11 of 11")
    desk.keyboard.press("p")
    step(live, "step 1 of 11")
    desk.keyboard.press("f")
    step(live, "step 11 of 11")
    desk.keyboard.press("Home")
    step(live, "step 0 of 11")
    assert cell_sources(desk) == before


def test_taking_over_drops_the_future_and_says_so(live: Any, desk: Any) -> None:
    live.focus()
    desk.keyboard.press("Home")
    desk.keyboard.press("ArrowRight")
    live.locator(".kvmlab-take").get_by_role("button", name="writes N through the directmap").click()
    step(live, "step 2 of 2")
    shot(desk, "live-by-hand")
    assert "The 10 steps that followed are dropped" in live.locator(".kvmlab-say").inner_text()
    assert live.locator("button:focus").inner_text() == "writes N through the directmap"
    before = cell_sources(desk)
    desk.keyboard.press("x")
    assert cell_sources(desk) == before


def test_the_diagram_is_copied_as_plain_text(live: Any, desk: Any) -> None:
    live.focus()
    desk.keyboard.press("c")
    live.get_by_text("Copied.").wait_for()
    copied = desk.evaluate("() => navigator.clipboard.readText()")
    assert copied == live.locator("details pre").text_content()
    assert "=> host-rmp-fault" in copied


def test_an_ordering_is_compared_with_another(live: Any, desk: Any) -> None:
    live.get_by_label("Compare with").select_option("pre-post-directmap")
    live.locator(".kvmlab-beside").get_by_text("kvm_pre_mem_attrs_changed():").wait_for()
    live.locator(".kvmlab-beside").scroll_into_view_if_needed()
    shot(desk, "live-versus")
    assert not overflows(desk)


def test_dark_theme_gives_light_text_on_a_dark_ground(live: Any, desk: Any) -> None:
    command(desk, "apputils:change-theme", theme=DARK)
    desk.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    desk.locator("#jupyterlab-splash").wait_for(state="detached")
    live.focus()
    desk.keyboard.press("End")
    shot(desk, "live-dark")
    text, ground = live.evaluate("(el) => [getComputedStyle(el).color, getComputedStyle(el).backgroundColor]")
    command(desk, "apputils:change-theme", theme="JupyterLab Light")
    desk.wait_for_function("() => document.body.dataset.jpThemeLight === 'true'")
    assert (text, ground) == ("rgb(255, 255, 255)", "rgb(17, 17, 17)")


@pytest.mark.parametrize("width", [900, 1600])
def test_nothing_has_to_be_scrolled_sideways(live: Any, desk: Any, width: int) -> None:
    size = desk.viewport_size
    desk.set_viewport_size({"width": width, "height": 1000})
    live.focus()
    desk.keyboard.press("End")
    shot(desk, f"live-{width}")
    wide = overflows(desk)
    desk.set_viewport_size(size)
    assert not wide


@pytest.mark.parametrize("width", [1300, 1600, 1920])
def test_beside_an_open_text_all_lanes_are_in_sight(live: Any, desk: Any, width: int) -> None:
    size = desk.viewport_size
    desk.set_viewport_size({"width": width, "height": 1000})
    live.get_by_role("button", name="Edit as text").click()
    shot(desk, f"live-edit-{width}")
    lanes = live.locator(".kvmlab-lanes")
    assert lanes.locator("thead th").count() == 4
    fits = lanes.evaluate("(el) => el.scrollWidth <= el.clientWidth")
    desk.set_viewport_size(size)
    assert fits
    assert not overflows(desk)


def test_a_new_run_opens_at_its_failure_which_is_in_sight(live: Any, desk: Any) -> None:
    step(live, "step 11 of 11")
    alarm = live.locator(".kvmlab-lanes").get_by_text("!! host-rmp-fault: #PF RMP: host write to N")
    assert alarm.evaluate("(el) => { const lanes = el.closest('.kvmlab-lanes').getBoundingClientRect();"
                          " const own = el.getBoundingClientRect();"
                          " return own.top >= lanes.top && own.bottom <= lanes.bottom + 1; }")  # fmt: skip


@pytest.mark.parametrize("theme", ["JupyterLab Light", DARK])
def test_rows_still_to_come_can_be_read(live: Any, desk: Any, theme: str) -> None:
    command(desk, "apputils:change-theme", theme=theme)
    desk.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{str(theme != DARK).lower()}'")
    desk.locator("#jupyterlab-splash").wait_for(state="detached")
    live.focus()
    desk.keyboard.press("Home")
    desk.keyboard.press("ArrowRight")
    contrasts = live.locator(".kvmlab-later td:not([title])").evaluate_all(
        CONTRAST
    )  # without the bar's glyphs
    command(desk, "apputils:change-theme", theme="JupyterLab Light")
    desk.wait_for_function("() => document.body.dataset.jpThemeLight === 'true'")
    assert len(contrasts) > 20
    assert min(contrasts) >= 4.5


def test_ctrl_s_in_the_workbench_saves_the_notebook(live: Any, desk: Any) -> None:
    live.focus()
    assert dirty(desk)
    desk.keyboard.press("Control+s")
    desk.wait_for_function(f"() => !{MODEL}.dirty")
    live.get_by_role("button", name="Edit as text").click()
    desk.evaluate(f"() => {{ {MODEL}.dirty = true; }}")
    desk.keyboard.press("Control+s")
    desk.wait_for_function(f"() => !{MODEL}.dirty")


def test_a_line_that_cannot_move_says_why(live: Any, desk: Any) -> None:
    line(live, "kvm_unmap_directmap()").focus()
    desk.keyboard.press("Alt+ArrowUp")
    live.locator(".kvmlab-problem", has_text="it stays inside if (attr == private)").wait_for()
    assert line(live, "kvm_unmap_directmap()").evaluate("(el) => el === document.activeElement")


def test_a_diagram_pasted_on_the_workbench_opens_as_its_run(live: Any, desk: Any) -> None:
    import kvmlab

    text = kvmlab.check("no-zap", scenario="tiny").trace().text()
    desk.evaluate("(text) => navigator.clipboard.writeText(text)", text)
    live.focus()
    desk.keyboard.press("Control+v")
    step(live, "step 29 of 29")
    assert name(live).inner_text() == "no-zap"


def test_another_text_pasted_on_the_workbench_opens_the_editor(live: Any, desk: Any) -> None:
    desk.evaluate("() => navigator.clipboard.writeText('rmpupdate()')")
    live.focus()
    desk.keyboard.press("Control+v")
    live.get_by_text("Pasted as text").wait_for()
    assert live.locator("textarea").input_value() == "rmpupdate()"
    assert name(live).inner_text() == FAULTY


def test_in_a_careless_scenario_it_says_what_is_not_judged_and_why(live: Any, desk: Any) -> None:
    live.locator("select[name=scenario]").select_option("careless")
    live.get_by_text("Not judged, as the guest is careless:").wait_for()
    live.scroll_into_view_if_needed()
    shot(desk, "live-careless")


def opened(page: Any, lab: Lab, name: str, *cells: str) -> Any:
    """A notebook of these cells in a page of its own, run to its end: its workbench."""
    (lab.folder / name).write_text(notebook(cells=[CELLS[0], *cells, DONE]), encoding="utf-8")
    page.set_viewport_size({"width": 1280, "height": 1000})
    open_notebook(page, lab, name)
    command(page, "notebook:run-all-cells")
    page.get_by_text("all cells ran", exact=True).wait_for(timeout=LOAD)
    return page.locator(".kvmlab")


def test_a_long_check_says_what_and_how_far_it_is_and_can_be_given_up(page: Any, lab: Lab) -> None:
    bench = opened(page, lab, "long.ipynb", ENDLESS)
    bench.locator("select[name=design]").select_option("no-zap")
    bench.get_by_text("000 states so far").wait_for()
    bench.get_by_text("Of the ordering and case before this change:").wait_for()
    assert name(bench).inner_text() == "no-zap"
    assert chip(bench, "host-rmp-fault").is_visible()
    page.wait_for_function("() => getComputedStyle(document.querySelector('.kvmlab-verdicts')).opacity < 1")
    shot(page, "exploring")
    bench.get_by_role("button", name="Cancel").click()
    bench.get_by_text("every interleaving explored").wait_for()
    assert name(bench).inner_text() == FAULTY
    assert bench.get_by_role("button", name="Cancel").count() == 0


def test_when_the_kernel_is_gone_the_workbench_says_so_and_is_grey(page: Any, lab: Lab) -> None:
    bench = opened(page, lab, "gone.ipynb", ENDLESS)
    bench.locator("select[name=design]").select_option("no-zap")
    bench.get_by_text("000 states so far").wait_for()
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    bench.get_by_text("The kernel that explored this is gone.").wait_for(timeout=LOAD)
    shot(page, "gone")
    assert name(bench).inner_text() == FAULTY
    assert bench.get_by_text("states so far").count() == 0
    assert bench.locator("select:visible").count() == 0
    assert bench.evaluate("(el) => getComputedStyle(el).filter") == "grayscale(1)"
    bench.focus()
    page.keyboard.press("ArrowLeft")
    step(bench, "step 10 of 11")


def test_a_saved_session_is_there_when_it_is_opened_again_without_its_kernel(page: Any, lab: Lab) -> None:
    bench = opened(page, lab, "saved.ipynb")
    line(bench, "KVM_MMU_LOCK(kvm)").focus()
    page.keyboard.press("Alt+ArrowDown")
    chip(bench, "lock-misuse").wait_for()
    page.keyboard.press("Control+s")
    page.wait_for_function(f"() => !{MODEL}.dirty")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    open_notebook(page, lab, "saved.ipynb")
    bench.get_by_text("This is the workbench as it was saved.").wait_for(timeout=LOAD)
    shot(page, "saved")
    assert name(bench).inner_text() == f"{FAULTY}*"
    assert chip(bench, "lock-misuse").is_visible()
    bench.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    step(bench, "step 1 of")
    assert page.get_by_text("model not found").count() == 0


def test_the_exercise_on_the_directmap_is_solved_with_alt_and_the_arrow(
    page: Any, lab: Lab, root: Path
) -> None:
    cells = json.loads((root / "notebooks/02_directmap_and_2m.ipynb").read_text(encoding="utf-8"))["cells"]
    (exercise,) = (
        "".join(cell["source"]) for cell in cells if "kvmlab.workbench(" in "".join(cell["source"])
    )
    (lab.folder / "exercise.ipynb").write_text(notebook(cells=[exercise, DONE]), encoding="utf-8")
    open_notebook(page, lab, "exercise.ipynb")
    command(page, "notebook:run-all-cells")
    bench = page.locator(".kvmlab")
    chip(bench, "host-rmp-fault").wait_for(timeout=LOAD)
    line(bench, "if (attr == private)").click()
    lines = "document.querySelector('.kvmlab-lines').innerText"
    for _ in range(10):
        before = page.evaluate(lines)
        page.keyboard.press("Alt+ArrowUp")
        page.wait_for_function(f"(before) => {lines} !== before", arg=before)
    bench.get_by_text("Nothing is violated", exact=True).wait_for()
    shot(page, "solved")


def test_a_page_that_is_loaded_again_finds_its_workbench_live(page: Any, lab: Lab) -> None:
    bench = opened(page, lab, "again.ipynb")
    page.keyboard.press("Control+s")
    page.wait_for_function(f"() => !{MODEL}.dirty")
    open_notebook(page, lab, "again.ipynb")
    bench.locator("select[name=design]").select_option("no-zap", timeout=LOAD)
    chip(bench, "kernel-bug").wait_for()


def test_saving_keeps_one_model_a_workbench_that_is_shown(page: Any, lab: Lab) -> None:
    opened(page, lab, "models.ipynb")
    for _ in range(2):
        page.evaluate("() => document.querySelector('.kvmlab').classList.add('old')")
        command(page, "notebook:run-all-cells")
        page.locator(".kvmlab:not(.old)").wait_for(timeout=LOAD)
    page.get_by_text("all cells ran", exact=True).wait_for(timeout=LOAD)
    command(page, "docmanager:save")
    page.wait_for_function(f"() => !{MODEL}.dirty")
    stored = json.loads((lab.folder / "models.ipynb").read_text(encoding="utf-8"))
    (models,) = stored["metadata"]["widgets"].values()
    views = [model["state"].get("view") for model in models["state"].values()]
    assert len(list(filter(None, views))) == 1


def test_a_stored_notebook_shows_its_picture_before_anything_runs(page: Any, lab: Lab) -> None:
    page.set_viewport_size({"width": 1280, "height": 1000})
    open_notebook(page, lab, "stored.ipynb")
    output = page.locator(".jp-OutputArea-output")
    output.get_by_text("!! host-rmp-fault: #PF RMP: host write to N").wait_for(timeout=LOAD)
    shot(page, "untrusted")
    bar = output.locator("td[style*=gradient]").first
    assert "linear-gradient" in bar.evaluate("(el) => getComputedStyle(el).backgroundImage")
    assert output.get_by_text("Run this cell to make it live").is_visible()
    assert page.locator(".kvmlab").count() == 0


def test_opening_and_saving_a_committed_notebook_changes_nothing_in_it(
    page: Any, lab: Lab, root: Path
) -> None:
    committed = (root / "notebooks/00_tour.ipynb").read_text(encoding="utf-8")
    (lab.folder / "tour.ipynb").write_text(committed, encoding="utf-8")
    open_notebook(page, lab, "tour.ipynb")
    info = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.info"
    assert page.evaluate(f"async () => (await {info}).language_info.version")
    page.wait_for_function(f"() => {MODEL}.getMetadata('language_info').version")
    assert not dirty(page)
    page.evaluate(f"() => {{ {MODEL}.dirty = true; }}")
    command(page, "docmanager:save")
    page.wait_for_function(f"() => !{MODEL}.dirty")
    assert (lab.folder / "tour.ipynb").read_text(encoding="utf-8") == committed


def test_the_exported_page_steps_without_kernel_and_network(page: Any, tmp_path: Path) -> None:
    import kvmlab
    from kvmlab.show.page import page_html

    reports = [kvmlab.check(name, scenario="tiny") for name in ("no-zap", FAULTY)]
    (tmp_path / "report.html").write_text(page_html(reports), encoding="utf-8")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.goto((tmp_path / "report.html").as_uri())
    first = page.locator(".kvmlab").first
    step(first, "step 29 of 29")
    chip(first, "out-of-sync").click()
    step(first, "step 24 of 24")
    shot(page, "exported")
    assert asked == [(tmp_path / "report.html").as_uri()]
    assert first.get_by_role("button", name="Edit as text").count() == 0
    assert "Alt" not in page.inner_text("body")
    page.get_by_role("link", name=FAULTY).click()
    assert page.locator(":target").inner_text().startswith(FAULTY)


@pytest.mark.parametrize("width", [1100, 1300, 1600])
def test_three_lanes_are_seen_without_scrolling_sideways(page: Any, tmp_path: Path, width: int) -> None:
    import kvmlab
    from kvmlab.show.page import page_html

    report = kvmlab.check("v8-post-hook", scenario="discard-races")
    (tmp_path / "report.html").write_text(page_html([report]), encoding="utf-8")
    page.set_viewport_size({"width": width, "height": 1000})
    page.goto((tmp_path / "report.html").as_uri())
    lanes = page.locator(".kvmlab-lanes").first
    assert lanes.locator("thead th").count() == 5
    assert lanes.evaluate("(el) => el.scrollWidth <= el.clientWidth")


def test_the_page_of_a_sept_board_walks_without_kernel_and_network(page: Any, tmp_path: Path) -> None:
    import kvmlab

    board = kvmlab.sept_board("VP.ENTER", "access", "AUG", "VP.ENTER", "ACCEPT", "access", "BLOCK")
    (tmp_path / "board.html").write_text(board.page(), encoding="utf-8")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "board.html").as_uri())
    told, picture = page.locator(".kvmlab-sept-told"), page.locator(".kvmlab-sept-picture")
    page.get_by_role("button", name="PAGE.REMOVE").click()
    assert "0xc0000b08 00000001 TDX_TLB_TRACKING_NOT_DONE | RCX" in told.inner_text()
    for name in ("TRACK", "kick", "PAGE.REMOVE"):
        page.get_by_role("button", name=name, exact=True).click()
    assert picture.get_attribute("data-at") == "FREE"
    page.get_by_role("button", name="Back").click()
    assert picture.get_attribute("data-at") == "BLOCKED"
    assert asked == [(tmp_path / "board.html").as_uri()]


def test_a_step_is_drawn_at_once(live: Any, desk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    live.focus()
    desk.keyboard.press("Home")
    times = [desk.evaluate(STEP) for _ in range(20)]
    with capsys.disabled():
        print(f"\na step in the browser, until it is painted: median {statistics.median(times):.1f} ms")
    step(live, "step 11 of 11")
