import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const EVENT = "hotpath.status";
const TOASTS = "HotPath.Toasts";
const COMPILE = "HotPathCompileRepeatedBlocks";
// Nodes that tell what they do while they do it; the others of the pack show their text by themselves.
const WITH_PANEL = /^HotPath(Compile(?!Report)|Quantize|Offload|Benchmark|WarmUp|LoadDiffusers|SaveAs)/;
const WIDGET = "hotpath_status";
const SECOND = (value) => (value < 0.995 ? `${Math.max(1, Math.round(value * 1000))} ms` : `${value.toFixed(1)} s`);
const FACTS = {
  region: ["Region"],
  blocks: ["Blocks"],
  graphs: ["Graphs"],
  compile_seconds: ["Compiling took", SECOND],
  load_seconds: ["Loading took", SECOND],
  step_seconds: ["Last step", SECOND],
};
const STATES = {
  idle: ["○", "Not run yet"],
  working: ["◐", "Working"],
  compiling: ["◐", "Compiling"],
  compiled: ["●", "Compiled"],
  recompiled: ["●", "Compiled again"],
  eager: ["▲", "Runs eager"],
  stopped: ["■", "Stopped"],
  done: ["●", "Done"],
};
const STYLE = `
.hotpath-panel { overflow: hidden; font: 12px/1.45 Inter, system-ui, sans-serif; color: var(--input-text, #ddd); }
.hotpath-panel > div { box-sizing: border-box; padding: 6px 8px; border-radius: 6px;
  background: var(--comfy-input-bg, #222); border-left: 3px solid var(--hotpath); }
.hotpath-panel { --hotpath: #8a8f98; }
.hotpath-panel[data-state="working"], .hotpath-panel[data-state="compiling"] { --hotpath: #3b82f6; }
.hotpath-panel[data-state="compiled"], .hotpath-panel[data-state="done"] { --hotpath: #22a55b; }
.hotpath-panel[data-state="recompiled"] { --hotpath: #d9920a; }
.hotpath-panel[data-state="eager"], .hotpath-panel[data-state="stopped"] { --hotpath: #dc4c3e; }
.hotpath-panel strong { font-weight: 600; }
.hotpath-panel strong > span { color: var(--hotpath); margin-right: 6px; }
.hotpath-panel dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 2px 0 0; }
.hotpath-panel dt { opacity: 0.75; }
.hotpath-panel dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.hotpath-panel p { margin: 3px 0 0; overflow-wrap: anywhere; }
.hotpath-report { max-width: min(760px, 90vw); max-height: 80vh; padding: 16px 20px; border-radius: 8px;
  border: 1px solid var(--border-color, #555); color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #222); }
.hotpath-report h2 { margin: 0 0 8px; font-size: 16px; }
.hotpath-report pre { margin: 0 0 12px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 Inter, sans-serif; }
.hotpath-report button { padding: 4px 14px; border-radius: 6px; border: 1px solid var(--border-color, #555);
  color: inherit; background: var(--comfy-input-bg, #333); cursor: pointer; }
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

/** The node of an id such as "12:5": node 5 in the subgraph of node 12. */
function findNode(id) {
  const path = String(id).split(":");
  let graph = root();
  while (path.length > 1) graph = graph?.getNodeById(Number(path.shift()))?.subgraph;
  const last = path[0];
  return graph?.getNodeById(last) ?? graph?.getNodeById(Number(last));
}

/** Ids under which a node runs: one for each instance of the subgraph that it is in. */
function idsOf(node, graph = root(), before = "") {
  return graph._nodes.flatMap((other) => {
    const id = `${before}${other.id}`;
    return other === node ? [id] : other.subgraph ? idsOf(node, other.subgraph, `${id}:`) : [];
  });
}

function addPanel(node) {
  const inner = make("div");
  // Here and not in the document's head, which is every pack's.
  const element = make("div", "", make("style", STYLE), inner);
  element.className = "hotpath-panel";
  element.setAttribute("role", "status");
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
  node.hotpathShow = (status) => {
    node.hotpathStatus = status;
    fill(inner, element, status);
    fit();
  };
  const fit = () => {
    // The size that it has on the canvas is not known before it is there.
    const needed = inner.offsetHeight;
    if (!needed || needed === height) return;
    height = needed;
    element.style.minHeight = `${height}px`;
    const least = node.computeSize();
    node.setSize([Math.max(node.size[0], least[0]), Math.max(node.size[1], least[1])]);
    node.setDirtyCanvas(true, true);
  };
  new ResizeObserver(fit).observe(inner);
  node.hotpathShow({ state: "idle", text: "", facts: {}, reasons: [] });
}

function fill(inner, element, status) {
  const [mark, label] = STATES[status.state] ?? STATES.done;
  const partly = status.state === "eager" && status.facts.blocks;
  const sign = make("span", mark);
  sign.setAttribute("aria-hidden", "true");
  const head = make("strong", "", sign, partly ? "Partly eager" : label);
  const facts = make("dl");
  for (const [name, [title, format]] of Object.entries(FACTS)) {
    if (!(name in status.facts)) continue;
    const value = status.facts[name];
    facts.append(make("dt", title), make("dd", format ? format(value) : String(value)));
  }
  const lines = status.reasons.map(({ reason, advice }) => make("p", advice ? `${reason}. Avoid it: ${advice}.` : reason));
  if (!facts.childElementCount && !lines.length && status.text) lines.push(make("p", status.text));
  element.dataset.state = status.state;
  element.title = status.text;
  inner.replaceChildren(head, facts, ...lines);
}

function toast(status) {
  if (status.state !== "eager" || !app.extensionManager.setting.get(TOASTS)) return;
  for (const { reason } of status.reasons) {
    const key = `${status.workflow} ${status.node} ${reason}`;
    if (told.has(key)) continue;
    told.add(key);
    app.extensionManager.toast.add({ severity: "warn", summary: "HotPath: runs eager", detail: reason, life: 10000 });
  }
}

async function restore() {
  const workflow = root().id;
  const answer = await api.fetchApi(`/hotpath/status?workflow=${encodeURIComponent(workflow)}`);
  if (!answer.ok) return;
  const statuses = await answer.json();
  if (root().id !== workflow) return;
  for (const [id, status] of Object.entries(statuses)) findNode(id)?.hotpathShow?.(status);
}

async function explain(node) {
  const texts = await Promise.all(
    idsOf(node).map(async (id) => (await api.fetchApi(`/hotpath/explain?node=${encodeURIComponent(id)}`)).text()),
  );
  const text = texts.filter(Boolean).join("\n\n") || node.hotpathStatus?.text || "It has done nothing yet. Queue a prompt.";
  const close = make("button", "Close");
  const dialog = make("dialog", "", make("style", STYLE), make("h2", `${node.title}: report`), make("pre", text), close);
  dialog.className = "hotpath-report";
  close.onclick = () => dialog.close();
  dialog.onclose = () => dialog.remove();
  // The host would take Escape from it, and Delete for the selected nodes.
  dialog.onkeydown = (event) => event.stopPropagation();
  app.canvas.canvas.parentElement.append(dialog);
  dialog.showModal();
}

/** Put Compile Repeated Blocks behind a MODEL output, and what was linked to that behind it. */
function compileBlocks(node, slot) {
  const graph = node.graph;
  const links = (node.outputs[slot].links ?? []).map((id) => graph.getLink?.(id) ?? graph.links[id]);
  const behind = links.map((link) => [graph.getNodeById(link.target_id), link.target_slot]);
  const added = LiteGraph.createNode(COMPILE);
  graph.beforeChange();
  added.pos = [node.pos[0] + node.size[0] + 40, node.pos[1]];
  graph.add(added);
  node.connect(slot, added, 0);
  for (const [target, input] of behind) added.connect(0, target, input);
  graph.afterChange();
  graph.setDirtyCanvas(true, true);
}

function menuItems(node) {
  const items = [];
  const slot = (node.outputs ?? []).findIndex((output) => output.type === "MODEL");
  if (slot >= 0 && node.comfyClass !== COMPILE) {
    items.push({ content: "Compile this model's blocks", callback: () => compileBlocks(node, slot) });
  }
  if (node.comfyClass?.startsWith("HotPath")) {
    items.push({ content: "Explain this report", callback: () => explain(node) });
  }
  return items;
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
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      toast(detail);
      if (detail.workflow === root().id) findNode(detail.node)?.hotpathShow?.(detail);
    });
  },
  nodeCreated(node) {
    if (WITH_PANEL.test(node.comfyClass ?? "")) addPanel(node);
  },
  afterConfigureGraph: restore,
  getNodeMenuItems: menuItems,
});
