// Elements, numbers as text, and requests to the server. Data reaches the page as text only, never as markup.

const texts = JSON.parse(document.querySelector("meta[name=watch-texts]").content);

// Return an English text of the page in its language, with values in place of fields such as {step}.
export function t(text, values = {}) {
  return (texts[text] ?? text).replace(/\{(\w+)\}/g, (field, name) => values[name] ?? field);
}

// Translate the texts that the page was loaded with.
export function translatePage() {
  const nodes = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
  while (nodes.nextNode()) {
    const text = nodes.currentNode.data.trim();
    if (texts[text]) nodes.currentNode.data = nodes.currentNode.data.replace(text, texts[text]);
  }
  for (const name of ["placeholder", "aria-label"]) {
    for (const element of document.querySelectorAll(`[${name}]`)) element.setAttribute(name, t(element.getAttribute(name)));
  }
}

const token = document.querySelector("meta[name=watch-token]").content;

export const find = (id) => document.getElementById(id);

// Build an element with properties, and with children that are elements or texts.
export function build(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  const { data = {}, ...plain } = properties;
  Object.assign(element, plain);
  Object.assign(element.dataset, data);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Build an element with a text and a class.
export const write = (tag, textContent, className = "") => build(tag, { textContent, className });

// Replace a text only if it differs, so that selections and screen readers are left alone.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export class ServerError extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(path, options) {
  const headers = { "X-Watch-Token": token, "Content-Type": "application/json" };
  const answer = await fetch(path, { headers, ...options });
  if (!answer.ok) throw new ServerError(answer.status, await answer.text());
  return answer.json();
}

const addWords = (path, words) => `${path}?${new URLSearchParams(words)}`;

export const get = (path, words = {}) => ask(addWords(path, words));
export const post = (path, content) => ask(path, { method: "POST", body: JSON.stringify(content) });
export const getImageAddress = (words) => addWords("/image", words);

// A number with about four digits.
export function writeNumber(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

export const writeCount = (value) => Math.round(value).toLocaleString("en");

// A duration such as 3 d 4 h, 2 h 05 min, 26 min, 4 min 10 s.
export function writeDuration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  const pad = (number) => String(number).padStart(2, "0");
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${pad(minutes % 60)} min`;
  if (minutes >= 10) return `${minutes} min`;
  return minutes ? `${minutes} min ${pad(Math.floor(seconds % 60))} s` : `${Math.floor(seconds)} s`;
}

// Images a second, or seconds an image where there are fewer than one a second.
export function writeSpeed(rate) {
  if (!rate) return "–";
  const write = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
  return rate >= 1 ? t("{rate} images/s", { rate: write(rate) }) : t("{rate} s/image", { rate: write(1 / rate) });
}
