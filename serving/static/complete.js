// Completion: a text that the model continues in place, with alternatives for each token.
//
// A mirror of the text behind the text area has an element for each token with known probability, to
// colour it and to find it under the pointer or the caret.

import { fetchJson, stream } from "./api.js";
import { announce, byId, debounced, examples, following, h, onControlEnter, onKey, track } from "./dom.js";
import { showFailure } from "./failures.js";
import { factsText } from "./messages.js";
import { model, modelId } from "./models.js";
import { parameters } from "./sampling.js";
import { load, save } from "./store.js";
import { number, percent, t } from "./words.js";

const NAME = "nanogpt.text";
const LEGEND = { sure: ">50%", likely: ">12.5%", open: ">1.6%", unlikely: "≤1.6%" };
const TOP = 8; // alternatives requested for each token
const KEEP_PAUSE_MS = 500;

let tokens = []; // { start, end, text, logprob, top }: positions in the text, in order
let before = null; // the text before the last continuation, for undo and again
let running = null; // AbortController
let awaited = 0; // animation frame; tokens may arrive faster
let inspected = null; // the token whose candidates are shown

export function startComplete() {
  field().value = load(NAME, "");
  field().oninput = onInput;
  onControlEnter(field(), go);
  onKey(field(), (event) => event.key.startsWith("Arrow") && inspectCaret(), "keyup");
  field().onclick = inspectCaret;
  byId("editor").onmousemove = inspectPointer;
  byId("editor").onmouseleave = () => inspect(null);
  byId("go").onclick = go;
  byId("complete-stop").onclick = () => running?.abort();
  byId("complete-undo").onclick = undo;
  byId("complete-again").onclick = () => undo() && go();
  byId("complete-clear").onclick = clear;
  byId("score").onclick = score;
}

/** Render; the probabilities of another model are dropped. */
export function showComplete(isAnother) {
  if (isAnother) tokens = [];
  inspect(null);
  render();
}

/** Stop, or close the candidates; return whether there was either. */
export function escapeComplete() {
  const isAny = running !== null || inspected !== null;
  running?.abort();
  inspect(null);
  return isAny;
}

const field = () => byId("complete-text");
const keep = debounced(() => save(NAME, field().value), KEEP_PAUSE_MS);

function onInput() {
  const text = field().value;
  // Tokens up to the first change stay valid.
  const same = tokens.findIndex(({ start, end, text: part }) => text.slice(start, end) !== part);
  if (same >= 0) tokens.length = same;
  inspect(null);
  keep();
  render();
}

async function go() {
  if (running || !model() || model().labels) return;
  before = { text: field().value, tokens: [...tokens] };
  const began = performance.now();
  let first = null;
  let n = 0;
  let nFirst = 0; // tokens of the first piece, which have no duration
  const prompt = before.text;
  const body = { model: modelId(), prompt, logprobs: TOP, ...parameters() };
  const version = { isJson: "guided_json" in body }; // as in a chat
  await run(async (signal) => {
    for await (const { choices, usage } of stream("v1/completions", body, signal)) {
      const [choice] = choices;
      if (choice?.finish_reason) version.finish = choice.finish_reason;
      if (choice?.logprobs) {
        first ??= performance.now();
        n += choice.logprobs.tokens.length;
        nFirst ||= n;
        add(choice.text, choice.logprobs);
      }
      if (!n) continue;
      const measured = n > nFirst ? ((n - nFirst) * 1000) / (performance.now() - first) : 0;
      const perSecond = usage?.tokens_per_second ?? measured;
      version.facts = { tokens: n, perSecond, first: (first - began) / 1000 };
      showFacts(factsText({ facts: version.facts }));
    }
  });
  version.text = field().value.slice(prompt.length);
  version.finish ??= "stopped";
  if (n) showFacts(factsText(version));
  announce(version.text);
}

function begin(text) {
  field().value = text;
  go();
}

/** Append text and its tokens, given by their offsets. */
function add(text, { text_offset, token_logprobs, top_logprobs }) {
  const at = field().value.length;
  field().value += text;
  const characters = [...text]; // offsets count characters of Unicode
  const [base] = text_offset;
  let place = at;
  text_offset.forEach((offset, i) => {
    const end = text_offset[i + 1] ?? base + characters.length;
    const part = characters.slice(offset - base, end - base).join("");
    if (part && token_logprobs[i] !== null) {
      const known = { logprob: token_logprobs[i], top: top_logprobs[i] };
      tokens.push({ start: place, end: place + part.length, text: part, ...known });
    }
    place += part.length;
  });
  cancelAnimationFrame(awaited);
  awaited = requestAnimationFrame(() => following(field().closest(".scroller"), render));
}

async function score() {
  const text = field().value;
  if (running || !text || !model() || model().labels) return;
  await run(async (signal) => {
    const options = { max_tokens: 0, echo: true, logprobs: TOP };
    const { choices } = await fetchJson("v1/completions", { model: modelId(), prompt: text, ...options }, signal);
    if (field().value !== text) return;
    tokens = [];
    field().value = "";
    add(choices[0].text, choices[0].logprobs);
    const known = tokens.reduce((sum, { logprob }) => sum + logprob, 0);
    showFacts(`${t("tokens", { n: number(tokens.length) })} · ${number(-known / tokens.length, 3)} nats`);
  });
}

/** Run an action that can be stopped and can fail. */
async function run(action) {
  running = new AbortController();
  showFailure("complete-failure");
  showFacts("");
  inspect(null);
  render();
  try {
    await action(running.signal);
  } catch (error) {
    if (error.name !== "AbortError") showFailure("complete-failure", error);
  }
  running = null;
  keep();
  render();
}

function undo() {
  if (!before || running) return false;
  const { text, tokens: its } = before;
  before = null;
  replace(text, its);
  return true;
}

function clear() {
  before = { text: field().value, tokens };
  replace("", []);
}

function replace(text, itsTokens) {
  field().value = text;
  tokens = itsTokens;
  inspect(null);
  keep();
  render();
  field().focus();
}

function showFacts(facts) {
  byId("complete-meter").textContent = facts;
}

function render() {
  const text = field().value;
  const pieces = [];
  let at = 0;
  for (const token of tokens) {
    if (token.start > at) pieces.push(text.slice(at, token.start));
    pieces.push(tokenElement(token));
    at = token.end;
  }
  // A final line end has no height unless something follows it.
  byId("mirror").replaceChildren(...pieces, `${text.slice(at)}\u200b`);
  const legend = Object.entries(LEGEND).map(([name, share]) => h("span", { class: `swatch ${name}` }, share));
  const below = tokens.length ? h("p", { class: "note" }, t("legend"), " ", ...legend.flatMap((e) => [e, " "])) : "";
  byId("complete-below").replaceChildren(text || running ? below : examples(t("completeTry"), begin));
  field().readOnly = running !== null;
  byId("editor").ariaBusy = String(running !== null);
  byId("go").hidden = running !== null;
  byId("complete-stop").hidden = running === null;
  byId("complete-undo").disabled = byId("complete-again").disabled = !before || running !== null;
  byId("score").disabled = running !== null || !text;
}

function tokenElement(token) {
  token.element ??= h("span", { class: `token ${likeliness(token.logprob)}` }, token.text);
  token.element.token = token;
  return token.element;
}

/** Return a class: probability over 1/2, 1/8, 1/64 or less. */
function likeliness(logprob) {
  const halvings = -logprob / Math.LN2;
  return Object.keys(LEGEND)[[1, 3, 6].filter((most) => halvings >= most).length];
}

// Candidates

function inspectPointer(event) {
  if (event.target.closest(".candidates")) return;
  const there = document.elementsFromPoint(event.clientX, event.clientY);
  const found = there.find((element) => element.token);
  if (found) inspect(found.token);
  else if (inspected && !isNear(event)) inspect(null);
}

/** Return whether the pointer is between a token and its candidates. */
function isNear({ clientX, clientY }) {
  const { left, right, top, bottom } = byId("candidates").getBoundingClientRect();
  return clientX > left - 24 && clientX < right + 24 && clientY > top - 32 && clientY < bottom + 24;
}

function inspectCaret() {
  const { selectionStart: start, selectionEnd: end } = field();
  const found = start === end && tokens.find((token) => token.start <= start && start < token.end);
  inspect(found || null);
}

function inspect(token) {
  if (running) token = null;
  if (token === inspected) return;
  inspected?.element?.classList.remove("inspected");
  inspected = token;
  const box = byId("candidates");
  box.hidden = token === null;
  if (token === null) return;
  token.element.classList.add("inspected");
  const ranked = Object.entries(token.top).sort((one, other) => other[1] - one[1]);
  box.replaceChildren(h("p", { class: "note" }, t("candidates")), ...ranked.map(candidate));
  place(box, token.element);
}

function candidate([text, logprob]) {
  const isBytes = text.startsWith("bytes:");
  const isTaken = text === inspected.text;
  const shown = isBytes ? text.slice(6) : visible(text);
  const label = t("take", { token: shown });
  return h(
    "button",
    {
      class: isTaken ? "candidate taken" : "candidate",
      disabled: isBytes || isTaken,
      title: label,
      onclick: () => take(inspected, text),
    },
    h("code", {}, shown),
    h("span", { class: "share" }, percent(Math.exp(logprob))),
    track(Math.exp(logprob)),
  );
}

/** Make blanks visible. */
const visible = (text) =>
  text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→") || "∅";

/** Replace a token and continue from there. */
function take(token, text) {
  const start = field().value.slice(0, token.start);
  replace(start + text, tokens.filter((other) => other.end <= token.start));
  go();
}

function place(box, element) {
  const around = byId("editor").getBoundingClientRect();
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const left = Math.min(at.left - around.left, around.width - box.offsetWidth - 4);
  box.style.left = `${Math.max(left, 4)}px`;
  box.style.top = `${at.bottom - around.top + 4}px`;
}
