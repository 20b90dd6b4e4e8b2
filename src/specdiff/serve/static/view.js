// What the page shows of an answer. Text reaches the page as text only, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const FEW_ROUNDS = 32; // the timeline's width before it grows

/** An element with a class and children, which are elements or text. */
export function element(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** A figure with `digits` decimals, or a dash. */
export function figure(value, digits, unit = "") {
  return Number.isFinite(value) ? value.toFixed(digits) + unit : "–";
}

/** The text of an answer, its rounds marked. */
export class AnswerView {
  constructor(article) {
    this.article = article;
    this.text = article.querySelector(".text");
    this.note = article.querySelector("h2 span");
  }

  start() {
    this.article.hidden = false;
    this.text.replaceChildren();
    this.text.setAttribute("aria-busy", "true");
    this.note.textContent = "";
    this.count = 0;
  }

  /** Append the text of new rounds. */
  add(rounds) {
    const bottom = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 8;
    for (const round of rounds) {
      for (const { text, accepted } of round.text) {
        const piece = element("span", accepted ? "accepted" : "own", text);
        piece.dataset.round = this.count;
        this.text.append(piece);
      }
      this.count++;
    }
    if (bottom) this.text.scrollTop = this.text.scrollHeight;
  }

  end() {
    this.text.setAttribute("aria-busy", "false");
  }

  /** Mark the text of one round. */
  mark(index) {
    for (const piece of this.text.children) {
      piece.classList.toggle("current", Number(piece.dataset.round) === index);
    }
  }
}

/** One column for each round; the range input under it picks one. */
export class Timeline {
  constructor(section) {
    this.section = section;
    this.bars = section.querySelector("svg");
    this.scrub = section.querySelector("input");
    this.detail = section.querySelector("#round");
  }

  start(height) {
    this.bars.replaceChildren();
    this.rounds = [];
    this.height = height;
    this.pinned = false; // the user has picked a round
    this.section.hidden = true;
  }

  /** Append columns, and show the last round unless another one was picked. */
  add(rounds) {
    for (const round of rounds) {
      this.bars.append(this.#column(round, this.rounds.length));
      this.rounds.push(round);
    }
    this.section.hidden = this.rounds.length === 0;
    let capacity = FEW_ROUNDS;
    while (capacity < this.rounds.length) capacity *= 2;
    this.#fit(capacity);
    if (!this.pinned) this.show(this.rounds.length - 1);
  }

  end() {
    this.#fit(this.rounds.length);
  }

  /** Show round `index`, from 0; a larger one is the last. Returns the index shown. */
  show(index) {
    const last = this.rounds.length - 1;
    const current = Math.min(index, last);
    if (current < 0) return current;
    const round = this.rounds[current];
    this.scrub.value = current + 1;
    const name = `Round ${current + 1} of ${last + 1}`;
    this.scrub.setAttribute("aria-valuetext", `${name}: ${spoken(round)}`);
    this.bars.querySelector(".current")?.classList.remove("current");
    this.bars.children[current].classList.add("current");
    this.detail.replaceChildren(...detail(round, current, last + 1));
    return current;
  }

  #fit(capacity) {
    this.bars.setAttribute("viewBox", `0 0 ${Math.max(capacity, 1)} ${this.height}`);
    this.scrub.max = Math.max(capacity, 1);
  }

  #column({ draft, accepted, tokens }, index) {
    const group = document.createElementNS(SVG, "g");
    const own = tokens.length - accepted;
    let top = this.height;
    for (const [kind, size] of [
      ["accepted", accepted],
      ["own", own],
      ["unused", draft.length - accepted],
      ["empty", this.height - draft.length - own],
    ]) {
      top -= size;
      if (size <= 0) continue;
      const bar = document.createElementNS(SVG, "rect");
      const box = { class: kind, x: index + 0.1, y: top, width: 0.8, height: size };
      for (const [name, value] of Object.entries(box)) bar.setAttribute(name, value);
      group.append(bar);
    }
    return group;
  }
}

function outcome({ draft, accepted, tokens }) {
  if (!draft.length) return "nothing drafted";
  if (accepted === draft.length) return `all ${draft.length} accepted`;
  if (tokens.length <= accepted) return `${accepted} of ${draft.length} accepted, then the end`;
  return `${accepted} of ${draft.length} accepted`;
}

function spoken(round) {
  const { draft, accepted, tokens } = round;
  const parts = [outcome(round)];
  if (draft.length) parts.push(`draft ${draft.map((token) => `“${token.text}”`).join(" ")}`);
  const own = tokens[accepted];
  if (own) {
    const instead = draft.length > accepted ? ` instead of “${draft[accepted].text}”` : "";
    parts.push(`the target put “${own.text}”${instead}`);
  }
  return parts.join("; ");
}

function detail(round, index, count) {
  const { draft, accepted, tokens, seconds } = round;
  const head = element("p", "round-head", element("strong", "", `Round ${index + 1}`));
  head.append(` of ${count}`, element("span", "faint", ` · ${outcome(round)}`));
  const drafts = draft.map((token, k) => chip(token, draftKind(k, accepted, tokens)));
  if (!drafts.length) drafts.push(element("span", "faint", "none"));
  const own = tokens.slice(accepted).map((token) => chip(token, "own"));
  if (!own.length) own.push(element("span", "faint", "nothing: the answer ended here"));
  else if (draft.length > accepted) own.push(element("span", "faint", "instead"));
  else if (draft.length) own.push(element("span", "faint", "after the whole draft"));
  return [head, row("Draft", drafts), row("Target", own), row("Time", [times(seconds)])];
}

function draftKind(position, accepted, tokens) {
  if (position < accepted) return "accepted";
  return position === accepted && tokens.length > accepted ? "rejected" : "unused";
}

function row(name, children) {
  const chips = element("span", "chips", ...children);
  return element("div", "row", element("span", "faint", name), chips);
}

function chip({ text, id }, kind) {
  const visible = text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  const node = element(kind === "rejected" ? "s" : "span", `chip ${kind}`, visible);
  node.title = `${kind === "own" ? "the target’s own" : kind}, id ${id}`;
  return node;
}

function times(seconds) {
  const parts = Object.entries(seconds).map(
    ([stage, value]) => `${stage} ${figure(value * 1000, 1, "\u00a0ms")}`,
  );
  return element("span", "faint", parts.join(" · "));
}

/** A bar for each draft position. */
export function showPositions(section, positions) {
  section.hidden = positions.length === 0;
  const bars = positions.map((value, k) => {
    const bar = element("span", "bar");
    bar.style.setProperty("--share", Number.isFinite(value) ? value : 0);
    const share = element("span", "share", figure(value * 100, 0, " %"));
    return element("li", "", element("span", "faint", String(k + 1)), bar, share);
  });
  section.querySelector("ol").replaceChildren(...bars);
}
