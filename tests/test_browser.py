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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest

pytestmark = pytest.mark.browser
if os.environ.get("KVMLAB_REQUIRE_BROWSER") != "1":
    pytest.importorskip("jupyterlab", reason="needs JupyterLab")
    pytest.importorskip("anywidget", reason="needs anywidget")

HOSTILE = '<img src=x onerror="window.pwned=1">'
LOAD = 60_000  # milliseconds; only a hang reaches it
FAULTY = "rmp-under-lock-directmap-post"
CELLS = [
    f"import kvmlab\nw = kvmlab.workbench({FAULTY!r})\nw",
    "assert w.report.complete",
    "print('all cells ran')",
]
SERVER_SAYS_READY = "is running at"
DARK = "JupyterLab Dark"
STEP = """() => new Promise((done) => {
  const root = document.querySelector('.kvmlab'), began = performance.now();
  root.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
})"""


class Lab(NamedTuple):
    """A running server: its address and its token."""

    address: str
    token: str

    def url(self, notebook: str) -> str:
        """The page of a notebook, in a fresh workspace."""
        return f"{self.address}/lab/tree/{notebook}?reset&token={self.token}"


def notebook(outputs: dict[str, str] | None = None) -> str:
    """A small notebook of the test's own; `outputs` are stored with its first cell."""
    import nbformat

    node = nbformat.v4
    cells = [node.new_code_cell(source) for source in CELLS]
    if outputs:
        cells[0].execution_count = 1
        cells[0].outputs = [node.new_output("execute_result", data=outputs, execution_count=1)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return str(nbformat.writes(node.new_notebook(cells=cells, metadata=kernel)))


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
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--notebook-dir={work}"),
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
        yield Lab(f"http://127.0.0.1:{port}", token)
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
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], viewport=size)
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
    first.focus()
    page.keyboard.press("End")
    step(first, "step 29 of 29")
    chip(first, "out-of-sync").click()
    step(first, "step 0 of 24")
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


def test_a_step_is_drawn_at_once(live: Any, desk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    live.focus()
    times = [desk.evaluate(STEP) for _ in range(20)]
    with capsys.disabled():
        print(f"\na step in the browser, until it is painted: median {statistics.median(times):.1f} ms")
    step(live, "step 11 of 11")
