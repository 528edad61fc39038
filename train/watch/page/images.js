// The tab with generated images: a row for each prompt, a column for each step, and a viewer at full size.

import { build, find, get, getImageAddress, setText, t, write, writeCount } from "./dom.js";

const MAX_COLUMNS = 60;
const NO_IMAGES = t("No generated images yet. Set sample.prompts, and sample.every_steps for images during training.");

const nameImage = (prompt) => prompt.prompt || t("image {number}", { number: prompt.number });

const nameStep = (step) => t("step {step}", { step: writeCount(step) });

export class ImageView {
  constructor() {
    this.run = "";
    this.shown = "";
    this.images = { steps: [], prompts: [] };
    find("image-steps").addEventListener("change", () => this.draw());
    find("viewer-close").addEventListener("click", () => find("viewer").close());
    find("viewer-back").addEventListener("click", () => this.move(-1, 0));
    find("viewer-on").addEventListener("click", () => this.move(1, 0));
    find("viewer-image").addEventListener("click", (event) => event.target.classList.toggle("full"));
    find("viewer").addEventListener("keydown", (event) => this.pressKey(event));
  }

  async update(name) {
    const images = await get("/api/images", { run: name });
    const shown = JSON.stringify([name, images]);
    if (shown === this.shown) return;
    Object.assign(this, { run: name, images, shown });
    this.draw();
  }

  draw() {
    const { prompts } = this.images, steps = this.chooseSteps();
    if (!prompts.length) {
      find("image-table").replaceChildren(write("p", NO_IMAGES, "soft"));
      return;
    }
    const titles = [t("prompt"), ...steps.map(nameStep)];
    const head = titles.map((textContent) => build("th", { scope: "col", textContent }));
    const rows = prompts.map((prompt) => {
      const name = build("th", { scope: "row", textContent: nameImage(prompt) });
      return build("tr", {}, name, ...steps.map((step) => this.buildCell(prompt, step)));
    });
    const table = build("table", { className: "image-grid" }, build("tr", {}, ...head), ...rows);
    find("image-table").replaceChildren(table);
    find("image-table").scrollLeft = table.scrollWidth; // the newest step
  }

  chooseSteps() {
    const { steps } = this.images, wanted = find("image-steps").value;
    const count = Math.min(steps.length, wanted === "all" ? MAX_COLUMNS : Number(wanted));
    if (wanted !== "all" || steps.length <= count) return steps.slice(steps.length - count);
    return Array.from({ length: count }, (_, place) => steps[Math.round((place * (steps.length - 1)) / (count - 1))]);
  }

  buildCell(prompt, step) {
    if (!prompt.steps.includes(step)) return build("td");
    const alt = `${nameImage(prompt)}, ${nameStep(step)}`;
    const image = build("img", { loading: "lazy", alt, src: this.getAddress(prompt.number, step, true) });
    const button = build("button", { type: "button" }, image);
    button.addEventListener("click", () => this.view(prompt, step));
    return build("td", {}, button);
  }

  getAddress(number, step, isSmall) {
    return getImageAddress({ run: this.run, step, number, ...(isSmall ? { thumb: 1 } : {}) });
  }

  view(prompt, step) {
    this.viewed = { prompt, step };
    const image = find("viewer-image");
    image.src = this.getAddress(prompt.number, step, false);
    image.alt = prompt.prompt;
    setText(find("viewer-step"), nameStep(step));
    setText(find("viewer-prompt"), prompt.prompt);
    const negative = prompt.negative && t("Negative prompt: {text}", { text: prompt.negative });
    setText(find("viewer-settings"), [negative, prompt.settings].filter(Boolean).join(" · "));
    find("viewer-back").disabled = step === prompt.steps[0];
    find("viewer-on").disabled = step === prompt.steps.at(-1);
    if (!find("viewer").open) find("viewer").showModal();
  }

  // Go some steps later, or some prompts down.
  move(steps, prompts) {
    const { prompt, step } = this.viewed, all = this.images.prompts;
    const next = all[all.findIndex((other) => other.number === prompt.number) + prompts];
    if (!next) return;
    const place = next.steps.indexOf(step) + steps;
    const target = next.steps[prompts && place < 0 ? next.steps.length - 1 : place];
    if (target !== undefined) this.view(next, target);
  }

  pressKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!moves[event.key]) return;
    event.preventDefault();
    this.move(...moves[event.key]);
  }
}
