// Classification: labels with bars, the most probable first.

import { fetchJson } from "./api.js";
import { byId, debounced, examples, h, onControlEnter } from "./dom.js";
import { showFailure } from "./failures.js";
import { modelId } from "./models.js";
import { load, save } from "./store.js";
import { number, percent, t } from "./words.js";

const NAME = "nanogpt.classified";
const PAUSE_MS = 400; // after the last keystroke, before the text is classified

let open = null; // the pending request
let shown = null;

export function startClassify() {
  const field = byId("classify-text");
  field.value = load(NAME, "");
  const later = debounced(classify, PAUSE_MS);
  field.oninput = () => {
    save(NAME, field.value);
    later();
  };
  onControlEnter(field, classify);
  byId("classify-go").onclick = classify;
}

/** Render in another language or for another model. */
export function showClassify(isAnother) {
  if (isAnother) {
    shown = null;
    classify();
  }
  render();
}

function begin(text) {
  byId("classify-text").value = text;
  classify();
}

async function classify() {
  open?.abort();
  const input = byId("classify-text").value;
  const began = performance.now();
  showFailure("classify-failure");
  if (!input.trim() || byId("classify").hidden) {
    shown = null;
    render();
    return;
  }
  open = new AbortController();
  try {
    const body = { model: modelId(), input };
    const { data, usage } = await fetchJson("v1/classify", body, open.signal);
    shown = { ...data[0], tokens: usage.prompt_tokens, took: performance.now() - began };
    render();
  } catch (error) {
    if (error.name !== "AbortError") showFailure("classify-failure", error);
  }
}

function render() {
  const ranked = Object.entries(shown?.probabilities ?? {}).sort((one, other) => other[1] - one[1]);
  const isEmpty = !byId("classify-text").value.trim();
  byId("labels").replaceChildren(...ranked.map(bar), isEmpty ? examples(t("classifyTry"), begin) : "");
  const facts = shown && [
    t("tokens", { n: number(shown.tokens) }),
    t("took", { n: number(shown.took) }),
  ];
  byId("classify-meter").textContent = facts ? facts.join(" · ") : "";
}

function bar([label, probability], place) {
  const fill = h("span", { class: "fill" });
  fill.style.width = `${100 * probability}%`;
  const words = t("labelIs", { label, percent: percent(probability) });
  return h(
    "div",
    { class: place ? "label" : "label first", role: "img", "aria-label": words },
    h("span", { class: "name", dir: "auto" }, label),
    h("span", { class: "share" }, percent(probability)),
    h("span", { class: "track" }, fill),
  );
}
