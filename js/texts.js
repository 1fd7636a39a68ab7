import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

/** What the panel, messages and menus say; "..." stands for what is filled in. Other languages have it under the same
 * keys in locales/<language>/main.json, which the host serves with those of all packs. */
const ENGLISH = {
  region: "Region",
  blocks: "Blocks",
  ran: "Ran",
  graphs: "Graphs",
  compile_seconds: "Compiling took",
  load_seconds: "Loading took",
  step_seconds: "Last step",
  eager_step_seconds: "Eager step",
  gain: "Gain",
  times_as_fast: "... times as fast",
  idle: "Not run yet",
  working: "Working",
  compiling: "Compiling",
  compiled: "Compiled",
  recompiled: "Compiled again",
  eager: "Runs eager",
  partly_eager: "Partly eager",
  skipped: "Blocks did not run",
  one_device: "On one device",
  stopped: "Stopped",
  done: "Done",
  avoid: "Avoid it: ...",
  toast: "HotPath: runs eager",
  compile_blocks: "Compile this model's blocks",
  explain: "Explain this report",
  report_of: "Report of ...",
  nothing: "It has done nothing yet. Queue a prompt.",
  meaning: "What that means",
  close: "Close",
};
let translations = {};
let chosen;

export async function loadTexts() {
  translations = await api.getCustomNodesI18n();
}

/** The language from now on; the host tells of it before its setting is changed. */
export function chooseLanguage(language) {
  chosen = language;
}

/** The text of a key in the language of the page, else in English. */
export function text(key, value) {
  const found = translated(key) ?? ENGLISH[key];
  return value === undefined ? found : found.replace("...", () => value);
}

/** What a term of the report means in the language of the page; undefined where nothing but the host's English is. */
export function meaningOf(term) {
  return translated("terms")?.[term];
}

function translated(key) {
  return translations[chosen ?? app.extensionManager.setting.get("Comfy.Locale")]?.HotPath?.[key];
}
