// The page where one talks to the models: which mode is shown, for which model, on what server.

import { byId, debounced, h, notice } from "/static/dom.js";
import { escapeChat, showChat, startChat, systemPrompt } from "/static/chat.js";
import { showClassify, startClassify } from "/static/classify.js";
import { escapeComplete, showComplete, startComplete } from "/static/complete.js";
import { failureText } from "/static/failures.js";
import { model, modeOf, onModel, refresh, showAbout } from "/static/models.js";
import { showSettings } from "/static/sampling.js";
import { startShell } from "/static/shell.js";
import { whenFull } from "/static/store.js";
import { onLanguage, t } from "/static/words.js";

const FIELDS = { chat: "chat-text", complete: "complete-text", classify: "classify-text" };
const VIEWS = { chat: showChat, complete: showComplete, classify: showClassify };
const WATCH_MS = 10_000; // between two looks whether the server is there
const RETRY_MS = 1_500; // while it is not

let mode = "chat";
let isAway = false;

function start() {
  startShell();
  startChat(() => !byId("settings").hidden && openSettings());
  startComplete();
  startClassify();
  onModel(showModel);
  onLanguage(showAll);
  whenFull(debounced(() => notice(t("full")), 100));
  for (const button of byId("modes").children) {
    button.addEventListener("click", () => setMode(button.dataset.mode));
  }
  byId("settings-button").addEventListener("click", () =>
    byId("settings").hidden ? openSettings(true) : closeSettings(),
  );
  byId("menu").addEventListener("click", () => toggleMenu());
  byId("conversations").addEventListener("click", (event) => {
    if (event.target.closest(".name, #new-chat")) toggleMenu(false);
  });
  document.querySelector("main").addEventListener("click", () => toggleMenu(false));
  addEventListener("keydown", onKey);
  addEventListener("online", watch);
  document.addEventListener("visibilitychange", () => document.hidden || watch());
  watch();
}

function showModel(found, isAnother) {
  if (isAnother) setMode(modeOf(found));
  document.title = `${found.id} · nanogpt`;
  document.body.dataset.model = found.id;
  for (const button of byId("modes").children) {
    button.disabled = (button.dataset.mode === "classify") !== Boolean(found.labels);
  }
  for (const show of Object.values(VIEWS)) show(isAnother);
}

function showAll() {
  showAbout();
  for (const show of Object.values(VIEWS)) show(false);
  if (!byId("settings").hidden) openSettings();
}

function setMode(wanted) {
  mode = wanted;
  document.body.dataset.mode = mode;
  for (const name of Object.keys(FIELDS)) byId(name).hidden = name !== mode;
  for (const button of byId("modes").children) {
    if (button.dataset.mode === mode) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  byId("skip").href = `#${FIELDS[mode]}`;
  VIEWS[mode](false);
  if (!byId("settings").hidden) openSettings();
  const isTouched = matchMedia("(pointer: coarse)").matches; // there a focus opens the keyboard
  if (!isTouched && !document.querySelector("dialog[open]")) byId(FIELDS[mode]).focus();
}

function openSettings(isAsked) {
  const system = mode === "chat" ? systemPrompt() : null;
  showSettings({ close: closeSettings, system });
  byId("settings").hidden = false;
  byId("settings-button").setAttribute("aria-expanded", "true");
  if (isAsked) byId("settings").querySelector("textarea, input").focus();
}

function closeSettings() {
  byId("settings").hidden = true;
  byId("settings-button").setAttribute("aria-expanded", "false");
  byId("settings-button").focus();
}

function toggleMenu(isOpen = !document.body.classList.contains("menu-open")) {
  document.body.classList.toggle("menu-open", isOpen);
  byId("menu").setAttribute("aria-expanded", String(isOpen));
}

function onKey(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const escape = { chat: escapeChat, complete: escapeComplete }[mode];
  if (document.body.classList.contains("menu-open")) toggleMenu(false);
  else if (escape?.()) byId(FIELDS[mode]).focus();
  else if (!byId("settings").hidden) closeSettings();
}

// Whether the server is there

let next;

async function watch() {
  clearTimeout(next);
  const trouble = await look();
  if (!document.body.dataset.mode) setMode(mode); // no model has said which, so as if one chats
  const isKeyless = trouble === t("keyNone"); // who closed the dialog is not asked again at once
  const button = h("button", { type: "button", onclick: watch }, t("tryAgain"));
  byId("banner").replaceChildren(trouble ?? "", isKeyless ? button : "");
  byId("banner").hidden = trouble === null;
  if (isAway && trouble === null) notice(t("back"));
  isAway = trouble === t("offline");
  if (!isKeyless) next = setTimeout(watch, trouble === null ? WATCH_MS : RETRY_MS);
}

/** Ask for the models when the page is looked at; return what is in the way of using them. */
async function look() {
  if (document.hidden && model()) return null;
  let health;
  try {
    health = await (await fetch("/health", { cache: "no-store" })).json();
  } catch {
    return t("offline");
  }
  try {
    if (await refresh()) return null;
    return t(health.engine === "up" ? "noModels" : "starting");
  } catch (error) {
    return error.kind === "key" ? t("keyNone") : failureText(error);
  }
}

start();
