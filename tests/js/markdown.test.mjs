import assert from "node:assert/strict";
import { test } from "node:test";

import { container, everything } from "./dom.mjs";
import { show } from "../../serving/static/markdown.js";

const ATTACKS = [
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "<img src=https://evil.example/x.png>",
  "![x](https://evil.example/x.png)",
  "[x](javascript:alert(1))",
  "[x](JaVaScRiPt:alert(1))",
  "[x]( java\tscript:alert(1))",
  "[x](data:text/html,<script>alert(1)</script>)",
  "[x](vbscript:x) <javascript:alert(1)>",
  '[x](https://ok.example/" onmouseover=alert(1) )',
  "<iframe src=https://evil.example></iframe>",
  "<svg onload=alert(1)>",
  "`<script>alert(1)</script>`",
  "```<img src=x onerror=alert(1)>\n<script>alert(1)</script>\n```",
  "| <script>alert(1)</script> |\n|---|\n| <img src=x onerror=alert(1)> |",
  "<style>*{display:none}</style><base href=https://evil.example/>",
  "<form action=https://evil.example><button>x</button></form>",
  "</div></article><h1>out</h1>",
];
const UNCLOSED = ["```", "~~~python\n", "**", "_ _ _ _", "[", "![", "[x](", "[x]()", "\\", "`".repeat(31)];
const ENDLESS = [
  ...["> ", "- "].map((mark) => mark.repeat(60)),
  ...["* ".repeat(500), "#".repeat(40), "[".repeat(3000), "*a ".repeat(2000), "_a".repeat(2000)],
];
const ODD = ["|||\n|-|\n|", "\n".repeat(500), "\x00\u202e\ufeff\u200b", "\ud83d", "1. a\n   - b\n      1. c\n         > d\n  e"];
const INERT = new Set(
  "DIV P H1 H2 H3 H4 H5 H6 HR BLOCKQUOTE UL OL LI TABLE THEAD TBODY TR TH TD FIGURE FIGCAPTION PRE CODE SPAN BUTTON SVG USE STRONG EM DEL A".split(" "),
);

function rendered(text) {
  const element = container();
  show(element, text);
  return element;
}

const found = (element, tag) => everything(element).filter((e) => e.tagName === tag);

test("an attack becomes text: no element that loads or runs, no handler, no unsafe link", () => {
  for (const attack of ATTACKS) {
    for (const element of everything(rendered(`${attack}\n\nand ${attack} inline`))) {
      assert.ok(INERT.has(element.tagName), `${attack}: ${element.tagName}`);
      assert.deepEqual(Object.keys(element.attributes).filter((name) => /^on|^style$|^src/.test(name)), [], attack);
      if (element.tagName === "A") assert.match(element.attributes.href, /^https:/, attack);
      if (element.tagName === "USE") assert.match(element.attributes.href, /^#/, attack);
    }
  }
});

test("malformed markdown is rendered as text", () => {
  for (const text of [...UNCLOSED, ...ENDLESS, ...ODD]) rendered(text);
  assert.equal(rendered("**bold").textContent, "**bold");
});

test("links open elsewhere and pass nothing on", () => {
  const links = found(rendered("[safe](https://one.example/a?b=c), https://two.example/x. <b>"), "A");
  const rel = "noopener noreferrer nofollow";
  assert.deepEqual(
    links.map(({ attributes }) => attributes),
    [
      { href: "https://one.example/a?b=c", target: "_blank", rel },
      { href: "https://two.example/x", target: "_blank", rel },
    ],
  );
});

test("markdown becomes elements", () => {
  const element = rendered(
    "# Title\n\n**bold** and *slanted*, ~~gone~~, `code`, [here](https://example.org/x).\n\n" +
      "1. outer\n   - inner\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n" +
      '```python\nprint("<b>")\n```\n\nsnake_case_name and 2 * 3 * 4.',
  );
  for (const [tag, text] of [
    ["H3", "Title"],
    ["STRONG", "bold"],
    ["EM", "slanted"],
    ["DEL", "gone"],
    ["OL", "outerinner"],
    ["UL", "inner"],
    ["BLOCKQUOTE", "quoted"],
    ["PRE", 'print("<b>")'],
    ["A", "here"],
  ]) {
    assert.equal(found(element, tag)[0]?.textContent, text, tag);
  }
  assert.deepEqual(found(element, "TD").map((cell) => cell.textContent), ["1", "2"]);
  assert.equal(found(element, "P").at(-1).textContent, "snake_case_name and 2 * 3 * 4.");
});

test("blocks that did not change keep their elements while a text grows", () => {
  const element = container();
  show(element, "one\n\ntwo");
  const [first] = element.children;
  show(element, "one\n\ntwo three");
  assert.equal(element.children[0], first);
  assert.equal(element.children[1].textContent, "two three");
  show(element, "one");
  assert.equal(element.children.length, 1);
});
