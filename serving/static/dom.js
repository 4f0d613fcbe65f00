// Elements from plain values. Text is always text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element: h("button", { class: "quiet", onclick: send }, "Send"). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return an element of SVG. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return an icon of the page's sheet (index.html). */
export function icon(name) {
  const use = svg("use", { href: `#${name}` });
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, use);
}

/** Return a button that is an icon; its label is read aloud and shown as a hint. */
export function iconButton(name, label, onclick, attributes = {}) {
  const shown = { type: "button", class: "icon-button", "aria-label": label, title: label };
  return h("button", { ...shown, onclick, ...attributes }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Return a function that runs `action` once, when it has not been called for a while. */
export function debounced(action, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}

/** Copy a text; browsers allow it on secure and local pages, elsewhere by an old way. */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = h("textarea", { class: "hidden-visually" });
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** Tell those who hear the page instead of seeing it. */
export function announce(text) {
  byId("announcer").textContent = text;
}

let hide;

/** Show a line for some seconds, with an action at most: notice("Deleted", "Undo", undo). */
export function notice(text, label, action) {
  const line = byId("notice");
  const act = () => {
    line.hidden = true;
    action();
  };
  line.replaceChildren(text, label ? h("button", { type: "button", onclick: act }, label) : "");
  line.hidden = false;
  clearTimeout(hide);
  hide = setTimeout(() => (line.hidden = true), label ? 8000 : 4000);
}
