// Messages as elements. `does` is { send(text), edit(index), again(), forget(), turn(message, by) }.

import { copy, examples, h, iconButton, notice } from "./dom.js";
import { failureText } from "./failures.js";
import { indented, isJson, verdict } from "./json.js";
import { codeBlock, show } from "./markdown.js";
import { model, modelName, modeOf } from "./models.js";
import { number, t } from "./words.js";

/** Return the elements of a conversation; sets `running.element` and `running.facts`. */
export function drawn(conversation, running, does) {
  const { messages } = conversation;
  if (!messages.length) return [welcome(does)];
  return messages.flatMap((message, index) => {
    const line = index && index === conversation.from ? [h("p", { class: "line" }, t("forgotten"))] : [];
    const { role, call } = message;
    const isMine = role === "user";
    const label = isMine ? t("you") : call ? t("resultOf", call.function) : t("answer");
    const body = role === "assistant"
      ? answerBody(message, message === messages.at(-1), conversation, running, does)
      : sentBody(message, index, does);
    return [...line, h("article", { class: isMine ? "mine" : "theirs", "aria-label": label }, body)];
  });
}

/** Render the version that is being streamed. */
export function drawRunning({ element, facts, version }) {
  if (version.text) show(element, version.text);
  else element.replaceChildren(version.call ? callBlock(version.call) : h("p", { class: "note waiting" }, t("thinking")));
  facts.textContent = factsText(version);
}

function welcome(does) {
  if (!model()) return "";
  const isTaught = modeOf(model()) === "chat";
  return h(
    "div",
    { class: "welcome" },
    h("h1", {}, t("chatEmpty", { model: modelName() })),
    isTaught ? null : h("p", { class: "note" }, t("chatUntaught")),
    examples(t("chatTry"), does.send),
  );
}

function sentBody({ text, call }, index, does) {
  const edit = iconButton("i-edit", t("edit"), () => does.edit(index));
  const actions = h("div", { class: "actions" }, call ? "" : copyButton(() => text), edit);
  const body = call
    ? codeBlock(isJson(text) ? indented(text) : text, h("b", {}, t("resultOf", call.function)))
    : h("div", { class: "bubble", dir: "auto" }, text);
  return [body, actions];
}

const callBlock = ({ function: about }) =>
  codeBlock(indented(about.arguments), h("b", {}, t("callOf", about)));

function answerBody(message, isLast, conversation, running, does) {
  const version = message.versions[message.shown] ?? { text: "" };
  const text = h("div", { class: "text" });
  if (running?.version === version) {
    running.element = text;
    running.facts = h("span", { class: "note facts" });
    drawRunning(running);
    return [text, h("div", { class: "actions" }, running.facts)];
  }
  if (version.call) text.append(callBlock(version.call));
  else if (version.isJson && isJson(version.text)) text.append(codeBlock(indented(version.text), "json"));
  else if (version.text || !version.finish) show(text, version.text);
  else text.append(h("p", { class: "note" }, t("nothingSaid")));
  const failure = version.failure ? [failureBox(version.failure, isLast, conversation, does)] : [];
  return [text, ...failure, answerActions(message, version, isLast, does)];
}

function answerActions(message, version, isLast, does) {
  const actions = h("div", { class: "actions" });
  if (version.text) actions.append(copyButton(() => version.text));
  if (isLast && !version.failure) actions.append(iconButton("i-again", t("again"), does.again));
  if (message.versions.length > 1) actions.append(...versionButtons(message, does));
  actions.append(h("span", { class: "note facts" }, factsText(version)));
  return actions;
}

function versionButtons(message, does) {
  const { versions, shown } = message;
  const turn = (by) => () => does.turn(message, by);
  return [
    iconButton("i-left", t("earlier"), turn(-1), { disabled: shown === 0 }),
    h("span", { class: "note" }, `${shown + 1}/${versions.length}`),
    iconButton("i-right", t("later"), turn(1), { disabled: shown === versions.length - 1 }),
  ];
}

function copyButton(text) {
  return iconButton("i-copy", t("copy"), async () => {
    await copy(text());
    notice(t("copied"));
  });
}

/** Return a failure, with actions for the last message. */
function failureBox(failure, isLast, conversation, does) {
  const box = h("div", { class: "failure", role: "alert" }, h("p", {}, failureText(failure)));
  if (!isLast) return box;
  const button = (label, action) => h("button", { onclick: action }, label);
  const last = conversation.messages.length - 2;
  const isLater = ({ role }, i) => role === "user" && i > conversation.from && i <= last;
  if (failure.kind === "context" && conversation.messages.some(isLater)) {
    box.append(button(t("forgetOldest"), does.forget));
  } else if (failure.kind !== "context") {
    box.append(button(t("tryAgain"), does.again));
  }
  return box;
}

/** Return the figures of an answer, and how it ended. */
export function factsText({ text, facts, finish, isJson }) {
  const parts = [];
  if (facts) {
    parts.push(t("tokens", { n: number(facts.tokens) }));
    if (facts.perSecond) parts.push(t("perSecond", { n: number(facts.perSecond, facts.perSecond < 10 ? 1 : 0) }));
    parts.push(t("first", { n: number(facts.first, 2) }));
  }
  if (finish === "length") parts.push(t("cutLength"));
  if (finish === "stopped") parts.push(t("stopped"));
  if (finish && isJson) parts.push(verdict(text));
  return parts.join(" · ");
}
