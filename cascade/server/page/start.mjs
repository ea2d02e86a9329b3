// The picture that drawing starts from, and what becomes of it: changed whole or in part, extended, enlarged.

import { sourceOf, upload } from "./api.mjs";
import { $, el, trying } from "./dom.mjs";
import { Mask } from "./mask.mjs";
import { choose, chosen, segments } from "./segments.mjs";

const MODES = { whole: "Whole", part: "Part", sides: "Extend", larger: "Enlarge" };
const SIDES = ["left", "top", "right", "bottom"];
const USUAL = 0.85;

export class Start {
  // card: of the model. onChange: called when a picture is there, or no longer.
  constructor(card, onChange) {
    Object.assign(this, { card, onChange, given: null, mask: new Mask() });
    const modes = Object.entries(MODES).filter(([name]) => name !== "larger" || card.enlargers.length);
    segments("start-modes", "mode", modes, "whole");
    $("start-choose").onclick = () => $("start-file").click();
    $("start-file").onchange = () => { this.take($("start-file").files[0]); $("start-file").value = ""; };
    $("start-off").onclick = () => { this.clear(); $("start-choose").focus(); };
    $("start-modes").onchange = () => this.#show();
    $("strength").oninput = () => this.#show();
    $("mask-paint").onclick = trying(() => this.#paint());
  }

  get mode() { return this.given && chosen("mode"); }

  // A file of the user's own.
  take = trying(async file => { if (file) this.use(await upload(file)); });

  // picture: {name, width, height}.
  use(picture, mode = "whole") {
    this.given = { ...picture, source: sourceOf(picture.name), mask: null };
    $("start-image").src = this.given.source;
    $("start-said").textContent = `${picture.width} × ${picture.height}`;
    $("strength").value = USUAL;
    $("resampling").value = 1;
    for (const side of SIDES) $(`side-${side}`).value = "";
    const longest = Math.max(picture.width, picture.height);
    $("to").value = Math.min(4096, this.card.enlargers.map(stage => stage.resolution).find(side => side > longest) ?? 2 * longest);
    choose("mode", mode);
    this.#show();
  }

  clear() {
    this.given = null;
    this.#show();
  }

  // What a job says of it. Throws an Error with a line for the user.
  asked() {
    if (!this.given) return {};
    const image = this.given.name;
    switch (this.mode) {
      case "part":
        if (!this.given.mask) throw new Error("Paint what is to change first.");
        return { image, mask: this.given.mask, ...rounds() };
      case "sides": {
        const extend = Object.fromEntries(SIDES.map(side => [side, Number($(`side-${side}`).value)]).filter(([, pixels]) => pixels));
        if (!Object.keys(extend).length) throw new Error("Say how many pixels to add, and where.");
        return { image, extend };
      }
      case "larger": return { image, to: Number($("to").value) };
      default: return { image, strength: Number($("strength").value) };
    }
  }

  // Show what was asked for.
  fill = trying(async asked => {
    if (!asked.image) { this.clear(); return; }
    const image = el("img", { src: sourceOf(asked.image) });
    await image.decode().catch(() => { throw new Error("The picture that it was made from is no longer kept here."); });
    const picture = { name: asked.image, width: image.naturalWidth, height: image.naturalHeight };
    this.use(picture, asked.to ? "larger" : asked.mask ? "part" : asked.extend ? "sides" : "whole");
    this.given.mask = asked.mask ?? null;
    if (typeof asked.strength === "number") $("strength").value = asked.strength;
    if (typeof asked.strength === "object") $("strength").value = Object.values(asked.strength)[0] ?? 1;
    $("resampling").value = asked.resampling ?? 1;
    for (const side of SIDES) $(`side-${side}`).value = asked.extend?.[side] ?? "";
    if (asked.to) $("to").value = asked.to;
    this.#show();
  });

  #paint() {
    const { given } = this;
    return this.mask.open({ ...given, mask: given.mask && sourceOf(given.mask) }, trying(async file => {
      given.mask = (await upload(file)).name;
      this.#show();
      $("mask-paint").focus();
    }));
  }

  #show() {
    $("start-given").hidden = !this.given;
    $("start-choose").hidden = Boolean(this.given);
    for (const name of Object.keys(MODES)) $(`mode-${name}`).hidden = this.mode !== name;
    const strength = Number($("strength").value);
    $("strength-said").textContent = strength === 0 ? "nothing" : strength === 1 ? "everything" : `${Math.round(100 * strength)} %`;
    $("mask-said").textContent = this.given?.mask ? "Painted; paint more" : "Paint what is to change";
    this.onChange();
  }
}

const rounds = () => (Number($("resampling").value) > 1 ? { resampling: Number($("resampling").value) } : {});
