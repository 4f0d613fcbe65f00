// The list of conversations.

import { byId, h, iconButton, notice, onKey } from "./dom.js";
import * as store from "./store.js";
import { t } from "./words.js";

let chat;

/** `ofChat` is { current(), answered(), open(conversation), stop() }. */
export function startList(ofChat) {
  chat = ofChat;
}

export function showList() {
  byId("conversation-list").replaceChildren(...store.conversations().map(entry));
}

function entry(conversation) {
  const title = conversation.title || t("newChat");
  const isCurrent = conversation.id === chat.current().id;
  const select = () => chat.open(isAnswered(conversation) ? chat.answered() : conversation);
  const line = h("li", { class: isCurrent ? "current" : "" });
  const name = h("button", { class: "name", dir: "auto", onclick: select, title }, title);
  if (isCurrent) name.ariaCurrent = "true";
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
    const current = chat.current();
    const named = conversation.id === current.id ? current : conversation;
    if (isMeant && field.value.trim()) named.title = field.value.trim();
    store.keepConversation(named);
    showList();
  };
  onKey(field, (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") end(false);
    event.stopPropagation();
  });
  field.onblur = () => end(true);
  line.replaceChildren(field);
  field.select();
}

function remove(conversation) {
  if (isAnswered(conversation)) chat.stop();
  store.removeConversation(conversation.id);
  if (conversation.id === chat.current().id) chat.open(store.newConversation());
  else showList();
  notice(t("removed"), t("undo"), () => {
    store.keepConversation(conversation);
    chat.open(conversation);
  });
}

const isAnswered = (conversation) => chat.answered()?.id === conversation.id;
