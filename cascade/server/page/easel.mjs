// The easel: the job at hand, its pictures growing in place; and below it what waits.

import { fileOf, stop } from "./api.mjs";
import { $, duration, el, iconButton, trying } from "./dom.mjs";

export class Easel {
  // actions: what can be done with a finished picture, {open, settings, again}.
  constructor(actions) {
    this.actions = actions;
    this.jobs = new Map();
    this.sheets = new Map();
    this.shown = undefined; // null: it shows that there is nothing
    this.stages = this.enlargers = [];
  }

  // All jobs anew, as the server has them.
  set(jobs) {
    this.jobs = new Map(jobs.map(job => [job.id, job]));
    this.render();
  }

  // A job is new, or its state is.
  update(job) {
    this.jobs.set(job.id, job);
    this.render();
  }

  // A picture has gone a step.
  step({ job: id, number, ...progress }) {
    const job = this.jobs.get(id);
    if (!job) return;
    job.progress[number] = progress;
    if (job !== this.shown) this.render();
    this.sheets.get(`${id} ${number}`)?.step(progress);
    this.#tellTime(job);
  }

  picture({ job: id, number, picture }) {
    const job = this.jobs.get(id);
    if (!job) return;
    job.pictures[number] = picture;
    this.sheets.get(`${id} ${number}`)?.finish(picture);
  }

  // The one that is drawn; else the one drawn last.
  #current() {
    const jobs = [...this.jobs.values()];
    const drawn = jobs.filter(job => Object.keys(job.pictures).length || job.error || job.id === this.shown?.id);
    return jobs.find(job => job.state === "drawing") ?? jobs.find(job => job.state === "waiting") ?? drawn.at(-1) ?? null;
  }

  render() {
    const job = this.#current();
    if (this.shown === undefined || job?.id !== this.shown?.id) this.#lay(job);
    this.shown = job;
    if (job) this.#tell(job);
    const waiting = [...this.jobs.values()].filter(other => other.state === "waiting" && other !== job);
    $("queue").replaceChildren(...waiting.map(other => this.#row(other)));
  }

  #lay(job) {
    this.sheets.clear();
    $("now").classList.toggle("one", !job || job.numbers.length === 1);
    if (!job) {
      $("now").replaceChildren(el("div", { className: "empty" }, el("b", { textContent: "What shall we draw?" }),
        "Describe it on the left, and watch it grow from noise to a picture."));
      this.bar = null;
      return;
    }
    for (const number of job.numbers) this.sheets.set(`${job.id} ${number}`, new Sheet(job, this));
    $("now").replaceChildren(...[...this.sheets.values()].map(sheet => sheet.node));
    job.numbers.forEach(number => {
      const sheet = this.sheets.get(`${job.id} ${number}`);
      if (job.pictures[number]) sheet.finish(job.pictures[number]);
      else if (job.progress[number]) sheet.step(job.progress[number]);
    });
    this.bar?.remove();
    this.bar = el("div", { className: "caption" });
    $("now").after(this.bar);
  }

  #tell(job) {
    const over = !["waiting", "drawing"].includes(job.state);
    for (const [number, picture] of Object.entries(job.pictures)) this.sheets.get(`${job.id} ${number}`)?.finish(picture);
    if (over) for (const sheet of this.sheets.values()) sheet.settle();
    const stopping = el("button", { type: "button", className: "stop", disabled: job.stopping,
                                    textContent: job.stopping ? "Stopping…" : "Stop", onclick: trying(() => stop(job)) });
    this.time = el("small");
    const prompt = el("span", { className: "grow" }, el("b", { textContent: titleOf(job), title: job.asked.prompt }), this.time);
    this.bar.replaceChildren(prompt, ...(over ? [] : [stopping]));
    this.bar.classList.toggle("wrong", Boolean(job.error));
    this.#tellTime(job);
  }

  #tellTime(job) {
    if (job !== this.shown || !this.time) return;
    this.time.textContent = job.error || this.#said(job);
  }

  #said(job) {
    if (job.state === "waiting") return "Waits for its turn";
    if (job.trace) return `Every step is kept · seed ${job.asked.seed}`;
    if (job.state === "stopped") return `Stopped · seed ${job.asked.seed}`;
    if (job.state !== "drawing") return `Seed ${job.asked.seed}`;
    const [number, progress] = Object.entries(job.progress)[0] ?? [];
    if (!progress) return "Reading the prompt";
    const { stage, step, steps, seconds_left: left } = progress;
    const { resolution } = [...this.stages, ...this.enlargers].find(own => own.name === stage) ?? { resolution: stage };
    const many = job.numbers.length > 1 ? `Picture ${job.numbers.indexOf(Number(number)) + 1} of ${job.numbers.length} · ` : "";
    const rest = left === null ? "" : ` · ${duration(left)} left`;
    return `${many}${resolution} px, step ${step + 1} of ${steps}${rest}`;
  }

  #row(job) {
    const count = job.numbers.length;
    const off = iconButton("close", `Do not draw “${job.asked.prompt}”`, trying(() => stop(job)));
    const many = count > 1 ? el("small", { textContent: `${count} pictures` }) : null;
    return el("li", {}, el("span", { className: "grow", textContent: titleOf(job) }), many, off);
  }
}

const titleOf = job => job.asked.prompt || `Enlarge to ${job.asked.to} px`;

// One picture on the easel, from noise to its file.
class Sheet {
  constructor(job, { stages, enlargers, actions }) {
    this.stages = job.asked.to ? enlargers : stages.filter(stage => !job.asked.until || stage.resolution <= job.asked.until);
    this.actions = actions;
    this.image = el("img", { alt: `Being drawn: ${job.asked.prompt}`, hidden: true });
    this.paper = el("button", { type: "button", className: "paper waits", disabled: true }, this.image);
    this.paper.setAttribute("aria-label", `Being drawn: ${job.asked.prompt}`);
    this.paper.style.aspectRatio = `${job.size.width} / ${job.size.height}`;
    this.bars = this.stages.map(() => el("b"));
    this.track = el("div", { className: "track" }, ...this.bars.map(bar => el("span", {}, bar)));
    this.node = el("div", { className: "sheet" }, this.paper, this.track);
  }

  step({ stage, step, steps, preview }) {
    if (this.finished) return;
    this.paper.classList.remove("waits");
    if (preview) this.#show(preview);
    const at = this.stages.findIndex(own => own.name === stage);
    this.bars.forEach((bar, place) => {
      bar.style.width = `${place < at ? 100 : place > at ? 0 : 100 * (step + 1) / steps}%`;
    });
  }

  // The file takes the preview's place once it is decoded, so that nothing flickers.
  async finish(picture) {
    if (this.finished === picture.id) return;
    this.finished = picture.id;
    this.settle();
    const { open } = this.actions;
    Object.assign(this.paper, { disabled: false, onclick: () => open(picture) });
    this.paper.setAttribute("aria-label", `Look at: ${picture.prompt}`);
    this.paper.style.aspectRatio = `${picture.width} / ${picture.height}`;
    const whole = el("img", { src: fileOf(picture), alt: picture.prompt });
    await whole.decode().catch(() => undefined);
    this.image.replaceWith(whole);
    this.image = whole;
  }

  // Nothing more comes: what was not begun when it was stopped goes.
  settle() {
    this.track.remove();
    this.paper.classList.remove("waits");
    this.node.hidden = this.image.hidden && !this.finished;
  }

  #show(source) {
    this.image.hidden = false;
    this.image.src = source;
  }
}
