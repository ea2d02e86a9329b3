// Elements, icons, and short messages.

export const $ = id => document.getElementById(id);

export function el(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// A button with an icon; its name is what a screen reader says and a pointer shows.
export function iconButton(name, title, onclick, className = "") {
  const button = el("button", { type: "button", className: `icon ${className}`, title, onclick }, icon(name));
  button.setAttribute("aria-label", title);
  return button;
}

export function press(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

export const isPressed = button => button.getAttribute("aria-pressed") === "true";

// action: {label, act}, such as an undo.
export function toast(text, action = null, seconds = 6) {
  const node = el("div", { className: "toast" }, el("span", { textContent: text }));
  if (action) {
    const act = () => { node.remove(); action.act(); };
    node.append(el("button", { type: "button", textContent: action.label, onclick: act }));
  }
  $("toasts").append(node);
  setTimeout(() => node.remove(), seconds * 1000);
}

// Whatever goes wrong in an action of the user is said, not lost.
export function trying(action) {
  return async (...values) => {
    try {
      return await action(...values);
    } catch (error) {
      toast(error.message, null, 10);
    }
  };
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 3600 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
