// Before the first paint: the chosen theme and language. Not a module, as those come after it.
(function () {
  let chosen = {};
  try {
    chosen = JSON.parse(localStorage.getItem("nanogpt.page")) || {};
  } catch {
    // nothing can be kept here, or what was kept is not ours
  }
  const root = document.documentElement;
  if (chosen.theme === "light" || chosen.theme === "dark") root.dataset.theme = chosen.theme;
  const chinese = chosen.language ? chosen.language === "zh" : /^zh/i.test(navigator.language);
  root.lang = chinese ? "zh" : "en";
})();
