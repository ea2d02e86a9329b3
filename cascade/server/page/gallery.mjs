// The gallery: everything drawn, the newest first, loaded as one scrolls.

import { call, remove, restore, star, thumbnailOf } from "./api.mjs";
import { $, el, icon, iconButton, isPressed, press, toast, trying } from "./dom.mjs";

export class Gallery {
  // onOpen: called with a picture. onCompare: with two of them.
  constructor({ onOpen, onCompare }) {
    Object.assign(this, { onOpen, onCompare, pictures: [], tiles: new Map(), chosen: [], complete: false });
    let timer;
    $("search").oninput = () => { clearTimeout(timer); timer = setTimeout(() => this.reload(), 200); };
    $("starred").onclick = () => { press($("starred"), !isPressed($("starred"))); this.reload(); };
    new IntersectionObserver(([end]) => { if (end.isIntersecting) this.more(); }, { rootMargin: "600px" })
      .observe($("end"));
  }

  reload = trying(async () => {
    this.round = (this.round ?? 0) + 1;
    Object.assign(this, { pictures: [], complete: false, loading: false });
    this.tiles.clear();
    $("pictures").replaceChildren();
    await this.more();
  });

  more = trying(async () => {
    if (this.loading || this.complete) return;
    this.#load(true);
    const round = this.round;
    const query = new URLSearchParams({ search: $("search").value, starred: isPressed($("starred")) });
    if (this.pictures.length) query.set("before", this.pictures.at(-1).id);
    try {
      const page = await call("GET", `/api/pictures?${query}`);
      if (round !== this.round) return; // another search has begun
      const fresh = page.pictures.filter(picture => !this.tiles.has(picture.id));
      this.pictures.push(...fresh);
      $("pictures").append(...fresh.map(picture => this.#tile(picture)));
      this.complete = page.pictures.length === 0;
      this.#count(page.total);
    } finally {
      if (round === this.round) this.#load(false);
    }
  });

  #load(loading) {
    this.loading = loading;
    $("pictures").setAttribute("aria-busy", loading);
  }

  // A picture was drawn.
  add(picture) {
    if (this.tiles.has(picture.id)) return;
    if ($("search").value || isPressed($("starred"))) return;
    this.pictures.unshift(picture);
    $("pictures").prepend(this.#tile(picture));
    this.#count(this.total + 1);
  }

  find(id) { return this.pictures.find(picture => picture.id === id) ?? null; }

  // The picture before or after another.
  neighbour(picture, by) {
    const place = this.pictures.findIndex(other => other.id === picture.id);
    if (place + by >= this.pictures.length - 6) this.more();
    return place < 0 ? null : this.pictures[place + by] ?? null;
  }

  star = trying(async picture => {
    const { starred } = await star(picture);
    for (const own of [picture, this.find(picture.id)]) if (own) own.starred = starred;
    const button = this.tiles.get(picture.id)?.querySelector(".mark-star");
    if (button) press(button, starred);
    return starred;
  });

  remove = trying(async picture => {
    await remove(picture);
    this.choose(picture, false);
    const place = this.pictures.findIndex(own => own.id === picture.id);
    if (place >= 0) this.pictures.splice(place, 1);
    this.tiles.get(picture.id)?.remove();
    this.tiles.delete(picture.id);
    this.#count(this.total - 1);
    const undo = trying(async () => { await restore(picture); await this.reload(); });
    toast("Deleted.", { label: "Undo", act: undo }, 10);
  });

  // Mark a picture for comparison; the second one opens it.
  choose(picture, chosen = !this.chosen.some(other => other.id === picture.id)) {
    this.chosen = this.chosen.filter(other => other.id !== picture.id);
    if (chosen) this.chosen.push(picture);
    if (this.chosen.length === 2) {
      this.onCompare(...this.chosen);
      this.chosen = [];
    }
    for (const [id, tile] of this.tiles) {
      press(tile.querySelector(".mark-compare"), this.chosen.some(other => other.id === id));
    }
    $("selection").hidden = !this.chosen.length;
    const off = () => this.chosen.length && this.choose(this.chosen[0], false);
    $("selection").replaceChildren("Choose a second picture to compare",
      el("button", { type: "button", textContent: "Cancel", onclick: off }));
  }

  #tile(picture) {
    const image = el("img", { src: thumbnailOf(picture), alt: picture.prompt, loading: "lazy", decoding: "async" });
    const open = el("button", { type: "button", title: picture.prompt, onclick: () => this.onOpen(picture) }, image);
    const compare = iconButton("compare", "Compare", () => this.choose(picture), "mark-compare");
    const mark = iconButton("star", "Star", () => this.star(picture), "mark-star");
    press(mark, picture.starred);
    press(compare, false);
    const tile = el("div", { className: "tile" }, open, compare, mark);
    this.tiles.set(picture.id, tile);
    return tile;
  }

  #count(total) {
    this.total = total;
    $("total").textContent = total ? total.toLocaleString("en") : "";
    const searched = $("search").value || isPressed($("starred"));
    $("nothing").hidden = this.pictures.length > 0;
    $("nothing").textContent = searched ? "Nothing found." : "What you draw is kept here.";
  }
}
