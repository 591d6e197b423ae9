// Write, Chat, Compare and Steps: each a section of the page.
let models = [], mode = "write";
const modelA = () => $("#model").value, modelB = () => $("#with").value;
// A model is one that is served, or SERVED@STEP, a kept checkpoint of its run.
const servedOf = (model) =>
  models.some(({id}) => id === model) ? model : model.replace(/@\d+$/, "");
const factsOf = (model) => models.find(({id}) => id === servedOf(model))?.gptcli;
// The line of facts about a model; nothing is known about an earlier step's loss.
const lineOf = (model) => {
  const facts = factsOf(model);
  if (!facts) return "";
  const step = model === servedOf(model) ? facts.step : Number(model.split("@").at(-1));
  return [
    step ? `step ${step.toLocaleString("en")}` : "", `${count(facts.parameters)} parameters`,
    `context of ${plural(facts.context, "token")}`,
    facts.val_loss && step === facts.step ? `validation loss ${facts.val_loss.toFixed(3)}` : "",
  ].filter(Boolean).join(" · ");
};
const isRun = (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey);

const writing = (() => {
  const section = $("#write"), area = $("textarea", section), mirror = $(".tokens", section);
  const line = $(".token", section), bar = $(".bar", section), undo = $(".undo", section), work = new Work(section);
  const doc = new Doc([{text: stored("sessionStorage", "text") ?? ""}]);
  const past = [], future = [];
  let typed = 0;

  const draw = (caret) => {
    if (area.value !== doc.text) area.value = doc.text;
    if (caret !== undefined) area.setSelectionRange(caret, caret);
    show(mirror, doc.pieces);
    undo.disabled = work.isRunning || !past.length;
  };
  const remember = () => {
    past.push({pieces: doc.pieces, caret: area.selectionStart});
    future.length = 0;
    if (past.length > 200) past.shift();
  };
  const restore = (from, to) => {
    if (work.isRunning || !from.length) return;
    to.push({pieces: doc.pieces, caret: area.selectionStart});
    const {pieces, caret} = from.pop();
    doc.pieces = pieces;
    typed = 0;
    draw(caret);
  };

  const run = (instead) => async (signal) => {
    const how = sampling(settings());
    let at = area.selectionEnd;
    remember();
    typed = 0;
    area.readOnly = true;
    const drawn = eachFrame(() => {
      const isSeen = bar.getBoundingClientRect().bottom < innerHeight + 60;
      draw(at);
      if (isSeen) bar.scrollIntoView({block: "nearest"});
    });
    try {
      const done = await write(doc, {at, model: modelA(), how, signal, instead,
                                     onText: (place) => { at = place; drawn(); }});
      return summary(done, how);
    } finally {
      area.readOnly = false;
      drawn.now();  // a frame to come would move the cursor back
      stored("sessionStorage", "text", doc.text);
    }
  };
  const go = () => work.run(run()).then(() => draw());
  const pick = (piece, other) => work.change(run({piece, other})).then(() => draw());

  area.addEventListener("input", () => {
    if (performance.now() - typed > 1000) remember();
    typed = performance.now();
    doc.edit(area.value, area.selectionEnd);
    pop.close();
    draw();
    stored("sessionStorage", "text", doc.text);
  });
  area.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase(), isCommand = event.ctrlKey || event.metaKey;
    if (isRun(event)) go();
    else if (isCommand && key === "z" && !event.shiftKey) restore(past, future);
    else if (isCommand && (key === "y" || key === "z")) restore(future, past);
    else if (event.altKey && key === "arrowdown") {
      const piece = doc.tokenAt(area.selectionEnd);
      if (piece) pop.open(piece, pick, true);
    } else return;
    event.preventDefault();
  });
  document.addEventListener("selectionchange", () => {
    if (document.activeElement === area)
      line.textContent = describe(doc.tokenAt(area.selectionEnd));
  });
  $(".go", section).addEventListener("click", () => {
    go();
    if (matchMedia("(hover: hover)").matches) area.focus();  // elsewhere a keyboard would appear
  });
  undo.addEventListener("click", () => restore(past, future));
  followPointer($(".paper", section), pick);
  draw();

  return {
    work,
    enter: () => draw(),
    request: () => ["completions", {model: modelA(), prompt: doc.text.slice(0, area.selectionEnd),
                                    ...sampling(settings())}],
  };
})();

const chatting = (() => {
  const section = $("#chat"), form = $("form", section), area = $("textarea", form);
  const talk = $(".talk", section), system = $(".system", section), work = new Work(section);
  let messages = [];

  const item = ({role, content}) => make("li", {className: role},
    make("b", {textContent: role === "user" ? "You" : "Model"}),
    make("div", {textContent: content, dir: "auto"}));
  const draw = () => {
    talk.replaceChildren(...messages.map(item));
    for (const name of [".again", ".clear"])
      $(name, section).disabled = work.isRunning || !messages.length;
  };
  const all = () => [
    ...system.value.trim() ? [{role: "system", content: system.value}] : [], ...messages,
  ];

  const answer = () => work.run(async (signal) => {
    const how = sampling(settings()), asked = all(), reply = {role: "assistant", content: ""};
    const begun = performance.now();
    messages.push(reply);
    draw();
    const box = $("div", talk.lastChild);
    const grow = eachFrame(() => {
      box.textContent = reply.content;
      box.scrollIntoView({block: "nearest"});
    });
    talk.setAttribute("aria-busy", "true");
    let finish = null, parts = 0;
    try {
      for await (const part of answerTo(modelA(), asked, how, signal)) {
        reply.content += part.text;
        finish = part.finish ?? finish;
        parts += part.text ? 1 : 0;
        grow();
      }
    } finally {
      if (!reply.content && !finish) messages.pop();
      talk.removeAttribute("aria-busy");
      grow.now();
      draw();
    }
    const seconds = (performance.now() - begun) / 1000;
    return [ENDS[finish], `${seconds.toFixed(1)} s`, `seed ${how.seed}`].filter(Boolean).join(" · ");
  }).then(draw);

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (work.isRunning || !area.value.trim()) return;
    messages.push({role: "user", content: area.value});
    area.value = "";
    answer();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  $(".again", section).addEventListener("click", () => {
    if (messages.at(-1)?.role === "assistant") messages.pop();
    answer();
  });
  $(".clear", section).addEventListener("click", () => {
    messages = [];
    work.status.textContent = "";
    draw();
    area.focus();
  });

  return {
    work,
    enter() {
      const canChat = factsOf(modelA())?.chat ?? false;
      $(".why", section).textContent = canChat ? ""
        : "This model was not trained on conversations, so it only continues texts: use Write.";
      for (const part of [form, talk, $("details", section)]) part.hidden = !canChat;
      draw();
    },
    request: () => ["chat/completions", {model: modelA(), messages: all(),
                                         ...sampling(settings())}],
  };
})();

const comparing = (() => {
  const section = $("#compare"), area = $(".prompt", section), work = new Work(section);
  const articles = [...section.querySelectorAll("article")];
  const column = (article, i) => {
    const pick = (piece, other) => work.change(async (signal) => {
      const how = sampling({...settings(), seed});
      return summary(await continued(i, how, signal, {piece, other}), how);
    });
    return new Reader($(".tokens", article), $(".token", article), pick);
  };
  const columns = articles.map(column);
  let seed = null;

  const model = (i) => i ? modelB() : modelA();
  const continued = (i, how, signal, instead) => {
    const reader = columns[i];
    if (!instead) reader.set(new Doc([{text: area.value}]));
    return reader.write(reader.doc, {at: area.value.length, model: model(i), how, signal, instead});
  };
  const run = () => work.run(async (signal) => {
    const how = sampling(settings());
    ({seed} = how);
    const both = await Promise.allSettled([0, 1].map((i) => continued(i, how, signal)));
    const failed = both.find(({status}) => status === "rejected");
    if (failed) throw failed.reason;
    return `seed ${seed} · ` + both.map(({value}) => plural(value.tokens, "token")).join(" and ");
  });
  area.addEventListener("keydown", (event) => {
    if (isRun(event)) { event.preventDefault(); run(); }
  });
  $(".go", section).addEventListener("click", run);

  return {
    work,
    enter() {
      for (const [i, article] of articles.entries()) {
        $("h2", article).replaceChildren(model(i), make("small", {textContent: lineOf(model(i))}));
        $(".tokens", article).setAttribute("aria-label", `Text of ${model(i)}`);
      }
    },
    request: () => ["completions", {model: modelA(), prompt: area.value, ...sampling(settings())}],
  };
})();

const stepping = (() => {
  const section = $("#steps"), slider = $("#step"), area = $(".prompt", section);
  const work = new Work(section), kept = $(".kept", section), written = new Map();
  let steps = [], samples = [], run = null;
  const nameOf = (step) => `${run}@${step}`;
  const now = () => steps[slider.value];
  const isKept = (step) => factsOf(run)?.steps.includes(step);

  const grow = (instead) => async (signal) => {
    const how = sampling(settings()), model = nameOf(now());
    const doc = instead ? reader.doc : new Doc([{text: area.value}]);
    if (!instead) { written.set(model, doc); reader.set(doc); }
    const at = doc.text.length;
    return summary(await reader.write(doc, {at, model, how, signal, instead}), how);
  };
  const reader = new Reader($(".tokens", kept), $(".token", kept),
                            (piece, other) => work.change(grow({piece, other})));

  const draw = () => {
    const step = now();
    $("output", section).textContent = step === undefined ? ""
      : `${step.toLocaleString("en")}${isKept(step) ? " (checkpoint kept)" : ""}`;
    slider.setAttribute("aria-valuetext", $("output", section).textContent);
    $(".shown", section).replaceChildren(...samples.filter((one) => one.step === step)
      .map(({prompt, text}) => make("p", {className: "paper sample", dir: "auto"},
        make("span", {className: "quiet", textContent: prompt ?? ""}), text)));
    kept.hidden = step === undefined || !isKept(step);
    if (kept.hidden) return;
    $("h2", kept).textContent = `Ask the checkpoint of step ${step.toLocaleString("en")}`;
    reader.set(written.get(nameOf(step)) ?? new Doc());
  };
  slider.addEventListener("input", () => { work.stop(); draw(); });
  area.addEventListener("keydown", (event) => {
    if (isRun(event)) { event.preventDefault(); work.run(grow()); }
  });
  $(".go", section).addEventListener("click", () => work.run(grow()));
  $(".open", section).addEventListener("click", () => {
    $("#model").value = nameOf(now());
    choose("write");
    $("#tab-write").focus();
  });

  const load = async () => {
    const wanted = servedOf(modelA());
    if (run === wanted) return;
    const found = (await (await ask(`gptcli/samples?model=${encodeURIComponent(wanted)}`)).json());
    run = wanted;
    samples = found.data;
    steps = [...new Set([...samples.map(({step}) => step), ...factsOf(run).steps])];
    steps.sort((a, b) => a - b);
    slider.max = Math.max(0, steps.length - 1);
    slider.value = slider.max;
    area.value ||= samples.at(-1)?.prompt ?? "";
    $(".marks", section).replaceChildren(...steps.map((step) => make(
      "i", {className: isKept(step) ? "full" : ""})));
    $(".track", section).hidden = !steps.length;
    $(".why", section).textContent = steps.length
      ? "What the model wrote while it was trained. Where a checkpoint is kept, you can ask it."
      : "This run has no samples and keeps no earlier checkpoints: set train.sample_every.";
  };

  return {
    work,
    enter: () => load().then(draw, fail),
    request: () => ["completions", {model: kept.hidden ? modelA() : nameOf(now()),
                                    prompt: area.value, ...sampling(settings())}],
  };
})();

const modes = {write: writing, chat: chatting, compare: comparing, steps: stepping};
