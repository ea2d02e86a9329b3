// Two pictures on one place, with a line between them that one moves.

import { fileOf } from "./api.mjs";
import { $ } from "./dom.mjs";
import { closing } from "./viewer.mjs";

export class Comparison {
  constructor() {
    this.dialog = $("comparison");
    closing(this.dialog);
    $("split-at").oninput = () => this.#split(Number($("split-at").value));
    const drag = event => {
      const { left, width } = $("split").getBoundingClientRect();
      this.#split(Math.min(100, Math.max(0, 100 * (event.clientX - left) / width)));
    };
    $("split").onpointerdown = event => { $("split").setPointerCapture(event.pointerId); drag(event); };
    $("split").onpointermove = event => { if (event.buttons) drag(event); };
  }

  open(first, second) {
    for (const [name, picture] of [["first", first], ["second", second]]) {
      Object.assign($(name), { src: fileOf(picture), alt: picture.prompt });
      $(`${name}-said`).textContent = `${picture.prompt} · seed ${picture.seed}`;
    }
    $("split").style.aspectRatio = `${first.width} / ${first.height}`;
    this.#split(50);
    this.dialog.showModal();
  }

  // Left of `at` percent the first picture is seen, right of it the second.
  #split(at) {
    $("first").style.clipPath = `inset(0 ${100 - at}% 0 0)`;
    $("second").style.clipPath = `inset(0 0 0 ${at}%)`;
    $("split-line").style.left = `${at}%`;
    $("split-at").value = at;
  }
}
