// How a picture came about: every step of every stage, over an axis of log SNR.

import { call } from "./api.mjs";
import { $, el } from "./dom.mjs";
import { chosen, segments } from "./segments.mjs";
import { closing } from "./viewer.mjs";

const QUANTITIES = {
  noised: "Forward process",
  z: "What the network sees, z_t",
  x_hat: "What it makes of it, x̂",
  guidance: "Guidance, x_cond − x_null",
  attention: "Attention to",
};
const FRAME_MILLISECONDS = 350;

export class Thinking {
  constructor() {
    this.dialog = $("thinking");
    closing(this.dialog);
    this.dialog.addEventListener("close", () => this.#play(false));
    $("thinking-step").oninput = () => this.#show();
    $("thinking-word").onchange = () => this.#show();
    $("thinking-stages").onchange = () => this.#choose();
    $("thinking-play").onclick = () => this.#play(!this.timer);
  }

  async open(name) {
    this.trace = await call("GET", `/api/traces/${name}`);
    this.place = `/api/traces/${name}`;
    const { prompt, seed, words, stages } = this.trace;
    $("thinking-prompt").replaceChildren(prompt, el("span", { textContent: ` seed ${seed}` }));
    segments("thinking-stages", "trace-stage", stages.map(({ name: stage, width }, at) => [String(at), `${stage} ${width} px`]), "0");
    $("thinking-word").replaceChildren(...words.map((word, at) => el("option", { value: at, textContent: word })));
    const subject = (prompt.split(",")[0].match(/[\p{L}\p{N}_'-]+/gu) ?? []).filter(word => words.includes(word)).at(-1);
    $("thinking-word").value = Math.max(0, words.indexOf(subject ?? words.at(-1)));
    $("thinking-sheet").href = `${this.place}/sheet.png`;
    $("thinking-animation").href = `${this.place}/trace.webp`;
    this.#choose();
    this.dialog.showModal();
    $("thinking-step").focus();
  }

  // Another stage.
  #choose() {
    this.stage = this.trace.stages[Number(chosen("trace-stage"))];
    const { steps, formulas, width, height } = this.stage;
    Object.assign($("thinking-step"), { max: steps.length - 1, value: 0 });
    const has = name => steps.some(({ files }) => files[name] || (name === "attention" && files["attention-0"]));
    $("thinking-word-part").hidden = !has("attention");
    this.views = Object.entries(QUANTITIES).filter(([name]) => has(name)).map(([name, label]) => {
      const { formula, source } = formulas.find(({ quantity }) => quantity === name);
      const image = el("img", { width, height, className: Math.max(width, height) <= 64 ? "tiny" : "" });
      const title = el("b", { textContent: label });
      const node = el("figure", {}, image, el("figcaption", {}, title, el("code", { textContent: formula }), el("small", { textContent: source })));
      return { name, label, image, title, node };
    });
    $("thinking-views").replaceChildren(...this.views.map(({ node }) => node));
    this.#axis();
    this.#show();
    for (const { files } of steps) for (const file of Object.values(files)) new Image().src = `${this.place}/${file}`;
  }

  #show() {
    const at = Number($("thinking-step").value), word = $("thinking-word").value;
    const { log_snr: level, files } = this.stage.steps[at];
    for (const { name, label, image, title } of this.views) {
      const file = files[name === "attention" ? `attention-${word}` : name];
      image.classList.toggle("none", !file);
      if (file) image.src = `${this.place}/${file}`;
      const told = name === "attention" ? `${label} “${this.trace.words[word]}”` : label;
      title.textContent = file ? told : `${told}: none at this step`;
      image.alt = told;
    }
    const alpha = 1 / (1 + Math.exp(-level));
    $("thinking-said").textContent = `Step ${at + 1} of ${this.stage.steps.length} · log SNR ${level.toFixed(2)} · signal α = ${alpha.toFixed(4)}`;
    [...$("thinking-axis").querySelectorAll("i")].forEach((dot, place) => dot.classList.toggle("now", place === at));
  }

  #axis() {
    const levels = this.stage.steps.map(step => step.log_snr);
    const low = Math.floor(Math.min(...levels) / 2) * 2 - 2, high = Math.ceil(Math.max(...levels) / 2) * 2 + 2;
    const put = (node, level) => { node.style.left = `${100 * (level - low) / (high - low)}%`; return node; };
    const ticks = [];
    for (let level = low; level <= high; level += 2) ticks.push(put(el("span", { textContent: level }), level));
    $("thinking-axis").replaceChildren(...ticks, ...levels.map(level => put(el("i"), level)));
  }

  #play(on) {
    clearInterval(this.timer);
    this.timer = null;
    $("thinking-play").textContent = on ? "Pause" : "Play";
    if (!on) return;
    const slider = $("thinking-step");
    if (Number(slider.value) === Number(slider.max)) slider.value = -1;
    this.timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      this.#show();
      if (Number(slider.value) === Number(slider.max)) this.#play(false);
    }, FRAME_MILLISECONDS);
  }
}
