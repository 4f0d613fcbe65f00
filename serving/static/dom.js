// Elements. Text is never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";
const NEAR_END = 80; // pixels

/** Return an element: h("button", { class: "quiet", onclick: send }, "Send"). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (tag === "button") element.type = "button";
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function icon(name) {
  const use = svg("use", { href: `#${name}` });
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, use);
}

export function iconButton(name, label, onclick, attributes = {}) {
  const shown = { class: "icon-button", "aria-label": label, title: label };
  return h("button", { ...shown, onclick, ...attributes }, icon(name));
}

/** Return a button for each line of a text, which is passed to `action`. */
export function examples(lines, action) {
  const button = (text) => h("button", { onclick: () => action(text) }, text);
  return h("div", { class: "actions examples" }, lines.split("\n").map(button));
}

/** Return a bar that is filled up to a share of its width. */
export function track(share) {
  const fill = h("span", { class: "fill" });
  fill.style.width = `${100 * share}%`;
  return h("span", { class: "track" }, fill);
}

/** Run an action that adds to a scroller, and keep its end in view if it was. */
export function following(scroller, action) {
  const { scrollHeight, scrollTop, clientHeight } = scroller;
  action();
  if (scrollHeight - scrollTop - clientHeight < NEAR_END) scroller.scrollTop = scroller.scrollHeight;
}

export const byId = (id) => document.getElementById(id);

/** Return a function that runs `action` after a pause in its calls. */
export function debounced(action, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}

/** Handle keys, except those of an input method (in Safari, its last has keyCode 229). */
export function onKey(target, action, type = "keydown") {
  target.addEventListener(type, (event) => {
    if (!event.isComposing && event.keyCode !== 229) action(event);
  });
}

export function onControlEnter(field, action) {
  onKey(field, (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    action();
  });
}

/** Copy a text; `navigator.clipboard` requires a secure or local page. */
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

/** Announce a text to screen readers. */
export function announce(text) {
  byId("announcer").textContent = text;
}

let hide;

/** Show a line for seconds: notice("Deleted", "Undo", undo). */
export function notice(text, label, action) {
  const line = byId("notice");
  const act = () => {
    line.hidden = true;
    action();
  };
  line.replaceChildren(text, label ? h("button", { onclick: act }, label) : "");
  line.hidden = false;
  clearTimeout(hide);
  hide = setTimeout(() => (line.hidden = true), label ? 8000 : 4000);
}
