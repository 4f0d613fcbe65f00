// What went wrong, in the page's words, followed by the server's own where these tell more.

import { t } from "/static/words.js";

const TELLS_MORE = new Set(["context", "model", "forbidden", "invalid", "failed", "busy"]);

export function failureText({ kind, message }) {
  const words = t(`is.${kind ?? "failed"}`);
  return TELLS_MORE.has(kind ?? "failed") && message ? `${words} ${message}` : words;
}
