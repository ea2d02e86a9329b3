// The mask: painted over the picture with a pointer or the keyboard.

import { $, el, toast } from "./dom.mjs";
import { choose, chosen, segments } from "./segments.mjs";
import { closing } from "./viewer.mjs";

const LONGEST = 1024; // of the canvas, in pixels: a brush is soft enough
const MOST_UNDONE = 20;
const COLOUR = [70, 81, 196]; // seen on light and dark pictures; what counts is where there is any
const STEP = 1 / 40; // of the canvas, for an arrow key

export class Mask {
  constructor() {
    this.dialog = $("masking");
    this.canvas = $("mask-canvas");
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    closing(this.dialog);
    segments("mask-tools", "tool", [["paint", "Paint"], ["erase", "Erase"]], "paint");
    $("mask-undo").onclick = () => this.#undo();
    $("mask-clear").onclick = () => { this.#remember(); this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height); };
    $("mask-invert").onclick = () => this.#invert();
    $("mask-done").onclick = () => this.#done();
    $("brush").oninput = () => this.#showCursor();
    this.#listen();
  }

  // source: address of the picture, width and height its own. mask: address of one to begin with, or null.
  // onDone: called with a PNG of that size, white where it was painted.
  async open({ source, width, height, mask }, onDone) {
    Object.assign(this, { size: [width, height], onDone, undone: [] });
    const share = Math.min(1, LONGEST / Math.max(width, height));
    Object.assign(this.canvas, { width: Math.round(width * share) || 1, height: Math.round(height * share) || 1 });
    $("mask-under").src = source;
    $("mask-stack").style.aspectRatio = `${width} / ${height}`;
    $("mask-stack").style.setProperty("--ratio", width / height);
    this.at = [this.canvas.width / 2, this.canvas.height / 2];
    choose("tool", "paint");
    if (mask) await this.#load(mask);
    this.dialog.showModal();
    this.#showCursor();
  }

  #listen() {
    const place = event => {
      const { left, top, width, height } = this.canvas.getBoundingClientRect();
      return [(event.clientX - left) / width * this.canvas.width, (event.clientY - top) / height * this.canvas.height];
    };
    this.canvas.onpointerdown = event => {
      this.canvas.setPointerCapture(event.pointerId);
      this.#remember();
      this.at = place(event);
      this.#stroke(this.at);
    };
    this.canvas.onpointermove = event => {
      const to = place(event);
      if (event.buttons) this.#stroke(to);
      this.at = to;
      this.#showCursor();
    };
    this.canvas.onkeydown = event => this.#key(event);
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this.canvas;
    if (event.key in moves) {
      const step = Math.max(width, height) * STEP * (event.shiftKey ? 3 : 1);
      const [x, y] = moves[event.key];
      const to = [Math.min(width, Math.max(0, this.at[0] + x * step)), Math.min(height, Math.max(0, this.at[1] + y * step))];
      if (this.held) this.#stroke(to);
      this.at = to;
    } else if (event.key === " ") {
      if (!event.repeat) { this.#remember(); this.#stroke(this.at); this.held = true; }
    } else if (event.key === "[" || event.key === "]") {
      $("brush").value = Number($("brush").value) * (event.key === "]" ? 1.25 : 0.8);
    } else if (event.key === "e") {
      choose("tool", chosen("tool") === "paint" ? "erase" : "paint");
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      this.#undo();
    } else return;
    event.preventDefault();
    this.#showCursor();
    this.canvas.onkeyup = up => { if (up.key === " ") this.held = false; };
  }

  // From where the brush is.
  #stroke(to) {
    this.pen.globalCompositeOperation = chosen("tool") === "erase" ? "destination-out" : "source-over";
    Object.assign(this.pen, { strokeStyle: `rgb(${COLOUR})`, lineWidth: Number($("brush").value), lineCap: "round", lineJoin: "round" });
    this.pen.beginPath();
    this.pen.moveTo(...this.at);
    this.pen.lineTo(to[0] + 0.01, to[1]);
    this.pen.stroke();
  }

  #remember() {
    this.undone.push(this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height));
    if (this.undone.length > MOST_UNDONE) this.undone.shift();
  }

  #undo() {
    const before = this.undone.pop();
    if (before) this.pen.putImageData(before, 0, 0);
  }

  #invert() {
    this.#remember();
    const data = this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let at = 0; at < data.data.length; at += 4) data.data.set([...COLOUR, 255 - data.data[at + 3]], at);
    this.pen.putImageData(data, 0, 0);
  }

  // A mask as the server keeps it is white on black; here it is a colour on nothing.
  async #load(address) {
    const image = el("img", { src: address });
    await image.decode();
    this.pen.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
    const data = this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let at = 0; at < data.data.length; at += 4) data.data.set([...COLOUR, data.data[at]], at);
    this.pen.putImageData(data, 0, 0);
  }

  #showCursor() {
    const shown = this.canvas.getBoundingClientRect().width / this.canvas.width;
    const size = Number($("brush").value) * shown;
    Object.assign($("mask-cursor").style, {
      width: `${size}px`, height: `${size}px`, left: `${this.at[0] * shown}px`, top: `${this.at[1] * shown}px` });
  }

  #done() {
    const [width, height] = this.size;
    const whole = Object.assign(document.createElement("canvas"), { width, height });
    const pen = whole.getContext("2d", { willReadFrequently: true });
    pen.drawImage(this.canvas, 0, 0, width, height);
    for (const [fillStyle, globalCompositeOperation] of [["#fff", "source-in"], ["#000", "destination-over"]]) {
      Object.assign(pen, { fillStyle, globalCompositeOperation });
      pen.fillRect(0, 0, width, height);
    }
    const painted = this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height).data.some((value, at) => at % 4 === 3 && value);
    if (!painted) { toast("Nothing is painted yet."); return; }
    whole.toBlob(file => { this.dialog.close(); this.onDone(file); }, "image/png");
  }
}
