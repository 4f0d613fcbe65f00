// The page: modes, the model, the server's state.

import { fetchJson } from "./api.js";
import { byId, debounced, h, notice, onKey } from "./dom.js";
import { escapeChat, showChat, startChat, systemPrompt } from "./chat.js";
import { showClassify, startClassify } from "./classify.js";
import { escapeComplete, showComplete, startComplete } from "./complete.js";
import { failureText } from "./failures.js";
import { model, modeOf, onModel, refresh, showAbout } from "./models.js";
import { showSettings } from "./sampling.js";
import { startShell } from "./shell.js";
import { whenFull } from "./store.js";
import { onLanguage, t } from "./words.js";

const FIELDS = { chat: "chat-text", complete: "complete-text", classify: "classify-text" };
const VIEWS = { chat: showChat, complete: showComplete, classify: showClassify };
const WATCH_MS = 10_000; // between two checks of the server
const RETRY_MS = 1_500; // while it cannot be reached

let mode = "chat";
let isAway = false;

function start() {
  startShell();
  startChat(renewSettings);
  startComplete();
  startClassify();
  onModel(showModel);
  onLanguage(showAll);
  whenFull(debounced(() => notice(t("full")), 100));
  for (const button of byId("modes").children) {
    const isOpen = () => button.ariaDisabled !== "true";
    button.onclick = () => (isOpen() ? setMode(button.dataset.mode) : notice(button.title));
  }
  byId("settings-button").onclick = () => (byId("settings").hidden ? openSettings(true) : closeSettings());
  byId("menu").onclick = () => toggleMenu();
  byId("conversations").onclick = (event) => {
    if (event.target.closest(".name, #new-chat")) toggleMenu(false);
  };
  document.querySelector("main").onclick = () => toggleMenu(false);
  onKey(document, onEscape);
  addEventListener("online", watch);
  document.addEventListener("visibilitychange", () => document.hidden || watch());
  watch();
}

function showModel(found, isAnother) {
  document.title = `${found.name} · nanogpt`;
  document.body.dataset.model = found.id;
  showModes();
  for (const show of Object.values(VIEWS)) show(isAnother);
  if (isAnother) setMode(modeOf(found));
}

function showAll() {
  showAbout();
  showModes();
  for (const show of Object.values(VIEWS)) show(false);
  renewSettings();
}

/** Disable the tabs of modes that the model lacks; their titles give the reason. */
function showModes() {
  for (const button of byId("modes").children) {
    const isOther = Boolean(model()?.labels) && button.dataset.mode !== "classify";
    button.ariaDisabled = String(isOther);
    button.title = isOther ? t("onlyLabels", { model: model().name }) : "";
  }
}

function setMode(name) {
  mode = name;
  document.body.dataset.mode = mode;
  for (const name of Object.keys(FIELDS)) byId(name).hidden = name !== mode;
  for (const button of byId("modes").children) {
    button.ariaCurrent = button.dataset.mode === mode ? "true" : null;
  }
  byId("skip").href = `#${FIELDS[mode]}`;
  VIEWS[mode](false);
  renewSettings();
  const isTouched = matchMedia("(pointer: coarse)").matches; // where focus opens the keyboard
  if (!isTouched && !document.querySelector("dialog[open]")) byId(FIELDS[mode]).focus();
}

function openSettings(isAsked) {
  const system = mode === "chat" ? systemPrompt() : null;
  showSettings({ close: closeSettings, system });
  byId("settings").hidden = false;
  byId("settings-button").ariaExpanded = "true";
  if (isAsked) byId("settings").querySelector("textarea, input").focus();
}

const renewSettings = () => byId("settings").hidden || openSettings();

function closeSettings() {
  byId("settings").hidden = true;
  byId("settings-button").ariaExpanded = "false";
  byId("settings-button").focus();
}

function toggleMenu(isOpen = !document.body.classList.contains("menu-open")) {
  document.body.classList.toggle("menu-open", isOpen);
  byId("menu").ariaExpanded = String(isOpen);
}

function onEscape(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const escape = { chat: escapeChat, complete: escapeComplete }[mode];
  if (document.body.classList.contains("menu-open")) toggleMenu(false);
  else if (escape?.()) byId(FIELDS[mode]).focus();
  else if (!byId("settings").hidden) closeSettings();
}

// Server state

let next;

async function watch() {
  clearTimeout(next);
  const trouble = await look();
  if (!document.body.dataset.mode) setMode(mode); // without a model: chat
  const isKeyless = trouble === t("keyNone"); // the dialog was closed: do not reopen it at once
  const button = h("button", { onclick: watch }, t("tryAgain"));
  byId("banner").replaceChildren(trouble ?? "", isKeyless ? button : "");
  byId("banner").hidden = trouble === null;
  if (isAway && trouble === null) notice(t("back"));
  isAway = trouble === t("offline");
  if (!isKeyless) next = setTimeout(watch, trouble === null ? WATCH_MS : RETRY_MS);
}

/** Refresh the models while the page is visible; return the problem or null. */
async function look() {
  if (document.hidden && model()) return null;
  try {
    if (await refresh()) return null;
    return t((await fetchJson("health")).engine === "up" ? "noModels" : "starting");
  } catch (error) {
    return { key: t("keyNone"), offline: t("offline") }[error.kind] ?? failureText(error);
  }
}

start();
