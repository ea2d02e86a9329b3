// Settings of each stage: empty means as the preset has it, which stands there in grey.

import { el } from "./dom.mjs";

const KNOBS = {
  steps: { label: "Steps", type: "number", min: 1, max: 1000, step: 1 },
  guidance: { label: "Guidance", type: "number", min: 0, max: 100, step: "any" },
  guidance_rescale: { label: "Undo guidance's contrast", type: "number", min: 0, max: 1, step: "any" },
  projection: { label: "Keep guidance's saturation", type: "number", min: 0, max: 1, step: "any" },
  sampler: { label: "Sampler" },
  threshold: { label: "Threshold", type: "text" },
  aug_level: { label: "Noise on the smaller picture", type: "number", min: 0, max: 0.99, step: "any" },
};

export class Knobs {
  constructor(place, card) {
    this.card = card;
    this.fields = card.stages.map((stage, order) => ({ stage, parts: this.#parts(stage, order) }));
    place.replaceChildren(...this.fields.map(({ stage, parts }) => el("div", { className: "knobs" },
      el("h2", {}, stage.name, el("small", { textContent: `${stage.resolution} px` })),
      ...Object.entries(parts).map(([name, input]) => labelled(KNOBS[name].label, input)))));
  }

  // {setting: {stage: value}} of what was filled in.
  values() {
    const values = {};
    for (const { stage, parts } of this.#shown()) {
      for (const [name, input] of Object.entries(parts)) {
        const value = input.section && shown(input.section) === input.value ? input.section : plain(input.value.trim());
        if (input.value.trim()) (values[name] ??= {})[stage.name] = value;
      }
    }
    return values;
  }

  // asked: as `POST /api/jobs` takes it, a value for all stages or one for each.
  fill(asked) {
    for (const { stage, parts } of this.fields) {
      for (const [name, input] of Object.entries(parts)) {
        const given = asked[name];
        const value = (given !== null && typeof given === "object" ? given[stage.name] : given) ?? "";
        input.section = typeof value === "object" ? value : null; // with settings that the form has no field for
        input.value = input.section ? shown(value) : value;
      }
    }
  }

  get filled() {
    return this.#shown().some(({ parts }) => Object.values(parts).some(input => input.value));
  }

  show(preset, until) {
    this.until = until;
    for (const { stage, parts } of this.fields) {
      parts.steps.closest(".knobs")?.toggleAttribute("hidden", stage.resolution > until);
      for (const [name, input] of Object.entries(parts)) {
        const usual = String(this.card.presets[preset][stage.name][name] ?? "none");
        if (name === "sampler") input.options[0].textContent = usual;
        else input.placeholder = usual;
      }
    }
  }

  #shown() { return this.fields.filter(({ stage }) => stage.resolution <= (this.until ?? Infinity)); }

  #parts(stage, order) {
    const names = Object.keys(KNOBS).filter(name => name !== "aug_level" || order > 0);
    return Object.fromEntries(names.map(name => [name, this.#field(stage, name)]));
  }

  #field(stage, name) {
    const { label, ...properties } = KNOBS[name];
    const id = `${name}-${stage.name}`;
    if (name !== "sampler") return el("input", { id, ...properties });
    const choice = sampler => el("option", { value: sampler, textContent: sampler });
    return el("select", { id }, el("option", { value: "" }), ...this.card.samplers.map(choice));
  }
}

// Low-rank adapters with their scales; 0 leaves one out.
export class Adapters {
  constructor(place, names) {
    this.sliders = names.map((name, order) => el("input", {
      id: `lora-${order}`, name, type: "range", min: -2, max: 2, step: 0.05, value: 0, oninput: () => this.#show(),
    }));
    this.said = this.sliders.map(slider => el("output", { htmlFor: slider.id }));
    place.replaceChildren(...this.sliders.map((slider, order) => el("div", {},
      el("label", { htmlFor: slider.id }, `${slider.name} `, this.said[order]), slider)));
    this.#show();
  }

  // {name: scale} of those that count.
  values() {
    return Object.fromEntries(this.sliders.map(({ name, value }) => [name, Number(value)]).filter(([, scale]) => scale));
  }

  fill({ adapters = {} }) {
    for (const slider of this.sliders) slider.value = adapters[slider.name] ?? 0;
    this.#show();
  }

  #show() {
    this.said.forEach((said, order) => { said.textContent = `× ${this.sliders[order].value}`; });
  }
}

function labelled(text, input) {
  return el("div", {}, el("label", { htmlFor: input.id, textContent: text }), input);
}

// A section by what the form shows of it: a sampler's name, or the factor of projected guidance.
const shown = section => String(section.kind ?? section.parallel ?? "");

const plain = text => (/^-?\d*\.?\d+(e-?\d+)?$/i.test(text) ? Number(text) : text);
