"use strict";
// One pair at a time. `source` answers from the server, or from the file itself when the page was exported.

const $ = (id) => document.getElementById(id);
let state = null, shownAt = 0, busy = false;

const server = {
  async ask(path, body) {
    const reply = await fetch(path, body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const answer = await reply.json();
    if (!reply.ok) throw new Error(answer.error || reply.statusText);
    return answer;
  },
  state: (rater) => server.ask(`/state?rater=${encodeURIComponent(rater)}`),
  vote: (rater, id, answer, seconds) => server.ask("/vote", { rater, id, answer, seconds }),
  undo: (rater) => server.ask("/undo", { rater }),
};

const file = {
  pack: null,
  votes(rater) { return JSON.parse(localStorage.getItem(`${this.pack.export}:${rater}`) || "[]"); },
  keep(rater, votes) { localStorage.setItem(`${this.pack.export}:${rater}`, JSON.stringify(votes)); },
  async state(rater) {
    const number = this.votes(rater).length, open = this.pack.asks[Math.min(number, this.pack.asks.length - 1)];
    return { rater, id: number, number, goal: this.pack.asks.length, question: this.pack.question, label: open.label,
      left: this.pack.pictures[open.left], right: this.pack.pictures[open.right] };
  },
  async vote(rater, id, answer, seconds) {
    const votes = this.votes(rater);
    if (id === votes.length && id < this.pack.asks.length) this.keep(rater, [...votes, { number: id, answer, seconds }]);
    return this.state(rater);
  },
  async undo(rater) { this.keep(rater, this.votes(rater).slice(0, -1)); return this.state(rater); },
  save(rater) {
    const { study, export: name, seed } = this.pack;
    const text = JSON.stringify({ study, export: name, seed, count: this.pack.asks.length, rater, votes: this.votes(rater) });
    const link = Object.assign(document.createElement("a"), { download: `votes-${study}.json` });
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.click();
  },
};

const embedded = $("pack");
if (embedded) file.pack = JSON.parse(embedded.textContent);
const source = embedded ? file : server;

function loaded(image, address) {
  return new Promise((resolve, reject) => {
    image.onload = resolve;
    image.onerror = () => reject(new Error("a picture did not load: reload the page"));
    image.src = address;
  });
}

async function show(next) {
  state = next;
  const finished = embedded && state.number >= state.goal;
  $("start").hidden = true;
  $("rate").hidden = false;
  $("question").textContent = finished ? "Thank you. Please save your votes and send the file back." : state.question + (state.label ? ` (${state.label})` : "");
  $("progress").textContent = `${state.number} of ${state.goal}, ${Math.max(state.goal - state.number, 0)} left` + (state.number >= state.goal && !embedded ? ": thank you, more are welcome" : "");
  $("bar").value = Math.min(state.number / state.goal, 1);
  $("undo").disabled = state.number === 0;
  $("save").hidden = !embedded;
  await Promise.all([loaded($("left").firstElementChild, state.left), loaded($("right").firstElementChild, state.right)]);
  shownAt = performance.now();
}

async function run(action) {
  if (busy) return;
  busy = true;
  try {
    await show(await action());
    $("message").textContent = "";
  } catch (error) {
    $("message").textContent = error.message;
  } finally {
    busy = false;
    document.body.dataset.number = state ? state.number : "";
  }
}

const vote = (answer) => run(() => source.vote(state.rater, state.id, answer, (performance.now() - shownAt) / 1000));
const undo = () => run(() => source.undo(state.rater));

$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  localStorage.setItem("rater", name);
  run(() => source.state(name));
});
$("left").addEventListener("click", () => vote(1));
$("right").addEventListener("click", () => vote(-1));
$("equal").addEventListener("click", () => vote(0));
$("undo").addEventListener("click", undo);
$("save").addEventListener("click", () => file.save(state.rater));
document.addEventListener("keydown", (event) => {
  if (!state || event.target.tagName === "INPUT" || event.repeat) return;
  const keys = { ArrowLeft: () => vote(1), ArrowRight: () => vote(-1), ArrowDown: () => vote(0), " ": () => vote(0), ArrowUp: undo, Backspace: undo };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
$("name").value = localStorage.getItem("rater") || "";
