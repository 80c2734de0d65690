"use strict";

// Draws every chart from its specification, in the colours of the page, and answers the controls of its figure.
(() => {
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();

  document.documentElement.classList.add("script");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function theme() {
    const [ink, faint, line] = [colour("--ink"), colour("--faint"), colour("--line")];
    return {
      background: null,
      font: getComputedStyle(document.body).fontFamily,
      view: { stroke: null },
      text: { color: ink, fill: ink },
      axis: { labelColor: faint, titleColor: faint, domainColor: line, tickColor: line, gridColor: line,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", aria: false },
      legend: { labelColor: ink, labelFontSize: 12, aria: false, columns: 2 },
      mark: { aria: false },
    };
  }

  // What the controls of a chart's figure say, by the names of the specification's parameters.
  function state(chart) {
    const figure = chart.closest("[data-figure]");
    const by = figure.querySelector("[data-by]:checked");
    const shown = [...figure.querySelectorAll("[data-shown]:checked")].map((each) => each.value);
    return { by: by && by.value, shown, dark: scheme.matches };
  }

  function apply(view, wanted) {
    const known = view.getState({ signals: () => true, data: () => false }).signals;
    for (const [name, value] of Object.entries(wanted)) {
      if (value !== null && name in known) view.signal(name, value);
    }
    return view.runAsync();
  }

  async function draw(chart) {
    if (views.has(chart)) views.get(chart).finalize();
    const spec = JSON.parse(document.querySelector(`script[data-for="${chart.id}"]`).textContent);
    const result = await vegaEmbed(chart, spec, {
      renderer: "svg",
      actions: false,
      ast: true,
      config: theme(),
      tooltip: { theme: scheme.matches ? "dark" : "light" },
    });
    views.set(chart, result);
    await apply(result.view, state(chart));
    chart.dataset.drawn = scheme.matches ? "dark" : "light";
  }

  let round = 0;

  async function drawAll() {
    const own = ++round;
    for (const chart of document.querySelectorAll("[data-chart]")) {
      if (own !== round) return;
      await draw(chart).catch((error) => {
        // The others are drawn all the same; the table under this one has its figures.
        console.error(`${chart.id}: ${error}`);
        chart.textContent = "This chart could not be drawn; its figures are in the table.";
      });
      await new Promise((next) => setTimeout(next));
    }
    document.documentElement.dataset.charts = scheme.matches ? "dark" : "light";
  }

  document.addEventListener("change", (event) => {
    const figure = event.target.closest("[data-figure]");
    if (!figure) return;
    for (const chart of figure.querySelectorAll("[data-chart]")) {
      if (views.has(chart)) apply(views.get(chart).view, state(chart));
    }
  });
  scheme.addEventListener("change", drawAll);
  drawAll();
})();
