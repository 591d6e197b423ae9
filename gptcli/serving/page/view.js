// What the parts of the page share: elements, tokens with their shades, and the alternatives.
const $ = (selector, within = document) => within.querySelector(selector);
const make = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};

const percent = (logprob) => {
  const part = 100 * Math.exp(logprob);
  if (part < 0.1) return "<0.1%";
  return `${part >= 99.95 ? "100" : part >= 9.95 ? part.toFixed(0) : part.toFixed(1)}%`;
};
const SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"};
const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");
// A token with its spaces shown; bytes that are no text by their numbers.
const named = ({bytes}) => {
  if (!bytes.length) return "end of text";
  try {
    const text = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true})
      .decode(Uint8Array.from(bytes));
    return text.replace(/^ | $|[\n\t\r]/g, (sign) => SIGNS[sign])
      .replace(/\p{C}/gu, (sign) => `U+${hex(sign.codePointAt(0)).padStart(4, "0")}`);
  } catch {
    return bytes.map((byte) => `0x${hex(byte)}`).join(" ");
  }
};
const count = (number) => {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (number >= size) return +(number / size).toPrecision(3) + unit;
  return String(number);
};
const plural = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

// Pieces as nodes: text, and a shaded span for each token.
const nodes = new WeakMap(), pieces = new WeakMap();
const nodeOf = (piece) => {
  if (!nodes.has(piece)) {
    const {text, token} = piece;
    let node = new Text(text);
    if (token) {
      // Spaces around a word stay plain: they may hang over the end of a line.
      const word = text.trim() ? text.trim() : text, at = text.indexOf(word);
      node = make("span", {className: "t"}, text.slice(0, at), make("b", {textContent: word}),
                  text.slice(at + word.length));
      node.style.setProperty("--rare", Math.min(1, -token.logprob / 6).toFixed(3));
      pieces.set(node, piece);
    }
    nodes.set(piece, node);
  }
  return nodes.get(piece);
};

// Makes `box` show the pieces; nodes at both ends that are there already stay.
const show = (box, shown) => {
  const old = box.childNodes, wanted = shown.map(nodeOf);
  let start = 0, end = 0;
  while (start < old.length && old[start] === wanted[start]) start++;
  const most = Math.min(old.length, wanted.length) - start;
  while (end < most && old[old.length - 1 - end] === wanted[wanted.length - 1 - end]) end++;
  const after = old[old.length - end] ?? null;
  for (const node of [...old].slice(start, old.length - end)) node.remove();
  for (const node of wanted.slice(start, wanted.length - end)) box.insertBefore(node, after);
};

// Calls `work` at most once a frame; `.now()` calls it at once, and in no frame after that.
const eachFrame = (work) => {
  let frame = 0;
  const soon = () => { frame ||= requestAnimationFrame(soon.now); };
  soon.now = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    work();
  };
  return soon;
};

const describe = (piece) => {
  if (!piece) return "";
  const {id, logprob, top} = piece.token;
  const others = top.filter((other) => other.id !== id).slice(0, 3)
    .map((other) => `${named(other)} ${percent(other.logprob)}`);
  return `${named(piece.token)} ${percent(logprob)}`
    + (others.length ? `, instead of ${others.join(", ")}` : "");
};

// The alternatives of a token, beside it; one at a time.
const pop = {
  box: $("#pop"),
  timer: 0,
  back: null,

  open(piece, pick, isFocused) {
    clearTimeout(this.timer);
    if (this.piece === piece && !this.box.hidden && !isFocused) return;
    if (this.back && !isFocused) return;  // the keyboard is in them
    this.piece = piece;
    this.back = isFocused ? document.activeElement : null;
    const {token} = piece, chosen = token.top.some(({id}) => id === token.id);
    const rows = (chosen ? token.top : [...token.top, token]).map((other) => {
      const isDrawn = other.id === token.id;
      const bar = make("i", {className: "share"});
      bar.style.setProperty("--part", Math.exp(other.logprob).toFixed(4));
      const row = make("button", {type: "button"},
                       make("b", {textContent: named(other)}), bar,
                       make("span", {textContent: percent(other.logprob)}));
      row.setAttribute("aria-label", `${named(other)}, ${percent(other.logprob)}`
                       + (isDrawn ? ", drawn" : ""));
      if (isDrawn) row.setAttribute("aria-current", "true");
      row.addEventListener("click", () => {
        this.close();
        if (!isDrawn) pick(piece, other);
      });
      return row;
    });
    this.box.replaceChildren(...rows);
    this.heat(piece);
    this.box.hidden = false;
    this.place();
    if (isFocused) (rows.find((row) => !row.hasAttribute("aria-current")) ?? rows[0]).focus();
  },

  // Below the token, above where there is no room, and nowhere once it is out of sight.
  place() {
    if (this.box.hidden) return;
    const {width, height} = this.box.getBoundingClientRect();
    const rect = $("b", this.hot).getClientRects()[0];
    if (!rect || rect.bottom < 0 || rect.top > innerHeight) { this.close(); return; }
    const left = Math.max(8, Math.min(rect.left, document.documentElement.clientWidth - width - 8));
    const below = rect.bottom + 2;
    const top = below + height < innerHeight ? below : Math.max(8, rect.top - height - 2);
    this.box.style.left = `${left}px`;
    this.box.style.top = `${top}px`;
  },

  close() {
    clearTimeout(this.timer);
    if (this.box.hidden) return false;
    this.box.hidden = true;
    this.heat(null);
    this.back?.focus();
    this.piece = this.back = null;
    return true;
  },

  // Marks the token that the alternatives are of.
  heat(piece) {
    this.hot?.classList.remove("hot");
    this.hot = piece && nodeOf(piece);
    this.hot?.classList.add("hot");
  },

  closeSoon() {
    clearTimeout(this.timer);
    if (!this.back) this.timer = setTimeout(() => this.close(), 300);
  },
};
pop.box.addEventListener("pointerenter", () => clearTimeout(pop.timer));
pop.box.addEventListener("pointerleave", () => pop.closeSoon());
pop.box.addEventListener("focusout", ({relatedTarget}) => {
  if (pop.box.hidden || pop.box.contains(relatedTarget)) return;
  pop.back = null;  // the focus has gone elsewhere
  pop.close();
});
pop.box.addEventListener("keydown", (event) => {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  const rows = [...pop.box.children];
  if (step) {
    rows.at((rows.indexOf(document.activeElement) + step) % rows.length).focus();
    event.preventDefault();
  }
  if (event.key === "Tab") pop.close();
});
addEventListener("scroll", () => pop.place(), {passive: true});
addEventListener("resize", () => pop.place());

// Opens the alternatives of the token under the pointer, which may lie below a text box.
const followPointer = (box, pick) => {
  const under = ({clientX, clientY}) => document.elementsFromPoint(clientX, clientY)
    .find((element) => pieces.has(element) && box.contains(element));
  const open = (event) => {
    const node = under(event);
    if (!node) { pop.closeSoon(); return; }
    pop.open(pieces.get(node), pick, false);
  };
  let rest = 0;
  box.addEventListener("pointermove", (event) => {
    clearTimeout(rest);
    if (event.pointerType === "mouse" && !event.buttons) rest = setTimeout(open, 60, event);
  });
  box.addEventListener("pointerleave", () => { clearTimeout(rest); pop.closeSoon(); });
  box.addEventListener("click", (event) => { if (event.pointerType !== "mouse") open(event); });
};

// A box of tokens that is read, not edited: the arrow keys walk along the tokens.
class Reader {
  constructor(box, line, pick) {
    Object.assign(this, {box, line, pick, doc: new Doc(), at: null});
    this.draw = eachFrame(() => show(box, this.doc.pieces));
    followPointer(box, (piece, other) => this.pick(piece, other));
    box.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (step) this.walk(step);
      else if (this.at && (event.key === "Enter" || event.key === "ArrowDown"))
        pop.open(pieces.get(this.at), this.pick, true);
      else return;
      event.preventDefault();
    });
  }

  walk(step) {
    const tokens = [...this.box.querySelectorAll(".t")].filter((node) => node.textContent);
    const next = tokens[this.at ? tokens.indexOf(this.at) + step : step > 0 ? 0 : tokens.length - 1];
    if (!next) return;
    this.at?.classList.remove("at");
    this.at = next;
    next.classList.add("at");
    next.scrollIntoView({block: "nearest"});
    this.line.textContent = describe(pieces.get(next));
  }

  set(doc) {
    this.doc = doc;
    this.at = null;
    this.line.textContent = "";
    this.draw();
  }

  // Lets a model write into `doc`; all of it is shown once it is done.
  write(doc, how) {
    return write(doc, {...how, onText: this.draw}).finally(this.draw.now);
  }
}

const notice = (text) => {
  $("#notice").hidden = !text;
  $("#notice p").textContent = text;
};
$("#notice button").addEventListener("click", () => notice(""));

// One piece of work at a time for each part of the page: its buttons, its Esc, its errors.
class Work {
  constructor(section) {
    this.section = section;
    this.status = $(".status", section);
    this.abort = null;
    $(".stop", section).addEventListener("click", () => this.stop());
  }

  get isRunning() {
    return this.abort !== null;
  }

  stop() {
    this.abort?.abort();
  }

  run(work) {
    if (!this.isRunning) this.done = this.doing(work);
    return this.done;
  }

  // Runs this in place of what is running.
  async change(work) {
    this.stop();
    await this.done;
    return this.run(work);
  }

  async doing(work) {
    pop.close();
    notice("");
    const focused = document.activeElement;
    this.abort = new AbortController();
    this.mark(true);
    this.status.textContent = "Waiting for the model…";
    try {
      this.status.textContent = await work(this.abort.signal);
    } catch (error) {
      const isStopped = this.abort.signal.aborted;
      this.status.textContent = isStopped ? "Stopped." : "";
      if (!isStopped) fail(error);
    }
    this.abort = null;
    this.mark(false);
    if (document.activeElement === document.body) focused.focus();
  }

  mark(isRunning) {
    this.section.toggleAttribute("data-running", isRunning);
    for (const button of this.section.querySelectorAll(".go, .again, .clear, .undo, .open"))
      button.disabled = isRunning;
    $(".go", this.section).hidden = isRunning;
    $(".stop", this.section).hidden = !isRunning;
  }
}

const fail = (error) => {
  if (error.status === 401) askForKey();
  if (!(error instanceof Failure)) console.error(error);
  notice(error instanceof Failure ? error.message : `This page failed: ${error.message}`);
};

const ENDS = {stop: "reached its end", length: "reached max tokens"};
const summary = ({tokens, seconds, finish}, how) => [
  plural(tokens, "token"),
  seconds > 0.05 ? `${(tokens / seconds).toPrecision(3)} tokens/s` : "",
  ENDS[finish] ?? "", `seed ${how.seed}`,
].filter(Boolean).join(" · ");
