// Failures in the page's language, followed by the server's message where it adds details.

import { byId } from "./dom.js";
import { t } from "./words.js";

const TELLS_MORE = new Set(["context", "model", "forbidden", "invalid", "failed", "busy"]);

/** Show a failure in an element, or hide the element. */
export function showFailure(id, error) {
  byId(id).textContent = error ? failureText(error) : "";
  byId(id).hidden = !error;
}

export function failureText({ kind, message }) {
  const words = t(`is.${kind ?? "failed"}`);
  return TELLS_MORE.has(kind ?? "failed") && message ? `${words} ${message}` : words;
}
