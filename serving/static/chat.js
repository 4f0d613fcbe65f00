// Chat: the open conversation and the answer that streams in.
//
// A conversation is { id, title, updated, system, from, forgets, messages }; messages before `from`
// are not sent; with `forgets` it advances when the context is full. A message is
// { role: "user", text }, { role: "tool", text, call } with the call whose result it is, or
// { role: "assistant", versions: [{ text, call, facts, finish, failure }], shown }.

import { counted, readAnswer, toSend } from "./answers.js";
import { showList, startList } from "./conversations.js";
import { announce, byId, debounced, following, onKey } from "./dom.js";
import { drawn, drawRunning } from "./messages.js";
import { model } from "./models.js";
import * as store from "./store.js";
import { number, t } from "./words.js";

const LAST = "nanogpt.last"; // the conversation that is open
const TITLE_CHARACTERS = 60;
const METER_PAUSE_MS = 350;

let shown; // conversation
let running = null; // { controller, version, conversation, element, facts }
let editing = null; // index of the message whose new text is in the field
let isMessage = false; // the field is for a message although a call has no result yet
let onConversation = () => {};

export function startChat(whenAnother) {
  onConversation = whenAnother;
  shown = store.conversation(store.load(LAST, "")) ?? store.newConversation();
  byId("chat-form").onsubmit = submit;
  onKey(byId("chat-text"), onEnter);
  byId("chat-text").oninput = onInput;
  byId("chat-stop").onclick = stopChat;
  byId("edit-cancel").onclick = leave;
  byId("new-chat").onclick = () => open(store.newConversation());
  addEventListener("pagehide", () => running && store.keepConversation(running.conversation));
  store.onConversationChanged(onOtherTab);
  startList({ current: () => shown, answered: () => running?.conversation, open, stop: stopChat });
}

/** Render after a change of language or model. */
export function showChat() {
  render();
  showList();
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

/** Stop the answer or the edit; return whether there was one. */
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
  isMessage = false;
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
  showList();
}

function onOtherTab(id) {
  showList();
  if (id !== null && id !== shown.id) return;
  if (running?.conversation === shown || editing !== null) return;
  const stored = store.conversation(shown.id);
  if (stored) {
    shown = stored;
    render();
    meter();
  }
}

// Input

function onEnter(event) {
  if (event.key !== "Enter" || event.shiftKey) return;
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
  const message = drafted(text);
  if (editing !== null) shown.messages.length = editing;
  shown.from = Math.min(shown.from, shown.messages.length);
  shown.messages.push(message);
  shown.title ||= text.trim().replace(/\s+/g, " ").slice(0, TITLE_CHARACTERS);
  field.value = "";
  cancelEdit();
  grow();
  answer(shown);
}

function edit(index) {
  editing = index;
  isMessage = false;
  showComposer();
  const field = byId("chat-text");
  field.value = shown.messages[index].text;
  grow();
  field.focus();
  meter();
}

function cancelEdit() {
  if (editing !== null) byId("chat-text").value = "";
  editing = null;
  showComposer();
  grow();
}

/** Stop editing, or change between a call's result and a message. */
function leave() {
  if (editing === null) isMessage = !isMessage;
  else cancelEdit();
  showComposer();
  meter();
  byId("chat-text").focus();
}

/** Return the call that the field awaits a result of, or undefined. */
function awaited() {
  const end = editing ?? shown.messages.length;
  const answer = shown.messages[end - 1];
  const version = answer?.versions?.[answer.shown];
  const isOver = version !== running?.version && !version?.failure;
  const isResult = editing === null || shown.messages[end].role === "tool";
  return isOver && isResult ? version?.call : undefined;
}

function drafted(text) {
  const call = awaited();
  return call && !isMessage ? { role: "tool", text, call } : { role: "user", text };
}

function grow() {
  const field = byId("chat-text");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// Answers

/** Answer the last message: in a new one, or in a new version of the answer. */
async function answer(conversation) {
  const { messages } = conversation;
  if (messages.at(-1).role !== "assistant") messages.push({ role: "assistant", versions: [], shown: 0 });
  const message = messages.at(-1);
  message.versions = message.versions.filter(({ text, call, failure }) => text || call || !failure);
  const version = { text: "" };
  message.shown = message.versions.push(version) - 1;
  isMessage = false;
  running = { controller: new AbortController(), conversation, version };
  keep(conversation);
  render();
  scrollToEnd();
  announce(t("writing"));
  try {
    await readAnswer(running, showSoon, render);
    const about = version.call?.function;
    announce(`${t("done")} ${about ? `${t("callOf", about)} ${about.arguments}` : version.text}`);
  } catch (error) {
    if (error.name === "AbortError") version.finish = "stopped";
    else version.failure = { kind: error.kind ?? "failed", message: error.message };
  }
  running = null;
  keep(conversation);
  showComposer();
  if (conversation === shown) {
    render();
    meter();
  }
}

const meter = debounced(async () => {
  const place = byId("chat-meter");
  const draft = byId("chat-text").value;
  const end = editing ?? shown.messages.length;
  const messages = toSend(shown, end, ...(draft.trim() ? [drafted(draft)] : []));
  if (!messages.length || !model() || model().labels || byId("chat").hidden) {
    place.textContent = "";
    return;
  }
  try {
    const { count, max_model_len: most } = await counted(messages);
    place.textContent = t("context", { n: number(count), most: number(most) });
    place.classList.toggle("over", count >= most);
  } catch {
    place.textContent = ""; // the meter is optional
  }
}, METER_PAUSE_MS);

// The view

function render() {
  const log = byId("log");
  log.ariaBusy = String(running?.conversation === shown);
  following(byId("chat-scroller"), () => log.replaceChildren(...drawn(shown, running, does)));
  showComposer();
}

function showComposer() {
  byId("send").hidden = running !== null;
  byId("chat-stop").hidden = running === null;
  const call = awaited();
  const result = call && t("resultOf", call.function);
  const isEdit = editing !== null;
  const [line, button] = byId("editing").children;
  byId("editing").hidden = !isEdit && !call;
  line.textContent = isEdit ? t("editing") : t("called", call?.function);
  button.textContent = isEdit ? t("cancel") : isMessage ? result : t("asMessage");
  const field = byId("chat-text");
  field.ariaLabel = field.title = call && !isMessage ? result : t("message");
  field.placeholder = call && !isMessage ? result : t("messageHere");
}

const does = {
  send: (text) => {
    byId("chat-text").value = text;
    byId("chat-form").requestSubmit();
  },
  edit: (index) => !running && edit(index),
  again: () => !running && answer(shown),
  forget: () => {
    if (running) return;
    shown.forgets = true;
    answer(shown);
  },
  turn: (message, by) => {
    message.shown += by;
    keep(shown);
    render();
    meter();
  },
};

let isAwaited = false;

function showSoon() {
  if (isAwaited) return;
  isAwaited = true;
  requestAnimationFrame(() => {
    isAwaited = false;
    if (running?.conversation !== shown) return;
    following(byId("chat-scroller"), () => drawRunning(running));
  });
}

function scrollToEnd() {
  const scroller = byId("chat-scroller");
  scroller.scrollTop = scroller.scrollHeight;
}
