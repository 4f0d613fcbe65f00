// Shared by both pages: theme, language, the key dialog.

import { onKeyNeeded } from "./api.js";
import { byId, h, icon } from "./dom.js";
import { load, save } from "./store.js";
import { language, onLanguage, setLanguage, t, translate } from "./words.js";

const PAGE = "nanogpt.page"; // theme.js reads it before the first paint
const THEMES = ["system", "light", "dark"];

export function startShell() {
  document.body.append(keyDialog());
  for (const button of document.querySelectorAll("[data-icon]")) {
    button.prepend(icon(`i-${button.dataset.icon}`));
  }
  translate(document);
  onKeyNeeded(askForKey);
  byId("language").onclick = () => {
    setLanguage(language() === "zh" ? "en" : "zh");
    choose({ language: language() });
  };
  byId("theme").onclick = () => {
    const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
    choose({ theme: next });
    showTheme();
  };
  onLanguage(showTheme);
  showTheme();
  addEventListener("storage", (event) => event.key === PAGE && showTheme());
}

const chosen = () => load(PAGE, {});
const choose = (choice) => save(PAGE, { ...chosen(), ...choice });
const theme = () => (THEMES.includes(chosen().theme) ? chosen().theme : "system");

function showTheme() {
  const name = theme();
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").ariaLabel = byId("theme").title = t("themeIs", { name: t(name) });
}

function keyDialog() {
  const words = (tag, name, attributes) => h(tag, { "data-t": name, ...attributes });
  const field = { type: "password", id: "key", autocomplete: "off", required: true };
  const form = h(
    "form",
    { method: "dialog", id: "key-form" },
    words("h2", "keyTitle", { id: "key-title" }),
    words("p", "keyWrong", { id: "key-wrong", class: "failure", role: "alert", hidden: true }),
    h("label", {}, words("span", "key"), h("input", field)),
    words("p", "keyKept", { class: "note" }),
    h("div", { class: "actions" }, words("button", "keyGo", { type: "submit", class: "primary" })),
  );
  return h("dialog", { id: "key-dialog", "aria-labelledby": "key-title" }, form);
}

/** Resolve to the key entered, or to null when the dialog is closed. */
function askForKey(wasWrong) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-wrong").hidden = !wasWrong;
  field.value = "";
  return new Promise((resolve) => {
    dialog.returnValue = "";
    byId("key-form").onsubmit = () => (dialog.returnValue = "given");
    dialog.onclose = () => {
      const key = field.value.trim();
      field.value = "";
      resolve(dialog.returnValue === "given" && key ? key : null);
    };
    dialog.showModal();
    field.focus();
  });
}
