// What the model reads besides the prompt: a field for each condition; empty means its default, which stands there in grey.

import { sourceOf, upload } from "./api.mjs";
import { $, el, trying } from "./dom.mjs";

const OPEN = "none"; // leaves a condition open

export class Conditions {
  constructor(card) {
    this.fields = card.conditions.map(condition => new FIELDS[condition.kind](condition));
    $("conditions").replaceChildren(...this.fields.map(field => field.node));
    $("conditions-part").hidden = $("weights-part").hidden = !this.fields.length;
  }

  // {name: value} of what was given. Throws an Error with a line for the user.
  values() {
    const given = this.fields.map(field => [field.condition.name, field.value]);
    const missing = this.fields.find(field => field.value === "" && field.condition.default === null);
    if (missing) throw new Error(`Say what ${missing.condition.name} is: ${missing.condition.values}.`);
    return Object.fromEntries(given.filter(([, value]) => value !== ""));
  }

  // {name: weight} as written: `layout=5, text=3`. Throws an Error with a line for the user.
  weights() {
    const pairs = $("weights").value.split(",").map(part => part.trim()).filter(Boolean).map(part => part.split("="));
    if (pairs.some(([name, weight, more]) => !name || !weight?.trim() || Number.isNaN(Number(weight)) || more !== undefined)) {
      throw new Error("Guidance of single conditions is written like layout=5, text=3");
    }
    return Object.fromEntries(pairs.map(([name, weight]) => [name.trim(), Number(weight)]));
  }

  fill(asked) {
    $("weights").value = Object.entries(asked.guidance_of ?? {}).map(([name, weight]) => `${name}=${weight}`).join(", ");
    for (const field of this.fields) field.value = asked.conditions?.[field.condition.name] ?? "";
  }
}

class Field {
  constructor(condition) {
    this.condition = condition;
    this.input = this.build(`condition-${condition.name}`);
    this.node = el("div", {}, el("label", { htmlFor: this.input.id, textContent: condition.name }), this.input);
  }

  get usual() { return this.condition.default === OPEN ? "open" : this.condition.default ?? ""; }
  get value() { return this.input.value.trim(); }
  set value(value) { this.input.value = value; }
}

class ClassField extends Field {
  build(id) {
    const choice = (value, textContent) => el("option", { value, textContent });
    const labels = this.condition.labels.map(label => choice(label, label));
    return el("select", { id }, choice("", this.usual || "choose"), ...labels, choice(OPEN, "open"));
  }
}

class NumberField extends Field {
  build(id) {
    const [min, max] = this.condition.range;
    const title = `${this.condition.values}; ${OPEN} leaves it open`;
    return el("input", { id, title, inputMode: "decimal", placeholder: this.usual || `${min} to ${max}` });
  }

  // What is no number goes to the server, which says what is wrong with it.
  get value() {
    const written = this.input.value.trim();
    return written === "" || Number.isNaN(Number(written)) ? written : Number(written);
  }

  set value(value) { this.input.value = value; }
}

class VectorField extends Field {
  build(id) { return el("input", { id, placeholder: this.usual || "numbers with commas between them" }); }

  get value() { return this.input.value.trim(); }
  set value(value) { this.input.value = Array.isArray(value) ? value.join(",") : value; }
}

class PictureField extends Field {
  build(id) {
    this.name = "";
    this.shown = el("img", { alt: "", hidden: true });
    const input = el("input", { id, type: "file", accept: "image/png,image/webp,image/jpeg" });
    input.onchange = trying(async () => { this.value = input.files[0] ? (await upload(input.files[0])).name : ""; });
    return input;
  }

  constructor(condition) {
    super(condition);
    this.node.append(this.shown);
    this.node.classList.add("given-picture");
  }

  get value() { return this.name; }

  set value(name) {
    this.name = name; // also OPEN, of a picture that was drawn without one
    if (!this.name) this.input.value = "";
    this.shown.hidden = !this.name || this.name === OPEN;
    if (!this.shown.hidden) this.shown.src = sourceOf(this.name);
  }
}

const FIELDS = { class: ClassField, number: NumberField, vector: VectorField, picture: PictureField };
