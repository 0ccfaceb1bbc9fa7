// The player: walks the run that Python has drawn, without asking.  It decides nothing: what a step did, what it
// changed, what a fragment looks like, all comes from Python.  Fragments are escaped there and go in as markup;
// everything else is text.  `workbench.js` follows in the same module.

const h = (tag, props = {}, ...children) => {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value);
    else if (name in el && name !== "list" && name !== "style") el[name] = value;
    else if (value !== null && value !== undefined) el.setAttribute(name, value);
  }
  el.append(...children.flat(Infinity));
  return el;
};
const fill = (el, ...children) => el.replaceChildren(...children.flat(Infinity));
const fragment = (el, html) => { el.innerHTML = html; return el; };
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
// Redraws, and gives the focus back to what took the place of the element that had it: were it lost, the next
// key would go to JupyterLab.
const keepingFocus = (root, redraw) => {
  const had = root.contains(document.activeElement) ? document.activeElement : null;
  const key = had?.dataset.key;
  redraw();
  if (!had || root.contains(document.activeElement)) return;
  const heir = key && [...root.querySelectorAll("[data-key]")].find((each) => each.dataset.key === key);
  (heir || root.closest(".kvmlab") || root).focus({ preventScroll: true });
};
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

// -- the player: walks a run without asking

function player(send, moved) {
  const title = h("div", { className: "kvmlab-title" });
  const button = (label, text, act) => h("button", { title: label, "aria-label": label, onclick: act }, text);
  const slider = h("input", { type: "range", min: 0, "aria-label": "Position in the run", oninput: () => go(Number(slider.value)) });
  const count = h("span", { className: "kvmlab-count" });
  const play = button("Play", "▶", () => (timer ? stop() : start()));
  const controls = h("div", { className: "kvmlab-row kvmlab-controls" },
    button("First (Home)", "⇤", () => go(0)), button("Back (Left)", "←", () => go(position - 1)), play,
    button("Forward (Right)", "→", () => go(position + 1)), button("Last (End)", "⇥", () => go(last())), slider, count);
  const style = h("style");
  const say = h("div", { className: "kvmlab-say", "aria-live": "polite" });
  const table = h("div", { className: "kvmlab-lanes", tabIndex: -1 });
  const caption = h("div", { className: "kvmlab-quiet" });
  const holds = h("div", { className: "kvmlab-holds" });
  const machine = h("div", { className: "kvmlab-machine" });
  const take = h("div", { className: "kvmlab-take" });
  const copied = h("span", { className: "kvmlab-quiet", "aria-live": "polite" });
  const pre = h("pre", { tabIndex: 0 });
  const plain = h("details", {}, h("summary", {}, "As plain text, for a mail"), pre);
  const code = h("code", { className: "kvmlab-replay" });
  const copy = h("div", { className: "kvmlab-row" },
    h("button", { onclick: () => clip(run.text, pre) }, "Copy diagram"), h("button", { onclick: () => clip(run.code, code) }, "Copy code"), code, copied);
  const el = h("section", { className: "kvmlab-player", "aria-label": "The run, step by step" }, style, title, controls, say,
    h("div", { className: "kvmlab-run" }, table, h("div", { className: "kvmlab-side" }, caption, machine, holds)), take, copy, plain);
  new ResizeObserver((_, observer) => { // what is drawn before it is on the page has no size to scroll by
    if (!table.clientHeight) return;
    scroll(bodies[position - 1]);
    observer.disconnect();
  }).observe(table);
  let run = { steps: [] }, position = 0, timer = 0, bodies = [], foot = null, lines = null, told = 0;

  const last = () => run.steps.length - 1;
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶"; };
  function start() {
    if (position === last()) go(0);
    timer = setInterval(() => (position < last() ? go(position + 1, true) : stop()), 700);
    play.textContent = "❚❚";
  }

  async function clip(text, where) {
    try {
      await navigator.clipboard.writeText(text);
      copied.textContent = "Copied.";
    } catch { // no clipboard without a secure context
      if (where === pre) plain.open = true;
      getSelection().selectAllChildren(where);
      copied.textContent = "Selected: press Ctrl+C.";
    }
  }

  function load(next, at = next.first) {
    run = next;
    style.textContent = run.styles;
    fragment(title, run.title);
    fragment(table, run.table);
    fragment(table.firstChild, run.head + run.steps.map((s) => s.row).join("") + run.foot);
    fragment(machine, run.table);
    lines = machine.firstChild;
    bodies = [...table.firstChild.tBodies];
    foot = bodies.splice(last())[0];
    bodies.forEach((body, i) => body.addEventListener("click", () => go(i + 1)));
    pre.textContent = run.text;
    code.textContent = run.code;
    slider.max = last();
    go(at, false, true);
    say.textContent = run.steps[position].say;
  }

  function go(to, playing = false, quietly = false) {
    if (!playing) stop();
    position = Math.min(Math.max(to, 0), last());
    const step = run.steps[position];
    bodies.forEach((body, i) => {
      body.classList.toggle("kvmlab-now", i + 1 === position);
      body.classList.toggle("kvmlab-later", position > 0 && i + 1 > position);
    });
    foot?.classList.toggle("kvmlab-later", position > 0 && position < last());
    scroll(bodies[position - 1]);
    fragment(lines, step.machine.map((i) => run.pool[i]).join(""));
    slider.value = position;
    count.textContent = `step ${position} of ${last()}`;
    caption.textContent = position ? `the machine after step ${position}` : "the machine before the first step";
    const broken = [...new Set(run.steps.slice(0, position + 1).flatMap((each) => each.broken))];
    holds.textContent = broken.length ? `!! violated so far: ${broken.join(", ")}` : "all properties hold so far";
    holds.classList.toggle("kvmlab-broken", broken.length > 0);
    if (!quietly) { say.textContent = step.say; copied.textContent = ""; }
    choices(step);
    moved(step, run.hues[step.actor]);
    if (!quietly && send.live) { clearTimeout(told); told = setTimeout(() => send({ do: "position", position }), 150); }
  }

  function scroll(body) { // within the lanes only: the page stays where it is
    if (!body) { table.scrollTop = table.scrollLeft = 0; return; }
    const cell = [...body.rows[0].cells].slice(2).find((each) => each.textContent) ?? body.rows[0].cells[0];
    const right = cell.offsetLeft + cell.offsetWidth - table.clientWidth;
    table.scrollLeft = Math.min(cell.offsetLeft, Math.max(right, table.scrollLeft));
    const top = body.offsetTop - (table.querySelector("thead")?.offsetHeight ?? 0);
    if (top < table.scrollTop) table.scrollTop = top;
    const bottom = body.offsetTop + body.offsetHeight - table.clientHeight;
    if (bottom > table.scrollTop) table.scrollTop = bottom;
  }

  function choices(step) {
    if (!send.live) return;
    const dot = (actor) => h("span", { className: "kvmlab-dot", style: `background:${run.hues[actor]}` });
    const act = (o) => { clearTimeout(told); send({ do: "take", actor: o.actor, choice: o.choice, at: position }); };
    const groups = Object.keys(run.hues).map((actor) => {
      const mine = step.options.filter((o) => o.actor === actor);
      const waits = step.waits.includes(actor);
      if (!mine.length && !waits) return "";
      return h("span", { className: "kvmlab-group" }, dot(actor), h("b", {}, actor),
        mine.map((o) => h("button", { "data-key": `take ${actor}`, title: o.text, className: o.bad ? "kvmlab-danger" : "", onclick: () => act(o) }, o.text)), waits ? h("span", { className: "kvmlab-quiet" }, "waits") : "");
    });
    const lead = step.options.length ? "Take over, and let step here:" : "Nobody can move: the run ends here.";
    keepingFocus(take, () => fill(take, h("span", { className: "kvmlab-quiet" }, lead), groups));
  }

  const find = (wanted, by) => {
    for (let i = position + by; i > 0 && i <= last(); i += by) if (wanted(i)) return i;
    return by > 0 ? last() : 0;
  };
  const turn = (i) => run.steps[i].actor !== run.steps[i - 1].actor;
  const keys = {
    ArrowLeft: () => go(position - 1), ArrowRight: () => go(position + 1), Home: () => go(0), End: () => go(last()),
    n: () => go(find(turn, 1)), p: () => go(find(turn, -1)), f: () => go(find((i) => run.steps[i].loud, 1)), c: () => clip(run.text, pre),
  };
  return { el, load, key: (name) => keys[name], announce: (text) => { if (text) say.textContent = text; }, refresh: () => go(position, false, true), stop };
}
