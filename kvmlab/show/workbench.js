// The workbench's browser half, after `player.js` in one module.  It draws the value `view` that Python sends and
// sends messages; every decision is Python's.

// -- selects above everything: which case

function caseBar(send) {
  const el = h("div", { className: "kvmlab-bar" });
  const names = { design: "Ordering", platform: "Platform", scenario: "Scenario", backing: "Backing" };
  const undo = h("button", { onclick: () => send({ do: "undo" }), title: "Take the last change back" }, "Undo");
  const status = h("span", { className: "kvmlab-status" });
  const chosen = (name, value) => send(name === "design" ? { do: "load", design: value } : { do: "choose", [name]: value });
  return {
    el,
    update(view) {
      const selects = Object.entries(names).map(([name, label]) => {
        if (!send.live) return h("label", {}, h("span", {}, label), h("b", {}, view.case[name]));
        const options = view.choices[name].map(([value, title]) =>
          h("option", { value, selected: value === view.case[name] }, title && title !== value ? `${value}: ${title}` : value));
        return h("label", {}, h("span", {}, label), h("select", { name, "data-key": name, onchange: (e) => chosen(name, e.target.value) }, options));
      });
      undo.hidden = !view.undo;
      status.textContent = [view.status, view.took].filter(Boolean).join(" · ");
      fill(el, selects, undo, status);
    },
  };
}

// -- the ordering: lines that can be moved, or its text

function ordering(send) {
  const title = h("div", { className: "kvmlab-title" });
  const lines = h("div", { className: "kvmlab-lines" });
  const text = h("textarea", { spellcheck: false, "aria-label": "The ordering as text", rows: 24 });
  const check = h("button", { className: "kvmlab-main", onclick: () => { asked = true; send({ do: "edit", text: text.value }); } }, "Check");
  const cancel = h("button", { onclick: () => edit(false) }, "Back to lines");
  const open = h("button", { onclick: () => edit(true) }, "Edit as text");
  const editor = h("div", { className: "kvmlab-editor", hidden: true }, text, h("div", { className: "kvmlab-row" }, check, cancel,
    h("span", { className: "kvmlab-quiet" }, "Ctrl+Enter checks")));
  const problem = h("pre", { className: "kvmlab-problem", role: "alert", hidden: true });
  const el = h("section", { className: "kvmlab-order", "aria-label": "The ordering" }, title, problem, editor, lines, h("div", { className: "kvmlab-row" }, open));
  let view = {}, items = new Map(), active = null, dragged = null, kept = null, asked = false;

  text.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) check.click(); });

  function edit(on) {
    if (on && kept !== view.design.text) { text.value = kept = view.design.text; text.setSelectionRange(0, 0); }
    editor.hidden = !on;
    lines.hidden = on;
    open.hidden = on || !send.live;
    (on ? text : open).focus();
  }

  const move = (section, line, by) => send({ do: "move", section, line, by });

  function item(section, line, code) {
    const key = `${section} ${line}`;
    const up = h("button", { tabIndex: -1, title: "Move up (Alt+Up)", "aria-label": `Move up: ${code.trim()}`, onclick: () => move(section, line, -1) }, "▲");
    const down = h("button", { tabIndex: -1, title: "Move down (Alt+Down)", "aria-label": `Move down: ${code.trim()}`, onclick: () => move(section, line, 1) }, "▼");
    const li = h("li", { tabIndex: -1, draggable: send.live, "aria-label": code.trim(), onfocus: () => activate(key) },
      h("span", { className: "kvmlab-code" }, code.replace(/^ +/, (lead) => lead.slice(lead.length / 2))), send.live ? h("span", { className: "kvmlab-arrows" }, up, down) : "");
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
      const changed = !same(view.design, next.design);
      view = next;
      if (changed) {
        items = new Map();
        const { name, title: what, source, base, notes, sections } = next.design;
        fill(title, h("b", {}, name), what !== name ? ` ${what}` : "", [source, ...notes].filter(Boolean).map((note) => h("div", { className: "kvmlab-quiet" }, note)));
        fill(lines, sections.map((section) => [
          h("div", { className: "kvmlab-section" }, `${section.name}:`, section.own ? "" : h("span", { className: "kvmlab-quiet" }, ` as in ${base}`)),
          h("ul", { "aria-label": section.name }, section.lines.map((code, line) => item(section.name, line, code))),
        ]));
        activate(active);
      }
      if (next.focus) activate(next.focus.join(" "));
      if (changed && (hadFocus || next.focus) && !lines.hidden) items.get(active)?.focus({ preventScroll: true });
      problem.hidden = !next.problem;
      problem.textContent = next.problem;
      open.hidden = !send.live || !editor.hidden;
      if (asked && !next.problem) { kept = null; edit(false); }
      asked = false;
    },
    at(line, hue) {
      lines.querySelector(".kvmlab-now")?.classList.remove("kvmlab-now");
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
      const rest = view.verdicts.filter((v) => !v.bad);
      const chips = bad.map((v) => h("button", { "data-key": v.name, className: "kvmlab-chip kvmlab-bad", title: v.sentence, "aria-pressed": view.shown === v.name, onclick: show(v.name) },
        h("b", {}, `!! ${v.name}`), h("span", {}, ` ${v.verdict}, after ${plural(v.steps, "step")}`)));
      const sample = h("button", { "data-key": "sample", className: "kvmlab-chip", title: "A run to the end in which nothing is violated", "aria-pressed": view.shown === "sample", onclick: show("sample") }, "a sample run");
      const fine = rest.map((v) => h("span", { className: "kvmlab-fine", title: v.sentence }, `${v.verdict === "Never" ? "✓" : "?"} ${v.name}`));
      const unseen = view.unseen.map((name) => h("span", { className: "kvmlab-fine" }, `not seen: ${name}`));
      fill(el, h("div", { className: "kvmlab-row" }, chips.length ? chips : h("b", { className: "kvmlab-ok" }, "Nothing is violated"), send.live || view.runs ? sample : ""),
        h("div", { className: "kvmlab-row" }, h("span", { className: "kvmlab-fine" }, rest.some((v) => v.verdict === "Never") ? "Never:" : ""), fine, unseen));
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

const LEGEND = "Keys: ← → step · Home End · n p next, previous turn · f next fault · c copy";
const MOVES = " · ↑ ↓ choose a line, with Alt move it";

function render({ model, el }) {
  const live = typeof model.send === "function";
  const send = (message) => {
    if (message.do === "show" && view.runs?.[message.property]) { view.shown = message.property; keepingFocus(root, () => verdict.update(view)); run.load(view.runs[message.property], 0); return; }
    if (!live) return;
    if (message.do !== "position") root.setAttribute("aria-busy", "true");
    model.send(message);
  };
  send.live = live;
  let view = model.get("view");
  const bar = caseBar(send), order = ordering(send), verdict = verdictList(send), beside = comparison(send);
  const run = player(send, (step, hue) => order.at(step.line, hue));
  const root = h("div", { className: "kvmlab", tabIndex: 0, role: "group", "aria-label": "KVM conversion workbench" },
    bar.el, h("div", { className: "kvmlab-desk" }, order.el, verdict.el, run.el), live ? beside.el : "", h("div", { className: "kvmlab-quiet kvmlab-legend" }, live ? LEGEND + MOVES : LEGEND));
  let before = {};

  function update() {
    view = model.get("view");
    root.removeAttribute("aria-busy");
    keepingFocus(root, () => {
      bar.update(view);
      order.update(view);
      verdict.update(view);
      if (live) beside.update(view);
      if (!same(before.trace, view.trace)) run.load(view.trace, view.position);
      else run.refresh();
    });
    run.announce(view.said);
    before = view;
  }

  root.addEventListener("keydown", (e) => {
    e.stopPropagation(); // else JupyterLab takes the key: x would cut the cell
    const typing = /^(TEXTAREA|SELECT)$/.test(e.target.tagName) || (e.target.type === "range" && /^(Arrow|Home|End)/.test(e.key));
    const act = run.key(e.key);
    if (typing || !act || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    act();
  });
  model.on?.("change:view", update);
  el.append(root);
  update();
  return () => { run.stop(); model.off?.("change:view", update); };
}

export default { render };
