// JSON of answers and calls.

import { t } from "./words.js";

const TOKEN = /"(?:[^"\\]|\\.)*"?|[{}[\],:]|[^\s{}[\],:"]+/g;
const MAX_INDENT = 20; // levels

/** Return the value of a JSON text, undefined for any other text. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Return a JSON text, or the beginning of one, in indented lines, its literals unchanged. */
export function indented(text) {
  let lines = "";
  let before = "";
  let depth = 0;
  for (const token of text.match(TOKEN) ?? []) {
    const [isFirst, isEnd] = [/[{[]/.test(before[0]), /[}\]]/.test(token[0])];
    if (isEnd) depth = Math.max(0, depth - 1);
    if (before === "," || isFirst !== isEnd) lines += `\n${"  ".repeat(Math.min(depth, MAX_INDENT))}`;
    lines += token === ":" ? ": " : token;
    if (/[{[]/.test(token[0])) depth++;
    before = token;
  }
  return lines;
}

export const isJson = (text) => parsed(text) !== undefined;

/** Return whether an answer is whole JSON, in words. */
export const verdict = (text) => t(isJson(text) ? "isJson" : "notJson");
