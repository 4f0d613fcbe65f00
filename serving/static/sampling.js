// The sampling parameters and their controls.

import { forgetKey, hasKey } from "./api.js";
import { byId, h, iconButton } from "./dom.js";
import { indented, isJson, parsed } from "./json.js";
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
const TOOL =
  '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", ' +
  '"properties": {"city": {"enum": ["Lima", "Oslo", "Tokyo"]}}, "required": ["city"], ' +
  '"additionalProperties": false}}}]';
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

/** Return the fields of the tools; after the result of a call the answer is a text. */
export function tools(messages) {
  if (!chosen.tools.trim()) return {};
  const { tools, names } = given();
  const name = chosen.tool_choice;
  if (name === "auto" || messages.at(-1)?.role === "tool") return { tools, tool_choice: "auto" };
  const named = { type: "function", function: { name } };
  return { tools, tool_choice: names.includes(name) ? named : "required" };
}

/** Return the tools and their names; a function alone becomes a tool, and no JSON stays a text. */
function given() {
  const value = parsed(chosen.tools);
  const tools = [value].flat().map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
  const names = tools.map((tool) => tool.function?.name).filter(Boolean);
  return { tools: value ? tools : chosen.tools, names };
}

/** Return stored values, replaced where missing or out of range. */
function sane(stored) {
  const right = {};
  for (const [name, [least, greatest, step, first]] of Object.entries(FIELDS)) {
    right[name] = within(stored?.[name] ?? first, least, greatest, step, first);
  }
  for (const name of ["stop", "schema", "tools", "tool_choice"]) {
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

/** Show the controls; `about` is { close, system }: how to close them, and the system prompt or null. */
export function showSettings(about) {
  const { close, system } = about;
  const head = h("div", { class: "head" }, h("h2", {}, t("settings")), iconButton("i-close", t("close"), close));
  const onclick = () => {
    chosen = sane({ tools: chosen.tools, tool_choice: chosen.tool_choice });
    save(NAME, chosen);
    showSettings(about);
  };
  const reset = h("button", { class: "quiet", onclick }, t("reset"));
  const forget = () => {
    forgetKey();
    location.reload();
  };
  byId("settings").replaceChildren(
    head,
    ...(system ? [systemField(system), ...toolFields()] : []),
    h("div", { class: "head" }, h("h3", {}, t("sampling")), reset),
    ...Object.keys(FIELDS).map(control),
    textField("stop", t("stopStrings"), null),
    textField("schema", t("schema"), t("schemaHint")),
    seedField(),
    hasKey() ? h("button", { class: "wide", onclick: forget }, t("forgetKey")) : "",
  );
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
  const settle = (from) => {
    set(from.valueAsNumber);
    field.value = chosen[name];
  };
  slider.oninput = () => settle(slider);
  field.onchange = () => settle(field);
  field.oninput = () => field.value !== "" && set(field.valueAsNumber);
  return labelled(t(name), hint, field, slider);
}

function textField(name, words, hint) {
  const field = h("textarea", { id: `sampling-${name}`, rows: 2, spellcheck: "false" });
  field.value = chosen[name];
  field.oninput = () => keep(name, field.value);
  return labelled(words, hint, field);
}

/** Return the field of the tools, then the choice among them or a button for an example. */
function toolFields() {
  const box = textField("tools", t("tools"), t("toolsHint"));
  const field = box.lastChild;
  const onchange = () => keep("tool_choice", select.value);
  const select = h("select", { id: "sampling-tool_choice", onchange });
  const choice = labelled(t("toolChoice"), t("toolChoiceHint"), select);
  const onclick = () => {
    field.value = indented(TOOL);
    field.oninput();
    field.setSelectionRange(0, 0);
    field.focus();
  };
  const example = h("button", { class: "quiet", onclick }, t("toolsTry"));
  const show = () => {
    const option = (value, words) => h("option", { value }, words);
    const named = given().names.map((name) => option(name, name));
    select.replaceChildren(option("required", t("required")), option("auto", t("auto")), ...named);
    select.value = chosen.tool_choice;
    if (!select.value) select.value = "required";
    example.hidden = Boolean(chosen.tools.trim());
    choice.hidden = !example.hidden;
    field.rows = example.hidden ? 9 : 2;
    field.ariaInvalid = String(example.hidden && !isJson(chosen.tools));
  };
  field.oninput = () => {
    keep("tools", field.value);
    show();
  };
  show();
  return [box, choice, example];
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
  return h("div", { class: field.matches("textarea, select") ? "control tall" : "control" }, label, field, ...more);
}
