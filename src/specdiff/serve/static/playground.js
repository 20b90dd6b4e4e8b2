// The playground: one form, one answer, and the same answer without the drafter.

import { ApiError, events, key, model } from "./api.js";
import { Figures } from "./figures.js";
import { AnswerView, Timeline, element, figure, showPositions } from "./view.js";

const DRAFT_LENGTH = 4; // at first, where the drafter has as many
const PROMPTS = {
  chat: "Explain in three short paragraphs why the sky is blue.",
  prompt: "The sky is blue because",
};
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

const byId = (id) => document.getElementById(id);
const form = byId("form");
const fields = form.elements;
const drafted = new AnswerView(byId("drafted"));
const plain = new AnswerView(byId("plain"));
const timeline = new Timeline(byId("timeline"));

let served = null; // the entry of the model
let running = null; // the AbortController of the answer in progress
let last = null; // the last finished answer with drafts: its request and figures
let turns = []; // messages of the conversation before the next one

// --- the request

function chatting() {
  return fields.mode.value === "chat";
}

/** The request of the form. Throws ApiError for a field that is not a number. */
function request() {
  const text = fields.prompt.value;
  if (!text.trim()) throw new ApiError("Write a prompt first.", { param: "prompt" });
  const body = { draft_len: Number(fields.draft_len.value) };
  if (served) body.model = served.id;
  for (const name of NUMBERS) {
    const { value, validity, labels } = fields[name];
    if (validity.badInput) {
      throw new ApiError(`${labels[0].textContent} must be a number.`, { param: name });
    }
    if (value === "") continue;
    body[name] = Number(value);
    if (Math.abs(body[name]) > Number.MAX_SAFE_INTEGER) {
      throw new ApiError(`${labels[0].textContent} is too large.`, { param: name });
    }
  }
  body.seed ??= Math.floor(Math.random() * 2 ** 31); // so that both answers share it
  if (!chatting()) return { path: "v1/completions", body: { ...body, prompt: text }, text };
  const system = fields.system.value;
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  const messages = [...first, ...turns, { role: "user", content: text }];
  return { path: "v1/chat/completions", body: { ...body, messages }, text };
}

// --- answers

/** Stream one answer. Returns its figures; throws ApiError or AbortError. */
async function stream({ path, body }, view, observe) {
  const figures = new Figures();
  view.start();
  try {
    for await (const event of events(path, body, !served.stream_chunk, running.signal)) {
      if (served.stream_chunk) view.add(event.choices.map(unmarked));
      const rounds = event.choices.flatMap((choice) => choice.rounds ?? []);
      if (!rounds.length) continue;
      figures.add(rounds, performance.now());
      view.add(rounds);
      observe(figures, rounds);
    }
  } finally {
    view.end();
  }
  return figures;
}

/** The text of a choice as a round without drafts, where the server hides its rounds. */
function unmarked({ delta, text }) {
  return { text: [{ text: delta ? (delta.content ?? "") : text, accepted: false }] };
}

/** The answer with drafts. */
async function answer() {
  const next = request();
  byId("plain").hidden = true;
  byId("verdict").textContent = "";
  byId("ratio").textContent = "–";
  timeline.start(next.body.draft_len + 1);
  showFigures(new Figures());
  last = null;
  showTurns(next);
  say("Answering…");
  drafted.article.scrollIntoView({ block: "nearest" }); // it is below the form on a phone
  const figures = await stream(next, drafted, (now, rounds) => {
    timeline.add(rounds);
    showFigures(now);
  }).finally(() => timeline.end());
  drafted.note.textContent = `draft length ${next.body.draft_len}`;
  last = { ...next, figures };
  say(
    served.stream_chunk
      ? "Answered. This server hides its rounds."
      : `${figures.tokens} tokens in ${figures.rounds.length} rounds, seed ${next.body.seed}.`,
  );
  if (chatting()) remember(next);
}

/** The last answer's request again, without drafts. */
async function compare() {
  const edited = fields.prompt.value.trim() && last && !same(request(), last);
  if (!last || edited) await answer();
  const { path, body, figures } = last;
  say("Answering without the drafter…");
  const other = await stream({ path, body: { ...body, draft_len: 0 } }, plain, (now) => {
    plain.note.textContent = `${figure(now.speed, 1)} tokens/s`;
  });
  drafted.note.textContent = `draft length ${body.draft_len}, ${figure(figures.speed, 1)} tokens/s`;
  byId("ratio").textContent = figure(figures.speed / other.speed, 2, "×");
  byId("verdict").textContent = verdict(figures.ids, other.ids, body.temperature === 0);
  say(`${figure(figures.speed, 1)} tokens per second, ${figure(other.speed, 1)} without drafter.`);
}

/** Whether two requests differ in nothing but a random seed. */
function same(one, other) {
  const seed = fields.seed.value ? {} : { seed: null };
  const [left, right] = [one, other].map(({ path, body }) => [path, { ...body, ...seed }]);
  return JSON.stringify(left) === JSON.stringify(right);
}

function verdict(one, other, greedy) {
  const index = one.findIndex((id, i) => id !== other[i]);
  if (index < 0 && one.length === other.length) return "Both texts are identical.";
  if (!greedy) return "Two samples of one distribution: drafts change the draw, not the odds.";
  const first = (index < 0 ? one.length : index) + 1;
  return `The texts differ from token ${first} on: at temperature 0, only rounding can do that.`;
}

/** Run `task` as the one answer in progress, and show what goes wrong. */
async function perform(task) {
  if (running) return;
  clearError();
  running = new AbortController();
  showState();
  try {
    if (!served) await load();
    await task();
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else showError(error);
  } finally {
    running = null;
    showState();
  }
}

// --- the conversation

function remember({ text }) {
  turns.push({ role: "user", content: text });
  turns.push({ role: "assistant", content: drafted.text.textContent });
  fields.prompt.value = "";
  byId("clear").hidden = false;
}

function showTurns({ text }) {
  const shown = chatting() ? [...turns, { role: "user", content: text }] : [];
  const items = shown.map(({ role, content }) => element("li", role, content));
  byId("turns").replaceChildren(...items);
  byId("turns").hidden = items.length === 0;
}

function clearTurns() {
  turns = [];
  byId("turns").hidden = true;
  byId("clear").hidden = true;
  fields.prompt.value = PROMPTS.chat;
  fields.prompt.focus();
}

// --- what the page says

function say(text) {
  byId("status").textContent = text;
}

function showFigures(figures) {
  byId("tau").textContent = figure(figures.tau, 2);
  byId("speed").textContent = figure(figures.speed, 1);
  byId("alpha").textContent = figure(figures.alpha * 100, 0, " %");
  showPositions(byId("positions"), figures.positions);
}

function showState() {
  for (const id of ["run", "compare", "clear"]) {
    byId(id).setAttribute("aria-disabled", running !== null);
  }
  byId("stop").setAttribute("aria-disabled", running === null);
}

function clearError() {
  byId("error").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

function showError(error) {
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  byId("error").textContent = error.message + again;
  byId("error").hidden = false;
  say("");
  if (error.status === 401) byId("key-field").hidden = false;
  const name = error.param === "messages" ? "prompt" : error.param;
  const field = error.status === 401 ? byId("key") : name && fields.namedItem(name);
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "error");
  field.focus();
}

// --- the page

async function load() {
  served = await model();
  byId("model").textContent = served.id;
  byId("compare").hidden = Boolean(served.stream_chunk); // it compares rounds
  const length = fields.draft_len;
  length.max = served.max_draft_len;
  length.value = Math.min(DRAFT_LENGTH, served.max_draft_len);
  showLength();
  const chat = form.querySelector("[value=chat]");
  chat.disabled = !served.has_chat_template;
  if (served.has_chat_template) chat.checked = true;
  showMode();
}

function showLength() {
  byId("draft-len-value").textContent = fields.draft_len.value;
}

function showMode() {
  byId("system-field").hidden = !chatting();
  byId("prompt-label").textContent = chatting() ? "Message" : "Prompt";
  const text = fields.prompt.value;
  if (text && !Object.values(PROMPTS).includes(text)) return;
  fields.prompt.value = PROMPTS[fields.mode.value];
}

function dark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  byId("theme").textContent = dark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Use the ${dark() ? "light" : "dark"} theme`);
}

function scrubTo(index) {
  timeline.pinned = true;
  drafted.mark(timeline.show(index));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  perform(answer);
});
byId("compare").addEventListener("click", () => perform(compare));
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => running ?? clearTurns());
byId("scrub").addEventListener("input", (event) => scrubTo(Number(event.target.value) - 1));
drafted.text.addEventListener("click", ({ target }) => {
  if (target.dataset.round) scrubTo(Number(target.dataset.round));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) perform(answer);
});
fields.draft_len.addEventListener("input", showLength);
for (const mode of form.querySelectorAll("[name=mode]")) mode.addEventListener("change", showMode);
byId("key").addEventListener("input", (event) => key.set(event.target.value));
byId("theme").addEventListener("click", () => {
  const theme = dark() ? "light" : "dark";
  localStorage.setItem("specdiff-theme", theme);
  showTheme(theme);
});

showTheme(localStorage.getItem("specdiff-theme"));
showState();
perform(() => {});
