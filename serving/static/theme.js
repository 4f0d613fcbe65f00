// Theme and language before the first paint, so not a module.
(function () {
  let chosen = {};
  try {
    chosen = JSON.parse(localStorage.getItem("nanogpt.page")) || {};
  } catch {
    // not readable
  }
  const root = document.documentElement;
  if (chosen.theme === "light" || chosen.theme === "dark") root.dataset.theme = chosen.theme;
  const chinese = chosen.language ? chosen.language === "zh" : /^zh/i.test(navigator.language);
  root.lang = chinese ? "zh" : "en";
})();
