// A row of choices of which one holds.

import { $, el } from "./dom.mjs";

// choices: [value, label, shape drawn before it].
export function segments(id, name, choices, value) {
  $(id).replaceChildren(...choices.map(([own, label, shape]) => {
    const input = el("input", { type: "radio", name, value: own, checked: own === value });
    return el("label", {}, input, el("span", {}, shape ? el("i", { className: shape }) : null, label));
  }));
}

export const chosen = name => document.querySelector(`input[name="${name}"]:checked`)?.value ?? null;

export function choose(name, value) {
  for (const input of document.querySelectorAll(`input[name="${name}"]`)) input.checked = input.value === value;
}
