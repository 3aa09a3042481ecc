// The interactive plots. Each draw* function draws what state.facet says.
const AXES = [
  ["train_flops", "training compute (FLOPs)"],
  ["wall_hours", "training wall-clock (hours)"],
  ["device_hours", "training time × devices (hours)"],
  ["images_seen", "training images seen"],
  ["epochs", "epochs"],
  ["energy_kwh", "energy (kWh)"],
  ["cost", "cost"],
];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const CONFIG = {
  displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
  displayModeBar: window.innerWidth < 600 ? false : "hover", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
};

function layout(x, y, log) {
  const narrow = window.innerWidth < 600;
  const axis = { gridcolor: "#e9ecef", linecolor: "#555b63", ticks: "outside", tickcolor: "#9aa1a9", zeroline: false };
  return {
    font: { family: "system-ui, sans-serif", size: narrow ? 11 : 13, color: "#1b1f24" },
    margin: { l: narrow ? 48 : 64, r: 12, t: 8, b: 48 },
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: "#fff", bordercolor: "#9aa1a9", font: { color: "#1b1f24" } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, title: { text: safe(x), standoff: 8 }, type: "log" },
    yaxis: { ...axis, title: { text: safe(y), standoff: 6 }, type: log ? "log" : "linear" },
  };
}

/** Ticks of a logarithmic axis: 1, 2, 5 up to about two decades, powers of ten beyond; ten times further each way. */
function logTicks(values) {
  const known = values.filter((v) => v > 0), low = Math.min(...known), high = Math.max(...known);
  if (known.length === 0) return {};
  const steps = high / low < 3 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : high / low < 200 ? [1, 2, 5] : [1];
  const tickvals = [];
  for (let e = Math.floor(Math.log10(low)) - 1; e <= Math.ceil(Math.log10(high)) + 1; e += 1) {
    for (const step of steps) tickvals.push(Number(`${step}e${e}`));
  }
  return { tickmode: "array", tickvals, ticktext: tickvals.map(tickText) };
}

function tickText(value) {
  if (value >= 1e-3 && value < 1e5) return value.toLocaleString("en-US", { maximumFractionDigits: 4 });
  const [head, exponent] = value.toExponential().split("e");
  return `${head === "1" ? "" : `${head}·`}10<sup>${Number(exponent)}</sup>`;
}

function facetPoints() {
  return DATA.points.filter((point) => point.facet === state.facet && point.fair);
}

function hover(point) {
  return `<b>${safe(point.label)}</b><br>${safe(FACETS.get(point.facet).name)} ${number(point.value)} ` +
    `${interval(point.low, point.high)}<br>${number(point.train_flops)} FLOPs`;
}

function band(points, x, color, group) {
  const known = points.filter((p) => p.low !== null && p[x] > 0);
  if (known.length < 2) return [];
  return [{
    x: [...known.map((p) => p[x]), ...known.map((p) => p[x]).reverse()],
    y: [...known.map((p) => p.high), ...known.map((p) => p.low).reverse()],
    fill: "toself", fillcolor: color + "26", line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false,
    legendgroup: group, type: "scatter",
  }];
}

function drawCompute() {
  const x = $("axis").value, facet = FACETS.get(state.facet), points = facetPoints();
  const sides = [...new Set(points.map((p) => p.train_resolution))].sort((a, b) => a - b);
  const traces = [];
  if ($("show-recipes").checked) traces.push(...recipeTraces(points, x));
  for (const curve of DATA.curves.filter((c) => c.facet === state.facet)) {
    const own = curve.points.map((i) => DATA.points[i]).filter((p) => p[x] > 0);
    if (own.length === 0) continue;
    const { color, symbol } = look(curve.model), group = `${curve.name}/${curve.dataset_hash}`;
    if ($("show-bands").checked) traces.push(...band(own, x, color, group));
    traces.push({
      x: own.map((p) => p[x]), y: own.map((p) => p.value), customdata: own.map((p) => p.index), type: "scatter",
      mode: "lines+markers", name: safe(curve.name), legendgroup: group, text: own.map(hover), hoverinfo: "text",
      line: { color, width: 2.4, dash: DASHES[sides.indexOf(curve.train_resolution) % DASHES.length] },
      marker: { symbol, size: 9, color, line: { color: "#fff", width: 1 } },
    });
    if ($("show-fits").checked && curve.fit && x === "train_flops") traces.push(...fitTraces(curve.fit, color, group));
  }
  const frontier = points.filter((p) => p.frontier && p[x] > 0);
  if ($("show-frontier").checked && x === "train_flops" && frontier.length) {
    traces.push({ x: frontier.map((p) => p[x]), y: frontier.map((p) => p.value), mode: "markers", type: "scatter",
      name: "frontier", hoverinfo: "skip", marker: { size: 16, symbol: "circle-open", color: "#1b1f24", line: { width: 1.2 } } });
  }
  const shown = layout(AXES.find(([key]) => key === x)[1], facet.name, facet.log);
  Object.assign(shown.xaxis, logTicks(points.map((p) => p[x])));
  if (facet.log) Object.assign(shown.yaxis, logTicks(points.map((p) => p.value)));
  const lowest = Math.min(...points.map((p) => p.value ?? Infinity)), published = DATA.published.filter((p) => p.facet === state.facet);
  if (x === "train_flops") shown.shapes = published.filter((p) => p.fid >= lowest / 1.5).map((p) => ({
    type: "line", xref: "paper", x0: 0.97, x1: 1, y0: p.fid, y1: p.fid, line: { color: "#9aa1a9", width: 2 },
    label: { text: safe(`${p.system} ${p.fid}`), font: { size: 10, color: "#777e86" }, textposition: "start", xanchor: "right" },
  }));
  Plotly.react("plot-compute", traces, shown, CONFIG);
  $("caption-compute").textContent = `${facet.title}. ${facet.bands}` + (published.length
    ? ` Published, with 50,000 samples and far more compute: ${published.map((p) => `${p.system} ${p.fid}`).join(", ")}.` : "");
  const best = points.filter((p) => p.frontier).sort((a, b) => a.train_flops - b.train_flops).pop();
  if (best) card(best);
}

function recipeTraces(points, x) {
  const recipes = Map.groupBy(points.filter((p) => p[x] > 0), (p) => p.recipe);
  return [...recipes.values()].map((own) => ({
    x: own.map((p) => p[x]), y: own.map((p) => p.value), customdata: own.map((p) => p.index), text: own.map(hover),
    hoverinfo: "text", mode: "lines+markers", type: "scatter", showlegend: false, opacity: 0.35,
    line: { color: look(own[0].model).color, width: 1 }, marker: { size: 5, color: look(own[0].model).color },
  }));
}

function fitTraces(fit, color, group) {
  return [
    { x: [...fit.x, ...fit.x.slice().reverse()], y: [...fit.high, ...fit.low.slice().reverse()], fill: "toself",
      fillcolor: color + "1a", line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: group },
    { x: fit.x, y: fit.y, mode: "lines", line: { color, width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false,
      legendgroup: group },
  ];
}

/** A table and no plot: a name of any length is whole, at any width. */
function drawSweep() {
  const tables = DATA.sweep.filter((table) => table.facet === state.facet);
  $("sweep-section").hidden = tables.length === 0;
  if (tables.length === 0) return;
  const sides = [...new Set(tables.flatMap((table) => table.resolutions))].sort((a, b) => a - b);
  const head = element("tr", {}, element("th", {}, "schedule"), ...sides.map((side) => element("th", {}, `${side} px`)));
  const body = element("tbody");
  for (const table of tables) {
    if (tables.length > 1) body.append(element("tr", { class: "family" }, element("th", { colspan: String(sides.length + 1) }, table.model)));
    for (const [i, schedule] of table.schedules.entries()) {
      const cells = sides.map((side) => {
        const j = table.resolutions.indexOf(side), text = j < 0 ? null : table.text[i][j];
        const cell = element("td", {}, text || "not run");
        if (text) shade(cell, table.shade[i][j]);
        return cell;
      });
      body.append(element("tr", {}, element("th", { scope: "row" }, schedule), ...cells));
    }
  }
  replace("table-sweep", element("thead", {}, head), body);
  $("caption-sweep").textContent = `${FACETS.get(state.facet).title}; ${tables.map((t) => t.where).join("; ")}. ` +
    "Colour: ratio to the best of its column, light is best, full blue 1.5 times it. Brackets: 95 % intervals.";
}

/** Colour a cell: the best value (0) is light, the worst (1) blue. */
function shade(cell, worse) {
  const mix = (light, dark) => Math.round(light + (dark - light) * (worse ?? 0));
  cell.style.background = `rgb(${mix(244, 76)}, ${mix(249, 147)}, ${mix(254, 201)})`;
}

/** Validation loss against size: the runs and the law's parabola of each budget, the best size ringed. */
function drawIsoflop() {
  $("isoflop-section").hidden = DATA.isoflop.length === 0;
  if (DATA.isoflop.length === 0) return;
  const law = DATA.isoflop[Number($("isoflop").value)], { color, symbol } = look(law.model);
  const traces = law.budgets.flatMap((budget, i) => {
    const name = `${number(budget.flops)} FLOPs`, opacity = 0.35 + 0.65 * (i + 1) / law.budgets.length;
    const shared = { type: "scatter", opacity, legendgroup: name };
    const text = budget.parameters.map((size, k) => `${name}<br>${number(size)} parameters: ${number(budget.losses[k], 4)}`);
    const best = `${name}<br>best size ${number(budget.best[0])}: ${number(budget.best[1], 4)}`;
    return [
      { ...shared, x: law.sizes, y: budget.curve, mode: "lines", line: { color, width: 1.6 }, hoverinfo: "skip", showlegend: false },
      { ...shared, x: budget.parameters, y: budget.losses, mode: "markers", name, text, hoverinfo: "text",
        marker: { symbol, size: 9, color, line: { color: "#fff", width: 1 } } },
      { ...shared, x: [budget.best[0]], y: [budget.best[1]], mode: "markers", text: [best], hoverinfo: "text", showlegend: false,
        marker: { size: 16, symbol: "circle-open", color: "#1b1f24", line: { width: 1.2 } } },
    ];
  });
  const shown = layout("parameters", "validation loss", true);
  Object.assign(shown.xaxis, logTicks(law.sizes));
  Plotly.react("plot-isoflop", traces, shown, CONFIG);
  $("caption-isoflop").textContent = law.caption;
}

function drawNfe() {
  const family = DATA.nfe.find((f) => f.lines.flat().some((i) => DATA.points[i].facet === state.facet));
  $("nfe-section").hidden = family === undefined;
  if (family === undefined) return;
  const lines = family.lines.map((line) => line.map((i) => DATA.points[i])), points = lines.flat();
  const solvers = [...new Set(points.map((p) => p.solver))].sort();
  const traces = lines.flatMap((own) => {
    own.sort((a, b) => a.nfe - b.nfe);
    const { color, symbol } = look(own[0].model), name = safe(`${own[0].label}, ${own[0].solver}`);
    return [...band(own, "nfe", color, name), {
      x: own.map((p) => p.nfe), y: own.map((p) => p.value), customdata: own.map((p) => p.index), name, legendgroup: name,
      mode: "lines+markers", type: "scatter", hoverinfo: "text", text: own.map((p) => `${hover(p)}<br>${p.nfe} NFE`),
      line: { color, width: 2, dash: DASHES[solvers.indexOf(own[0].solver) % DASHES.length] }, marker: { symbol, size: 8, color },
    }];
  });
  const ticks = [...new Set(points.map((p) => p.nfe))].sort((a, b) => a - b);
  const shown = layout("network evaluations per image", family.name, true);
  if (ticks.length <= 10) Object.assign(shown.xaxis, { tickvals: ticks, ticktext: ticks.map(String) });
  Object.assign(shown.yaxis, logTicks(points.map((p) => p.value)));
  Plotly.react("plot-nfe", traces, shown, CONFIG);
  $("caption-nfe").textContent = `${family.title}. Each line is one checkpoint sampled with more and more steps: the one plot across samplers.`;
}

function card(point) {
  const facet = FACETS.get(point.facet), runs = point.runs.split(" ");
  const key = runs.map((run) => `${run}/${point.images_seen}`).find((k) => DATA.grids[k]);
  const facts = [
    [facet.name, `${number(point.value)} ${interval(point.low, point.high)}`],
    ["to held-out", number(point.heldout)], ["training FLOPs", number(point.train_flops)],
    ["wall-clock", point.wall_hours ? `${number(point.wall_hours)} h` : ""], ["images seen", number(point.images_seen)],
    ["epochs", number(point.epochs)], ["parameters", number(point.parameters)], ["seeds", String(point.seeds)],
    ["sampler", `${point.solver}, ${point.nfe} NFE`], ["weights", point.ema], ["interval holds", point.noise],
  ].filter(([, value]) => value !== "");
  const list = element("dl");
  for (const [name, value] of facts) list.append(element("dt", {}, name), element("dd", {}, value));
  const head = element("h3", {}, point.label);
  replace("card", head, gridImage(key, `samples of ${point.label} after ${point.images_seen} images`), list);
}

function gridImage(key, alt) {
  if (!key || !DATA.grids[key]) return element("p", { class: "hint" }, "No sample grid of this evaluation.");
  return element("img", { class: "grid-image", src: DATA.grids[key], loading: "lazy", alt });
}
