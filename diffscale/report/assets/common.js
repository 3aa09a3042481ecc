"use strict";
// What all parts of the page share. Text from records reaches the page through textContent, or through safe() where
// plotly.js would read it as markup; never through innerHTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  for (const child of children) node.append(child);
  return node;
}

function replace(id, ...children) {
  $(id).replaceChildren(...children);
}

/** Text for plotly, which reads a small set of tags and entities in labels and hover texts. */
function safe(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

/** A number as people write it: three digits, 1.2e14 beyond a million, nothing for a missing one. */
function number(value, digits = 3) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e7 || size < 1e-3)) return value.toExponential(digits - 1).replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(digits)));
}

function interval(low, high) {
  return low === null || high === null ? "" : `[${number(low)}, ${number(high)}]`;
}

function select(id, options, change) {
  const node = $(id);
  node.replaceChildren(...options.map(([value, text]) => {
    const option = element("option", { value });
    option.textContent = text;
    return option;
  }));
  node.addEventListener("change", () => change(node.value));
  return node;
}

const look = (model) => DATA.looks[model] || { color: "#555b63", symbol: "circle" };
const FACETS = new Map(DATA.facets.map((facet) => [facet.facet, facet]));
const state = { facet: DATA.facets[0].facet };
