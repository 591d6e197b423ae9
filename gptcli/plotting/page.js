"use strict";
// Draws the page's charts from the numbers beside this script, and shows the values at a step.
(() => {
  const numbers = JSON.parse(document.getElementById("numbers").textContent);
  const MARGIN = {top: 8, right: 10, bottom: 24, left: 56};
  const state = {axis: "steps", log: false, smooth: true, step: null};

  const make = (name, attributes, parent) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent?.append(element);
    return element;
  };

  // The index of the last of the sorted `values` that is at most `value`, or the first.
  const indexAt = (values, value) => {
    let low = 0, high = values.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (values[middle] <= value) low = middle; else high = middle - 1;
    }
    return low;
  };

  const between = (from, to, value) => {
    const i = Math.min(indexAt(from, value), from.length - 2);
    if (i < 0) return to[0] ?? 0;
    const part = (value - from[i]) / (from[i + 1] - from[i] || 1);
    return to[i] + part * (to[i + 1] - to[i]);
  };

  const lastSecond = numbers.seconds[1].at(-1);
  const TIME = lastSecond < 120 ? ["s", 1] : lastSecond < 7200 ? ["min", 60] : ["h", 3600];
  const place = (step) => state.axis === "steps" ? step
    : state.axis === "tokens" ? between(...numbers.tokens, step)
    : between(...numbers.seconds, step) / TIME[1];
  const stepAt = (x) => state.axis === "steps" ? x
    : state.axis === "tokens" ? between(numbers.tokens[1], numbers.tokens[0], x)
    : between(numbers.seconds[1], numbers.seconds[0], x * TIME[1]);

  const short = (value) => {
    if (Math.abs(value) >= 1e3) value = +value.toPrecision(3);
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return +(value / size).toPrecision(3) + unit;
    return String(+value.toPrecision(4));
  };
  const inBytes = (value) => short(value).replace("B", "G").replace(/[kMGT]?$/, " $&B");
  const UNITS = {
    loss: [(value) => value.toFixed(4), (value) => String(+value.toPrecision(4))],
    rate: [(value) => value.toExponential(2), (value) => String(+value.toPrecision(3))],
    count: [short, short],
    bytes: [inBytes, inBytes],
  };

  const ticks = (low, high, most) => {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let i = Math.ceil(low / size); i * size <= high + size * 1e-9; i++) found.push(i * size);
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
      for (const factor of [1, 1.5, 2, 3, 5, 7]) {
        const value = factor * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    return found.length > 3 ? found : ticks(low, high, 7);
  };

  // What is drawn, from end to end, for a scale that has room for it.
  const extent = (series) => {
    const values = series.flatMap((one) => one.values).filter((value) => value > 0);
    const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)],
                                      [Infinity, -Infinity]);
    return low < high ? [low * 0.98, high * 1.02] : [low * 0.9, high * 1.1];
  };

  class Chart {
    constructor(figure, chart) {
      this.chart = chart;
      this.isLoss = chart.unit === "loss";
      this.caption = figure.querySelector("figcaption");
      this.svg = make("svg", {role: "img", "aria-label": chart.title}, figure);
      const follow = (event) => {
        const x = event.clientX - this.svg.getBoundingClientRect().left;
        tell(stepAt(this.unscale(x)));
      };
      this.svg.addEventListener("pointermove", follow);
      this.svg.addEventListener("pointerdown", follow);
      this.svg.addEventListener("pointerleave", () => tell(null));
    }

    get series() {
      const all = this.chart.series;
      return state.smooth || !this.isLoss ? all
        : all.filter((one) => one.name !== "training, smoothed")
             .map((one) => one.kind === "faint" ? {...one, kind: "line"} : one);
    }

    draw() {
      const {svg, series} = this;
      const width = Math.max(svg.clientWidth, 200), height = this.isLoss ? 320 : 150;
      const isLog = state.log && this.isLoss;
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("height", height);
      const left = MARGIN.left, right = width - MARGIN.right;
      const top = MARGIN.top, bottom = height - MARGIN.bottom;
      const steps = series.flatMap((one) => [one.steps[0], one.steps.at(-1)]);
      const first = Math.min(0, ...steps), last = Math.max(...steps);
      const [x0, x1] = [place(first), place(last)];
      const [y0, y1] = isLog ? extent(series) : [this.chart.low, this.chart.high];
      const bend = isLog ? Math.log : (value) => value;
      const scaleX = (x) => left + (x - x0) / (x1 - x0 || 1) * (right - left);
      const scaleY = (y) => bottom - (bend(Math.max(y, isLog ? y0 : y)) - bend(y0))
        / (bend(y1) - bend(y0) || 1) * (bottom - top);
      this.unscale = (x) => x0 + (x - left) / (right - left) * (x1 - x0);
      this.scaleStep = (step) => scaleX(place(step));
      this.span = [top, bottom];

      const show = UNITS[this.chart.unit][1];
      for (const y of isLog ? logTicks(y0, y1) : ticks(y0, y1, this.isLoss ? 9 : 5)) {
        make("line", {x1: left, x2: right, y1: scaleY(y), y2: scaleY(y), class: "grid"}, svg);
        make("text", {x: left - 8, y: scaleY(y) + 4, "text-anchor": "end"}, svg)
          .textContent = show(y);
      }
      const unit = state.axis === "time" ? " " + TIME[0] : "";
      for (const x of ticks(x0, x1 || 1, Math.max(2, Math.floor(width / 80)))) {
        const isEnd = scaleX(x) > right - 20;
        make("text", {x: isEnd ? right : scaleX(x), y: height - 7,
                      "text-anchor": isEnd ? "end" : "middle"}, svg).textContent = short(x) + unit;
      }
      const clip = `clip-${[...document.querySelectorAll("svg")].indexOf(svg)}`;
      const box = {x: left - 4, y: top - 4, width: right - left + 8, height: bottom - top + 8};
      make("rect", box, make("clipPath", {id: clip}, svg));
      const paper = make("g", {"clip-path": `url(#${clip})`}, svg);
      for (const one of series) {
        const points = one.steps.map((step, i) =>
          `${this.scaleStep(step).toFixed(1)},${scaleY(one.values[i]).toFixed(1)}`);
        make("path", {d: "M" + points.join("L"), class: one.kind}, paper);
        if (one.steps.length <= (one.kind === "marked" ? 40 : 1))
          for (const point of points) {
            const [cx, cy] = point.split(",");
            make("circle", {cx, cy, r: 2.6, class: one.kind}, paper);
          }
      }
      if (this.chart.best) {
        const [step, value] = this.chart.best;
        const x = this.scaleStep(step), y = scaleY(value);
        const corners = Array.from({length: 10}, (_, i) => {
          const angle = Math.PI * i / 5, reach = i % 2 ? 3.2 : 8;
          return `${x + reach * Math.sin(angle)},${y - reach * Math.cos(angle)}`;
        });
        make("polygon", {points: corners.join(" "), class: "star"}, svg);
      }
      this.cursor = make("line", {y1: top, y2: bottom, class: "cursor"}, svg);
    }

    tell(step) {
      const last = Math.max(...this.series.map((one) => one.steps.at(-1)));
      const at = step === null ? last : Math.max(0, Math.min(step, last));
      this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
      const x = this.scaleStep(at);
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
      const title = document.createElement("b");
      title.textContent = this.chart.title;
      this.caption.replaceChildren(title);
      const add = (text, kind) => {
        const span = document.createElement("span");
        if (kind) {
          const key = document.createElement("i");
          key.className = kind;
          span.append(key);
        }
        span.append(text);
        this.caption.append(span);
      };
      if (this.isLoss) add(where(at));
      for (const one of this.series) {
        const value = one.values[indexAt(one.steps, at)];
        const text = one.steps[0] > at ? "–" : UNITS[this.chart.unit][0](value);
        add(this.isLoss ? `${one.name} ${text}` : text, this.isLoss ? one.kind : null);
      }
    }
  }

  const where = (step) => {
    const tokens = short(between(...numbers.tokens, step));
    const time = +(between(...numbers.seconds, step) / TIME[1]).toPrecision(3);
    return `step ${Math.round(step).toLocaleString("en")}, ${tokens} tokens, ${time} ${TIME[0]}`;
  };

  const figures = [...document.querySelectorAll("figure")];
  const charts = figures.map((figure, i) => new Chart(figure, numbers.charts[i]));
  const tell = (step) => { state.step = step; for (const chart of charts) chart.tell(step); };
  const draw = () => { for (const chart of charts) chart.draw(); tell(state.step); };

  const inputs = [...document.querySelectorAll(".controls input")];
  const obey = () => {  // also at the start: a browser may remember what was chosen
    for (const input of inputs)
      if (input.name !== "axis") state[input.name] = input.checked;
      else if (input.checked) state.axis = input.value;
    draw();
  };
  for (const input of inputs) input.addEventListener("change", obey);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; draw(); }
  });
  try {
    obey();
    document.documentElement.dataset.drawn = charts.length;
  } catch (error) {
    document.getElementById("error").textContent = `The curves could not be drawn: ${error}`;
    throw error;
  }
})();
