// The page: its parts, and what goes from one to another.

import { ask, askMatrix, askedOf, call, follow, read } from "./api.mjs";
import { Comparison } from "./compare.mjs";
import { Composer } from "./composer.mjs";
import { $, el, toast, trying } from "./dom.mjs";
import { Easel } from "./easel.mjs";
import { Gallery } from "./gallery.mjs";
import { Thinking } from "./thinking.mjs";
import { Training } from "./training.mjs";
import { Viewer } from "./viewer.mjs";

const VARIATIONS = 4, VARIED = 0.35; // as many, so far on the way to other noise

const traced = new Set(); // jobs of this tab whose trace is shown as soon as it is there
const thinking = new Thinking();
const comparison = new Comparison();
const gallery = new Gallery({
  onOpen: picture => viewer.open(picture),
  onCompare: (first, second) => comparison.open(first, second),
});
const viewer = new Viewer(gallery, {
  settings: trying(async picture => settle(await askedOf(picture))),
  again: trying(async picture => {
    const { seed, number, ...asked } = await askedOf(picture);
    await draw({ ...asked, num_images_per_prompt: 1 });
  }),
  vary: trying(async picture => {
    const asked = await askedOf(picture);
    for (let count = 0; count < VARIATIONS; count++) {
      await draw({ ...asked, variation: [String(Math.floor(Math.random() * 2 ** 32)), VARIED] });
    }
  }),
  change: picture => start(picture, "whole"),
  enlarge: picture => start(picture, "larger"),
  think: trying(async picture => {
    const job = await draw({ ...await askedOf(picture), trace: true });
    traced.add(job.id);
    toast("It is drawn once more, and every step kept.");
  }),
  compare: picture => gallery.choose(picture, true),
  star: picture => gallery.star(picture),
  remove: picture => gallery.remove(picture),
});
const easel = new Easel({ open: picture => viewer.open(picture) });
let composer = null;

async function draw(asked) {
  const job = await ask(asked);
  easel.update(job);
  return job;
}

// A sheet, cell by cell; the seed of the first one is what a lock would keep.
async function drawMatrix({ num_images_per_prompt: _, ...asked }, matrix) {
  const { jobs } = await askMatrix(asked, matrix);
  jobs.forEach(job => easel.update(job));
  return jobs[0];
}

// A picture of the gallery is what the next one starts from.
function start({ id, width, height, prompt }, mode) {
  composer?.start.use({ name: id, width, height }, mode);
  $("prompt").value ||= prompt;
  $("start").scrollIntoView({ block: "nearest", behavior: "smooth" });
  document.querySelector("#start-modes input:checked").focus();
}

function settle(asked) {
  composer?.fill(asked);
  $("prompt").focus();
  toast("The settings of that picture are in the form, its seed kept.");
}

// Other models than the one in use, where there are any.
async function offerModels() {
  const { models } = await call("GET", "/api/models");
  $("models").hidden = models.length < 2;
  $("models").replaceChildren(...models.map(name => el("option", { value: name, textContent: name })));
  $("models").onchange = trying(async () => {
    try {
      await call("PUT", "/api/model", { name: $("models").value });
    } catch (error) {
      $("models").value = models[0];
      throw error;
    }
  });
}

const begin = trying(async () => {
  const card = await call("GET", "/api/model");
  if (composer && card.name !== composer.card.name) { location.reload(); return; } // another one was chosen
  offerModels();
  const adapters = Object.entries(card.adapters).map(([stage, scales]) => `${stage} + adapter × ${scales.join(", ")}`);
  $("model").textContent = [card.name, card.device === "cpu" ? "CPU" : card.device, ...adapters].join(" · ");
  $("model").title = `Licence of the weights: ${card.license}; cascade ${card.version}`;
  Object.assign(easel, { stages: card.stages, enlargers: card.enlargers });
  if (!composer) composer = new Composer(card, trying(async () => {
    const matrix = composer.matrix();
    composer.taken(matrix.length ? await drawMatrix(composer.asked(), matrix) : await draw(composer.asked()));
    $("easel").scrollIntoView({ block: "nearest", behavior: "smooth" });
  }));
  easel.render();
});

follow({
  state({ jobs, ready, error }) {
    $("model").textContent = error || (ready ? $("model").textContent : "Loading the model…");
    $("model").classList.toggle("bad", Boolean(error));
    if (error) offerModels();
    if (ready) begin().then(() => easel.set(jobs));
    gallery.reload();
  },
  model: ({ error }) => {
    $("model").textContent = error;
    $("model").classList.toggle("bad", Boolean(error));
    if (!error) begin();
    else offerModels();
  },
  job(job) {
    easel.update(job);
    if (job.trace && traced.delete(job.id)) trying(() => thinking.open(job.trace))();
  },
  step: step => easel.step(step),
  picture: news => { easel.picture(news); gallery.add(news.picture); },
  lost() {
    $("model").textContent = "The server does not answer.";
    $("model").classList.add("bad");
  },
});

// --- a picture that is dropped, pasted or chosen gives its settings back; one that has none is a start

const take = trying(async file => {
  if (!file) return;
  try {
    settle(await read(file));
  } catch (error) {
    if (error.code !== "no_recipe" || !composer) throw error;
    await composer.start.take(file);
    toast("That picture holds no settings; it is now the one to change.");
  }
});
$("read-button").onclick = () => $("read-file").click();
$("read-file").onchange = () => { take($("read-file").files[0]); $("read-file").value = ""; };
const holdsFile = event => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", event => {
  if (!holdsFile(event)) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", event => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
addEventListener("drop", event => {
  $("drop").classList.remove("over");
  if (!holdsFile(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
addEventListener("paste", event => { if (event.clipboardData.files.length) take(event.clipboardData.files[0]); });

new Training();

// --- colours

const THEMES = { "": "as the system", light: "light", dark: "dark" };
function colour(theme) {
  document.documentElement.dataset.theme = theme;
  const title = `Colours: ${THEMES[theme]}`;
  $("theme-button").title = title;
  $("theme-button").setAttribute("aria-label", title);
  localStorage.setItem("theme", theme);
}
$("theme-button").onclick = () => {
  const names = Object.keys(THEMES);
  colour(names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length]);
};
colour(localStorage.getItem("theme") in THEMES ? localStorage.getItem("theme") : "");
