// Answers in JSON.

import { t } from "./words.js";

const TOKEN = /"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g;
const MAX_INDENT = 20; // levels

/** Return a JSON text in indented lines, its literals unchanged; null for any other text. */
export function indented(text) {
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  let lines = "";
  let before = "";
  let depth = 0;
  for (const token of text.match(TOKEN)) {
    const [isFirst, isEnd] = [/[{[]/.test(before[0]), /[}\]]/.test(token[0])];
    if (isEnd) depth--;
    if (before === "," || isFirst !== isEnd) lines += `\n${"  ".repeat(Math.min(depth, MAX_INDENT))}`;
    lines += token === ":" ? ": " : token;
    if (/[{[]/.test(token[0])) depth++;
    before = token;
  }
  return lines;
}

/** Return whether an answer is whole JSON, in words. */
export const verdict = (text) => t(indented(text) === null ? "notJson" : "isJson");
