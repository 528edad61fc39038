// The tab with charts: fetches what is new in the curves of the chosen runs, and draws them over each other.

import { Chart, buildSwatch } from "./chart.js";
import { build, find, get, setText, t, writeCount } from "./dom.js";

export const COLORS = ["#3b82c4", "#e08a2e", "#3fa66b", "#c9508f", "#8d6fd1", "#2ea3a3", "#b59a1f", "#d9574f"];
const CHARTS = [
  { metric: "loss", title: t("Loss") },
  { metric: "validation/loss", title: t("Validation loss") },
  {
    metric: "timesteps", title: t("Validation loss by timestep"), build: buildTimestepCurves, hasMarks: false,
    writeX: (x) => t("around timestep {timestep}", { timestep: writeCount(x) }), xRange: [0, 1000],
  },
  { metric: "lr", title: t("Learning rate"), isExact: true, fromZero: true },
  { metric: "grad_norm", title: t("Gradient norm"), fromZero: true },
  { metric: "samples_per_second", title: t("Throughput"), unit: t("images/s"), fromZero: true },
  { metric: "data_wait_share", title: t("Waiting for data"), unit: "%", scale: 100, fromZero: true },
];
const BIN = /^validation\/loss_t(\d+)-(\d+)$/;
const MAX_EARLIER = 3; // validations by timestep that are drawn beside the last one
const MAX_UNKNOWN = 12; // charts of metrics that this page does not know

// The curves of one run. A fetch brings only the ranges of steps that may have changed.
class RunCurves {
  constructor(name) {
    Object.assign(this, { name, version: "", first: 0, curves: {}, changes: {}, share: 0, changed: null });
  }

  // Fetch if the run's files have changed since the last fetch; returns whether there is something new.
  async update(changed) {
    if (this.share >= 1 && this.changed === changed) return false;
    const answer = await get("/api/curves", { run: this.name, version: this.version, first: this.first });
    if (answer.version !== this.version) this.curves = {};
    for (const [name, part] of Object.entries(answer.curves)) this.merge(name, part, answer.first);
    Object.assign(this, { version: answer.version, changes: answer.changes, share: answer.share, changed });
    this.first = Math.floor(answer.last_step / answer.width);
    return true;
  }

  merge(name, part, first) {
    const old = this.curves[name] ?? { range: [], step: [], mean: [], low: [], high: [], broken: [] };
    const kept = old.range.findLastIndex((range) => range < first) + 1;
    const curve = { range: old.range.slice(0, kept).concat(part.range) };
    for (const column of ["step", "mean"]) curve[column] = old[column].slice(0, kept).concat(part[column]);
    for (const column of ["low", "high"]) curve[column] = old[column].slice(0, kept).concat(part[column] ?? part.mean);
    curve.broken = old.broken.filter(([range]) => range < first);
    for (let at = 0; at < part.broken.length; at += 2) curve.broken.push([part.broken[at], part.broken[at + 1]]);
    this.curves[name] = curve;
  }
}

export class CurveView {
  constructor() {
    this.runs = new Map();
    this.charts = new Map();
    this.chosen = [];
    find("smoothing").addEventListener("input", () => this.draw());
    find("log").addEventListener("change", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // chosen: [{name, changed}], the open run first. Returns whether some file is not read to its end yet.
  async update(chosen) {
    const isSame = chosen.map((run) => run.name).join("\0") === this.chosen.join("\0");
    this.chosen = chosen.map((run) => run.name);
    const names = new Set(this.chosen);
    for (const name of this.runs.keys()) if (!names.has(name)) this.runs.delete(name);
    const found = await Promise.all(chosen.map((run) => this.openRun(run.name).update(run.changed)));
    if (!isSame || found.some(Boolean)) this.draw();
    const shares = this.chosen.map((name) => this.runs.get(name)?.share ?? 1);
    const least = Math.min(...shares);
    setText(find("reading"), least < 1 ? t("reading metrics: {percent} %", { percent: Math.floor(100 * least) }) : "");
    return least < 1;
  }

  openRun(name) {
    if (!this.runs.has(name)) this.runs.set(name, new RunCurves(name));
    return this.runs.get(name);
  }

  draw() {
    const opened = this.chosen.map((name, place) => ({ run: this.runs.get(name), color: COLORS[place % COLORS.length] }));
    const runs = opened.filter(({ run }) => run);
    const labels = runs.length > 1 ? runs.map(({ run, color }) => build("li", {}, buildSwatch(color), run.name)) : [];
    find("legend").replaceChildren(...labels);
    const known = new Set(CHARTS.map((chart) => chart.metric));
    const names = [...new Set(runs.flatMap(({ run }) => Object.keys(run.curves)))];
    const unknown = names.filter((name) => !known.has(name) && !name.startsWith("validation/")).slice(0, MAX_UNKNOWN);
    const all = [...CHARTS, ...unknown.map((metric) => ({ metric, title: metric }))];
    const options = { smoothing: find("smoothing").value / 100, isLogarithmic: find("log").checked };
    for (const words of all) this.drawChart(words, runs, options);
    find("no-charts").hidden = names.length > 0;
    const metrics = new Set(all.map((words) => words.metric));
    for (const [metric, chart] of this.charts) if (!metrics.has(metric)) chart.figure.hidden = true;
  }

  drawChart(words, runs, options) {
    const curves = runs.flatMap(({ run, color }) => (words.build ?? buildCurves)(run, words, color, runs.length > 1));
    const isEmpty = !curves.some((curve) => curve.x.length);
    if (!this.charts.has(words.metric)) {
      if (isEmpty) return;
      const chart = new Chart(words, (x, own) => this.charts.forEach((other) => hoverTogether(other, own, x)));
      this.charts.set(words.metric, chart);
      const later = listLater(words.metric).map((metric) => this.charts.get(metric)?.figure).find(Boolean) ?? null;
      find("chart-grid").insertBefore(chart.figure, later);
    }
    const chart = this.charts.get(words.metric);
    chart.figure.hidden = isEmpty;
    const marks = words.hasMarks === false ? [] : runs.flatMap(({ run }) => listMarks(run, runs.length > 1));
    if (!isEmpty) chart.show(curves, marks, options);
  }
}

// The known metrics whose charts come after that of a metric; none for unknown ones, which come last.
function listLater(metric) {
  const place = CHARTS.findIndex((chart) => chart.metric === metric);
  return place < 0 ? [] : CHARTS.slice(place + 1).map((chart) => chart.metric);
}

function hoverTogether(chart, own, x) {
  const isSameAxis = (chart.words.xRange === undefined) === (own.words.xRange === undefined);
  chart.setHover(isSameAxis ? x : null, chart === own);
}

function listMarks(run, isNamed) {
  const owner = isNamed ? `${run.name}, ` : "";
  return Object.entries(run.changes).map(([step, texts]) => ({ x: Number(step), text: owner + t("changed here: {texts}", { texts: texts.join(", ") }) }));
}

function buildCurves(run, { metric, scale = 1 }, color, isNamed) {
  const averages = Object.keys(run.curves).filter((name) => name.startsWith(`${metric}_ema_`));
  return [metric, ...averages].filter((name) => run.curves[name]).map((name) => {
    const { step, mean, low, high, broken } = run.curves[name];
    const average = name === metric ? "" : `EMA ${name.split("_ema_")[1]}`;
    const times = (values) => (scale === 1 ? values : values.map((value) => value * scale));
    return {
      label: [isNamed ? run.name : "", average].filter(Boolean).join(", "), color, alpha: average ? 0.55 : 1,
      x: step, mean: times(mean), low: times(low), high: times(high), broken: broken.map(([, place]) => place),
    };
  });
}

// A line for each of the last validations, over the bins of timesteps.
function buildTimestepCurves(run, words, color, isNamed) {
  const bins = Object.keys(run.curves).map((name) => BIN.exec(name)).filter(Boolean).sort((one, other) => one[1] - other[1]);
  if (!bins.length) return [];
  const middles = bins.map(([, first, last]) => (Number(first) + Number(last) + 1) / 2);
  const steps = [...new Set(bins.flatMap(([name]) => run.curves[name].step))].sort((one, other) => one - other);
  const spread = (count) => Array.from({ length: count }, (_, place) => steps[Math.floor((place * (steps.length - 1)) / count)]);
  const earlier = isNamed ? [] : [...new Set(spread(Math.min(MAX_EARLIER, steps.length - 1)))];
  return [...earlier, steps.at(-1)].map((step, place, shown) => {
    const values = bins.map(([name]) => run.curves[name].mean[run.curves[name].step.indexOf(step)]);
    const used = values.map((value, at) => at).filter((at) => values[at] !== undefined);
    return {
      label: (isNamed ? `${run.name}, ` : "") + t("step {step}", { step: writeCount(step) }), color, alpha: 0.3 + (0.7 * (place + 1)) / shown.length,
      x: used.map((at) => middles[at]), mean: used.map((at) => values[at]),
    };
  });
}
