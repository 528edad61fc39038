// A chart on a canvas: curves over steps with the range of their values, a smoothed line, and values under the pointer.

import { build, setText, t, writeCount, writeNumber } from "./dom.js";

const LEFT = 58, RIGHT = 10, TOP = 12, BOTTOM = 24;
const FEW_POINTS = 60; // a curve with fewer is drawn with its points, and is not smoothed
const OUTLIERS = 0.005; // share of the values at either end that the scale may leave out

export class Chart {
  // words: title; unit; isExact: no smoothing; writeX writes a place on the x axis; xRange fixes its ends; fromZero
  // begins y at 0.
  constructor(words, onHover) {
    this.words = { writeX: (step) => `step ${writeCount(step)}`, ...words };
    this.onHover = onHover;
    this.curves = [];
    this.marks = [];
    this.hover = null;
    this.value = build("span", { className: "value" });
    this.canvas = build("canvas", { role: "img" });
    this.tip = build("div", { className: "tip", hidden: true });
    this.figure = build("figure", { className: "chart" }, this.value, build("h3", { textContent: words.title }), this.canvas, this.tip);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.onHover(null, this));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  // curves: {label, color, x, mean, low, high, broken}; low and high may be missing. marks: {x, text}.
  show(curves, marks, { smoothing, isLogarithmic }) {
    const chooseShare = (curve) => (this.words.isExact || curve.x.length < FEW_POINTS ? 0 : smoothing);
    this.curves = curves.map((curve) => ({ ...curve, smooth: smooth(curve.mean, chooseShare(curve)) }));
    this.marks = marks;
    this.isLogarithmic = isLogarithmic && curves.every((curve) => curve.mean.every((value) => value > 0));
    const lasts = this.curves.filter((curve) => curve.x.length).map((curve) => writeNumber(curve.smooth.at(-1)));
    setText(this.value, lasts.length ? `${lasts.slice(0, 3).join(" · ")} ${this.words.unit ?? ""}`.trim() : "");
    const value = lasts.length ? t("last {values}", { values: lasts.join(", ") }) : t("no values");
    this.canvas.setAttribute("aria-label", t("{name}: {value}", { name: this.words.title, value }));
    this.draw();
  }

  point(event) {
    const x = this.toStep?.(event.offsetX);
    if (x !== undefined) this.onHover(x, this);
  }

  setHover(x, isOwn) {
    if (x === this.hover && !isOwn) return;
    this.hover = x;
    this.draw();
    this.showTip(isOwn);
  }

  showTip(isOwn) {
    const values = isOwn && this.hover !== null ? this.listNearest() : [];
    this.tip.hidden = !values.length;
    if (this.tip.hidden) return;
    const [first, at] = values[0];
    const lines = values.map(([curve, place]) => {
      const [low, high] = [curve.low?.[place], curve.high?.[place]];
      const range = low === high ? "" : ` (${t("{low} to {high}", { low: writeNumber(low), high: writeNumber(high) })})`;
      const value = `${writeNumber(curve.mean[place])}${range}`;
      const text = curve.label ? t("{name}: {value}", { name: curve.label, value }) : value;
      return build("div", {}, buildSwatch(curve.color), text);
    });
    const near = this.marks.filter((mark) => Math.abs(this.toPixel(mark.x) - this.toPixel(first.x[at])) < 6);
    const notes = near.map((mark) => build("div", { className: "text", textContent: mark.text }));
    this.tip.replaceChildren(build("div", { textContent: this.words.writeX(first.x[at]) }), ...lines, ...notes);
    const middle = this.canvas.clientWidth / 2, place = this.toPixel(first.x[at]);
    this.tip.style.left = place < middle ? `${place + 22}px` : "auto";
    this.tip.style.right = place < middle ? "auto" : `${this.canvas.clientWidth - place + 24}px`;
    this.tip.style.top = `${this.canvas.offsetTop + 8}px`;
  }

  // The curves that reach to the pointer, each with the place of the value next to it.
  listNearest() {
    const reach = (this.xRange[1] - this.xRange[0]) / 50 + 1;
    const covers = ({ x }) => x.length && this.hover >= x[0] - reach && this.hover <= x.at(-1) + reach;
    return this.curves.filter(covers).map((curve) => [curve, findNearest(curve.x, this.hover)]);
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return; // in a tab that is not shown
    const scale = devicePixelRatio || 1, pen = this.canvas.getContext("2d");
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const colors = getComputedStyle(document.documentElement), color = (name) => colors.getPropertyValue(`--${name}`).trim();
    pen.font = "11px system-ui, sans-serif";
    if (!this.curves.some((curve) => curve.x.length)) {
      pen.fillStyle = color("soft");
      pen.fillText(t("no values yet"), LEFT, height / 2);
      return;
    }
    this.setScales(width, height);
    this.drawAxes(pen, color, width, height);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT - 4, TOP - 4, width - LEFT - RIGHT + 8, height - TOP - BOTTOM + 8);
    pen.clip();
    this.curves.forEach((curve) => this.drawCurve(pen, curve, height, color));
    pen.restore();
    this.drawHover(pen, color, height);
  }

  setScales(width, height) {
    const filled = this.curves.filter((curve) => curve.x.length);
    const ends = this.words.xRange ?? findRange(filled.flatMap((curve) => [curve.x[0], curve.x.at(-1)]));
    const change = this.isLogarithmic ? Math.log10 : (value) => value;
    const tops = filled.flatMap((curve) => [...findTypical(curve.mean), ...findRange(curve.smooth)]);
    let [low, high] = findRange(tops.filter(Number.isFinite));
    if (this.words.fromZero && !this.isLogarithmic) low = Math.min(low, 0);
    [low, high] = [change(low), change(high)];
    const margin = (high - low || Math.abs(high) || 1) * 0.05;
    low -= this.words.fromZero && !this.isLogarithmic && low === 0 ? 0 : margin;
    high += margin;
    const [first, last] = ends, span = last - first || 1;
    this.yRange = [low, high];
    this.xRange = [first, last];
    this.toPixel = (x) => LEFT + ((x - first) / span) * (width - LEFT - RIGHT);
    this.toStep = (pixel) => first + ((pixel - LEFT) / (width - LEFT - RIGHT)) * span;
    this.toHeight = (value) => TOP + ((high - change(value)) / (high - low)) * (height - TOP - BOTTOM);
  }

  drawAxes(pen, color, width, height) {
    const [low, high] = this.yRange;
    const values = this.isLogarithmic ? listPowers(low, high) : listTicks(low, high, 7);
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    values.forEach((value) => {
      const y = Math.round(this.toHeight(value)) + 0.5;
      pen.strokeStyle = color("grid");
      strokeLine(pen, LEFT, y, width - RIGHT, y);
      pen.fillStyle = color("soft");
      pen.fillText(writeNumber(value), LEFT - 6, y);
    });
    pen.textBaseline = "alphabetic";
    pen.textAlign = "center";
    const steps = this.words.xTicks ?? listTicks(...this.xRange, Math.max(3, Math.floor(width / 60)));
    steps.forEach((step) => pen.fillText(writeCount(step), Math.min(this.toPixel(step), width - RIGHT - 12), height - 6));
    pen.setLineDash([4, 3]);
    pen.strokeStyle = color("mark");
    this.marks.forEach((mark) => strokeLine(pen, this.toPixel(mark.x), TOP, this.toPixel(mark.x), height - BOTTOM));
    pen.setLineDash([]);
  }

  drawCurve(pen, curve, height, color) {
    const { x, mean, low, high } = curve;
    pen.fillStyle = pen.strokeStyle = curve.color;
    pen.globalAlpha = 0.16 * (curve.alpha ?? 1);
    if (low) {
      pen.beginPath();
      x.forEach((step, at) => pen.lineTo(this.toPixel(step), this.toHeight(high[at])));
      for (let at = x.length - 1; at >= 0; at--) pen.lineTo(this.toPixel(x[at]), this.toHeight(low[at]));
      pen.fill();
    }
    pen.globalAlpha = 0.4 * (curve.alpha ?? 1);
    pen.lineWidth = 1;
    if (curve.smooth !== mean) this.drawLine(pen, x, mean);
    pen.globalAlpha = curve.alpha ?? 1;
    pen.lineWidth = 2;
    this.drawLine(pen, x, curve.smooth);
    if (x.length < FEW_POINTS) x.forEach((step, at) => fillDot(pen, this.toPixel(step), this.toHeight(mean[at])));
    pen.globalAlpha = 1;
    pen.fillStyle = color("bad");
    (curve.broken ?? []).forEach((step) => pen.fillRect(this.toPixel(step) - 1, height - BOTTOM - 8, 2, 8));
  }

  drawLine(pen, x, values) {
    pen.beginPath();
    x.forEach((step, at) => pen.lineTo(this.toPixel(step), this.toHeight(values[at])));
    pen.stroke();
  }

  drawHover(pen, color, height) {
    if (this.hover === null || this.hover < this.xRange[0] || this.hover > this.xRange[1]) return;
    pen.strokeStyle = color("soft");
    const pixel = Math.round(this.toPixel(this.hover)) + 0.5;
    strokeLine(pen, pixel, TOP, pixel, height - BOTTOM);
    this.listNearest().forEach(([curve, at]) => {
      pen.fillStyle = curve.color;
      fillDot(pen, this.toPixel(curve.x[at]), this.toHeight(curve.smooth[at]), 3.5);
    });
  }
}

export function buildSwatch(color) {
  const swatch = build("span", { className: "swatch" });
  swatch.style.background = color;
  return swatch;
}

// The mean over `share` of the values around each of them, and over fewer at the ends; without a share the values.
export function smooth(values, share) {
  const reach = Math.floor((share * values.length) / 2);
  if (reach < 1) return values;
  const sums = new Float64Array(values.length + 1);
  values.forEach((value, at) => { sums[at + 1] = sums[at] + value; });
  return values.map((_, at) => {
    const first = Math.max(0, at - reach), end = Math.min(values.length, at + reach + 1);
    return (sums[end] - sums[first]) / (end - first);
  });
}

// The place of the value in an ascending list that is nearest to x; -1 in an empty one.
export function findNearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] < x) low = middle;
    else high = middle;
  }
  return high < 0 || Math.abs(list[high] - x) <= Math.abs(list[low] - x) ? high : low;
}

function findRange(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

// The ends of the values without outliers.
function findTypical(values) {
  if (!values.length) return [];
  const sorted = Float64Array.from(values).sort(), cut = Math.floor(sorted.length * OUTLIERS);
  return [sorted[cut], sorted[sorted.length - 1 - cut]];
}

// Round numbers between two ends, about `count` of them.
export function listTicks(low, high, count) {
  const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let number = Math.ceil(low / step); number * step <= high + step * 1e-9; number++) ticks.push(number * step || 0); // no -0
  return ticks;
}

// Powers of ten between two ends, which are logarithms; 2 and 5 times these as well if there are few.
function listPowers(low, high) {
  const factors = high - low < 2 ? [1, 2, 5] : [1], ticks = [];
  for (let power = Math.floor(low); power <= high; power++) factors.forEach((factor) => ticks.push(factor * 10 ** power));
  const inside = ticks.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
  return inside.length >= 2 ? inside : listTicks(10 ** low, 10 ** high, 4).filter((value) => value > 0);
}

function strokeLine(pen, x0, y0, x1, y1) {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}

function fillDot(pen, x, y, radius = 2.5) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}
