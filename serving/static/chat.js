// Chat: conversations, and the answers in them as they stream in.
//
// A conversation is { id, title, updated, system, from, forgets, messages }; messages before `from`
// are no longer sent, and where it `forgets`, ever more of them once the context is full. A message is { role: "user", text }, or { role: "assistant", versions, shown }, where
// a version is { text, facts, finish, failure }.

import { ask, stream } from "/static/api.js";
import { announce, byId, copy, debounced, h, iconButton, notice } from "/static/dom.js";
import { failureText } from "/static/failures.js";
import { show } from "/static/markdown.js";
import { model, modelId, modeOf } from "/static/models.js";
import { parameters } from "/static/sampling.js";
import * as store from "/static/store.js";
import { number, t } from "/static/words.js";

const LAST = "nanogpt.last"; // the conversation that is open
const TITLE_CHARACTERS = 60;
const METER_PAUSE_MS = 350;
const ROOM = 0.7; // of the context may be what is sent, when the oldest messages are dropped
const NEAR_END = 80; // pixels from the end within which the view follows the stream

let shown; // conversation
let running = null; // { controller, version, conversation, element }
let editing = null; // index of the message whose new text is in the field
let onConversation = () => {};

export function startChat(whenAnother) {
  onConversation = whenAnother;
  shown = store.conversation(store.load(LAST, "")) ?? store.newConversation();
  byId("chat-form").addEventListener("submit", submit);
  byId("chat-text").addEventListener("keydown", onKey);
  byId("chat-text").addEventListener("input", onInput);
  byId("chat-stop").addEventListener("click", stopChat);
  byId("edit-cancel").addEventListener("click", cancelEdit);
  byId("new-chat").addEventListener("click", () => open(store.newConversation()));
  addEventListener("pagehide", () => running && store.keepConversation(running.conversation));
  store.onConversationChanged(onOtherTab);
}

/** Show everything anew: after a change of language or model. */
export function showChat() {
  render();
  list();
  meter();
}

export const systemPrompt = () => ({
  text: shown.system,
  onChange: (text) => {
    shown.system = text;
    if (shown.messages.length) keep(shown);
    meter();
  },
});

/** Stop what is running, or leave the editing of a message; return whether there was either. */
export function escapeChat() {
  if (running) stopChat();
  else if (editing !== null) cancelEdit();
  else return false;
  return true;
}

export const stopChat = () => running?.controller.abort();

// Conversations

function open(conversation) {
  shown = conversation;
  store.save(LAST, shown.id);
  cancelEdit();
  showChat();
  scrollToEnd();
  onConversation();
  byId("chat-text").focus();
}

function keep(conversation) {
  conversation.updated = Date.now();
  store.keepConversation(conversation);
  store.save(LAST, shown.id);
  list();
}

function onOtherTab(id) {
  list();
  if (id !== null && id !== shown.id) return;
  if (running?.conversation === shown || editing !== null) return;
  const kept = store.conversation(shown.id);
  if (kept) {
    shown = kept;
    render();
    meter();
  }
}

function list() {
  byId("conversation-list").replaceChildren(...store.conversations().map(entry));
}

function entry(conversation) {
  const title = conversation.title || t("untitled");
  const select = () => open(running?.conversation.id === conversation.id ? running.conversation : conversation);
  const line = h("li", { class: conversation.id === shown.id ? "current" : "" });
  const name = h("button", { type: "button", class: "name", dir: "auto", onclick: select, title }, title);
  if (conversation.id === shown.id) name.setAttribute("aria-current", "true");
  line.append(
    name,
    iconButton("i-edit", t("rename"), () => rename(line, conversation)),
    iconButton("i-remove", t("remove"), () => remove(conversation)),
  );
  return line;
}

function rename(line, conversation) {
  const field = h("input", { type: "text", "aria-label": t("rename"), maxlength: 200 });
  field.value = conversation.title;
  let isOver = false;
  const end = (isMeant) => {
    if (isOver) return;
    isOver = true;
    const named = conversation.id === shown.id ? shown : conversation;
    if (isMeant && field.value.trim()) named.title = field.value.trim();
    store.keepConversation(named);
    list();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") end(false);
    event.stopPropagation();
  });
  field.addEventListener("blur", () => end(true));
  line.replaceChildren(field);
  field.select();
}

function remove(conversation) {
  if (running?.conversation.id === conversation.id) stopChat();
  store.removeConversation(conversation.id);
  if (conversation.id === shown.id) open(store.newConversation());
  else list();
  notice(t("removed"), t("undo"), () => {
    store.keepConversation(conversation);
    open(conversation);
  });
}

// What is said

function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // input of Chinese
  event.preventDefault();
  submit(event);
}

function onInput() {
  grow();
  meter();
}

function submit(event) {
  event.preventDefault();
  const field = byId("chat-text");
  const text = field.value;
  if (running || !text.trim() || !model()) return;
  if (editing !== null) shown.messages.length = editing;
  shown.from = Math.min(shown.from, shown.messages.length);
  shown.messages.push({ role: "user", text });
  shown.title ||= text.trim().replace(/\s+/g, " ").slice(0, TITLE_CHARACTERS);
  field.value = "";
  cancelEdit();
  grow();
  answer(shown);
}

function edit(index) {
  editing = index;
  byId("editing").hidden = false;
  const field = byId("chat-text");
  field.value = shown.messages[index].text;
  grow();
  field.focus();
  meter();
}

function cancelEdit() {
  if (editing !== null) byId("chat-text").value = "";
  editing = null;
  byId("editing").hidden = true;
  grow();
}

function grow() {
  const field = byId("chat-text");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// Answers

/** Answer what was said last: in a new message, or in a new version of the answer that is there. */
async function answer(conversation) {
  const { messages } = conversation;
  if (messages.at(-1).role === "user") messages.push({ role: "assistant", versions: [], shown: 0 });
  const message = messages.at(-1);
  message.versions = message.versions.filter((version) => version.text || !version.failure);
  const version = { text: "" };
  message.shown = message.versions.push(version) - 1;
  running = { controller: new AbortController(), conversation, version };
  keep(conversation);
  render();
  scrollToEnd();
  announce(t("writing"));
  try {
    await readFitting(running);
    announce(`${t("done")} ${version.text}`);
  } catch (error) {
    if (error.name === "AbortError") version.finish = "stopped";
    else version.failure = { kind: error.kind ?? "failed", message: error.message };
  }
  running = null;
  keep(conversation);
  if (conversation === shown) {
    const follows = isAtEnd();
    render();
    if (follows) scrollToEnd();
    meter();
  }
}

/** Read an answer; where the context is full and that is wished, forget the oldest messages. */
async function readFitting({ conversation }) {
  const end = conversation.messages.length - 1;
  try {
    await read(running, toSend(conversation, end));
  } catch (error) {
    if (error.kind !== "context" || !conversation.forgets) throw error;
    if (!(await forgetOldest(conversation, end, running.controller.signal))) throw error;
    render();
    await read(running, toSend(conversation, end));
  }
}

/** Forget the oldest messages until there is room for an answer; return whether there were any. */
async function forgetOldest(conversation, end, signal) {
  const { messages, from } = conversation;
  for (let start = from + 1; start < end; start++) {
    if (messages[start].role !== "user") continue;
    conversation.from = start;
    const { count, max_model_len: most } = await counted(toSend(conversation, end), signal);
    if (count <= ROOM * most) break;
  }
  return conversation.from > from;
}

/** Read an answer into its version; the figures are the server's where it tells them. */
async function read({ controller, version }, messages) {
  const body = { model: modelId(), messages, stream_options: { include_usage: true }, ...parameters() };
  const began = performance.now();
  let first = null;
  let n = 0;
  const facts = (usage) => {
    const now = performance.now();
    const seconds = (now - (first ?? now)) / 1000;
    version.facts = {
      tokens: usage?.completion_tokens ?? n,
      perSecond: usage?.tokens_per_second ?? (n > 1 && seconds ? (n - 1) / seconds : 0),
      first: ((first ?? now) - began) / 1000,
    };
  };
  for await (const { choices, usage } of stream("/v1/chat/completions", body, controller.signal)) {
    const [choice] = choices;
    if (choice?.delta.content) {
      first ??= performance.now();
      n++;
      version.text += choice.delta.content;
      facts();
      showSoon();
    }
    if (choice?.finish_reason) version.finish = choice.finish_reason;
    if (usage) facts(usage);
  }
}

function toSend(conversation, end) {
  const said = conversation.messages.slice(conversation.from, end).map((message) =>
    message.role === "user"
      ? { role: "user", content: message.text }
      : { role: "assistant", content: message.versions[message.shown]?.text ?? "" },
  );
  const system = conversation.system.trim();
  const messages = said.filter((message) => message.content);
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

const counted = (messages, signal) =>
  ask("/v1/tokenize", { model: modelId(), messages }, signal);

const meter = debounced(async () => {
  const place = byId("chat-meter");
  const draft = byId("chat-text").value;
  const end = editing ?? shown.messages.length;
  const messages = toSend(shown, end);
  if (draft.trim()) messages.push({ role: "user", content: draft });
  if (!messages.length || !model() || model().labels || byId("chat").hidden) {
    place.textContent = "";
    return;
  }
  try {
    const { count, max_model_len: most } = await counted(messages);
    place.textContent = t("context", { n: number(count), most: number(most) });
    place.classList.toggle("over", count >= most);
  } catch {
    place.textContent = ""; // it is a hint only
  }
}, METER_PAUSE_MS);

// The view

function render() {
  const log = byId("log");
  log.setAttribute("aria-busy", String(running?.conversation === shown));
  log.replaceChildren(...shown.messages.flatMap(article));
  if (!shown.messages.length) log.replaceChildren(welcome());
  byId("send").hidden = running !== null;
  byId("chat-stop").hidden = running === null;
}

function welcome() {
  const name = model()?.id ?? "";
  const isTaught = !model() || modeOf(model()) === "chat";
  const more = isTaught ? [] : [h("p", { class: "note" }, t("chatUntaught"))];
  return h("div", { class: "welcome" }, h("h1", {}, t("chatEmpty", { model: name })), ...more);
}

function article(message, index) {
  const line = index && index === shown.from ? [h("p", { class: "line" }, t("forgotten"))] : [];
  const mine = message.role === "user";
  const label = t(mine ? "you" : "answer");
  const body = mine ? userBody(message, index) : answerBody(message, index);
  return [...line, h("article", { class: mine ? "mine" : "theirs", "aria-label": label }, body)];
}

function userBody(message, index) {
  const actions = h(
    "div",
    { class: "actions" },
    copyButton(() => message.text),
    iconButton("i-edit", t("edit"), () => !running && edit(index)),
  );
  return [h("div", { class: "bubble", dir: "auto" }, message.text), actions];
}

function answerBody(message, index) {
  const version = message.versions[message.shown] ?? { text: "" };
  const text = h("div", { class: "text" });
  if (running?.version === version) {
    running.element = text;
    running.facts = h("span", { class: "note facts" });
    showRunning();
    return [text, h("div", { class: "actions" }, running.facts)];
  }
  show(text, version.text);
  if (!version.text && version.finish) text.append(h("p", { class: "note" }, t("nothingSaid")));
  const isLast = index === shown.messages.length - 1;
  const failure = version.failure ? [failureBox(version.failure, isLast)] : [];
  return [text, ...failure, answerActions(message, version, isLast)];
}

function answerActions(message, version, isLast) {
  const actions = h("div", { class: "actions" });
  if (version.text) actions.append(copyButton(() => version.text));
  if (isLast && !version.failure) actions.append(iconButton("i-again", t("again"), () => !running && answer(shown)));
  if (message.versions.length > 1) actions.append(...versionButtons(message));
  actions.append(h("span", { class: "note facts" }, factsText(version)));
  return actions;
}

function versionButtons(message) {
  const turn = (by) => () => {
    message.shown += by;
    keep(shown);
    render();
    meter();
  };
  const { versions, shown: at } = message;
  return [
    iconButton("i-left", t("earlier"), turn(-1), { disabled: at === 0 }),
    h("span", { class: "note" }, `${at + 1}/${versions.length}`),
    iconButton("i-right", t("later"), turn(1), { disabled: at === versions.length - 1 }),
  ];
}

function copyButton(text) {
  return iconButton("i-copy", t("copy"), async () => {
    await copy(text());
    notice(t("copied"));
  });
}

function failureBox(failure, isLast) {
  const box = h("div", { class: "failure", role: "alert" }, h("p", {}, failureText(failure)));
  if (!isLast) return box;
  const button = (label, action) => h("button", { type: "button", onclick: action }, label);
  const forget = () => {
    shown.forgets = true;
    answer(shown);
  };
  const last = shown.messages.length - 2;
  const isLater = ({ role }, i) => role === "user" && i > shown.from && i <= last;
  if (failure.kind === "context" && shown.messages.some(isLater)) {
    box.append(button(t("forgetOldest"), forget));
  } else if (failure.kind !== "context") {
    box.append(button(t("tryAgain"), () => !running && answer(shown)));
  }
  return box;
}

function factsText({ facts, finish }) {
  const told = [];
  if (facts) {
    told.push(t("tokens", { n: number(facts.tokens) }));
    if (facts.perSecond) told.push(t("perSecond", { n: number(facts.perSecond, facts.perSecond < 10 ? 1 : 0) }));
    told.push(t("first", { n: number(facts.first, 2) }));
  }
  if (finish === "length") told.push(t("cutLength"));
  if (finish === "stopped") told.push(t("stopped"));
  return told.join(" · ");
}

let isAwaited = false;

function showSoon() {
  if (isAwaited) return;
  isAwaited = true;
  requestAnimationFrame(() => {
    isAwaited = false;
    if (running?.conversation === shown) showRunning();
  });
}

function showRunning() {
  const { element, facts, version } = running;
  const follows = isAtEnd();
  if (version.text) show(element, version.text);
  else element.replaceChildren(h("p", { class: "note waiting" }, t("thinking")));
  if (version.text && element.firstElementChild?.classList.contains("waiting")) element.firstChild.remove();
  facts.textContent = factsText(version);
  if (follows) scrollToEnd();
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = byId("chat-scroller");
  return scrollHeight - scrollTop - clientHeight < NEAR_END;
}

function scrollToEnd() {
  const scroller = byId("chat-scroller");
  scroller.scrollTop = scroller.scrollHeight;
}
