"""How the report looks, and the little it does when it is touched."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1c2024; --soft: #59626c; --line: #dfe3e8;
  --good: #00654b; --bad: #a83600; --busy: #00589b; --idle: #59626c;
  --s0: #0068b0; --s1: #c25700; --s2: #007a5b; --s3: #a8478a; --s4: #7a6000; --s5: #4a5560; --s6: #2f8fc4; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1d2125; --ink: #e6e9ec; --soft: #a3adb7; --line: #333a41;
  --good: #4fd1a5; --bad: #ff9b66; --busy: #6cb8f0; --idle: #a3adb7;
  --s0: #5cb2f2; --s1: #f5a04c; --s2: #45c99c; --s3: #e596c8; --s4: #d8c04a; --s5: #b3bdc7; --s6: #9ad3f7; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
a { color: var(--busy); text-underline-offset: .15em; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.75rem 0 .25rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0 .75rem; } .about, .sub { color: var(--soft); font-size: .875rem; max-width: 48rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0 0; font-size: .875rem; }
.pill { display: inline-block; border: 1px solid currentColor; border-radius: 1rem; padding: 0 .6rem; font-size: .8rem;
  line-height: 1.5; white-space: nowrap; vertical-align: .1em; }
.good { color: var(--good); } .bad { color: var(--bad); } .busy { color: var(--busy); } .idle { color: var(--idle); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.25rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; overflow-wrap: anywhere; }
.tile span { display: block; color: var(--soft); font-size: .8rem; line-height: 1.35; }
.tile strong { font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.notice { border-left: 3px solid var(--bad); padding: .1rem .8rem; margin: .75rem 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.75rem 2rem;
  margin-top: 1rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; font-size: .9rem; }
.unit { font-weight: 400; color: var(--soft); }
.keys { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .8rem; color: var(--soft); min-height: 1.4em; }
.keys span { white-space: nowrap; } .keys b { font-weight: 500; color: var(--ink); }
.keys svg { width: 1.6em; height: .7em; margin-right: .3em; vertical-align: 0; display: inline; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.label { fill: var(--ink); font-size: 12px; }
.forest text { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.square svg { max-width: 15rem; } .heat svg { max-width: 44rem; }
.plot { touch-action: pan-y; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); } .cross { stroke: var(--soft); visibility: hidden; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); } .s4 { --c: var(--s4); }
.s5 { --c: var(--s5); } .s6 { --c: var(--s6); } .kgood { --c: var(--good); } .kbad { --c: var(--bad); }
.kidle { --c: var(--idle); } .kbusy { --c: var(--busy); }
.curve, .swatch, .stem { stroke: var(--c); } .area, .dot, .bar { fill: var(--c); }
.area { stroke: var(--paper); stroke-width: .6; fill-opacity: .85; }
.swatch { stroke-width: 3; } .stem { stroke-width: 2; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
td, th { border-bottom: 1px solid var(--line); padding: .35rem 1.1rem .35rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; } td code { white-space: nowrap; }
 .number { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: .4rem 0; } summary { cursor: pointer; padding: .2rem 0; }
.said, pre, code { font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: .5rem 0; } .said { unicode-bidi: isolate; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .8rem; }
.sample { background: var(--card); border-radius: .5rem; padding: .7rem .8rem; min-width: 0; }
.sample > * { margin: 0 0 .45rem; } .sample > :last-child { margin: 0; }
.sample .asked { color: var(--soft); } .long { max-height: 18rem; overflow-y: auto; }
.judged { font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: .6rem; }
.side { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .6rem; background: var(--paper);
  min-width: 0; }
.side .who { font-size: .8rem; color: var(--soft); }
.rails { display: grid; grid-template-columns: auto minmax(0, 1fr); margin-top: 1rem; }
.rails > svg { width: auto; display: block; }
.rail { fill: none; stroke: var(--soft); stroke-width: 1.4; opacity: .75; }
.stop-dot { fill: var(--c); stroke: var(--paper); stroke-width: 2; }
.stop-dot.kidle { fill: var(--paper); stroke: var(--c); }
.stop { height: 72px; display: flex; flex-wrap: nowrap; align-items: center; gap: .9rem; padding-left: .6rem;
  min-width: 0; border-bottom: 1px solid var(--line); }
.stop > div { min-width: 0; flex: 1; } .stop .sub { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.stop .name { font-weight: 600; } .stop .type { color: var(--soft); font-size: .8rem; font-weight: 400; }
.stop > svg { width: 7.5rem; flex: none; }
@media (max-width: 30rem) { .stop > svg { width: 4.5rem; } main { padding: 1rem .9rem 3rem; } }
"""

SCRIPT = """
"use strict";
for (const figure of document.querySelectorAll("figure[data-x]")) {
  const svg = figure.querySelector(".plot"), cross = svg.querySelector(".cross"), said = figure.querySelector("output");
  const [first, last, left, right] = figure.dataset.x.split(" ").map(Number);
  const [low, high, bottom, top] = figure.dataset.y.split(" ").map(Number);
  const value = y => low + (bottom - y) / (bottom - top) * (high - low);
  const curves = [...svg.querySelectorAll("[data-name]")].map(shape => {
    const points = shape.getAttribute("points").split(" ").map(point => point.split(",").map(Number));
    if (shape.tagName === "polyline")
      return {name: shape.dataset.name, at: points.map(([x, y]) => [x, value(y)])};
    const edge = points.slice(0, points.length / 2), under = points.slice(points.length / 2).reverse();
    return {name: shape.dataset.name, at: edge.map(([x, y], i) => [x, value(y) - value(under[i][1])])};
  });
  svg.addEventListener("pointermove", event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const near = curves.map(curve => curve.at.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const place = near.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)[0];
    const step = Math.round(first + (place - left) / (right - left) * (last - first));
    said.textContent = `at step ${step}: ` + curves.map((c, i) => `${c.name} ${near[i][1].toPrecision(3)}`).join(", ");
    cross.setAttribute("x1", place); cross.setAttribute("x2", place); cross.style.visibility = "visible";
  });
  svg.addEventListener("pointerleave", () => { said.textContent = ""; cross.style.visibility = "hidden"; });
}
"""
"""Under a finger or a pointer a chart says its values; they are read from the curves themselves."""
