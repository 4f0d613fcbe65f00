// The server's models and the selected one.

import { fetchJson, Failure } from "./api.js";
import { byId, h } from "./dom.js";
import { number, t } from "./words.js";

let models = [];
let details = null; // of the selected model
let described = ""; // model and revision of the details
let chosen = new URLSearchParams(location.search).get("model")?.normalize() || null;
let listener = () => {};

export const model = () => details;
export const modelId = () => details?.id;
export const modelName = () => details?.name ?? "";

export function modeOf(found) {
  if (found.labels) return "classify";
  return found.template === "plain" ? "complete" : "chat";
}

/** Call `action(details, isAnother)` when the model or its weights change. */
export function onModel(action) {
  listener = action;
  byId("models").onchange = (event) => choose(event.target.value);
}

/** Fetch the models; select the default if none is; return their number. */
export async function refresh() {
  models = (await fetchJson("v1/models")).data;
  chosen ??= models.find((found) => found.default)?.id ?? models[0]?.id;
  const known = models.find(({ id, aliases }) => id === chosen || aliases.includes(chosen));
  showPicker(known?.id);
  if (models.length && !known) throw new Failure("model", t("chooseModel", { model: chosen }));
  if (known && described !== `${known.id} ${known.created}`) await describe(known.id);
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
    found = await fetchJson(`v1/models/${encodeURIComponent(id)}`);
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
  const all = JSON.stringify(models.map(({ id: value, name }) => [value, name]));
  if (picker.dataset.all !== all) {
    picker.replaceChildren(...models.map((found) => h("option", { value: found.id }, found.name)));
    picker.dataset.all = all;
  }
  picker.value = id ?? "";
  picker.disabled = !models.length;
}

/** Show the details of the selected model. */
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
