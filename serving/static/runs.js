// A card for each run with its curves, its report and a link to its model.

import { fetchJson } from "./api.js";
import { byId, h, iconButton, svg } from "./dom.js";
import { showFailure } from "./failures.js";
import "./runs_words.js";
import { startShell } from "./shell.js";
import { language, number, onLanguage, percent, t } from "./words.js";

const LOOK_MS = 5_000; // between two refreshes, for runs that may be training
const WIDTH = 320;
const HEIGHT = 120;
const LEFT = 34; // of the plot, after the labels of the vertical axis
const BOTTOM = 104;
const TOP = 8;
const WIDE = 30; // times the median, from which the vertical axis is logarithmic, as in reports

let runs = null;
let boards = {};
let before = "";

async function look() {
  let wait = LOOK_MS;
  try {
    if (!document.hidden || !runs) {
      const answer = await fetchJson("v1/runs");
      [runs, boards] = [answer.data, answer.leaderboards ?? {}];
    }
    showFailure("banner");
    // Addresses have new tickets every time.
    const now = JSON.stringify([runs, boards], (name, value) => (name === "report" ? Boolean(value) : value));
    if (now !== before) render();
    before = now;
  } catch (error) {
    showFailure("banner", error);
    if (error.kind === "key") wait = null;
  }
  if (wait) setTimeout(look, wait);
}

function render() {
  if (!runs) return;
  const nothing = h("p", { class: "note" }, t("noRuns"));
  byId("boards").replaceChildren(...Object.entries(boards).map(board));
  byId("runs").replaceChildren(...(runs.length ? runs.map(card) : [nothing]));
}

/** The runs of a sweep, grouped by all but their seed, the best first. */
function board([sweep, rows]) {
  const columns = ["rank", "run", "seeds", "bits", "difference", "interval", "speed", "time"];
  const digits = { minimumFractionDigits: 4, maximumFractionDigits: 4 };
  const fixed = (value, sign = "auto") =>
    new Intl.NumberFormat(language(), { ...digits, signDisplay: sign }).format(value);
  const signed = (value) => fixed(value, "exceptZero");
  const line = (row, i) => {
    const { bits_per_byte: bits, bits_per_byte_stderr: error, difference } = row;
    const ends = [row.difference_low, row.difference_high];
    const cells = [
      number(i + 1),
      row.label,
      number(row.seeds),
      Number.isFinite(bits) ? fixed(bits) + (error ? ` ± ${fixed(error)}` : "") : "",
      Number.isFinite(difference) ? signed(difference) : "",
      ends.every(Number.isFinite) ? ends.map(signed).join(" … ") : "",
      Number.isFinite(row.tokens_per_s) ? number(row.tokens_per_s) : "",
      Number.isFinite(row.wall_s) ? number(row.wall_s) : "",
    ];
    return h("tr", {}, cells.map((text) => h("td", {}, text)));
  };
  const head = h("tr", {}, columns.map((name) => h("th", { scope: "col" }, t(name))));
  const table = h("table", {}, h("thead", {}, head), h("tbody", {}, rows.map(line)));
  return h("section", { class: "board" }, h("h2", {}, sweep), h("div", {}, table));
}

function card(run) {
  return h(
    "article",
    { class: "run" },
    h("h2", {}, run.id),
    facts(run),
    run.error && h("p", { class: "failure" }, run.error),
    metrics(run.summary),
    figure(run),
    actions(run),
  );
}

function facts({ stage, state, step, max_steps: most, updated }) {
  const when = new Intl.DateTimeFormat(document.documentElement.lang, {
    ...{ month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" },
  }).format(updated * 1000);
  const isOver = state === "finished" || !most;
  const far = isOver
    ? t("steps", { n: number(step) })
    : t("stepOf", { n: number(step), most: number(most) });
  const badge = h("span", { class: `badge ${state}` }, t(state === "stopped" ? "halted" : state));
  return h("p", { class: "facts" }, badge, ` ${[stage, far, when].filter(Boolean).join(" · ")}`);
}

function metrics(summary) {
  const shown = [
    ["accuracy", summary.test_accuracy ?? summary.val_accuracy, percent],
    ["valLoss", summary.val_loss, (value) => number(value, 3)],
    ["bits", summary.val_bits_per_byte, (value) => number(value, 3)],
    ["speed", summary.tokens_per_s, number],
  ].filter(([, value]) => Number.isFinite(value));
  return h(
    "dl",
    { class: "metrics" },
    shown.map(([name, value, format]) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, format(value)))),
  );
}

function figure({ curves, step }) {
  const shown = [
    ["trainLoss", curves["train/loss"], "series-0 faint"],
    ["valLoss", curves["val/loss"], "series-1"],
  ].filter(([, points]) => points?.length);
  if (!shown.length) return "";
  const values = shown.map(([name, points]) => `${t(name)} ${number(points.at(-1)[1], 3)}`);
  const legend = shown.map(([name, points, look]) =>
    h("span", {}, h("i", { class: look }), `${t(name)} ${number(points.at(-1)[1], 3)}`),
  );
  const drawn = draw(shown, step, t("curvesOf", { values: values.join(", ") }));
  return h("figure", {}, drawn, h("figcaption", { class: "legend" }, legend));
}

function draw(shown, last, label) {
  const points = shown.flatMap(([, its]) => its);
  const end = Math.max(last, ...points.map(([step]) => step), 1); // damaged runs included
  const values = points.map(([, value]) => value).sort((one, other) => one - other);
  const [least, median] = [values[0], values[values.length >> 1]];
  const isWide = least > 0 && values.at(-1) > WIDE * median;
  const [scale, unscale] = isWide ? [Math.log, Math.exp] : [Number, Number];
  const [low, high] = limits(scale(least), scale(values.at(-1)));
  const x = (step) => LEFT + ((WIDTH - LEFT - 4) * step) / end;
  const y = (value) => BOTTOM - ((BOTTOM - TOP) * (scale(value) - low)) / (high - low);
  const ticks = [low, (low + high) / 2, high].map(unscale).flatMap((value) => [
    svg("line", { class: "grid", x1: LEFT, x2: WIDTH - 4, y1: y(value), y2: y(value) }),
    svg("text", { x: LEFT - 5, y: y(value) + 3.5, "text-anchor": "end" }, short(value)),
  ]);
  const steps = [0, end].map((step, i) =>
    svg("text", { x: x(step), y: HEIGHT - 3, "text-anchor": i ? "end" : "start" }, number(step)),
  );
  const lines = shown.map(([, points, look]) => {
    const places = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
    const begin = places.length > 1 ? places.join("L") : `${places[0]}h.1`;
    return svg("path", { class: look, d: `M${begin}`, "stroke-linecap": "round" });
  });
  const attributes = { class: "curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" };
  return svg("svg", { ...attributes, "aria-label": label }, ...ticks, ...steps, ...lines);
}

function limits(low, high) {
  const margin = 0.06 * (high - low) || 0.1;
  return [low - margin, high + margin];
}

const short = (value) =>
  Math.abs(value) >= 1e4 ? value.toExponential(0) : number(value, Math.abs(value) < 1 ? 2 : 1);

function actions({ id, model, report }) {
  const box = h("div", { class: "actions" });
  if (model) {
    const href = `./?model=${encodeURIComponent(model)}`;
    box.append(h("a", { class: "button primary", href }, t("tryIt")));
  }
  if (report) {
    const label = `${t("report")}: ${id}`;
    const open = () => openReport(id);
    box.append(h("button", { "aria-label": label, onclick: open }, t("report")));
  }
  return box;
}

/** Show a report in a sandboxed frame, at its newest address, as tickets expire. */
function openReport(id) {
  const report = runs.find((run) => run.id === id).report.slice(1); // relative, as this page is
  const dialog = byId("report");
  const frame = h("iframe", { sandbox: "", src: report, title: `${t("report")}: ${id}` });
  const close = iconButton("i-close", t("close"), () => dialog.close());
  const tab = h("a", { class: "quiet", href: report, target: "_blank", rel: "noopener" }, t("inTab"));
  const head = h("div", { class: "head" }, h("h2", { id: "report-title" }, id), tab, close);
  dialog.replaceChildren(head, frame);
  dialog.onclose = () => dialog.replaceChildren();
  dialog.showModal();
}

startShell();
onLanguage(render);
look();
