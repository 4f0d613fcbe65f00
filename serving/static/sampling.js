// The sampling parameters and their controls.

import { forgetKey, hasKey } from "./api.js";
import { byId, h, iconButton } from "./dom.js";
import { load, save } from "./store.js";
import { t } from "./words.js";

const NAME = "nanogpt.sampling";
// minimum, maximum, step, default, neutral value
const FIELDS = {
  temperature: [0, 2, 0.05, 0.8],
  top_p: [0.01, 1, 0.01, 0.95, 1],
  top_k: [0, 200, 1, 0, 0],
  min_p: [0, 1, 0.01, 0, 0],
  max_tokens: [1, 4096, 1, 256],
  presence_penalty: [-2, 2, 0.1, 0, 0],
  frequency_penalty: [-2, 2, 0.1, 0, 0],
  repetition_penalty: [0.5, 2, 0.01, 1, 1],
};
const MAX_STOPS = 16;
const MAX_STOP_CHARACTERS = 256;

let chosen = sane(load(NAME, {}));

/** Return a request's parameters, without neutral values. */
export function parameters() {
  const parameters = {};
  for (const [name, [, , , , neutral]] of Object.entries(FIELDS)) {
    if (chosen[name] !== neutral) parameters[name] = chosen[name];
  }
  const stops = chosen.stop.split("\n").filter(Boolean).map((stop) => stop.replaceAll("\\n", "\n"));
  if (stops.length) {
    parameters.stop = stops.slice(0, MAX_STOPS).map((stop) => stop.slice(0, MAX_STOP_CHARACTERS));
  }
  if (chosen.seed !== null) parameters.seed = chosen.seed;
  if (chosen.schema.trim()) parameters.guided_json = chosen.schema;
  return parameters;
}

/** Return stored values, replaced where missing or out of range. */
function sane(stored) {
  const right = {};
  for (const [name, [least, greatest, step, first]] of Object.entries(FIELDS)) {
    right[name] = within(stored?.[name] ?? first, least, greatest, step, first);
  }
  for (const name of ["stop", "schema"]) {
    right[name] = typeof stored?.[name] === "string" ? stored[name] : "";
  }
  const seed = stored?.seed ?? null;
  right.seed = Number.isSafeInteger(seed) && seed >= 0 ? seed : null;
  return right;
}

function within(value, least, greatest, step, otherwise) {
  if (!Number.isFinite(value)) return otherwise;
  const whole = step === 1 ? Math.round(value) : value;
  return Math.min(Math.max(whole, least), greatest);
}

export function showSettings({ close, system }) {
  const head = h("div", { class: "head" }, h("h2", {}, t("settings")), iconButton("i-close", t("close"), close));
  const reset = h("button", { class: "quiet", onclick: () => change({}, close, system) }, t("reset"));
  const forget = () => {
    forgetKey();
    location.reload();
  };
  byId("settings").replaceChildren(
    head,
    system ? systemField(system) : "",
    h("div", { class: "head" }, h("h3", {}, t("sampling")), reset),
    ...Object.keys(FIELDS).map(control),
    textField("stop", t("stopStrings"), null),
    textField("schema", t("schema"), t("schemaHint")),
    seedField(),
    hasKey() ? h("button", { class: "wide", onclick: forget }, t("forgetKey")) : "",
  );
}

function change(values, close, system) {
  chosen = sane(values);
  save(NAME, chosen);
  showSettings({ close, system });
}

function keep(name, value) {
  chosen[name] = value;
  save(NAME, chosen);
}

function control(name) {
  const [min, max, step, first, neutral] = FIELDS[name];
  const id = `sampling-${name}`;
  const hint = neutral === undefined ? t(`${name}Hint`) : t("off", { n: neutral });
  const limits = { min, max, step, value: chosen[name], title: hint };
  const field = h("input", { type: "number", id, inputmode: "decimal", ...limits });
  const slider = h("input", { type: "range", "aria-label": t(name), ...limits });
  const set = (value) => {
    keep(name, within(value, min, max, step, first));
    slider.value = chosen[name];
  };
  slider.oninput = () => {
    set(slider.valueAsNumber);
    field.value = chosen[name];
  };
  field.oninput = () => field.value !== "" && set(field.valueAsNumber);
  field.onchange = () => {
    set(field.valueAsNumber);
    field.value = chosen[name];
  };
  return labelled(t(name), hint, field, slider);
}

function textField(name, words, hint) {
  const field = h("textarea", { id: `sampling-${name}`, rows: 2, spellcheck: "false" });
  field.value = chosen[name];
  field.oninput = () => keep(name, field.value);
  return labelled(words, hint, field);
}

function seedField() {
  const limits = { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, value: chosen.seed };
  const field = h("input", { type: "number", id: "sampling-seed", ...limits });
  field.onchange = () => {
    keep("seed", sane({ seed: field.value === "" ? null : field.valueAsNumber }).seed);
    field.value = chosen.seed ?? "";
  };
  return labelled(t("seed"), t("seedHint"), field);
}

function systemField({ text, onChange }) {
  const field = h("textarea", { id: "system-prompt", rows: 4, dir: "auto" });
  field.value = text;
  field.oninput = () => onChange(field.value);
  return labelled(t("systemPrompt"), null, field);
}

function labelled(words, hint, field, ...more) {
  const label = h("label", { for: field.id }, words, hint && h("small", {}, hint));
  return h("div", { class: field.matches("textarea") ? "control tall" : "control" }, label, field, ...more);
}
