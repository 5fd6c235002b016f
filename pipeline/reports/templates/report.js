"use strict";
// Under a finger or a pointer a chart shows its values, read from the points of its curves.
for (const figure of document.querySelectorAll("figure[data-steps]")) {
  const svg = figure.querySelector(".plot"), cross = svg.querySelector(".cross"), output = figure.querySelector("output");
  const [first, last] = figure.dataset.steps.split(" ").map(Number);
  const [low, high] = figure.dataset.values.split(" ").map(Number);
  const curves = [...svg.querySelectorAll("polyline")].map(line => ({
    name: line.dataset.name, points: line.getAttribute("points").split(" ").map(point => point.split(",").map(Number)),
  }));
  svg.addEventListener("pointermove", event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const nearest = points => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const points = curves.map(curve => nearest(curve.points)), place = nearest(points)[0];
    const step = Math.round(first + (place - 44) / 308 * (last - first));
    const value = y => (low + (150 - y) / 142 * (high - low)).toPrecision(3);
    output.textContent = `at step ${step}: ` + curves.map(({name}, i) => `${name} ${value(points[i][1])}`).join(", ");
    cross.setAttribute("x1", place);
    cross.setAttribute("x2", place);
    cross.style.visibility = "visible";
  });
  svg.addEventListener("pointerleave", () => { output.textContent = ""; cross.style.visibility = "hidden"; });
}
