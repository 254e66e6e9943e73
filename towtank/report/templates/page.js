"use strict";
(() => {
  const { figures, twins } = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const print = window.matchMedia("print");
  const fine = window.matchMedia("(pointer: fine)");
  const config = {
    displaylogo: false,
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false,
    showSendToCloud: false, // plotly's default offers to upload the chart
    plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
  };

  // Colours: a figure is stored in the light palette; on a dark page every colour is swapped for its twin.
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",");
  const pairs = new Map(Object.entries(twins));
  for (const [light, twin] of Object.entries(twins)) pairs.set("rgba(" + channels(light), "rgba(" + channels(twin));
  const swap = (colour) => {
    const cut = colour.startsWith("rgba(") ? colour.lastIndexOf(",") : colour.length;
    const twin = pairs.get(colour.slice(0, cut));
    return twin === undefined ? colour : twin + colour.slice(cut);
  };
  const recolour = (node) => {
    if (typeof node === "string") return swap(node);
    if (Array.isArray(node)) return node.map(recolour);
    if (node === null || typeof node !== "object") return node;
    return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, recolour(value)]));
  };

  const narrow = (layout, div) => {
    if (div.clientWidth >= 480) return layout;
    return { ...layout, margin: { ...layout.margin, l: 46, r: 6 }, font: { ...layout.font, size: 11 } };
  };

  const draw = () => {
    const night = dark.matches && !print.matches;
    for (const [id, figure] of Object.entries(figures)) {
      const div = document.getElementById(id);
      const { data, layout } = night ? recolour(figure) : figure;
      const full = { ...narrow(layout, div), dragmode: fine.matches ? "zoom" : false };
      Plotly.react(div, structuredClone(data), structuredClone(full), config);
    }
  };
  const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => Plotly.Plots.resize(target)));
  draw();
  for (const id of Object.keys(figures)) resized.observe(document.getElementById(id));
  dark.addEventListener("change", draw);
  print.addEventListener("change", draw);

  // The table of runs: sort by a heading, show the rows that have every word of the filter.
  const table = document.getElementById("runs");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);

  const compare = (column, sign) => (a, b) => {
    const [x, y] = [a.cells[column].dataset.key, b.cells[column].dataset.key];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const [p, q] = [Number(x), Number(y)];
    return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q);
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...rows.sort(compare(column, up ? 1 : -1)));
    });
  });

  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const cells = Array.from(row.cells, (cell) => cell.textContent.toLowerCase());
      const has = (word) => cells.some((cell) => (/^[\d.]+$/.test(word) ? cell === word : cell.includes(word)));
      row.hidden = !words.every(has);
      count += !row.hidden;
    }
    shown.textContent = count + " of " + rows.length + " runs";
  });
})();
