// The part of the browser that the page's pure modules need: elements, storage, a language.

class Element {
  constructor(tag) {
    this.tagName = tag.toUpperCase();
    this.attributes = {};
    this.childNodes = [];
    this.listeners = {};
  }
  get children() {
    return this.childNodes.filter((node) => node instanceof Element);
  }
  get lastChild() {
    return this.childNodes.at(-1);
  }
  get textContent() {
    return this.childNodes.map((node) => node.textContent ?? node).join("");
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
  }
  addEventListener(name, action) {
    this.listeners[name] = action;
  }
  append(...nodes) {
    for (const node of nodes) {
      if (node instanceof Element) node.parent = this;
      this.childNodes.push(node);
    }
  }
  replaceWith(node) {
    node.parent = this.parent;
    this.parent.childNodes[this.parent.childNodes.indexOf(this)] = node;
  }
  remove() {
    this.parent.childNodes.splice(this.parent.childNodes.indexOf(this), 1);
  }
}

class Storage {
  #items = new Map();
  isFull = false;
  get length() {
    return this.#items.size;
  }
  key(i) {
    return [...this.#items.keys()][i];
  }
  getItem(name) {
    return this.#items.get(name) ?? null;
  }
  setItem(name, value) {
    if (this.isFull) throw new Error("QuotaExceededError");
    this.#items.set(name, value);
  }
  removeItem(name) {
    this.#items.delete(name);
  }
}

globalThis.document = {
  documentElement: { lang: "en" },
  createElement: (tag) => new Element(tag),
  createElementNS: (_, tag) => new Element(tag),
};
globalThis.localStorage = new Storage();
globalThis.sessionStorage = new Storage();

/** Return an empty element. */
export const container = () => document.createElement("div");

/** Return an element and all below it. */
export function everything(element) {
  return [element, ...element.children.flatMap(everything)];
}
