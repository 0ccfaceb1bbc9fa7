// The board of one secure EPT entry, after `player.js` in one module.  Python has computed every answer and drawn
// everything: this walks from state to state, says so in the drawing's data-* attributes, and keeps the log.

function render({ model, el }) {
  const view = model.get("view");
  const picture = fragment(h("div", { className: "kvmlab-sept-drawing" }), view.picture);
  const svg = picture.firstChild;
  const facts = h("div", { className: "kvmlab-row kvmlab-sept-facts" });
  const told = h("div", { className: "kvmlab-sept-told", "aria-live": "polite" });
  const log = h("ol", { className: "kvmlab-sept-log", tabIndex: 0, "aria-label": "What was clicked" });
  const copied = h("span", { className: "kvmlab-quiet", "aria-live": "polite" });
  const plain = h("pre", { hidden: true });
  let trail = [];

  const here = () => (trail.length ? trail.at(-1).to : view.start);
  function take(click) {
    const step = view.steps[here()][click];
    if (step) trail.push({ click, to: step[0], found: view.pool[step[1]] });
  }
  const buttons = view.clicks.map((each, n) =>
    h("button", { title: each.title, "data-key": each.name, onclick: () => { take(n); show(); } }, each.name));
  const group = (side, label) => h("div", { className: "kvmlab-row" }, h("span", { className: "kvmlab-quiet kvmlab-sept-side" }, label),
    buttons.filter((_, n) => view.clicks[n].side === side && !view.clicks[n].hidden));
  const back = h("button", { onclick: () => { trail.pop(); show(); } }, "Back");
  const again = h("button", { onclick: () => { trail = []; show(); } }, "Start over");
  const copy = h("button", { onclick: clip }, "Copy log");

  async function clip() {
    plain.textContent = trail.map((each) => each.found.line).join("\n");
    try {
      await navigator.clipboard.writeText(plain.textContent);
      copied.textContent = "Copied.";
    } catch { // no clipboard without a secure context
      plain.hidden = false;
      getSelection().selectAllChildren(plain);
      copied.textContent = "Selected: press Ctrl+C.";
    }
  }

  const bad = (found) => found.kind && found.kind !== "success";
  const code = (rax) => h("code", {}, "0x", h("span", {}, rax.slice(0, 8)), " ", h("span", {}, rax.slice(8)));
  function bits(rax) {
    const top = parseInt(rax[0], 16);
    return h("div", { className: "kvmlab-quiet" }, `bit 63 error ${top >> 3} · bit 62 not recoverable ${(top >> 2) & 1} · bits 31:0 operand or details`);
  }
  function answer(each) {
    if (!each) return h("div", { className: "kvmlab-quiet" }, "Click a leaf: the module's answer comes here.");
    const { found } = each;
    const head = h("div", {}, h("b", {}, view.clicks[each.click].full), " ", found.kind ? h("span", { className: bad(found) ? "kvmlab-sept-class kvmlab-bad" : "kvmlab-sept-class" }, found.kind) : "");
    if (!found.rax) return [head, h("div", {}, found.said)];
    return [head, h("div", {}, "RAX ", code(found.rax), " ", h("b", {}, found.name)), bits(found.rax), h("div", {}, found.said)];
  }
  function show() {
    const state = view.states[here()];
    for (const [name, value] of Object.entries(state.data)) svg.dataset[name] = value;
    fill(facts, state.facts.map(([name, value]) => h("span", {}, h("span", { className: "kvmlab-quiet" }, name), " ", h("b", {}, value))));
    fill(told, answer(trail.at(-1)));
    fill(log, trail.map(({ click, found }) => h("li", {}, h("b", {}, view.clicks[click].name), " ",
      h("span", { className: bad(found) ? "kvmlab-sept-wrong" : "kvmlab-quiet" }, bad(found) ? `${found.name} (${found.said})` : found.said))));
    log.scrollTop = log.scrollHeight;
    buttons.forEach((button, n) => { button.setAttribute("aria-disabled", String(!view.steps[here()][n])); });
    back.setAttribute("aria-disabled", String(!trail.length));
    again.setAttribute("aria-disabled", String(!trail.length));
    copied.textContent = "";
    plain.hidden = true;
  }

  const table = fragment(h("div", { className: "kvmlab-sept-answers" }), view.answers);
  const desk = h("div", { className: "kvmlab-sept-desk" }, picture, h("div", { className: "kvmlab-sept-panel" },
    group("KVM", "KVM"), group("vCPU", "vCPU"), told, facts, log, h("div", { className: "kvmlab-row" }, back, again, copy, copied), plain));
  const root = h("div", { className: "kvmlab kvmlab-sept", tabIndex: 0, role: "group", "aria-label": view.title },
    h("div", { className: "kvmlab-title" }, h("b", {}, view.title)), desk,
    h("details", {}, h("summary", {}, "All answers"), table), h("div", { className: "kvmlab-fine" }, view.key));
  root.addEventListener("keydown", (e) => e.stopPropagation()); // else JupyterLab takes the key: x would cut the cell
  el.append(root);
  view.log.forEach((click) => take(click));
  show();
}

export default { render };
