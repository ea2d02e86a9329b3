// One picture, large: what it says of itself, and what can be done with it.

import { fileOf } from "./api.mjs";
import { $, el, icon, press } from "./dom.mjs";

const SMALL = 256;

export class Viewer {
  // actions: {settings, again, vary, change, enlarge, think, compare, star, remove}, each called with the picture.
  constructor(gallery, actions) {
    this.gallery = gallery;
    this.actions = actions;
    this.dialog = $("viewer");
    closing(this.dialog);
    $("previous").onclick = () => this.turn(-1);
    $("next").onclick = () => this.turn(1);
    this.dialog.addEventListener("keydown", event => {
      if (event.key === "ArrowLeft") this.turn(-1);
      if (event.key === "ArrowRight") this.turn(1);
    });
  }

  open(picture) {
    this.picture = this.gallery.find(picture.id) ?? picture;
    this.#show();
    if (!this.dialog.open) this.dialog.showModal();
  }

  turn(by) {
    const other = this.gallery.neighbour(this.picture, by);
    if (other) this.open(other);
  }

  #show() {
    const { picture } = this;
    const tiny = Math.max(picture.width, picture.height) <= SMALL;
    const { width, height } = picture;
    $("frame").replaceChildren(el("img", { src: fileOf(picture), alt: picture.prompt, width, height, className: tiny ? "tiny" : "" }));
    $("viewer-prompt").textContent = picture.prompt;
    $("viewer-actions").replaceChildren(...this.#buttons(picture));
    $("viewer-facts").replaceChildren(...facts(picture).flatMap(([name, value]) => [
      el("dt", { textContent: name }), el("dd", { textContent: value })]));
    $("previous").disabled = !this.gallery.neighbour(picture, -1);
    $("next").disabled = !this.gallery.neighbour(picture, 1);
  }

  #buttons(picture) {
    const { settings, again, vary, change, enlarge, think, compare, remove } = this.actions;
    const leaving = act => () => { this.dialog.close(); act(picture); };
    const download = el("a", { className: "action", href: fileOf(picture, true), download: picture.name }, icon("down"), "Download");
    const starring = action("star", picture.starred ? "Starred" : "Star", () => this.#star());
    starring.classList.add("starring");
    press(starring, picture.starred);
    return [
      action("copy", "Use settings", leaving(settings)),
      action("again", "Draw again", leaving(again)),
      action("brush", "Change", leaving(change)),
      action("vary", "Variations", leaving(vary)),
      action("larger", "Enlarge", leaving(enlarge)),
      action("steps", "Watch it think", leaving(think)),
      download,
      starring,
      action("compare", "Compare", leaving(compare)),
      ...(picture.deletable ? [action("bin", "Delete", leaving(remove), "danger")] : []),
    ];
  }

  async #star() {
    await this.actions.star(this.picture);
    this.#show();
    this.dialog.querySelector(".starring").focus();
  }
}

function action(name, label, onclick, more = "") {
  return el("button", { type: "button", className: `action ${more}`, onclick }, icon(name), label);
}

// Closed by its button, and by a click beside it; Escape is the browser's.
export function closing(dialog) {
  dialog.querySelector(".close").onclick = () => dialog.close();
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
}

function facts(picture) {
  const stages = Object.entries(picture.stages);
  const told = ([name, own]) => [name, `${own.sampler.kind ?? own.sampler}, ${own.steps} step${own.steps === 1 ? "" : "s"}`
    + (own.guidance === 1 ? "" : `, guidance ${own.guidance}`)];
  return [
    ["Size", `${picture.width} × ${picture.height}`],
    ["Seed", picture.num_images > 1 ? `${picture.seed}, picture ${picture.number + 1} of ${picture.num_images}` : picture.seed],
    ...(picture.negative_prompt ? [["Not in it", picture.negative_prompt]] : []),
    ...stages.map(told),
    ["Model", picture.model],
    ["Licence", picture.license],
    ["Drawn", new Date(picture.drawn_at * 1000).toLocaleString()],
    ["File", picture.name],
  ];
}
