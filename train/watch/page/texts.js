// The tabs with settings, also beside those of another run, and with warnings and bad samples.

import { build, find, get, setText, t, write, writeCount } from "./dom.js";

export class SettingView {
  constructor() {
    Object.assign(this, { run: "", settings: {}, other: "", others: {} });
    find("setting-find").addEventListener("input", () => this.draw());
    find("only-differences").addEventListener("change", () => this.draw());
    find("compare").addEventListener("change", () => this.choose(find("compare").value));
  }

  async update(name, runs) {
    this.listOthers(runs.filter((run) => run.name !== name).map((run) => run.name));
    const other = find("compare").value;
    const fetched = [get("/api/settings", { run: name }), other ? get("/api/settings", { run: other }) : {}];
    const [settings, others] = await Promise.all(fetched);
    const shown = JSON.stringify([settings, others, name, other]);
    if (shown === this.shown) return;
    Object.assign(this, { run: name, settings, other, others, shown });
    this.draw();
  }

  async choose(other) {
    this.others = other ? await get("/api/settings", { run: other }).catch(() => ({})) : {};
    this.other = other;
    if (other) find("only-differences").checked = true;
    this.draw();
  }

  listOthers(names) {
    const list = find("compare"), chosen = list.value, text = names.join("\0");
    if (text === this.names) return;
    this.names = text;
    const options = names.map((value) => build("option", { value, textContent: value }));
    list.replaceChildren(build("option", { value: "", textContent: t("no other run") }), ...options);
    list.value = names.includes(chosen) ? chosen : "";
  }

  draw() {
    const wanted = find("setting-find").value.toLowerCase(), isCompared = this.other !== "";
    const onlyDifferences = isCompared && find("only-differences").checked;
    find("only-differences").disabled = !isCompared;
    const columns = isCompared ? [this.settings, this.others] : [this.settings];
    const keys = [...new Set(columns.flatMap(Object.keys))];
    const differs = (key) => isCompared && this.settings[key] !== this.others[key];
    const matches = (key) => [key, ...columns.map((column) => column[key] ?? "")].join(" ").toLowerCase().includes(wanted);
    const shown = keys.filter((key) => matches(key) && (!onlyDifferences || differs(key)));
    const head = isCompared ? [build("tr", {}, write("th", t("setting")), write("th", this.run), write("th", this.other))] : [];
    const rows = shown.map((key) => {
      const cells = columns.map((column) => write("td", column[key] ?? "–"));
      return build("tr", { className: differs(key) ? "differs" : "" }, write("td", key), ...cells);
    });
    const table = build("table", { className: "setting-grid" }, ...head, ...rows);
    find("setting-table").replaceChildren(shown.length ? table : write("p", explainNone(keys, onlyDifferences), "soft"));
  }
}

function explainNone(keys, onlyDifferences) {
  if (!keys.length) return t("This run has no config.yaml that can be read.");
  return onlyDifferences ? t("No setting differs.") : t("No setting matches.");
}

const LEVELS = { WARNING: t("WARNING"), ERROR: t("ERROR"), CRITICAL: t("CRITICAL") };

export class MessageView {
  async update(name) {
    const messages = await get("/api/messages", { run: name });
    const shown = JSON.stringify([name, messages]);
    if (shown === this.shown) return;
    this.shown = shown;
    const warnings = messages.warnings.map(({ time, level, rank, text }) => {
      const origin = rank ? `[${t("rank {rank}", { rank })}] ` : "";
      return build("li", {}, write("span", time, "when"), write("span", LEVELS[level], level), ` ${origin}${text}`);
    });
    find("warnings").replaceChildren(...orNone(warnings, t("No warnings.")));
    const { num_bad: count, bad_samples: samples } = messages;
    setText(find("num-bad"), count > samples.length ? t("the last {shown} of {count}", { shown: samples.length, count: writeCount(count) }) : "");
    const bad = samples.map(({ step, key, reason }) =>
      build("li", {}, write("span", t("step {step}", { step: writeCount(step) }), "when"), write("strong", key), ` ${reason}`));
    find("bad-samples").replaceChildren(...orNone(bad, t("No bad samples.")));
  }
}

const orNone = (items, text) => (items.length ? items : [write("li", text, "soft")]);
