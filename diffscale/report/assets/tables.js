// Samples side by side, the settings of two runs, and the table of every evaluation.
const PAGE = 100;
const table = { sort: "train_flops", ascending: true, page: 0, filters: {} };

function runName(id) {
  const run = DATA.runs[id];
  return `${run.name} · seed ${run.seed} · ${id.slice(0, 8)}`;
}

function setupSamples() {
  const keys = Object.keys(DATA.grids);
  $("samples-section").hidden = keys.length === 0;
  const options = keys.map((key) => {
    const [id, images] = key.split("/");
    return [key, id, Number(images)];
  }).sort((a, b) => runName(a[1]).localeCompare(runName(b[1])) || a[2] - b[2])
    .map(([key, id, images]) => [key, `${runName(id)} · ${number(images)} images`]);
  for (const side of ["a", "b"]) select(`sample-${side}`, options, () => showSample(side));
}

function showSample(side) {
  const key = $(`sample-${side}`).value;
  replace(`view-${side}`, gridImage(key, `samples of ${key}`), key ? sampleNote(key) : "");
}

/** The ends of the group's two best curves, for the samples and the settings. */
function chooseBestTwo() {
  const ends = DATA.curves.filter((c) => c.facet === state.facet).map((c) => DATA.points[c.points[c.points.length - 1]])
    .sort((p, q) => (p.value - q.value) * (FACETS.get(state.facet).higher ? -1 : 1));
  const bySeed = (p) => p.runs.split(" ").sort((a, b) => DATA.runs[a].seed - DATA.runs[b].seed);
  const runs = ends.map((p) => bySeed(p)[0]), keys = Object.keys(DATA.grids);
  const grids = ends.map((p) => bySeed(p).map((run) => `${run}/${p.images_seen}`).find((key) => DATA.grids[key])).filter(Boolean);
  for (const [i, side] of ["a", "b"].entries()) {
    if (keys.length) $(`sample-${side}`).value = grids[i] || grids[0] || keys[0];
    $(`diff-${side}`).value = runs[i] || runs[0] || Object.keys(DATA.runs)[0];
    showSample(side);
  }
  drawDiff();
}

function sampleNote(key) {
  const [id, images] = key.split("/");
  const found = DATA.points.find((p) => p.runs.split(" ").includes(id) && p.images_seen === Number(images) && p.facet === state.facet);
  const seed = settingsOf(id)["eval.seed"];
  return element("p", { class: "hint" }, seed === undefined ? "" : `sample seed ${seed}. `, found ? `${FACETS.get(found.facet).name} ${number(found.value)} (mean of ${found.seeds} seed${found.seeds > 1 ? "s" : ""})` : "");
}

function settingsOf(id) {
  return { ...DATA.settings.common, ...DATA.settings.runs[id] };
}

function setupDiff() {
  const options = Object.keys(DATA.runs).map((id) => [id, runName(id)]).sort((a, b) => a[1].localeCompare(b[1]));
  for (const side of ["a", "b"]) select(`diff-${side}`, options, drawDiff);
}

function settingText(json) {
  if (json === undefined) return "(not set)";
  const value = JSON.parse(json);
  return typeof value === "string" ? value : json;
}

function drawDiff() {
  const a = settingsOf($("diff-a").value), b = settingsOf($("diff-b").value);
  const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort();
  const differing = keys.filter((key) => a[key] !== b[key]);
  const body = element("tbody");
  for (const key of differing) {
    body.append(element("tr", {}, element("th", { scope: "row" }, key), element("td", {}, settingText(a[key])), element("td", {}, settingText(b[key]))));
  }
  if (differing.length === 0) body.append(element("tr", {}, element("td", { colspan: "3" }, "No setting differs.")));
  const head = element("thead", {}, element("tr", {}, element("th", {}, "setting"), element("th", {}, "A"), element("th", {}, "B")));
  replace("diff", head, body);
}

function setupTable() {
  const head = element("tr"), filters = element("tr", { class: "filters" });
  for (const [i, column] of DATA.table.columns.entries()) {
    const numeric = DATA.table.numeric[i];
    const button = element("button", { type: "button", onclick: () => sortBy(column) }, column);
    head.append(element("th", { class: (numeric ? "num" : "") + (DATA.table.printed[i] ? "" : " screen"), "data-column": column, title: DATA.table.descriptions[i] }, button));
    const input = element("input", { type: "search", "aria-label": `filter ${column}`, oninput: (event) => {
      table.filters[column] = event.target.value;
      table.page = 0;
      drawTable();
    } });
    filters.append(element("th", {}, input));
  }
  replace("table", element("thead", {}, head, filters), element("tbody"));
  $("only-group").addEventListener("change", () => { table.page = 0; drawTable(); });
  $("page-back").addEventListener("click", () => { table.page -= 1; drawTable(); });
  $("page-next").addEventListener("click", () => { table.page += 1; drawTable(); });
}

function sortBy(column) {
  table.ascending = table.sort === column ? !table.ascending : true;
  table.sort = column;
  table.page = 0;
  drawTable();
}

/** Text contains; with < <= > >= = in front a number (or a whole text for =) is compared. */
function matches(value, filter) {
  const [, operator, rest] = filter.trim().match(/^(<=|>=|<|>|=)?\s*(.*)$/);
  if (rest === "") return true;
  const limit = Number(rest);
  if (operator && !Number.isNaN(limit)) {
    if (typeof value !== "number") return false;
    return { "<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit, "=": value === limit }[operator];
  }
  const text = String(value ?? "").toLowerCase();
  return operator === "=" ? text === rest.toLowerCase() : text.includes(rest.toLowerCase());
}

function drawTable() {
  const { columns, numeric, printed, rows, facets } = DATA.table;
  const active = columns.map((c, i) => [i, table.filters[c] || ""]).filter(([, filter]) => filter.trim() !== "");
  const only = $("only-group").checked;
  const kept = rows.filter((row, r) => (!only || facets[r] === state.facet) && active.every(([i, f]) => matches(row[i], f)));
  const by = columns.indexOf(table.sort), sign = table.ascending ? 1 : -1;
  kept.sort((a, b) => {
    if (a[by] === null || b[by] === null) return (a[by] === null) - (b[by] === null);
    return sign * (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0);
  });
  const pages = Math.max(1, Math.ceil(kept.length / PAGE));
  table.page = Math.min(Math.max(0, table.page), pages - 1);
  const body = element("tbody");
  for (const row of kept.slice(table.page * PAGE, (table.page + 1) * PAGE)) {
    body.append(element("tr", {}, ...row.map((value, i) => {
      const text = number(value, 4);
      return element("td", { class: (numeric[i] ? "num" : "") + (printed[i] ? "" : " screen"), title: numeric[i] ? "" : text }, text);
    })));
  }
  $("table").querySelector("tbody").replaceWith(body);
  for (const th of $("table").querySelectorAll("th[data-column]")) {
    const chosen = th.dataset.column === table.sort;
    th.setAttribute("aria-sort", chosen ? (table.ascending ? "ascending" : "descending") : "none");
    th.firstChild.textContent = th.dataset.column + (chosen ? (table.ascending ? " ▲" : " ▼") : "");
  }
  $("table-count").textContent = `${number(kept.length)} of ${number(rows.length)} evaluations, page ${table.page + 1} of ${pages}`;
  $("page-back").disabled = table.page === 0;
  $("page-next").disabled = table.page >= pages - 1;
}
