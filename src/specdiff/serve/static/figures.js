// The statistics of an answer, folded from its rounds as the library folds them.

export class Figures {
  rounds = [];
  tokens = 0;
  drafted = 0;
  accepted = 0;
  reached = []; // how often draft position k was verified
  passed = []; // and how often it was accepted
  #first = null; // the first event: reading the prompt is no part of the speed
  #last = 0;

  /** Count the rounds of one event, received at `now` milliseconds. */
  add(rounds, now) {
    for (const round of rounds) this.#count(round);
    this.#first ??= { now, tokens: this.tokens };
    this.#last = now;
  }

  #count(round) {
    const { draft, accepted, tokens } = round;
    const cut = tokens.length <= accepted; // at an end: the tokens after it were not rejected
    const verified = Math.min(accepted + !cut, draft.length);
    this.rounds.push(round);
    this.tokens += tokens.length;
    this.drafted += draft.length;
    this.accepted += accepted;
    for (let k = 0; k < draft.length; k++) {
      this.reached[k] = (this.reached[k] ?? 0) + (k < verified);
      this.passed[k] = (this.passed[k] ?? 0) + (k < accepted);
    }
  }

  /** Tokens per round, the target's own included. */
  get tau() {
    return this.rounds.length ? this.tokens / this.rounds.length : NaN;
  }

  /** Accepted of the drafted tokens. */
  get alpha() {
    return this.drafted ? this.accepted / this.drafted : NaN;
  }

  /** Tokens per second after the first event. */
  get speed() {
    if (this.#first === null || this.#last <= this.#first.now) return NaN;
    return ((this.tokens - this.#first.tokens) * 1000) / (this.#last - this.#first.now);
  }

  /** Acceptance at each draft position, of the rounds that reached it. */
  get positions() {
    return this.reached.map((reached, k) => (reached ? this.passed[k] / reached : NaN));
  }

  /** Token ids of the answer. */
  get ids() {
    return this.rounds.flatMap((round) => round.tokens.map((token) => token.id));
  }
}
