// Markdown as elements. The text is untrusted: it is never parsed as HTML and loads nothing; links
// are http, https and mailto only. Images become links.

import { copy, h, icon } from "./dom.js";
import { t } from "./words.js";

const MAX_NESTED = 6;
const MAX_INLINE = 10_000; // characters of a paragraph that are parsed
const MAX_SPAN = 1000; // characters between an opening and a closing mark
const FENCE = /^ {0,3}(```+|~~~+)\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)])(?: +|$)/;
const TABLE_LINE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const PAIRS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const WEB = /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}]/i;
const SAFE = /^(?:https?:\/\/|mailto:)[^\s]+$/i;

/** Render a text in a container; unchanged blocks are reused. */
export function show(container, text) {
  const blocks = toBlocks(text.split("\n"));
  const before = container.sources ?? [];
  blocks.forEach(({ source, build }, i) => {
    if (before[i] === source) return;
    const element = build();
    if (container.children[i]) container.children[i].replaceWith(element);
    else container.append(element);
  });
  while (container.children.length > blocks.length) container.lastChild.remove();
  container.sources = blocks.map(({ source }) => source);
}

/** Return the blocks: the text of each and how to build it. */
function toBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [end, build] = block(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return blocks;
}

/** Return the end of the block that begins at a line, and how to build it. */
function block(lines, at, depth) {
  const line = lines[at];
  const nests = depth < MAX_NESTED;
  if (FENCE.test(line)) return fence(lines, at);
  if (HEADING.test(line)) return [at + 1, () => heading(line)];
  if (RULE.test(line)) return [at + 1, () => h("hr")];
  if (nests && QUOTE.test(line)) return quote(lines, at, depth);
  if (nests && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "")) return table(lines, at);
  const end = until(lines, at + 1, (next) => !next.trim() || begins(next));
  return [end, () => h("p", { dir: "auto" }, inline(lines.slice(at, end).join("\n")))];
}

const begins = (line) =>
  [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));

function until(lines, at, ends) {
  while (at < lines.length && !ends(lines[at])) at++;
  return at;
}

function heading(line) {
  const [, marks, text] = HEADING.exec(line);
  // Below the page's own headings.
  return h(`h${Math.min(6, marks.length + 2)}`, { dir: "auto" }, inline(text));
}

function fence(lines, at) {
  const [, mark, language] = FENCE.exec(lines[at]);
  const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  const end = until(lines, at + 1, closes);
  const code = lines.slice(at + 1, end).join("\n");
  return [Math.min(end + 1, lines.length), () => codeBlock(code, language.trim().slice(0, 30))];
}

/** Return a text as it is, under a title. */
export function codeBlock(code, title) {
  const button = h("button", { class: "quiet" }, icon("i-copy"), t("copy"));
  button.onclick = async () => {
    await copy(code);
    button.lastChild.textContent = t("copied");
  };
  const head = h("figcaption", {}, h("span", {}, title), button);
  const body = h("pre", { tabindex: "0" }, h("code", { dir: "ltr" }, code));
  return h("figure", { class: "code" }, head, body);
}

function quote(lines, at, depth) {
  const end = until(lines, at, (line) => !QUOTE.test(line));
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end, () => h("blockquote", {}, built(inner, depth + 1))];
}

function list(lines, at, depth) {
  const [, indent, number] = ITEM.exec(lines[at]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    const isItem = found && found[1].length <= indent.length + 1;
    if (isItem && (found[2] === undefined) !== (number === undefined)) break;
    if (isItem) items.push([lines[end].slice(found[0].length)]);
    else if (!lines[end].trim()) {
      if (!continues(lines[end + 1], indent)) break;
      items.at(-1).push("");
    } else if (/^ {2,}/.test(lines[end].slice(indent.length)) || !begins(lines[end])) {
      items.at(-1).push(lines[end].slice(indent.length).replace(/^ {1,4}/, ""));
    } else break;
    end++;
  }
  const tag = number === undefined ? "ul" : "ol";
  const build = () => {
    const entries = items.map((item) => h("li", { dir: "auto" }, built(item, depth + 1)));
    return h(tag, { start: number }, entries);
  };
  return [end, build];
}

/** Return whether a list continues after an empty line. */
function continues(line, indent) {
  if (line === undefined || !line.trim()) return false;
  return ITEM.test(line) || line.startsWith(`${indent}  `);
}

function built(lines, depth) {
  const elements = toBlocks(lines, depth).map(({ build }) => build());
  // An item of one paragraph has no <p>.
  return elements.length === 1 && elements[0].tagName === "P"
    ? [...elements[0].childNodes]
    : elements;
}

function table(lines, at) {
  const end = until(lines, at + 2, (line) => !line.includes("|") || !line.trim());
  const build = () => {
    const row = (line, tag) =>
      h("tr", {}, cells(line).map((cell) => h(tag, { dir: "auto" }, inline(cell))));
    const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
    const whole = h("table", {}, h("thead", {}, row(lines[at], "th")), h("tbody", {}, body));
    return h("div", { class: "scrolls", tabindex: "0" }, whole);
  };
  return [end, build];
}

const cells = (line) =>
  line
    .trim()
    .replace(/^\||\|$/g, "")
    .split("|")
    .map((cell) => cell.trim());

/** Return the texts and elements of a paragraph. */
function inline(text, depth = 0) {
  if (text.length > MAX_INLINE || depth > MAX_NESTED) return [text];
  const nodes = [];
  let plain = "";
  let at = 0;
  const add = (node, length) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
    at += length;
  };
  while (at < text.length) {
    const found = "\\`![*_~h".includes(text[at].toLowerCase()) && span(text, at, depth);
    if (found) add(...found);
    else plain += text[at++];
  }
  return plain ? [...nodes, plain] : nodes;
}

/** Return the element at a position and its length there, or null. */
function span(text, at, depth) {
  const here = text[at];
  if (here === "\\") {
    return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? [text[at + 1], 2] : null;
  }
  if (here === "`") return code(text, at);
  if (here === "[" || text.startsWith("![", at)) return link(text, at, depth);
  if (here === "h" || here === "H") return address(text, at);
  return emphasis(text, at, depth);
}

function code(text, at) {
  const [mark] = /^`+/.exec(text.slice(at, at + 20));
  const end = text.indexOf(mark, at + mark.length);
  if (end < 0) return null;
  return [h("code", { dir: "ltr" }, text.slice(at + mark.length, end)), end + mark.length - at];
}

function link(text, at, depth) {
  const opens = text.indexOf("[", at);
  const middle = text.indexOf("](", opens);
  const end = middle < 0 ? -1 : text.indexOf(")", middle);
  if (end < 0 || end - opens > 2 * MAX_SPAN) return null;
  const label = text.slice(opens + 1, middle);
  const [url] = text.slice(middle + 2, end).trim().split(/\s/);
  if (!SAFE.test(url) || label.includes("[")) return null;
  return [anchor(url, inline(label || url, depth + 1)), end + 1 - at];
}

function address(text, at) {
  if (!/^http/i.test(text.slice(at, at + 4)) || /\w/.test(text[at - 1] ?? "")) return null;
  const found = WEB.exec(text.slice(at, at + 2000));
  return found && [anchor(found[0], [found[0]]), found[0].length];
}

const anchor = (href, label) =>
  h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, label);

function emphasis(text, at, depth) {
  for (const [mark, tag] of PAIRS) {
    if (!text.startsWith(mark, at)) continue;
    const end = closing(text, at, mark);
    if (end < 0) continue;
    const inner = inline(text.slice(at + mark.length, end), depth + 1);
    return [h(tag, {}, inner), end + mark.length - at];
  }
  return null;
}

/** Return the position of the closing mark, or -1; snake_case opens none. */
function closing(text, at, mark) {
  const begin = at + mark.length;
  const isWord = (character) => /[\p{L}\p{N}]/u.test(character ?? "");
  if (/\s/.test(text[begin] ?? " ")) return -1;
  if (mark[0] === "_" && isWord(text[at - 1])) return -1;
  for (let end = text.indexOf(mark, begin + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    if (end - at > MAX_SPAN) return -1;
    const after = text[end + mark.length];
    const doubled = mark.length === 1 && (after === mark || text[end - 1] === mark);
    const inWord = mark[0] === "_" && isWord(after);
    if (!doubled && !inWord && !/[\s\\]/.test(text[end - 1])) return end;
  }
  return -1;
}
