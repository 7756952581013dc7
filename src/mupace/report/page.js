
"use strict";
(() => {
  const controls = document.querySelector(".controls");
  if (!controls) return; // a record without a number to draw
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = { unit: "step", log: false, hidden: new Set() };
  let plots = [];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const hue = (line) => colour(`--h${line.hue % 8}`);

  // Position of x between the points xs, carried over to ys; straight lines between and beyond.
  function carry(x, xs, ys) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    return ys[low] + (x - xs[low]) * (ys[high] - ys[low]) / (xs[high] - xs[low]);
  }
  const place = (step) => (state.unit === "token" ? carry(step, data.clock.step, data.clock.token) : step);
  const stepAt = (x) => (state.unit === "token" ? carry(x, data.clock.token, data.clock.step) : x);

  function short(v) {
    for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(v) >= size) return +(v / size).toPrecision(4) + letter;
    return String(+v.toPrecision(4));
  }
  function rate(v) {
    if (v === 0 || Math.abs(v) >= 1e-3) return String(+v.toPrecision(4));
    const [mantissa, exponent] = v.toExponential(3).split("e");
    return +mantissa + "e" + exponent;
  }
  const reading = (chart, v) => (chart.rates ? rate(v) : Math.abs(v) >= 1e4 ? short(v) : v.toPrecision(4));

  function table(chart) {
    const frame = [[0, place(data.end)], [null, null]]; // holds the x axis at the whole run
    return uPlot.join([frame, ...chart.lines.map((line) => [line.x.map(place), line.y])]);
  }

  const DASH = { planned: [5, 4], level: [2, 3] };
  const WIDTH = { taken: 2.4, planned: 1.2, raw: 1, smooth: 2, points: 1.4, level: 1.4 };
  function look(line) {
    const stroke = line.kind === "planned" ? colour("--ink") : hue(line);
    return {
      stroke: line.kind === "raw" ? stroke + "66" : stroke,
      width: WIDTH[line.kind], dash: DASH[line.kind],
      points: { show: line.kind === "points", size: 6, width: 0, fill: stroke, stroke },
    };
  }

  // The defined point of a series nearest to where the cursor is: series of one chart have their own x.
  function nearest(u, series, hovered, x) {
    const xs = u.data[0], ys = u.data[series];
    let left = hovered, right = hovered;
    while (left >= 0 && ys[left] == null) left--;
    while (right < xs.length && ys[right] == null) right++;
    if (left < 0 && right >= xs.length) return null;
    if (left < 0) return right;
    if (right >= xs.length) return left;
    return x - xs[left] <= xs[right] - x ? left : right;
  }

  function logTicks(u, axis, low, high) {
    const found = [];
    for (const steps of [[1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9], [1]]) {
      found.length = 0;
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const m of steps) {
          const v = +(m * 10 ** e).toPrecision(6);
          if (v >= low && v <= high) found.push(v);
        }
      const few = steps.length === 3 ? 4 : 5;
      if (found.length >= few) break;
    }
    return found.length > 9 ? found.filter((v) => Math.abs(Math.log10(v) % 1) < 1e-9) : found;
  }

  function yScale(chart) {
    if (chart.log && state.log)
      return { distr: 3, range: (u, low, high) => (low === null ? [1, 10] : [low / 1.06, high * 1.06]) };
    return {
      range: (u, low, high) => {
        if (low === null) return [0, 1];
        if (chart.zero) return [Math.min(0, low), high > 0 ? high * (chart.rates ? 1.2 : 1.12) : 1];
        const room = (high - low || Math.abs(high) || 1) * 0.06;
        return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
      },
    };
  }

  // Verticals: the phases of the plan by name in the first chart, resumes and replans in all.
  function marks(chart) {
    return (u) => {
      const { ctx, bbox } = u, ratio = devicePixelRatio || 1;
      const rows = [];
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      ctx.font = `${12 * ratio}px system-ui, sans-serif`;
      ctx.textBaseline = "top";
      ctx.textAlign = "left";
      const lines = data.events.map(([step, name]) => [step, chart.rates ? name : "", colour("--h4"), [6, 3]]);
      if (chart.rates) lines.unshift(...data.edges.map(([step, name]) => [step, name, colour("--soft"), [2, 3]]));
      const at = ([step]) => Math.round(u.valToPos(place(step), "x", true)) + 0.5;
      ctx.lineWidth = ratio;
      for (const line of lines) {
        ctx.strokeStyle = line[2];
        ctx.setLineDash(line[3].map((d) => d * ratio));
        ctx.beginPath();
        ctx.moveTo(at(line), bbox.top);
        ctx.lineTo(at(line), bbox.top + bbox.height);
        ctx.stroke();
      }
      ctx.setLineDash([]);
      ctx.lineWidth = 4 * ratio;
      ctx.lineJoin = "round";
      ctx.strokeStyle = colour("--bg");
      for (const line of lines.filter(([, name]) => name).sort((a, b) => a[0] - b[0])) {
        const wide = ctx.measureText(line[1]).width, x = at(line);
        if (x < bbox.left - 1 || x > bbox.left + bbox.width) continue;
        const left = Math.min(x + 5 * ratio, bbox.left + bbox.width - wide - 2 * ratio);
        let row = 0;
        while (rows[row] !== undefined && rows[row] > left) row++;
        rows[row] = left + wide + 8 * ratio;
        ctx.strokeText(line[1], left, bbox.top + (3 + 15 * row) * ratio);
        ctx.fillStyle = line[2];
        ctx.fillText(line[1], left, bbox.top + (3 + 15 * row) * ratio);
      }
      ctx.restore();
    };
  }

  function axes(chart) {
    const common = {
      stroke: colour("--soft"), font: "12px system-ui, sans-serif", ticks: { show: false },
      grid: { stroke: colour("--grid"), width: 1 },
    };
    const values = (u, splits) => splits.map((v) => (v == null ? "" : chart.rates ? rate(v) : short(v)));
    const y = { ...common, size: 56, gap: 6, space: 34, values };
    if (chart.log && state.log) Object.assign(y, { splits: logTicks, filter: (u, splits) => splits });
    return [{ ...common, size: 30, space: 70, values: (u, splits) => splits.map(short) }, y];
  }

  const where = document.getElementById("where"), hint = where.textContent;
  function tell(x) {
    if (x == null) { where.textContent = hint; return; }
    const step = Math.max(0, stepAt(x));
    const tokens = data.clock ? ` · ${short(carry(step, data.clock.step, data.clock.token))} tokens` : "";
    where.textContent = `update ${Math.round(step).toLocaleString("en")}${tokens}`;
  }

  function build(chart) {
    const figure = document.getElementById(`chart-${chart.key}`), box = figure.querySelector(".plot");
    const key = figure.querySelector(".key");
    const read = () => {
      chart.lines.forEach((line, i) => {
        const at = plot.cursor.idxs && plot.cursor.left >= 0 ? plot.cursor.idxs[i + 2] : null;
        const value = at == null ? null : plot.data[i + 2][at];
        if (cells[i]) cells[i].textContent = value == null ? "" : reading(chart, value);
      });
      if (plot.cursor.event) tell(plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null);
    };
    const options = {
      width: box.clientWidth, height: box.clientHeight, legend: { show: false },
      padding: [8, 18, 0, 0],
      scales: { x: { time: false }, y: yScale(chart) },
      axes: axes(chart),
      cursor: {
        y: false, dataIdx: nearest, points: { size: 7 }, drag: { x: true, y: false },
        sync: { key: "run", setSeries: false, scales: ["x", null] },
      },
      series: [{}, { show: false }, ...chart.lines.map((line) => ({ show: !state.hidden.has(chart.key + line.label), ...look(line) }))],
      hooks: { drawAxes: [marks(chart)], setCursor: [() => plot && read()] },
    };
    let plot = null;
    plot = new uPlot(options, table(chart), box);
    const cells = fill(key, chart, plot);
    return { plot, box };
  }

  // One entry per line, but a single one for several planned lines; returns each line's cell for its value.
  function fill(key, chart, plot) {
    const planned = chart.lines.map((line, i) => i).filter((i) => chart.lines[i].kind === "planned");
    const cells = [];
    key.replaceChildren();
    chart.lines.forEach((line, i) => {
      const many = line.kind === "planned" && planned.length > 1;
      if (many && i !== planned[planned.length - 1]) return;
      const value = document.createElement("b");
      const label = line.kind === "planned" ? "planned" : line.label;
      key.append(entry(chart, many ? planned : [i], label, value, plot));
      if (!many) cells[i] = value;
    });
    return cells;
  }

  function swatch(line) {
    const canvas = document.createElement("canvas"), ctx = canvas.getContext("2d");
    const ratio = devicePixelRatio || 1, drawn = look(line);
    [canvas.width, canvas.height] = [22 * ratio, 10 * ratio];
    canvas.style.width = "22px";
    canvas.style.height = "10px";
    ctx.scale(ratio, ratio);
    ctx.strokeStyle = ctx.fillStyle = drawn.stroke;
    ctx.lineWidth = drawn.width;
    ctx.setLineDash(drawn.dash || []);
    ctx.beginPath();
    ctx.moveTo(0, 5);
    ctx.lineTo(22, 5);
    ctx.stroke();
    if (drawn.points.show) { ctx.beginPath(); ctx.arc(11, 5, 3, 0, 7); ctx.fill(); }
    return canvas;
  }

  // A swatch drawn as the line is drawn, its name, its value under the cursor; pressed while it is shown.
  function entry(chart, members, label, value, plot) {
    const button = document.createElement("button"), name = document.createElement("span");
    const ids = members.map((i) => chart.key + chart.lines[i].label);
    name.textContent = label;
    button.type = "button";
    button.setAttribute("aria-pressed", String(!state.hidden.has(ids[0])));
    button.append(swatch(chart.lines[members[0]]), name, value);
    button.addEventListener("click", () => {
      const show = state.hidden.has(ids[0]);
      ids.forEach((id) => (show ? state.hidden.delete(id) : state.hidden.add(id)));
      button.setAttribute("aria-pressed", String(show));
      plot.batch(() => members.forEach((i) => plot.setSeries(i + 2, { show })));
    });
    return button;
  }

  function rebuild() {
    plots.forEach(({ plot }) => plot.destroy());
    plots = data.charts.map(build);
  }

  controls.hidden = false;
  document.getElementById("unit").hidden = !data.clock;
  document.getElementById("unit").addEventListener("change", (event) => { state.unit = event.target.value; rebuild(); });
  document.getElementById("log").addEventListener("change", (event) => { state.log = event.target.checked; rebuild(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);
  rebuild();
  const resized = new ResizeObserver(() => plots.forEach(({ plot, box }) => {
    if (plot.width !== box.clientWidth || plot.height !== box.clientHeight)
      plot.setSize({ width: box.clientWidth, height: box.clientHeight });
  }));
  document.querySelectorAll(".plot").forEach((box) => resized.observe(box));
})();
