// Starts the page: fills the selects, draws the main group, and says when it is ready (tests wait for that).
function drawFacet() {
  const own = DATA.findings.filter((finding) => finding.facet === state.facet || finding.facet === "");
  const lines = own.length ? own : [{ kind: "open", text: "Nothing to say of this group: fewer than two evaluations of a distance." }];
  replace("findings", ...lines.map((finding) => element("li", { class: finding.kind }, finding.text)));
  drawCompute();
  drawSweep();
  drawNfe();
  drawTable();
  chooseBestTwo();
}

function watch(id) {
  for (const kind of ["plotly_hover", "plotly_click"]) {
    if ($(id).on) $(id).on(kind, (event) => {
      const index = event.points[0].customdata;
      if (index !== undefined) card(DATA.points[index]);
    });
  }
}

function forPrint(width) {
  for (const id of ["plot-compute", "plot-isoflop", "plot-nfe"]) {
    if ($(id).data) Plotly.relayout(id, width ? { width } : { width: null, autosize: true });
  }
}

function start() {
  $("summary").textContent = DATA.summary;
  select("facet", DATA.facets.map((f) => [f.facet, `${f.title} (${f.runs} run${f.runs > 1 ? "s" : ""})`]), (value) => {
    state.facet = value;
    table.page = 0;
    drawFacet();
  });
  const measured = AXES.filter(([key]) => DATA.points.some((p) => p[key] > 0));
  select("axis", measured, drawCompute);
  for (const id of ["show-bands", "show-recipes", "show-fits", "show-frontier"]) $(id).addEventListener("change", drawCompute);
  select("isoflop", DATA.isoflop.map((law, i) => [i, law.title]), drawIsoflop);
  drawIsoflop();
  setupTable();
  setupSamples();
  setupDiff();
  drawFacet();
  watch("plot-compute");
  watch("plot-nfe");
  replace("notes", ...DATA.notes.map((note) => element("p", {}, note)));
  window.addEventListener("beforeprint", () => forPrint(680));
  window.addEventListener("afterprint", () => forPrint(null));
  document.body.dataset.ready = "yes";
}

start();
