// The models of the server, and the one that is talked to.

import { ask } from "/static/api.js";
import { byId, h } from "/static/dom.js";
import { number, t } from "/static/words.js";

let models = [];
let details = null; // of the chosen model
let described = ""; // model and weights that the details are of
let chosen = new URLSearchParams(location.search).get("model");
let listener = () => {};

export const model = () => details;
export const modelId = () => details?.id;

/** Return the mode that a model was trained for. */
export function modeOf(found) {
  if (found.labels) return "classify";
  return found.template === "plain" ? "complete" : "chat";
}

/** Call `action(details, isAnother)` when there is a model, another one, or new weights of it. */
export function onModel(action) {
  listener = action;
  byId("models").addEventListener("change", (event) => choose(event.target.value));
}

/** Ask for the models; choose one where none is chosen yet. Return how many there are. */
export async function refresh() {
  models = (await ask("/v1/models")).data;
  const known = models.find(({ id, aliases }) => id === chosen || aliases.includes(chosen));
  const best = known ?? models.find((found) => found.default) ?? models[0];
  showPicker(best?.id);
  if (best && described !== `${best.id} ${best.created}`) await describe(best.id);
  return models.length;
}

export async function choose(id) {
  const address = new URL(location.href);
  address.searchParams.set("model", id);
  history.replaceState(null, "", address);
  chosen = id;
  showPicker(id);
  await describe(id);
}

async function describe(id) {
  byId("about").textContent = t("loading", { model: id });
  let found;
  try {
    found = await ask(`/v1/models/${encodeURIComponent(id)}`);
  } finally {
    showAbout();
  }
  const isAnother = found.id !== details?.id;
  details = found;
  described = `${id} ${found.created}`;
  showAbout();
  listener(found, isAnother);
}

function showPicker(id) {
  const picker = byId("models");
  const ids = models.map((found) => found.id);
  if (ids.join("\n") !== [...picker.options].map((option) => option.value).join("\n")) {
    picker.replaceChildren(...ids.map((name) => h("option", { value: name }, name)));
  }
  if (id) picker.value = id;
  picker.disabled = !ids.length;
}

/** Tell what the chosen model is. */
export function showAbout() {
  const about = byId("about");
  if (!details) {
    about.textContent = "";
    return;
  }
  const size = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const facts = [
    t("params", { n: size.format(details.parameters) }),
    t("contextIs", { n: number(details.max_model_len) }),
    t("stepIs", { n: number(details.step) }),
    details.dtype,
  ];
  about.textContent = about.title = facts.join(" · ");
}
