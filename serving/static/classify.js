// Classification: labels with bars, the most probable first. The labels of a language model are
// options that the user enters.

import { fetchJson } from "./api.js";
import { byId, debounced, examples, h, onControlEnter, track } from "./dom.js";
import { showFailure } from "./failures.js";
import { model, modelId } from "./models.js";
import { load, save } from "./store.js";
import { number, percent, t } from "./words.js";

const NAMES = { "classify-text": "nanogpt.classified", "classify-options": "nanogpt.options" };
const PAUSE_MS = 400; // after the last keystroke, before the text is classified

let open = null; // the pending request
let shown = null;

export function startClassify() {
  const later = debounced(classify, PAUSE_MS);
  for (const [id, name] of Object.entries(NAMES)) {
    const field = byId(id);
    field.value = load(name, "");
    field.oninput = () => {
      save(name, field.value);
      later();
    };
    onControlEnter(field, classify);
  }
  byId("classify-go").onclick = classify;
}

/** Render in another language or for another model. */
export function showClassify(isAnother) {
  if (isAnother || !(shown || open)) classify();
  else render();
}

const text = () => byId("classify-text").value;
const options = () => byId("classify-options").value.split("\n").filter(Boolean);

/** Begin with an example: a text, and options after "|". */
function begin(line) {
  const [first, ...others] = line.split("|");
  byId("classify-text").value = first;
  if (others.length) byId("classify-options").value = others.join("\n");
  classify();
}

async function classify() {
  open?.abort();
  open = null;
  showFailure("classify-failure");
  let found = null;
  if (text().trim() && model() && (model().labels || options().length > 1) && !byId("classify").hidden) {
    const sent = (open = new AbortController());
    render();
    try {
      found = await scored(sent.signal);
    } catch (error) {
      if (open === sent) showFailure("classify-failure", error);
    }
    if (open !== sent) return;
    open = null;
  }
  shown = found;
  render();
}

/** Return the probabilities of labels or options, the number of tokens and milliseconds. */
async function scored(signal) {
  const began = performance.now();
  const criteria = Object.fromEntries(options().map((option) => [option, null]));
  const [path, body] = model().labels
    ? ["v1/classify", { input: text() }]
    : ["v1/systemone", { state: text(), questions: { next: { type: "choice", criteria } } }];
  const { data, answers, usage } = await fetchJson(path, { model: modelId(), ...body }, signal);
  const { probabilities } = data?.[0] ?? answers.next;
  const tokens = usage.prompt_tokens ?? usage.input_tokens;
  return { probabilities, tokens, took: performance.now() - began };
}

function render() {
  const hasLabels = Boolean(model()?.labels);
  const ranked = Object.entries(shown?.probabilities ?? {}).sort((one, other) => other[1] - one[1]);
  const tries = text().trim() ? "" : examples(t(hasLabels ? "classifyTry" : "choiceTry"), begin);
  byId("choice").hidden = hasLabels;
  byId("labels").classList.toggle("waiting", open !== null);
  byId("labels").replaceChildren(...ranked.map(bar), tries);
  const facts = shown && [
    t("tokens", { n: number(shown.tokens) }),
    t("took", { n: number(shown.took) }),
  ];
  byId("classify-meter").textContent = facts ? facts.join(" · ") : "";
}

function bar([label, probability], place) {
  const words = t("labelIs", { label, percent: percent(probability) });
  return h(
    "div",
    { class: place ? "label" : "label first", role: "img", "aria-label": words },
    h("span", { class: "name", dir: "auto" }, label),
    h("span", { class: "share" }, percent(probability)),
    track(probability),
  );
}
