// The page: polls the server, lists the runs, shows one of them, and passes on what the reader clicks.

import { CurveView } from "./curves.js";
import {
  build, find, get, post, ServerError, setText, t, translatePage, write, writeCount, writeDuration, writeNumber, writeSpeed,
} from "./dom.js";
import { ImageView } from "./images.js";
import { MessageView, SettingView } from "./texts.js";

const POLL_MS = 2000, SLOW_POLLS = 3; // images, settings and messages are asked for at every third poll
const ORDER = ["running", "failed", "stopped", "finished"];
const STATES = { running: t("running"), failed: t("failed"), stopped: t("stopped"), finished: t("finished") };
const ASKED = { save: t("saves a checkpoint"), sample: t("generates images"), stop: t("saves and stops") };
const MAX_OVERLAYS = 7;
const NO_RUN = t("No run yet. This page shows a run as soon as it starts.");

const TABS = ["charts", "images", "settings", "messages"];

const curves = new CurveView();
const views = { images: new ImageView(), settings: new SettingView(), messages: new MessageView() };
const state = {
  runs: [], open: "", overlays: new Set(), tab: "charts",
  polls: 0, timer: 0, isPolling: false,
  isAsked: false, // another poll at once
  isWanted: true, // images, settings or messages at the next poll
  answered: {}, // run → what a request that failed said
};
const tabButtons = document.querySelectorAll("[data-tab]"), requestButtons = document.querySelectorAll("[data-request]");
const items = new Map(); // name → elements of the run in the list

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  state.open = words.get("run") ?? state.open;
  state.overlays = new Set(words.getAll("with"));
  state.tab = TABS.includes(words.get("tab")) ? words.get("tab") : "charts";
}

function writeAddress() {
  const overlays = [...state.overlays].map((name) => ["with", name]);
  const words = new URLSearchParams([["run", state.open], ["tab", state.tab], ...overlays]);
  history.replaceState(null, "", `#${words}`);
}

// One poll at a time: answers that arrive in another order would mix older numbers with newer ones.
async function poll() {
  if (state.isPolling) return void (state.isAsked = true);
  clearTimeout(state.timer);
  state.isPolling = true;
  let wait = POLL_MS;
  try {
    const { root, runs } = await get("/api/runs");
    const isRunning = (run) => Number(run.state === "running");
    state.runs = runs.sort((one, other) => isRunning(other) - isRunning(one) || other.changed - one.changed);
    setText(find("root"), root);
    if (!state.open && runs.length) state.open = runs[0].name;
    showList();
    if (await showRun()) wait = 0; // a long file is not read to its end
    setText(find("connection"), "");
  } catch (error) {
    const isForeign = error instanceof ServerError && error.status === 403;
    const anew = t("the page was started anew: open the address that it printed");
    setText(find("connection"), isForeign ? anew : t("no answer from the server; trying again"));
  }
  state.polls++;
  state.isPolling = false;
  if (state.isAsked) wait = 0;
  if (!document.hidden || state.isAsked) state.timer = setTimeout(poll, wait);
  state.isAsked = false;
}

function showList() {
  const wanted = find("find").value.toLowerCase(), list = find("run-list");
  const shown = state.runs.filter((run) => run.name.toLowerCase().includes(wanted) || [run.state, STATES[run.state]].includes(wanted));
  const counts = ORDER.map((name) => [state.runs.filter((run) => run.state === name).length, name]);
  setText(find("count"), counts.filter(([count]) => count).map(([count, name]) => `${count} ${STATES[name]}`).join(", "));
  find("empty").hidden = state.runs.length > 0;
  const names = new Set(shown.map((run) => run.name));
  for (const [name, item] of items) if (!names.has(name)) (item.row.remove(), items.delete(name));
  shown.forEach((run, place) => {
    const item = items.get(run.name) ?? buildItem(run.name);
    if (list.children[place] !== item.row) list.insertBefore(item.row, list.children[place] ?? null);
    fillItem(item, run);
  });
}

function buildItem(name) {
  const parts = { state: build("span"), line: build("span"), progress: build("progress", { max: 1, ariaHidden: "true" }) };
  const line = build("span", { className: "line" }, parts.state, " ", parts.line);
  const button = build("button", { type: "button" }, write("span", name, "name"), line, parts.progress);
  const label = t("Overlay the curves of {name}", { name });
  const box = build("input", { type: "checkbox", title: label, ariaLabel: label });
  button.addEventListener("click", () => openRun(name));
  box.addEventListener("change", () => overlay(name, box.checked));
  const item = { row: build("li", {}, button, box), box, button, ...parts };
  items.set(name, item);
  return item;
}

const nameStep = (run) => t("step {step}", { step: writeCount(run.step) });

function fillItem(item, run) {
  const isOpen = run.name === state.open;
  item.row.className = isOpen ? "open" : "";
  item.button.ariaCurrent = isOpen ? "true" : "false";
  item.state.className = `state ${run.state}`;
  setText(item.state, STATES[run.state]);
  const share = run.max_steps ? `${Math.floor((100 * run.step) / run.max_steps)} %` : nameStep(run);
  const left = run.seconds_left ? t(", {time} left", { time: writeDuration(run.seconds_left) }) : "";
  setText(item.line, run.state === "running" ? share + left : nameStep(run));
  item.progress.value = run.max_steps ? Math.min(1, run.step / run.max_steps) : 0;
  item.progress.hidden = run.state !== "running";
  item.box.checked = isOpen || state.overlays.has(run.name);
  item.box.disabled = isOpen;
}

// Show the open run; returns whether there is more to fetch at once.
async function showRun() {
  const run = state.runs.find((other) => other.name === state.open);
  find("run").hidden = !run;
  if (!run) {
    setText(find("empty"), state.open ? t("The run {name} is not there any more.", { name: state.open }) : NO_RUN);
    find("empty").hidden = !state.open && state.runs.length > 0;
    return false;
  }
  find("empty").hidden = true;
  showFacts(run);
  for (const button of tabButtons) button.ariaSelected = String(button.dataset.tab === state.tab);
  for (const name of TABS) find(name).hidden = name !== state.tab;
  if (state.tab === "charts") {
    const overlays = state.runs.filter((other) => state.overlays.has(other.name) && other !== run);
    return curves.update([run, ...overlays.slice(0, MAX_OVERLAYS)]);
  }
  const isDue = state.isWanted || state.polls % SLOW_POLLS === 0;
  state.isWanted = false;
  if (isDue) await views[state.tab].update(run.name, state.runs);
  return false;
}

function showFacts(run) {
  const percent = run.state === "running" && run.max_steps ? `${Math.floor((100 * run.step) / run.max_steps)} % ` : "";
  document.title = `${percent}${run.name}`;
  setText(find("name"), run.name);
  setText(find("state"), STATES[run.state]);
  find("state").className = `state ${run.state}`;
  setText(find("text"), run.text);
  find("progress").value = run.max_steps ? Math.min(1, run.step / run.max_steps) : 0;
  const facts = {
    [t("step")]: run.max_steps ? `${writeCount(run.step)} / ${writeCount(run.max_steps)}` : writeCount(run.step),
    [t("time left")]: run.state === "running" ? writeDuration(run.seconds_left) : null,
    [t("speed")]: run.images_per_second ? writeSpeed(run.images_per_second) : null,
    [t("data wait")]: run.data_wait_share == null ? null : `${(100 * run.data_wait_share).toFixed(1)} %`,
    [t("memory")]: run.memory || null,
    [t("loss")]: run.loss == null ? null : writeNumber(run.loss),
    [t("epoch")]: run.epoch == null ? null : writeNumber(run.epoch),
    [t("ranks")]: run.num_ranks > 1 ? `${run.num_ranks}` : null,
    [t("slow ranks")]: run.slow_ranks || null,
    [t("over-fitting")]: run.over_fitting || null,
    [t("bad samples")]: run.num_bad ? writeCount(run.num_bad) : null,
    [t("non-finite updates")]: run.num_non_finite ? writeCount(run.num_non_finite) : null,
  };
  const shown = Object.entries(facts).filter(([, value]) => value !== null);
  const text = JSON.stringify(shown);
  if (text !== state.facts) {
    const entries = shown.map(([name, value]) => build("div", {}, write("dt", name), write("dd", value)));
    find("facts").replaceChildren(...entries);
  }
  state.facts = text;
  showButtons(run);
}

function showButtons(run) {
  for (const button of requestButtons) {
    const name = button.dataset.request;
    button.disabled = !run.accepts.includes(name) || run.requests.includes(name);
    button.title = name === "sample" && run.has_prompts === false ? t("This run has no prompts: set sample.prompts") : "";
  }
  const waiting = run.requests.map((name) => ASKED[name]).join(", ");
  setText(find("answer"), state.answered[run.name] ?? (waiting ? t("The run {waiting} after this step.", { waiting }) : ""));
}

async function request(name) {
  const run = state.open;
  try {
    await post("/api/request", { run, request: name });
    delete state.answered[run];
  } catch (error) {
    state.answered[run] = error instanceof ServerError ? error.message : t("no answer from the server");
  }
  poll();
}

function openRun(name) {
  if (name !== state.open) state.answered = {};
  state.open = name;
  state.isWanted = true;
  find("side").classList.remove("shown");
  find("menu").ariaExpanded = "false";
  writeAddress();
  poll();
}

function openTab(name) {
  state.tab = name;
  state.isWanted = true;
  writeAddress();
  poll();
}

function overlay(name, isShown) {
  if (isShown) state.overlays.add(name);
  else state.overlays.delete(name);
  writeAddress();
  poll();
}

function start() {
  translatePage();
  readAddress();
  find("find").addEventListener("input", showList);
  const onClick = (element, act) => element.addEventListener("click", act);
  onClick(find("menu"), () => {
    find("menu").ariaExpanded = String(find("side").classList.toggle("shown"));
  });
  for (const button of tabButtons) onClick(button, () => openTab(button.dataset.tab));
  for (const button of requestButtons) onClick(button, () => {
    if (button.dataset.request !== "stop") return void request(button.dataset.request);
    setText(find("confirm-name"), state.open);
    find("confirm").showModal();
  });
  onClick(find("confirm-yes"), () => {
    find("confirm").close();
    request("stop");
  });
  onClick(find("confirm-no"), () => find("confirm").close());
  addEventListener("hashchange", () => {
    readAddress();
    state.isWanted = true;
    poll();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) poll();
  });
  poll();
}

start();
