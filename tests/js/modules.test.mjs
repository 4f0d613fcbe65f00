// Stored values, sampling parameters and the words of the page.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

import "./dom.mjs";
import { indented, isJson } from "../../serving/static/json.js";
import "../../serving/static/runs_words.js";
import * as store from "../../serving/static/store.js";
import { number, percent, t } from "../../serving/static/words.js";

const STATIC = new URL("../../serving/static/", import.meta.url);
let imports = 0;

/** Return the module of a page that loads with these stored values. */
async function samplingWith(stored) {
  localStorage.setItem("nanogpt.sampling", stored);
  return import(`../../serving/static/sampling.js?${imports++}`);
}

const parametersWith = async (stored) => (await samplingWith(stored)).parameters();

/** Return the fields of tools given in a text, after a message of a role. */
async function toolsWith(tools, tool_choice, role) {
  return (await samplingWith(JSON.stringify({ tools, tool_choice }))).tools([{ role }]);
}

test("by default only what differs from the API's default is sent", async () => {
  assert.deepEqual(await parametersWith("{}"), { temperature: 0.8, top_p: 0.95, max_tokens: 256 });
});

test("malformed stored values are replaced by the defaults", async () => {
  const expected = await parametersWith("{}");
  for (const stored of ["null", "[]", "{", '{"temperature": "hot", "stop": 5}', "9"]) {
    assert.deepEqual(await parametersWith(stored), expected, stored);
  }
});

test("stored values are limited to their ranges", async () => {
  const sent = await parametersWith('{"temperature": 7, "top_p": 7, "top_k": 1.6, "frequency_penalty": -9, "seed": -1}');
  assert.deepEqual(
    [sent.temperature, sent.top_p, sent.top_k, sent.frequency_penalty, sent.seed],
    [2, undefined, 2, -2, undefined],
  );
});

test("stop strings are one per line, with \\n for a line break", async () => {
  assert.deepEqual((await parametersWith('{"stop": "7\\\\n\\n\\n8"}')).stop, ["7\n", "8"]);
});

test("a schema is sent as it is written, and blanks are none", async () => {
  const schema = '{"type": "object"';
  assert.equal((await parametersWith(JSON.stringify({ schema }))).guided_json, schema);
  assert.equal((await parametersWith('{"schema": " \\n"}')).guided_json, undefined);
});

test("JSON is indented without a change of its literals", () => {
  const lines = ["{", '  "a, {b}": [', "    12345678901234567890,", '    "\\"[\\u00e9: ",', "    []", "  ],", '  "c": {}', "}"];
  assert.equal(indented('{"a, {b}":[12345678901234567890, "\\"[\\u00e9: ",[]],"c":{ }}'), lines.join("\n"));
  assert.equal(indented(" true "), "true");
  assert.equal(indented("}}]{]"), "\n}\n}\n]{]");
  for (const text of ["", '{"a": ', "text", "{} {}"]) assert.equal(isJson(text), false, text);
});

test("the beginning of a JSON text is the beginning of its lines", () => {
  const whole = '{"a, {b": ["\\"\\u00e9: ", 5]}';
  assert.ok(isJson(whole));
  for (let end = 0; end <= whole.length; end++) {
    const begun = indented(whole.slice(0, end)).trimEnd();
    assert.ok(indented(whole).startsWith(begun), begun);
    assert.equal(begun.replace(/\s/g, ""), whole.slice(0, end).replace(/\s/g, ""));
  }
});

test("functions become tools, one of which is named, and no JSON is sent as it is written", async () => {
  const [now, then] = ["now", "then"].map((name) => ({ type: "function", function: { name } }));
  const written = JSON.stringify([now, { name: "then" }]);
  assert.deepEqual(await toolsWith(" ", "auto", "user"), {});
  assert.deepEqual(await toolsWith(written, "", "user"), { tools: [now, then], tool_choice: "required" });
  assert.deepEqual((await toolsWith(written, "then", "user")).tool_choice, then);
  assert.equal((await toolsWith(written, "gone", "user")).tool_choice, "required");
  assert.equal((await toolsWith(written, "then", "tool")).tool_choice, "auto");
  assert.deepEqual((await toolsWith('{"name": "now"}', "", "user")).tools, [now]);
  for (const text of ["[", "null"]) assert.equal((await toolsWith(text, "", "user")).tools, text);
});

test("conversations are stored, listed newest first and removed", () => {
  const [one, two] = [store.newConversation(), store.newConversation()];
  store.keepConversation({ ...one, updated: 1 });
  store.keepConversation({ ...two, updated: 2 });
  localStorage.setItem("nanogpt.chat.broken", "{");
  localStorage.setItem("nanogpt.chat.other", "9");
  assert.deepEqual(store.conversations().map(({ id }) => id), [two.id, one.id]);
  store.removeConversation(two.id);
  assert.deepEqual(store.conversations().map(({ id }) => id), [one.id]);
  assert.equal(store.conversation(one.id).updated, 1);
});

test("a full storage is reported, and the conversation lives as long as the page", () => {
  let reports = 0;
  store.whenFull(() => reports++);
  localStorage.isFull = true;
  store.keepConversation({ ...store.newConversation(), id: "unsaved" });
  localStorage.isFull = false;
  assert.equal(reports, 1);
  assert.ok(store.conversations().some(({ id }) => id === "unsaved"));
});

test("every text of the page exists once, in both languages", () => {
  const texts = readdirSync(STATIC).map((name) => readFileSync(new URL(name, STATIC), "utf8"));
  const entries = [...texts.join("\n").matchAll(/^  "?([\w.]+)"?: \[(?:"|$)/gm)].map(([, name]) => name);
  assert.equal(new Set(entries).size, entries.length);
  const named = /data-t(?:-\w+)?="(\w+)"|(?<!\w)t\("([\w.]+)"/g;
  const used = texts.flatMap((text) => [...text.matchAll(named)].map(([, one, other]) => one ?? other));
  assert.ok(used.length > 60);
  for (const name of used) {
    for (const lang of ["en", "zh"]) {
      document.documentElement.lang = lang;
      assert.ok(t(name, {}).length, `${name} in ${lang}`);
    }
  }
});

test("numbers follow the language", () => {
  document.documentElement.lang = "en";
  assert.equal(number(1234567.891, 1), "1,234,567.9");
  assert.equal(percent(0.123), "12.3%");
  assert.equal(percent(0.0001234), "0.01%");
});
