// The workbench's browser half, after `player.js` in one module.  It draws the value `view` that Python sends and
// sends messages; every decision is Python's.

// -- selects above everything: which case, and how much of it is explored

function caseBar(send) {
  const el = h("div", { className: "kvmlab-bar" });
  const names = { design: "Ordering", platform: "Platform", scenario: "Scenario", backing: "Backing" };
  const undo = h("button", { onclick: () => send({ do: "undo" }), title: "Take the last change back" }, "Undo");
  const status = h("span", { className: "kvmlab-status" });
  const cancel = h("button", { className: "kvmlab-cancel", onclick: () => send({ do: "cancel" }), title: "Give up, and go back to what was checked before" }, "Cancel");
  const told = h("div", { className: "kvmlab-row kvmlab-told" }, status, cancel);
  const chosen = (name, value) => send(name === "design" ? { do: "load", design: value } : { do: "choose", [name]: value });
  const count = (states) => { status.textContent = `exploring: ${states ? `${states.toLocaleString("en")} states so far` : "..."}`; };
  return {
    el, count,
    update(view) {
      const selects = Object.entries(names).map(([name, label]) => {
        if (!send.live) return h("label", {}, h("span", {}, label), h("b", {}, view.case[name]));
        const options = view.choices[name].map(([value, title]) =>
          h("option", { value, selected: value === view.case[name] }, title && title !== value ? `${value}: ${title}` : value));
        return h("label", {}, h("span", {}, label), h("select", { name, "data-key": name, onchange: (e) => chosen(name, e.target.value) }, options));
      });
      undo.hidden = !send.live || !view.undo;
      cancel.hidden = !view.exploring;
      if (!view.exploring) status.textContent = [view.status, view.took].filter(Boolean).join(" · ");
      fill(el, selects, undo, told);
    },
  };
}

// -- the ordering: lines that can be moved, or its text

function ordering(send) {
  const title = h("div", { className: "kvmlab-title" });
  const lines = h("div", { className: "kvmlab-lines" });
  const text = h("textarea", { spellcheck: false, "aria-label": "The ordering as text", rows: 24,
    placeholder: "An ordering, one call a line; or the code of a run, or a diagram that carries one" });
  const check = h("button", { className: "kvmlab-main", onclick: () => { asked = true; send({ do: "edit", text: text.value }); } }, "Check");
  const cancel = h("button", { onclick: () => edit(false) }, "Back to lines");
  const open = h("button", { onclick: () => edit(true) }, "Edit as text");
  const editor = h("div", { className: "kvmlab-editor", hidden: true }, text, h("div", { className: "kvmlab-row" }, check, cancel,
    h("span", { className: "kvmlab-quiet" }, "Ctrl+Enter checks. A run's code, or its diagram from a mail, may be pasted here.")));
  const problem = h("pre", { className: "kvmlab-problem", role: "alert", hidden: true });
  const el = h("section", { className: "kvmlab-order", "aria-label": "The ordering" }, title, problem, editor, lines, h("div", { className: "kvmlab-row" }, open));
  let view = {}, items = new Map(), active = null, dragged = null, kept = null, asked = false, live = send.live;

  text.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) check.click(); });

  function edit(on) {
    if (on && kept !== view.design.text) { text.value = kept = view.design.text; text.setSelectionRange(0, 0); }
    if (on && view.draft !== null && view.draft !== undefined) text.value = view.draft;
    editor.hidden = !on;
    lines.hidden = on;
    open.hidden = on || !send.live;
    (on ? text : open).focus();
  }

  const breakable = (code) => code.split(/(?<=\()(?!\))/).flatMap((part, n) => (n ? [h("wbr"), part] : [part]));
  const move = (section, line, by) => send({ do: "move", section, line, by });

  function item(section, line, code) {
    const key = `${section} ${line}`;
    const up = h("button", { tabIndex: -1, title: "Move up (Alt+Up)", "aria-label": `Move up: ${code.trim()}`, onclick: () => move(section, line, -1) }, "▲");
    const down = h("button", { tabIndex: -1, title: "Move down (Alt+Down)", "aria-label": `Move down: ${code.trim()}`, onclick: () => move(section, line, 1) }, "▼");
    const li = h("li", { tabIndex: -1, draggable: send.live, "aria-label": code.trim(), onfocus: () => activate(key) },
      h("span", { className: "kvmlab-code" }, breakable(code.replace(/^ +/, (lead) => lead.slice(lead.length / 2)))), send.live ? h("span", { className: "kvmlab-arrows" }, up, down) : "");
    li.addEventListener("dragstart", (e) => { dragged = { section, line }; e.dataTransfer.setData("text/plain", code.trim()); e.dataTransfer.effectAllowed = "move"; });
    li.addEventListener("dragend", () => { dragged = null; });
    li.addEventListener("dragover", (e) => { if (dragged?.section === section) { e.preventDefault(); li.classList.add("kvmlab-over"); } });
    li.addEventListener("dragleave", () => li.classList.remove("kvmlab-over"));
    li.addEventListener("drop", (e) => {
      li.classList.remove("kvmlab-over");
      if (dragged?.section !== section) return;
      e.preventDefault();
      if (dragged.line !== line) send({ do: "move", section, line: dragged.line, to: line });
    });
    li.addEventListener("keydown", (e) => {
      if (e.target !== li || !["ArrowUp", "ArrowDown"].includes(e.key)) return;
      e.preventDefault();
      const by = e.key === "ArrowUp" ? -1 : 1;
      if (e.altKey) { if (send.live) move(section, line, by); return; }
      const keys = [...items.keys()];
      items.get(keys[keys.indexOf(key) + by])?.focus();
    });
    items.set(key, li);
    return li;
  }

  function activate(key) {
    if (items.has(active)) items.get(active).tabIndex = -1;
    active = items.has(key) ? key : items.keys().next().value;
    if (items.has(active)) items.get(active).tabIndex = 0;
  }

  return {
    el,
    update(next) {
      const hadFocus = lines.contains(document.activeElement);
      const changed = !same(view.design, next.design) || live !== send.live;
      const pasted = next.draft && next.draft !== view.draft && !asked;
      view = next;
      live = send.live;
      if (changed) {
        items = new Map();
        const { name, title: what, source, notes, sections, idle } = next.design;
        fill(title, h("b", {}, name), what !== name ? ` ${what}` : "", [source, ...notes].filter(Boolean).map((note) => h("div", { className: "kvmlab-quiet" }, note)));
        fill(lines, sections.map((section) => [
          h("div", { className: "kvmlab-section" }, `${section.name}:`, section.from ? h("span", { className: "kvmlab-quiet" }, ` as in ${section.from}`) : ""),
          h("ul", { "aria-label": section.name }, section.lines.map((code, line) => item(section.name, line, code))),
        ]), idle.length ? h("div", { className: "kvmlab-quiet kvmlab-idle" }, `Not run in this case: ${idle.join(", ")}.`) : "");
        activate(active);
      }
      if (next.focus) activate(next.focus.join(" "));
      if (changed && (hadFocus || next.focus) && !lines.hidden) items.get(active)?.focus({ preventScroll: true });
      problem.hidden = !next.problem;
      problem.textContent = next.problem;
      if (!send.live && !editor.hidden) edit(false);
      open.hidden = !send.live || !editor.hidden;
      if (pasted && send.live) edit(true);
      if (next.exploring) return; // what is asked will be known when it is explored
      if (asked && !next.problem) { kept = null; edit(false); }
      asked = false;
    },
    at(line, hue) {
      lines.querySelector(".kvmlab-now")?.classList.remove("kvmlab-now");
      if (view.exploring) return; // the run is of the ordering before
      const li = line && items.get(line.join(" "));
      if (!li) return;
      li.classList.add("kvmlab-now");
      li.style.setProperty("--kvmlab-hue", hue);
    },
  };
}

// -- the verdicts: each that is violated opens its counterexample

function verdictList(send) {
  const el = h("section", { className: "kvmlab-verdicts", "aria-label": "Verdicts" });
  const show = (property) => () => send({ do: "show", property });
  return {
    el,
    update(view) {
      const bad = view.verdicts.filter((v) => v.bad);
      const chips = bad.map((v) => h("button", { "data-key": v.name, className: "kvmlab-chip kvmlab-bad", title: v.sentence, "aria-pressed": view.shown === v.name, disabled: !send.live && !view.runs, onclick: show(v.name) },
        h("b", {}, `!! ${v.name}`), h("span", {}, ` ${v.verdict}, after ${plural(v.steps, "step")}`)));
      const sample = h("button", { "data-key": "sample", className: "kvmlab-chip", title: "A run to the end in which nothing is violated", "aria-pressed": view.shown === "sample", onclick: show("sample") }, "a sample run");
      const nothing = !view.complete ? "Nothing is violated so far; not all is explored" : view.unjudged.length ? "Nothing that is judged is violated" : "Nothing is violated";
      const named = (v, mark) => h("span", { className: "kvmlab-fine", title: v.sentence }, `${mark} ${v.name}`);
      const line = (lead, rest) => rest.length ? h("div", { className: "kvmlab-row" }, h("span", { className: "kvmlab-fine" }, lead), rest) : "";
      fill(el, h("div", { className: "kvmlab-before" }, "Of the ordering and case before this change:"),
        h("div", { className: "kvmlab-row" }, chips.length ? chips : h("b", { className: "kvmlab-ok" }, nothing), send.live || view.runs ? sample : ""),
        line("Never:", view.verdicts.filter((v) => v.verdict === "Never").map((v) => named(v, "✓"))),
        view.unjudged.map(({ why, names }) => line(`Not judged, as ${why}:`, view.verdicts.filter((v) => names.includes(v.name)).map((v) => named(v, "?")))),
        line("Not seen:", view.unseen.map((name) => h("span", { className: "kvmlab-fine" }, name))));
    },
  };
}

// -- another ordering beside this one

function comparison(send) {
  const select = h("select", { onchange: () => send({ do: "versus", design: select.value || null }) });
  const side = h("div", { className: "kvmlab-beside" });
  const el = h("section", { className: "kvmlab-versus", "aria-label": "Comparison" }, h("label", {}, h("span", {}, "Compare with"), select), side);
  return {
    el,
    update(view) {
      const names = view.choices.design.map(([value]) => value).filter((value) => !value.endsWith("*"));
      if (view.versus.design && !names.includes(view.versus.design)) names.push(view.versus.design);
      fill(select, ["", ...names].map((value) => h("option", { value, selected: value === view.versus.design }, value || "nothing")));
      if (view.versus.html) fragment(side, view.versus.html);
      else fill(side, view.versus.problem);
    },
  };
}

// -- what JupyterLab knows and a widget is not told

// Whether the kernel that a widget talks to is still there.  JupyterLab marks the view of a model that was read from
// a file; of a kernel that ends or starts afresh only the session tells.  `changed` is called when it may have ended.
function connection(model, el, changed) {
  const session = model.widget_manager?.context?.sessionContext;
  const marked = new MutationObserver(changed);
  let ended = false;
  const status = (_, word) => { ended ||= /restarting|terminating|dead/.test(word); changed(); };
  marked.observe(el, { attributes: true, attributeFilter: ["class"] });
  session?.statusChanged?.connect(status);
  session?.kernelChanged?.connect(changed);
  return {
    live: () => typeof model.send === "function" && !ended && !el.classList.contains("jupyter-widgets-disconnected") && !(session && !session.session?.kernel),
    close() {
      marked.disconnect();
      session?.statusChanged?.disconnect(status);
      session?.kernelChanged?.disconnect(changed);
    },
  };
}

// JupyterLab saves a notebook without its widgets' models, unless a setting says otherwise; reopened, such a
// notebook says "model not found" where the workbench was.  So the models that the notebook's outputs name are
// put into its metadata whenever it is saved, in the form that JupyterLab itself writes and reads.
const WIDGET_STATE = "application/vnd.jupyter.widget-state+json", OURS = "kvmlab.show.widget.Workbench";
const saving = new WeakSet();

function keepWhenSaved(model) {
  const manager = model.widget_manager, context = manager?.context;
  if (!context?.saveState || !context.model?.setMetadata || !manager.get_state_sync || saving.has(context)) return;
  saving.add(context);
  context.saveState.connect((_, phase) => { if (phase === "started") keepModels(manager, context.model); });
}

function keepModels(manager, notebook) {
  const before = notebook.getMetadata("widgets")?.[WIDGET_STATE]?.state ?? {};
  const now = manager.get_state_sync({ drop_defaults: true });
  const kept = {};
  const keep = (id) => {
    const found = now.state[id] ?? before[id];
    if (!found || kept[id]) return;
    kept[id] = found;
    for (const [, other] of JSON.stringify(found.state).matchAll(/"IPY_MODEL_(\w+)"/g)) keep(other);
  };
  for (const [, id] of JSON.stringify(notebook.toJSON()).matchAll(/"model_id":"(\w+)"/g)) {
    if (before[id] || now.state[id]?.state._anywidget_id === OURS) keep(id);
  }
  if (Object.keys(kept).length) notebook.setMetadata("widgets", { [WIDGET_STATE]: { ...now, state: kept } });
  else if (Object.keys(before).length) notebook.deleteMetadata("widgets");
}

const LEGEND = "Keys: ← → step · Home End · n p next, previous turn · f next fault · c copy";
const MOVES = " · ↑ ↓ choose a line, with Alt move it";
const PATIENCE = 3000; // milliseconds without an answer before that is said
const SILENT = "The kernel has not answered yet: it may be busy with a cell.";
const GONE = "The kernel that explored this is gone. What you see is its last answer; run the cell again to go on.";
const SAVED = "This is the workbench as it was saved. Its run can be stepped through; kvmlab.workbench(\"CODE\"), with the run's code from below, goes on from here.";

function render({ model, el }) {
  const send = (message) => {
    if (message.do === "show" && view.runs?.[message.property]) { view.shown = message.property; keepingFocus(root, () => verdict.update(view)); run.load(view.runs[message.property]); return; }
    if (!send.live || (asked && message.do === "move")) return; // until the answer is there a line's number may be another's
    if (message.do !== "position") { asked = true; clearTimeout(silent); silent = setTimeout(() => tell(SILENT), PATIENCE); }
    model.send(message);
  };
  const link = connection(model, el, () => { if (link.live() !== send.live) update(); });
  send.live = link.live();
  let view = model.get("view"), asked = false, silent = 0, wasLive = send.live, before = {};
  const bar = caseBar(send), order = ordering(send), verdict = verdictList(send), beside = comparison(send);
  const run = player(send, (step, hue) => order.at(step.line, hue));
  const note = h("div", { className: "kvmlab-note", role: "status", hidden: true });
  const legend = h("div", { className: "kvmlab-quiet kvmlab-legend" });
  const root = h("div", { className: "kvmlab", tabIndex: 0, role: "group", "aria-label": "KVM conversion workbench" },
    note, bar.el, h("div", { className: "kvmlab-desk" }, order.el, verdict.el, run.el), beside.el, legend);
  const tell = (text) => { note.hidden = !text; note.textContent = text; };

  function update() {
    clearTimeout(silent);
    asked = false;
    send.live = link.live();
    wasLive ||= send.live;
    const pending = send.live ? model.get("pending") ?? {} : {};
    const exploring = "case" in pending;
    view = { ...model.get("view"), ...pending, exploring };
    tell(send.live || typeof model.send !== "function" ? "" : wasLive ? GONE : SAVED);
    root.classList.toggle("kvmlab-gone", wasLive && !send.live);
    root.setAttribute("aria-busy", exploring);
    legend.textContent = send.live ? LEGEND + MOVES : LEGEND;
    keepingFocus(root, () => {
      bar.update(view);
      order.update(view);
      verdict.update(view);
      beside.el.hidden = !send.live;
      if (send.live) beside.update(view);
      if (!same(before.trace, view.trace)) run.load(view.trace, view.position);
      else run.refresh();
    });
    if (exploring) bar.count(model.get("explored"));
    run.announce(exploring ? "" : view.said);
    before = view;
  }
  const counted = () => { if (view.exploring) bar.count(model.get("explored")); };

  root.addEventListener("keydown", (e) => {
    const typing = /^(TEXTAREA|SELECT)$/.test(e.target.tagName) || (e.target.type === "range" && /^(Arrow|Home|End|Page)/.test(e.key));
    // JupyterLab takes plain keys for commands (x would cut the cell), so those stay here.  With Ctrl or Cmd they
    // are JupyterLab's (Ctrl+S saves), but for Ctrl+Enter and the ones that a field of text needs itself.
    const command = e.ctrlKey || e.metaKey;
    if (!command || e.key === "Enter" || (typing && /^([acvxyz]|Arrow.*|Home|End|Backspace|Delete)$/i.test(e.key))) e.stopPropagation();
    const act = run.key(e.key);
    if (typing || !act || command || e.altKey) return;
    e.preventDefault();
    act();
  });
  root.addEventListener("paste", (e) => {
    if (e.target.tagName === "TEXTAREA" || !send.live) return;
    e.stopPropagation();
    e.preventDefault();
    send({ do: "paste", text: e.clipboardData.getData("text/plain") });
  });
  const events = { "change:view": update, "change:pending": update, "change:explored": counted };
  for (const [name, react] of Object.entries(events)) model.on?.(name, react);
  keepWhenSaved(model);
  el.append(root);
  update();
  return () => {
    run.stop();
    link.close();
    for (const [name, react] of Object.entries(events)) model.off?.(name, react);
  };
}

export default { render };
