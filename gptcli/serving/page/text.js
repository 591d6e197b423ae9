// A text of pieces: what was typed, and tokens that a model drew, each with its alternatives.

// The bytes at the end that begin a character and do not finish it.
const unfinished = (bytes) => {
  for (let n = 1; n <= Math.min(3, bytes.length); n++) {
    const byte = bytes.at(-n);
    if (byte < 0x80) return [];
    if (byte >= 0xc0) return n < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2) ? bytes.slice(-n) : [];
  }
  return [];
};

const decoderAfter = (bytes) => {
  const decoder = new TextDecoder("utf-8", {ignoreBOM: true});
  decoder.decode(Uint8Array.from(bytes), {stream: true});
  return decoder;
};
// A text box makes its own line breaks of carriage returns, so places would shift.
const readable = (text) => text.replaceAll("\r", "");

const textOf = (pieces) => pieces.map(({text}) => text).join("");

// What a model wrote in one go: the text and the ids before, and the tokens after.
class Run {
  constructor(model, before, ids, bytes = []) {
    Object.assign(this, {model, before, ids, bytes, given: bytes, tokens: []});
    this.decoder = decoderAfter(bytes);
  }

  // Returns the piece of a token; one that only begins a character has no text yet.
  add({id, logprob, bytes, top}) {
    const text = readable(this.decoder.decode(Uint8Array.from(bytes), {stream: true}));
    this.bytes = unfinished([...this.bytes, ...bytes]);
    const token = {id, logprob, bytes, top, run: this, index: this.tokens.length,
                   open: this.bytes};
    const piece = {text, token};
    this.tokens.push(piece);
    return piece;
  }

  textBefore(index) {
    return this.before + textOf(this.tokens.slice(0, index));
  }

  idsBefore(index) {
    return this.ids && [...this.ids, ...this.tokens.slice(0, index).map(({token}) => token.id)];
  }

  bytesBefore(index) {
    return index ? this.tokens[index - 1].token.open : this.given;
  }
}

class Doc {
  constructor(pieces = []) {
    this.pieces = pieces;
  }

  get text() {
    return textOf(this.pieces);
  }

  // Puts pieces in the place of a part of the text; a token that is cut is a token no more.
  splice(start, end, added) {
    const before = [], after = [];
    let place = 0;
    for (const piece of this.pieces) {
      const stop = place + piece.text.length;
      if (stop <= start) before.push(piece);
      else if (place >= end) after.push(piece);
      else {
        if (place < start) before.push({text: piece.text.slice(0, start - place)});
        if (stop > end) after.push({text: piece.text.slice(end - place)});
      }
      place = stop;
    }
    this.pieces = [];
    for (const piece of [...before, ...added, ...after]) {
      const last = this.pieces.at(-1);
      if (last && !last.token && !piece.token)
        this.pieces.splice(-1, 1, {text: last.text + piece.text});
      else if (piece.text || piece.token) this.pieces.push(piece);
    }
  }

  // Takes what a text box holds after an edit that ended at `caret`.
  edit(text, caret) {
    const old = this.text;
    let same = 0, tail = 0;
    const most = Math.min(old.length, text.length - caret);
    while (tail < most && old.at(-1 - tail) === text.at(-1 - tail)) tail++;
    const end = old.length - tail, stop = text.length - tail;
    while (same < Math.min(end, stop) && old[same] === text[same]) same++;
    this.splice(same, end, [{text: text.slice(same, stop)}]);
    let place = 0;  // a character that was begun here is not finished any more
    this.pieces = this.pieces.filter((piece) => {
      const isBegun = !piece.text && place === same;
      place += piece.text.length;
      return !isBegun;
    });
  }

  placeOf(piece) {
    let place = 0;
    for (const one of this.pieces) {
      if (one === piece) return place;
      place += one.text.length;
    }
    return -1;
  }

  // The token whose text holds the character before `offset`.
  tokenAt(offset) {
    let place = 0;
    for (const piece of this.pieces) {
      place += piece.text.length;
      if (place >= offset && piece.text) return piece.token ? piece : null;
    }
    return null;
  }

  // The ids that stand for the text before a token, if `model` wrote on and nothing was edited.
  idsBefore(piece, model) {
    const {run, index} = piece.token;
    const isSame = servedOf(run.model) === servedOf(model)
      && run.textBefore(index) === this.text.slice(0, this.placeOf(piece));
    return isSame ? run.idsBefore(index) : null;
  }

  // The ids that stand for the text before `offset`, and the bytes of a character that they begin;
  // null if the text has to be tokenized.
  chainAt(offset, model) {
    let place = 0, last = null;
    for (const piece of this.pieces) {
      place += piece.text.length;
      if (place === offset) last = piece;
    }
    const ids = last?.token && this.idsBefore(last, model);
    return ids ? {ids: [...ids, last.token.id], bytes: last.token.open} : null;
  }
}

// Lets the model write into `doc` at `at`. `ids` stand for the text before; with `instead`, a
// token's piece and one of its alternatives, writes from there, and what followed is dropped.
async function write(doc, {at, model, how, signal, instead, onText}) {
  let run, sent;
  if (instead) {
    const {piece, other} = instead, {token} = piece;
    at = doc.placeOf(piece);
    if (at < 0) throw new Failure("That part of the text is gone.");
    const before = doc.text.slice(0, at), ids = doc.idsBefore(piece, model);
    const first = doc.pieces.indexOf(piece);
    let last = first;
    while (doc.pieces[last]?.token?.run === token.run) last++;
    run = new Run(model, before, ids, ids ? token.run.bytesBefore(token.index) : []);
    const added = run.add({...other, top: token.top});
    doc.pieces = doc.pieces.toSpliced(first, last - first, added);
    at += added.text.length;
    sent = ids ? [...ids, other.id] : before + added.text;
  } else {
    const before = doc.text.slice(0, at), chain = doc.chainAt(at, model);
    run = new Run(model, before, chain?.ids ?? null, chain?.bytes);
    sent = chain?.ids ?? before;
  }
  const begun = performance.now(), start = at, given = run.tokens.length;
  const stops = how.stop ?? factsOf(model)?.defaults.stop ?? [];
  let finish = null, seconds = 0;
  for await (const part of complete(model, sent, how, signal)) {
    finish = part.finish ?? finish;
    if (part.prompt) run.ids = part.prompt.slice(0, part.prompt.length - given);
    for (const token of part.tokens) {
      const piece = run.add(token);
      doc.splice(at, at, [piece]);
      at += piece.text.length;
    }
    const text = doc.text.slice(start, at);
    const cuts = stops.map((stop) => text.indexOf(readable(stop))).filter((i) => i >= 0);
    if (cuts.length) {
      doc.splice(start + Math.min(...cuts), at, []);
      at = start + Math.min(...cuts);
    }
    onText(at);
    seconds = (performance.now() - begun) / 1000;
    if (cuts.length) return {at, finish: "stop", seconds, tokens: run.tokens.length - given};
  }
  return {at, finish, seconds, tokens: run.tokens.length - given};
}
