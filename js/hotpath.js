import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { chooseLanguage, loadTexts, meaningOf, text } from "./texts.js";

const EVENT = "hotpath.status";
const TOASTS = "HotPath.Toasts";
const COMPILE = "HotPathCompileRepeatedBlocks";
// Nodes that tell what they do while they do it; the others of the pack show their text by themselves.
const WITH_PANEL = /^HotPath(Compile(?!Report)|Quantize|Offload|Split|Benchmark|WarmUp|LoadDiffusers|SaveAs)/;
const WIDGET = "hotpath_status";
const GAP = 40;
const SECOND = (value) => (value < 0.995 ? `${Math.max(1, Math.round(value * 1000))} ms` : `${value.toFixed(1)} s`);
// In the order in which they are shown; what they are called is in texts.js.
const FACTS = {
  region: String,
  blocks: String,
  ran: String,
  graphs: String,
  compile_seconds: SECOND,
  load_seconds: SECOND,
  step_seconds: SECOND,
  eager_step_seconds: SECOND,
  gain: (value) => text("times_as_fast", value.toFixed(2)),
};
const SIGNS = {
  idle: "○",
  working: "◐",
  compiling: "◐",
  compiled: "●",
  recompiled: "●",
  eager: "▲",
  skipped: "○",
  one_device: "▲",
  stopped: "■",
  done: "●",
};
const IDLE = { state: "idle", text: "", time: 0, facts: {}, reasons: [] };
const STYLE = `
.hotpath-panel { overflow: hidden; font: 12px/1.45 Inter, system-ui, sans-serif; color: var(--input-text, #ddd);
  --hotpath: #8a8f98; }
.hotpath-panel[data-state="working"], .hotpath-panel[data-state="compiling"] { --hotpath: #3b82f6; }
.hotpath-panel[data-state="compiled"], .hotpath-panel[data-state="done"] { --hotpath: #22a55b; }
.hotpath-panel[data-state="recompiled"], .hotpath-panel[data-state="one_device"] { --hotpath: #d9920a; }
.hotpath-panel[data-state="eager"], .hotpath-panel[data-state="stopped"] { --hotpath: #dc4c3e; }
.hotpath-panel > div { box-sizing: border-box; padding: 6px 8px; border-radius: 6px;
  background: var(--comfy-input-bg, #222); border-left: 3px solid var(--hotpath); }
.hotpath-panel header { display: flex; gap: 6px; font-weight: 600; }
.hotpath-panel header > :first-child { color: var(--hotpath); }
.hotpath-panel time { margin-left: auto; font-weight: 400; font-variant-numeric: tabular-nums; }
.hotpath-panel dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 0; }
.hotpath-panel dt { opacity: 0.75; font-weight: 400; }
.hotpath-panel dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.hotpath-panel p { margin: 3px 0 0; overflow: hidden; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 6; }
.hotpath-report { max-width: min(760px, 90vw); max-height: 80vh; padding: 16px 20px; border-radius: 8px; overflow: auto;
  border: 1px solid var(--border-color, #555); color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #222);
  margin: auto; font: 13px/1.5 Inter, system-ui, sans-serif; }
.hotpath-report::backdrop { background: rgb(0 0 0 / 45%); }
.hotpath-report h2 { margin: 0 0 8px; font-size: 16px; font-weight: 600; }
.hotpath-report h3 { margin: 12px 0 4px; font-size: 13px; font-weight: 600; }
.hotpath-report p { margin: 0 0 4px; overflow-wrap: anywhere; }
.hotpath-report dt { font-weight: 600; }
.hotpath-report dd { margin: 0 0 6px; }
.hotpath-report button { margin-top: 8px; padding: 4px 14px; border-radius: 6px; color: inherit; cursor: pointer;
  border: 1px solid var(--border-color, #555); background: var(--comfy-input-bg, #333); }
`;

const told = new Set();

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

function root() {
  return app.rootGraph ?? app.graph;
}

/** All nodes and the ids under which they run, such as "12:5" for node 5 in the subgraph of node 12. A node in a
 * subgraph has one for each instance of that. */
function* nodesWithIds(graph = root(), before = "") {
  for (const node of graph._nodes) {
    const id = `${before}${node.id}`;
    yield [node, id];
    if (node.subgraph) yield* nodesWithIds(node.subgraph, `${id}:`);
  }
}

/** What a node does, as text and numbers on it, kept up to date with `node.hotpathShow`. */
function addPanel(node) {
  const sign = make("span");
  sign.setAttribute("aria-hidden", "true");
  const label = make("span");
  // Read out when it changes; numbers, which change at each step, are not.
  label.setAttribute("role", "status");
  const clock = make("time");
  const facts = make("dl");
  const lines = make("div");
  const inner = make("div", "", make("header", "", sign, label, clock), facts, lines);
  // Here and not in the document's head, which is every pack's.
  const element = make("div", "", inner, make("style", STYLE));
  element.className = "hotpath-panel";
  let height = 34;
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false,
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;

  // Nodes 2.0 keep what they mounted for a node of the same id: of another tab, or from before an undo.
  const mount = () => {
    if (element.isConnected || node.graph !== app.canvas.graph) return;
    document.querySelector(`[data-node-id="${node.id}"] .hotpath-panel`)?.replaceWith(element);
  };
  const fit = () => {
    // The size that it has on the canvas is not known before it is there.
    const needed = inner.offsetHeight;
    if (!needed || needed === height) return;
    height = needed;
    element.style.minHeight = `${height}px`;
    // Nodes 2.0 grow with what is in them.
    if (LiteGraph.vueNodesMode) return;
    const least = node.computeSize();
    node.setSize([Math.max(node.size[0], least[0]), Math.max(node.size[1], least[1])]);
    node.setDirtyCanvas(true, true);
  };
  new ResizeObserver(fit).observe(inner);

  let ticking;
  const tick = (started) => {
    clock.textContent = `${Math.floor((performance.now() - started) / 1000)} s`;
  };
  const show = (status) => {
    const state = status.state in SIGNS ? status.state : "done";
    const title = text(state === "eager" && status.facts.blocks ? "partly_eager" : state);
    element.dataset.state = status.state;
    element.title = status.text;
    sign.textContent = SIGNS[state];
    if (label.textContent !== title) label.textContent = title;
    facts.replaceChildren(
      ...Object.entries(FACTS)
        .filter(([fact]) => fact in status.facts)
        .flatMap(([fact, format]) => [make("dt", text(fact)), make("dd", format(status.facts[fact]))]),
    );
    const reasons = status.reasons.map(({ reason, advice }) =>
      advice ? `${reason}. ${text("avoid", advice)}.` : reason,
    );
    if (!facts.childElementCount && !reasons.length && status.text) reasons.push(status.text);
    lines.replaceChildren(...reasons.map((line) => make("p", line)));
    clearInterval(ticking);
    clock.textContent = "";
    if (status.state === "compiling" || status.state === "working") {
      const started = performance.now() - 1000 * (status.age ?? 0);
      tick(started);
      ticking = setInterval(tick, 1000, started);
    }
    mount();
    fit();
  };
  node.hotpathShow = (status) => {
    // What was asked for may arrive after what was told meanwhile.
    if (status !== IDLE && status.time < node.hotpathStatus.time) return;
    node.hotpathStatus = status;
    show(status);
  };
  node.hotpathShow(IDLE);
  requestAnimationFrame(mount);
  const removed = node.onRemoved;
  node.onRemoved = function (...args) {
    clearInterval(ticking);
    return removed?.apply(this, args);
  };
}

function toast(status) {
  if (status.state !== "eager" || !app.extensionManager.setting.get(TOASTS)) return;
  const key = ({ reason }) => `${status.workflow} ${status.node} ${reason}`;
  const unknown = status.reasons.filter((each) => !told.has(key(each)));
  if (!unknown.length) return;
  for (const each of unknown) told.add(key(each));
  const detail = unknown.map(({ reason }) => reason).join("\n");
  app.extensionManager.toast.add({ severity: "warn", summary: text("toast"), detail, life: 10000 });
}

/** Show what the host last told of this workflow's nodes: to a page that was not there, or not connected, then. */
async function restore() {
  const workflow = root().id;
  const answer = await api.fetchApi(`/hotpath/status?workflow=${encodeURIComponent(workflow)}`);
  if (!answer.ok) return;
  const statuses = await answer.json();
  if (root().id !== workflow) return;
  const last = new Map();
  for (const [node, id] of nodesWithIds()) {
    if (!node.hotpathShow) continue;
    const before = last.get(node) ?? IDLE;
    const status = statuses[id] ?? IDLE;
    last.set(node, status.time > before.time ? status : before);
  }
  for (const [node, status] of last) node.hotpathShow(status);
}

async function explain(node) {
  const ids = [...nodesWithIds()].filter(([other]) => other === node).map(([, id]) => id);
  const answers = await Promise.all(
    ids.map(async (id) => {
      const query = new URLSearchParams({ workflow: root().id, node: id });
      return (await api.fetchApi(`/hotpath/explain?${query}`)).json();
    }),
  );
  const lines = answers.flatMap((answer) => answer.lines);
  const terms = Object.assign({}, ...answers.map((answer) => answer.terms));
  const dialog = make("dialog", "", make("style", STYLE), make("h2", node.title));
  dialog.append(...(lines.length ? lines : [text("nothing")]).map((line) => make("p", line)));
  if (Object.keys(terms).length) {
    const list = make("dl");
    for (const [term, meaning] of Object.entries(terms)) {
      list.append(make("dt", term), make("dd", meaningOf(term) ?? meaning));
    }
    dialog.append(make("h3", text("meaning")), list);
  }
  const close = make("button", text("close"));
  close.onclick = () => dialog.close();
  dialog.append(close);
  dialog.className = "hotpath-report";
  dialog.setAttribute("aria-label", text("report_of", node.title));
  dialog.onclose = () => dialog.remove();
  // The host would take Escape from it, and Delete for the selected nodes.
  dialog.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Escape") dialog.close();
  };
  app.canvas.canvas.parentElement.append(dialog);
  dialog.showModal();
}

function overlaps(node, other) {
  const [left, top, width, height] = node.getBounding();
  const [x, y, w, h] = other.getBounding();
  return left < x + w && x < left + width && top < y + h && y < top + height;
}

/** Put Compile Repeated Blocks behind a MODEL output, and what was linked to that behind it. */
function compileBlocks(node, slot) {
  const { graph } = node;
  const behind = (node.outputs[slot].links ?? []).map((id) => graph.getLink(id));
  const added = LiteGraph.createNode(COMPILE);
  graph.beforeChange();
  added.pos = [node.pos[0] + node.size[0] + GAP, node.pos[1]];
  graph.add(added);
  added.updateArea?.();
  for (let other; (other = graph._nodes.find((each) => each !== added && overlaps(added, each))); added.updateArea?.()) {
    added.pos = [added.pos[0], other.pos[1] + other.size[1] + 2 * GAP];
  }
  for (const link of behind) {
    const target = graph.getNodeById(link.target_id);
    if (target) added.connect(0, target, link.target_slot);
    // The output of the subgraph that this is in.
    else graph.outputs[link.target_slot].connect(added.outputs[0], added);
  }
  node.connect(slot, added, 0);
  graph.afterChange();
  graph.setDirtyCanvas(true, true);
}

function compileItem(node, slot) {
  return { content: text("compile_blocks"), callback: () => compileBlocks(node, slot) };
}

function isModel(slot) {
  return slot?.type === "MODEL";
}

function menuItems(node) {
  const items = [];
  const slot = (node.outputs ?? []).findIndex(isModel);
  if (slot >= 0 && node.comfyClass !== COMPILE) items.push(compileItem(node, slot));
  if (node.comfyClass?.startsWith("HotPath")) {
    items.push({ content: text("explain"), callback: () => explain(node) });
  }
  return items;
}

/** The same on the output itself, whose menu the classic canvas shows. */
function addSlotMenu(node) {
  const others = node.getExtraSlotMenuOptions;
  node.getExtraSlotMenuOptions = function (at) {
    const mine = isModel(at.output) && node.comfyClass !== COMPILE ? [compileItem(node, at.slot)] : [];
    return [...(others?.call(this, at) ?? []), ...mine];
  };
}

app.registerExtension({
  name: "HotPath",
  settings: [
    {
      id: TOASTS,
      name: "Tell when blocks run eager",
      category: ["HotPath", "Messages", "Toasts"],
      tooltip: "A short message when Compile Repeated Blocks can't compile something and goes on without.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  init: loadTexts,
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      toast(detail);
      if (detail.workflow !== root().id) return;
      for (const [node, id] of nodesWithIds()) if (id === detail.node) node.hotpathShow?.(detail);
    });
    api.addEventListener("reconnected", restore);
    app.ui.settings.addEventListener("Comfy.Locale.change", ({ detail }) => {
      chooseLanguage(detail.value);
      for (const [node] of nodesWithIds()) node.hotpathShow?.(node.hotpathStatus);
    });
  },
  nodeCreated(node) {
    if (WITH_PANEL.test(node.comfyClass ?? "")) addPanel(node);
    addSlotMenu(node);
  },
  afterConfigureGraph: restore,
  getNodeMenuItems: menuItems,
});
