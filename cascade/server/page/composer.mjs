// The form: what to draw. It gives and takes what `POST /api/jobs` takes.

import { Conditions } from "./conditions.mjs";
import { $, el, icon, isPressed, press } from "./dom.mjs";
import { Adapters, Knobs } from "./knobs.mjs";
import { choose, chosen, segments } from "./segments.mjs";
import { Start } from "./start.mjs";

const SHAPES = { square: ["Square", 1, 1], wide: ["Wide", 1.5, 1], tall: ["Tall", 1, 1.5] };
const PRESETS = { fast: "Fast", default: "Normal", best: "Best" };

// `0,0,0.5,1: a red ring` as `POST /api/jobs` takes it. Throws an Error with a line for the user.
function region(line) {
  const [, numbers, prompt] = /^([\d.,\s]+):\s*(.+)$/.exec(line.trim()) ?? [];
  const box = (numbers ?? "").split(",").map(Number);
  if (box.length !== 4 || box.some(Number.isNaN)) throw new Error("A region is written like 0,0,0.5,1: a red ring");
  return { box, prompt };
}

export class Composer {
  // card: of the model. onAsk: called with what is asked for.
  constructor(card, onAsk) {
    this.card = card;
    this.lastSeed = "";
    this.knobs = new Knobs($("stages"), card);
    this.conditions = new Conditions(card);
    this.adapters = new Adapters($("loras"), card.loras);
    $("loras-part").hidden = !card.loras.length;
    $("prompt").closest(".prompt").hidden = !card.reads_text;
    segments("shapes", "shape", Object.entries(SHAPES).map(([name, [label]]) => [name, label, name]), "square");
    const sizes = card.stages.map(stage => [String(stage.resolution), `${stage.resolution}`]);
    segments("until", "until", sizes.map(([value, text]) => [value, `${text} px`]), sizes.at(-1)[0]);
    const presets = Object.keys(PRESETS).filter(name => name in card.presets);
    segments("presets", "preset", presets.map(name => [name, PRESETS[name]]), "default");
    $("presets").parentElement.hidden = presets.length < 2;
    this.start = new Start(card, () => this.#show());
    this.#offerStyles();
    this.#offerExamples();
    this.#listen(onAsk);
    this.#show();
    $("draw").disabled = false;
  }

  // Throws an Error with a line for the user.
  asked() {
    const prompt = $("prompt").value.trim();
    const start = this.start.asked();
    if (!prompt && !start.to && this.card.reads_text) throw new Error("Say what to draw first.");
    const given = this.conditions.values();
    if (Object.keys(given).length) start.conditions = given;
    if (start.to) return { prompt, ...start, ...($("seed").value ? { seed: $("seed").value } : {}), ...this.#preset() };
    const asked = { prompt, num_images_per_prompt: Number($("count").value) || 1, until: this.#until(), ...start };
    if ($("negative").value.trim()) asked.negative_prompt = $("negative").value.trim();
    if ($("seed").value) asked.seed = $("seed").value;
    const [width, height] = this.#size();
    const adapters = this.adapters.values();
    if (Object.keys(adapters).length) asked.adapters = adapters;
    if ($("language").checked) asked.prompt_language = true;
    const regions = $("regions").value.split("\n").filter(line => line.trim()).map(region);
    if (regions.length) asked.regions = regions;
    const weights = this.conditions.weights();
    if (Object.keys(weights).length) asked.guidance_of = weights;
    return { ...asked, ...this.#preset(), ...(width ? { width, height } : {}), ...this.knobs.values() };
  }

  // The axes of a sheet; none: a single request.
  matrix() { return [$("columns").value.trim(), $("rows").value.trim()].filter(Boolean); }

  #preset() { return chosen("preset") === "default" ? {} : { preset: chosen("preset") }; }

  // Show what was asked for, with its seed kept.
  fill(asked) {
    $("prompt").value = asked.prompt;
    $("negative").value = asked.negative_prompt ?? "";
    $("count").value = asked.number === undefined ? asked.num_images_per_prompt ?? 1 : 1;
    choose("until", String(asked.until ?? this.card.stages.at(-1).resolution));
    choose("preset", asked.preset ?? "default");
    const shape = Object.keys(SHAPES).find(name => String(this.#shaped(name)) === String([asked.width, asked.height]));
    choose("shape", shape ?? null);
    [$("width").value, $("height").value] = shape || !asked.width ? ["", ""] : [asked.width, asked.height];
    $("language").checked = Boolean(asked.prompt_language);
    $("regions").value = (asked.regions ?? []).map(({ box, prompt }) => `${box.join(",")}: ${prompt}`).join("\n");
    [$("columns").value, $("rows").value] = ["", ""];
    this.start.fill(asked);
    this.knobs.fill(asked);
    this.conditions.fill(asked);
    this.adapters.fill(asked);
    this.#keepSeed(asked.seed ?? "");
    $("advanced").open ||= this.knobs.filled || Boolean(asked.adapters) || Boolean(asked.prompt_language || asked.regions || asked.guidance_of) || Boolean(asked.negative_prompt) || !(shape || asked.image);
    this.#show();
  }

  // A job was taken: an open seed is open again, and what was drawn is what a lock would keep.
  taken(job) {
    this.lastSeed = job.asked.seed;
    if (!isPressed($("seed-lock"))) $("seed").value = "";
    this.#show();
  }

  reset() {
    const prompt = $("prompt").value;
    this.fill({ prompt, width: this.#shaped("square")[0], height: this.#shaped("square")[1] });
    $("advanced").open = false;
  }

  #until() { return Number(chosen("until")); }

  // Width and height of a shape with the chosen stage as the last.
  #shaped(name) {
    const stage = this.card.stages.find(stage => stage.resolution === this.#until());
    const fit = side => Math.max(1, Math.round(side * stage.resolution / stage.multiple)) * stage.multiple;
    const [, width, height] = SHAPES[name];
    return [width === 1 ? stage.resolution : fit(width), height === 1 ? stage.resolution : fit(height)];
  }

  // A picture to change has a shape already, unless the user names another one.
  #size() {
    if (this.start.given && !$("width").value && !$("height").value) return [];
    const shaped = this.#shaped(chosen("shape") ?? "square");
    return ["width", "height"].map((side, place) => Number($(side).value) || shaped[place]);
  }

  #keepSeed(seed) {
    $("seed").value = seed;
    this.#lock(Boolean(seed));
  }

  #lock(locked) {
    press($("seed-lock"), locked);
    $("seed-lock").replaceChildren(icon(locked ? "lock" : "unlock"));
  }

  #show() {
    const [width, height] = this.#shaped(chosen("shape") ?? "square");
    $("width").placeholder = width;
    $("height").placeholder = height;
    this.knobs.show(chosen("preset"), this.#until());
    $("shapes").parentElement.hidden = Boolean(this.start?.given);
    $("until").parentElement.hidden = this.start?.mode === "larger";
    $("draw").textContent = { larger: "Enlarge", sides: "Extend" }[this.start?.mode] ?? "Draw";
    const prompt = $("prompt").value;
    for (const chip of $("styles").children) press(chip, prompt.includes(chip.textContent));
    $("examples").hidden = Boolean(prompt) || !$("examples").children.length;
  }

  #offerStyles() {
    const { styles } = this.card;
    $("styles-part").hidden = !styles.length;
    const chip = style => el("button", { type: "button", className: "chip", textContent: style,
                                         onclick: () => this.#toggleStyle(style) });
    $("styles").replaceChildren(...styles.map(chip));
  }

  #toggleStyle(style) {
    const plain = this.card.styles.reduce((text, other) => text.replaceAll(other, ""), $("prompt").value);
    const subject = plain.replace(/[\s,]+$/, "").replace(/,\s*,/g, ",");
    const had = $("prompt").value.includes(style);
    $("prompt").value = had ? subject : [subject, style].filter(Boolean).join(", ");
    this.#show();
  }

  #offerExamples() {
    const { examples } = this.card;
    const some = examples.toSorted(() => Math.random() - 0.5).slice(0, 3);
    const button = text => el("button", { type: "button", textContent: text, onclick: () => {
      $("prompt").value = text;
      this.#show();
      $("prompt").focus();
    } });
    $("examples").replaceChildren(...some.length ? ["Try", ...some.map(button)] : []);
  }

  #listen(onAsk) {
    const form = $("composer");
    form.onsubmit = event => { event.preventDefault(); onAsk(); };
    form.addEventListener("input", event => {
      if (event.target.name === "shape") $("width").value = $("height").value = "";
      this.#show();
    });
    form.addEventListener("keydown", event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); onAsk(); }
    });
    $("seed").oninput = () => {
      $("seed").value = $("seed").value.replace(/\D/g, "");
      this.#lock(Boolean($("seed").value));
    };
    $("seed-dice").onclick = () => { $("seed").value = String(Math.floor(Math.random() * 2 ** 32)); };
    $("seed-lock").onclick = () => {
      const locked = !isPressed($("seed-lock"));
      $("seed").value = locked ? $("seed").value || this.lastSeed : "";
      this.#lock(locked && Boolean($("seed").value));
    };
    const count = by => () => {
      const most = this.card.limits.pictures;
      $("count").value = Math.min(most, Math.max(1, (Number($("count").value) || 1) + by));
    };
    [$("fewer").onclick, $("more").onclick] = [count(-1), count(1)];
    $("reset").onclick = () => this.reset();
  }
}
