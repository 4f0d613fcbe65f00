// Classification: a text in, its labels with bars out, most probable first.

import { ask } from "/static/api.js";
import { byId, debounced, h } from "/static/dom.js";
import { failureText } from "/static/failures.js";
import { modelId } from "/static/models.js";
import { load, save } from "/static/store.js";
import { number, percent, t } from "/static/words.js";

const NAME = "nanogpt.classified";
const PAUSE_MS = 400; // in writing, after which the text is classified

let open = null; // the request on its way
let shown = null;

export function startClassify() {
  const field = byId("classify-text");
  field.value = load(NAME, "");
  const later = debounced(classify, PAUSE_MS);
  field.addEventListener("input", () => {
    save(NAME, field.value);
    later();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      classify();
    }
  });
  byId("classify-go").addEventListener("click", classify);
}

/** Show what there is in the page's language, or for another model. */
export function showClassify(isAnother) {
  if (isAnother) {
    shown = null;
    classify();
  }
  render();
}

async function classify() {
  open?.abort();
  const input = byId("classify-text").value;
  const began = performance.now();
  byId("classify-failure").hidden = true;
  if (!input.trim() || byId("classify").hidden) {
    shown = null;
    render();
    return;
  }
  open = new AbortController();
  try {
    const body = { model: modelId(), input };
    const { data, usage } = await ask("/v1/classify", body, open.signal);
    shown = { ...data[0], tokens: usage.prompt_tokens, took: performance.now() - began };
    render();
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("classify-failure").textContent = failureText(error);
    byId("classify-failure").hidden = false;
  }
}

function render() {
  const ranked = Object.entries(shown?.probabilities ?? {}).sort((one, other) => other[1] - one[1]);
  byId("labels").replaceChildren(...ranked.map(bar));
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
