// Training runs, followed while the tab is open: curves, grids over time, warnings, time left.

import { call } from "./api.mjs";
import { $, duration, el, trying } from "./dom.mjs";

const EVERY_MILLISECONDS = 5000;
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300, HEIGHT = 130;

export class Training {
  constructor() {
    addEventListener("hashchange", () => this.#turn());
    $("run-grid-at").oninput = () => { this.atNewest = Number($("run-grid-at").value) === this.run.grids.length - 1; this.#showGrid(); };
    this.#turn();
  }

  // The part of the page that the address names.
  #turn() {
    const training = location.hash === "#training";
    $("draw-part").hidden = training;
    $("training-part").hidden = !training;
    for (const [id, here] of [["tab-draw", !training], ["tab-training", training]]) {
      if (here) $(id).setAttribute("aria-current", "page"); else $(id).removeAttribute("aria-current");
    }
    clearInterval(this.timer);
    if (!training) return;
    this.refresh();
    this.timer = setInterval(() => { if (!document.hidden) this.refresh(); }, EVERY_MILLISECONDS);
  }

  refresh = trying(async () => {
    const { folder, runs } = await call("GET", "/api/runs");
    $("no-runs").hidden = runs.length > 0;
    $("no-runs").textContent = `No run in ${folder} yet; \`cascade train\` begins one, --runs names another folder.`;
    if (!runs.some(({ id }) => id === this.chosen)) this.chosen = runs[0]?.id;
    this.#list(runs);
    $("run").hidden = !this.chosen;
    if (this.chosen) this.#show(await call("GET", `/api/runs/${this.chosen}`));
  });

  #list(runs) {
    const focused = document.activeElement?.dataset?.run;
    $("runs").replaceChildren(...runs.map(run => {
      const button = el("button", { type: "button", onclick: () => { this.chosen = run.id; this.atNewest = true; this.refresh(); } },
        el("b", { textContent: run.name }), el("small", { textContent: stateOf(run) }));
      button.dataset.run = run.id;
      button.setAttribute("aria-pressed", String(run.id === this.chosen));
      return el("li", {}, button);
    }));
    if (focused) document.querySelector(`[data-run="${focused}"]`)?.focus();
  }

  #show(run) {
    const another = run.id !== this.run?.id;
    this.run = run;
    $("run-name").textContent = run.name;
    $("run-said").textContent = stateOf(run) + (run.loss === null ? "" : ` · loss ${run.loss.toPrecision(3)}`);
    $("run-progress").value = run.steps ? run.step / run.steps : 0;
    $("run-warnings").replaceChildren(...run.warnings.slice(-5).reverse().map(({ step, text }) => el("li", {}, el("b", { textContent: `Step ${step}: ` }), text)));
    $("run-grid-part").hidden = !run.grids.length;
    $("run-grid-at").max = run.grids.length - 1;
    if (another || (this.atNewest ?? true)) $("run-grid-at").value = run.grids.length - 1;
    if (run.grids.length) this.#showGrid();
    $("run-curves").replaceChildren(...run.panels.map(name => panel(name, run.curves[name])));
  }

  #showGrid() {
    const step = this.run.grids[Number($("run-grid-at").value)];
    const source = `/api/runs/${this.run.id}/grids/${step}`;
    if (!$("run-grid").src.endsWith(source)) $("run-grid").src = source;
    $("run-grid").alt = `Sample pictures after step ${step}`;
    $("run-grid-said").textContent = `after step ${step.toLocaleString("en")}`;
  }
}

function stateOf({ state, step, steps, seconds_left: left }) {
  const at = `step ${step.toLocaleString("en")}${steps ? ` of ${steps.toLocaleString("en")}` : ""}`;
  return { done: `Done, ${at}`, stopped: `Stopped at ${at}`, running: `Training, ${at}${left === null ? "" : ` · ${duration(left)} left`}` }[state];
}

// A curve of [step, value]; losses and norms fall by factors, so their axis is logarithmic.
function panel(name, curve) {
  const values = curve.map(([, value]) => value);
  const logarithmic = /loss|norm/.test(name) && Math.min(...values) > 0;
  const height = value => (logarithmic ? Math.log(value) : value);
  const low = Math.min(...values.map(height)), high = Math.max(...values.map(height));
  const [first, last] = [curve[0][0], curve.at(-1)[0]];
  const x = step => (last > first ? WIDTH * (step - first) / (last - first) : WIDTH / 2);
  const y = value => (high > low ? HEIGHT - HEIGHT * (height(value) - low) / (high - low) : HEIGHT / 2);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `-4 -4 ${WIDTH + 8} ${HEIGHT + 8}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name}: ${told(values[0])} at step ${first}, ${told(values.at(-1))} at step ${last}`);
  const line = document.createElementNS(SVG, curve.length > 1 ? "polyline" : "circle");
  if (curve.length > 1) line.setAttribute("points", curve.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" "));
  else for (const [key, value] of [["cx", x(first)], ["cy", y(values[0])], ["r", 3]]) line.setAttribute(key, value);
  svg.append(line);
  const ends = [Math.max(...values), Math.min(...values)].map(value => el("small", { textContent: told(value) }));
  return el("figure", {}, el("figcaption", {}, el("b", { textContent: name }), el("span", { textContent: told(values.at(-1)) })),
    el("div", { className: "curve" }, svg, ...ends), el("small", { textContent: `step ${first.toLocaleString("en")} to ${last.toLocaleString("en")}${logarithmic ? ", logarithmic" : ""}` }));
}

const told = value => (Math.abs(value) >= 0.001 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2));
