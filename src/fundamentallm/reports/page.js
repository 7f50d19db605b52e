"use strict";
// Draws the curves of the data block. Texts are set as text, never as markup.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 256, LEFT = 58, RIGHT = 10, TOP = 10, BOTTOM = 26;
  const COLORS = 8, DASHES = ["", "7 3", "2 3", "9 3 2 3"];
  const byId = (id) => document.getElementById(id);
  let data = JSON.parse(byId("data").textContent);
  const view = { axis: "step", logx: false, logy: false, range: null, hidden: new Set() };
  let charts = [];

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  function drawing(name, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  function strokeOf(color) {
    const dash = DASHES[Math.floor(color / COLORS) % DASHES.length];
    return { class: `curve color${color % COLORS}`, ...(dash && { "stroke-dasharray": dash }) };
  }
  function swatch(color) {
    const line = drawing("line", { x1: 0, y1: 5, x2: 22, y2: 5, ...strokeOf(color) });
    return drawing("svg", { width: 22, height: 10, class: "swatch", "aria-hidden": "true" }, line);
  }

  const exact = (value) => (typeof value === "number" ? String(Number(value.toPrecision(8))) : value);
  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e12 || (size > 0 && size < 1e-3)) return value.toExponential().replace("e+", "e");
    for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= unit) return Number((value / unit).toPrecision(4)) + letter;
    }
    return String(Number(value.toPrecision(4)));
  }
  function timed(seconds) {
    if (seconds < 60) return `${short(seconds)} s`;
    if (seconds < 7200) return `${short(seconds / 60)} min`;
    return `${short(seconds / 3600)} h`;
  }
  function xLabel(x) {
    return view.axis === "seconds" ? timed(x) : view.axis === "step" ? String(x) : short(x);
  }

  function linearTicks(low, high, count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999) || power;
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9 && ticks.length < 50; i++) {
      ticks.push(Number((i * step).toPrecision(12)));
    }
    return ticks;
  }
  function logTicks(low, high, count) {
    const decades = Math.log10(high / low);
    if (decades < 1) return linearTicks(low, high, count).filter((tick) => tick > 0);
    const every = Math.max(1, Math.ceil(decades / count));
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); 10 ** p <= high; p += every) {
      for (const m of decades < 2.5 ? [1, 2, 5] : [1]) {
        const tick = Number((m * 10 ** p).toPrecision(12));
        if (tick >= low && tick <= high) ticks.push(tick);
      }
    }
    return ticks;
  }
  function scale(low, high, from, to, log) {
    const map = log ? Math.log10 : (x) => x;
    const a = map(low), b = map(high) === map(low) ? map(low) + 1 : map(high);
    const there = (x) => from + ((map(x) - a) / (b - a)) * (to - from);
    const back = (pixel) => {
      const m = a + ((pixel - from) / (to - from)) * (b - a);
      return log ? 10 ** m : m;
    };
    return { there, back, ticks: (count) => (log ? logTicks : linearTicks)(low, high, count) };
  }

  // Of sorted numbers, the index of the one nearest to x.
  function nearest(numbers, x) {
    let low = 0, high = numbers.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (numbers[middle] <= x) low = middle; else high = middle;
    }
    return Math.abs(numbers[low] - x) <= Math.abs(numbers[high] - x) ? low : high;
  }
  function binOf(series, step) {
    return (series.bins || []).find(([first, last]) => first <= step && step <= last);
  }
  function inBin(series, [first, last, count]) {
    const inside = series.value.filter((value, i) =>
      typeof value === "number" && series.step[i] >= first && series.step[i] <= last);
    const ends = inside.length
      ? `minimum ${exact(Math.min(...inside))}, maximum ${exact(Math.max(...inside))} of `
      : "";
    return `bin of steps ${first} to ${last}: ${ends}${count} values`;
  }
  function xOfStep(run, step) {
    if (view.axis === "step") return step;
    for (const chart of data.charts) {
      for (const series of chart.series) {
        if (series.run === run) return series[view.axis][nearest(series.step, step)];
      }
    }
    return step;
  }

  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.at = null;
      this.places = [];
      this.plot = element("div", { class: "plot", tabindex: "0", role: "slider",
        "aria-label": `${spec.title}: move through the values`, "aria-orientation": "horizontal" });
      this.hover = element("div", { class: "hover", hidden: "" });
      const unit = spec.unit ? element("span", {}, ` (${spec.unit})`) : "";
      const keys = element("div", { class: "keys" });
      if (data.runs.length === 1 && spec.series.length > 1) {
        for (const series of spec.series) {
          keys.append(element("span", {}, swatch(series.color), series.label));
        }
      }
      this.figure = element("figure", {}, element("figcaption", {}, spec.title, unit), keys,
        this.plot);
      this.plot.addEventListener("pointermove", (event) => this.move(event));
      this.plot.addEventListener("pointerleave", () => this.leave());
      this.plot.addEventListener("pointerdown", (event) => this.press(event));
      this.plot.addEventListener("pointerup", (event) => this.release(event));
      this.plot.addEventListener("pointercancel", () => { this.from = null; this.leave(); });
      this.plot.addEventListener("dblclick", () => zoom(null));
      this.plot.addEventListener("keydown", (event) => this.key(event));
      this.plot.addEventListener("focus", () => this.show(this.at ?? this.xs().length - 1));
      this.plot.addEventListener("blur", () => this.leave());
    }
    series() {
      return this.spec.series.filter((series) => !view.hidden.has(series.run) && series.step.length);
    }
    // The horizontal places of all values, each once, that are in view; as last drawn.
    xs() {
      return this.places;
    }
    findPlaces() {
      const all = new Set();
      for (const series of this.series()) for (const x of series[view.axis]) all.add(x);
      this.places = [...all].filter((x) => this.inView(x)).sort((a, b) => a - b);
    }
    inView(x) {
      return (!view.logx || x > 0) && (!view.range || (x >= view.range[0] && x <= view.range[1]));
    }
    draw() {
      const width = Math.max(240, this.plot.clientWidth);
      const svg = drawing("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
      this.plot.replaceChildren(svg, this.hover);
      this.svg = svg;
      this.width = width;
      this.findPlaces();
      let low = Infinity, high = -Infinity, left = Infinity, right = -Infinity;
      const fits = (y) => typeof y === "number" && (!view.logy || y > 0);
      for (const series of this.series()) {
        series[view.axis].forEach((x, i) => {
          if (!this.inView(x)) return;
          left = Math.min(left, x); right = Math.max(right, x);
          const y = series.value[i];
          if (fits(y)) { low = Math.min(low, y); high = Math.max(high, y); }
        });
      }
      if (view.range) [left, right] = view.range;
      if (!(left <= right)) {
        svg.append(drawing("text", { x: LEFT, y: HEIGHT / 2 }, "no values here"));
        this.x = null;
        this.describe();
        return;
      }
      if (!(low <= high)) [low, high] = view.logy ? [1, 10] : [0, 1];
      const room = view.logy ? (high / low) ** 0.04 : (high - low) * 0.04 || Math.abs(high) * 0.04 || 1;
      [low, high] = view.logy ? [low / (room === 1 ? 1.1 : room), high * (room === 1 ? 1.1 : room)]
        : [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
      this.x = scale(left, right, LEFT, width - RIGHT, view.logx);
      this.y = scale(low, high, HEIGHT - BOTTOM, TOP, view.logy);
      for (const tick of this.y.ticks(5)) {
        const y = this.y.there(tick);
        svg.append(drawing("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "grid" }),
          drawing("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(tick)));
      }
      for (const tick of left < right ? this.x.ticks(Math.max(2, Math.floor(width / 110))) : [left]) {
        const x = this.x.there(tick);
        if (x > width - RIGHT + 1) continue;
        svg.append(drawing("text", { x, y: HEIGHT - 8,
          "text-anchor": x > width - 45 ? "end" : "middle" },
          view.axis === "seconds" ? timed(tick) : short(tick)));
      }
      for (const mark of this.marks()) {
        svg.append(drawing("line", { x1: mark.x, x2: mark.x, y1: TOP, y2: HEIGHT - BOTTOM,
          class: mark.kind }),
          drawing("path", { d: `M${mark.x - 5},${TOP - 8}h10l-5,8z`, class: mark.kind }));
      }
      for (const series of this.series()) this.line(series, fits);
      this.cursor = drawing("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" });
      this.band = drawing("rect", { y: TOP, height: HEIGHT - TOP - BOTTOM, width: 0, class: "zoom" });
      svg.append(this.cursor, this.band);
      this.describe();
    }
    line(series, fits) {
      let path = "", open = false, count = 0;
      const dots = [];
      series[view.axis].forEach((x, i) => {
        const y = series.value[i];
        if (!this.inView(x) || !fits(y)) { open = false; return; }
        const point = `${this.x.there(x).toFixed(1)},${this.y.there(y).toFixed(1)}`;
        path += (open ? "L" : "M") + point;
        open = true;
        count += 1;
        if (dots.length <= 40) dots.push(point.split(","));
      });
      if (path) this.svg.append(drawing("path", { d: path, ...strokeOf(series.color) }));
      if (count > 40) return;
      for (const [cx, cy] of dots) {
        this.svg.append(drawing("circle", { cx, cy, r: 2, ...strokeOf(series.color) }));
      }
    }
    marks() {
      const marks = [];
      for (const mark of data.marks) {
        if (view.hidden.has(mark.run)) continue;
        const x = xOfStep(mark.run, mark.step);
        if (this.x && this.inView(x)) {
          const at = this.x.there(x);
          if (at >= LEFT - 1 && at <= this.width - RIGHT + 1) marks.push({ ...mark, x: at });
        }
      }
      return marks;
    }
    describe() {
      const count = this.xs().length;
      this.plot.setAttribute("aria-valuemin", "0");
      this.plot.setAttribute("aria-valuemax", String(Math.max(0, count - 1)));
      if (this.at === null || this.at >= count) {
        this.at = null;
        this.plot.setAttribute("aria-valuenow", String(Math.max(0, count - 1)));
        const lasts = this.series().map((series) =>
          `${series.label} ${exact(series.value[series.value.length - 1])} at step ${series.step[series.step.length - 1]}`);
        this.plot.setAttribute("aria-valuetext", lasts.join("; ") || "no values");
      }
    }
    show(index) {
      const xs = this.xs();
      if (!this.x || !xs.length) return;
      this.at = Math.max(0, Math.min(xs.length - 1, index));
      const x = xs[this.at], pixel = this.x.there(x);
      const rows = [element("p", {}, `${view.axis === "seconds" ? "time" : view.axis} ${xLabel(x)}`)];
      const words = [rows[0].textContent];
      for (const series of this.series()) {
        const i = nearest(series[view.axis], x);
        if (Math.abs(this.x.there(series[view.axis][i]) - pixel) > 30) continue;
        const bin = binOf(series, series.step[i]);
        const text = `${series.label}: ${exact(series.value[i])} at step ${series.step[i]}`
          + (bin ? ` (${inBin(series, bin)})` : "");
        rows.push(element("p", {}, swatch(series.color), " ", text));
        words.push(text);
      }
      const near = this.marks().filter((mark) => Math.abs(mark.x - pixel) <= 6).slice(0, 3);
      for (const mark of near) {
        const text = `${mark.kind} at step ${mark.step}: ${mark.text.slice(0, 300)}`;
        rows.push(element("p", {}, text));
        words.push(text);
      }
      this.hover.replaceChildren(...rows);
      this.hover.hidden = false;
      const share = pixel / this.width;
      this.hover.style.left = share < 0.5 ? `${(share * 100 + 2).toFixed(1)}%` : "auto";
      this.hover.style.right = share < 0.5 ? "auto" : `${(102 - share * 100).toFixed(1)}%`;
      this.cursor.setAttribute("x1", pixel);
      this.cursor.setAttribute("x2", pixel);
      this.cursor.setAttribute("visibility", "visible");
      this.plot.setAttribute("aria-valuenow", String(this.at));
      this.plot.setAttribute("aria-valuetext", words.join("; "));
    }
    leave() {
      this.hover.hidden = true;
      if (this.cursor) this.cursor.setAttribute("visibility", "hidden");
    }
    pixelOf(event) {
      const box = this.svg.getBoundingClientRect();
      return ((event.clientX - box.left) / box.width) * this.width;
    }
    press(event) {
      if (event.button !== 0 || !this.x) return;
      this.from = this.pixelOf(event);
      this.plot.setPointerCapture(event.pointerId); // a drag may end beside the chart
    }
    move(event) {
      if (!this.x) return;
      const pixel = this.pixelOf(event);
      const xs = this.xs();
      if (xs.length) this.show(nearest(xs, this.x.back(pixel)));
      if (this.from != null) {
        this.band.setAttribute("x", Math.min(this.from, pixel));
        this.band.setAttribute("width", Math.abs(pixel - this.from));
      }
    }
    release(event) {
      const from = this.from, to = this.pixelOf(event);
      this.from = null;
      if (from == null || !this.x) return;
      this.band.setAttribute("width", 0);
      if (Math.abs(to - from) < 8) return;
      const inside = (pixel) => this.x.back(Math.max(LEFT, Math.min(this.width - RIGHT, pixel)));
      zoom([inside(Math.min(from, to)), inside(Math.max(from, to))]);
    }
    key(event) {
      const xs = this.xs(), last = xs.length - 1, at = this.at ?? last;
      const page = Math.max(1, Math.round(xs.length / 10));
      const moves = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
        PageDown: at - page, PageUp: at + page, Home: 0, End: last };
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.key in moves) this.show(moves[event.key]);
      else if (event.key === "Escape") zoom(null);
      else if ((event.key === "+" || event.key === "-") && xs.length > 1) {
        const center = xs[Math.max(0, Math.min(last, at))];
        const half = ((xs[last] - xs[0]) / 2) * (event.key === "+" ? 0.5 : 2);
        zoom([Math.max(view.logx ? xs[0] : 0, center - half), center + half]);
        const there = this.xs();
        if (there.length) this.show(nearest(there, center));
      } else return;
      event.preventDefault();
    }
  }

  function zoom(range) {
    view.range = range;
    for (const chart of charts) chart.at = null;
    drawAll();
  }
  function drawAll() {
    for (const chart of charts) chart.draw();
  }
  function build() {
    charts = data.charts.map((spec) => new Chart(spec));
    byId("charts").replaceChildren(...charts.map((chart) => chart.figure));
    const legend = byId("legend");
    legend.replaceChildren();
    if (data.runs.length > 1) {
      data.runs.forEach((name, run) => {
        const box = element("input", { type: "checkbox" });
        box.checked = !view.hidden.has(run);
        box.addEventListener("change", () => {
          if (box.checked) view.hidden.delete(run); else view.hidden.add(run);
          drawAll();
        });
        legend.append(element("label", {}, box, swatch(run), element("bdi", {}, name)));
      });
    }
    drawAll();
  }

  byId("axis").addEventListener("change", (event) => { view.axis = event.target.value; zoom(null); });
  for (const name of ["logx", "logy"]) {
    byId(name).addEventListener("change", (event) => { view[name] = event.target.checked; zoom(null); });
  }
  byId("reset").addEventListener("click", () => zoom(null));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; drawAll(); }
  });
  build();

  // A served page: replace what has changed, keep zoom, choices and what is open.
  const shown = new Map();
  const live = () => document.querySelectorAll("[data-live]");
  if (data.refresh) for (const section of live()) shown.set(section.id, section.innerHTML);
  async function look() {
    const state = byId("state");
    try {
      const answer = await fetch(location.href, { cache: "no-cache" });
      if (!answer.ok) {
        state.textContent = "the files cannot be read now; the page shows what they were";
        return;
      }
      const news = new DOMParser().parseFromString(await answer.text(), "text/html");
      state.replaceChildren(...news.getElementById("state").childNodes);
      for (const section of live()) {
        const fresh = news.getElementById(section.id), markup = fresh.innerHTML;
        if (markup === shown.get(section.id)) continue;
        shown.set(section.id, markup);
        const open = [...section.querySelectorAll("details")].map((one) => one.open);
        section.replaceChildren(...fresh.childNodes);
        section.querySelectorAll("details").forEach((one, i) => { one.open = Boolean(open[i]); });
      }
      const block = news.getElementById("data").textContent;
      if (block === byId("data").textContent) return;
      byId("data").textContent = block;
      data = JSON.parse(block);
      const focused = charts.findIndex((chart) => chart.plot === document.activeElement);
      build();
      if (focused >= 0 && charts[focused]) charts[focused].plot.focus();
    } catch (error) {
      state.textContent = "the command that serves this page has ended";
    }
  }
  if (data.refresh) setInterval(look, data.refresh * 1000);
})();
