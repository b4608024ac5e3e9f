"use strict";
// Draws the status page from the JSON in #data. Every text goes in as text, never as HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SEVERAL = RUNS.length > 1;
const KEPT = "tf_gsnr:" + location.pathname; // what a reload brings back: scroll, sorting, choices
const kept = (() => { try { return JSON.parse(sessionStorage.getItem(KEPT)) || {}; } catch { return {}; } })();
const redraws = [];

// Elements

function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function number(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 0.001 || size === 0) return String(Number(value.toPrecision(3)));
  return value.toExponential(1).replace("e-", "e−");
}

const colour = (k) => `var(--c${k % 12})`;
const known = (values) => values.filter((v) => v !== null && v !== undefined && isFinite(v));

// Scales

function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : (v) => v;
  const a = f(low), b = f(high);
  const map = (v) => from + ((f(v) - a) / (b - a || 1)) * (to - from);
  map.ticks = log ? logTicks(low, high) : ticks(low, high);
  return map;
}

function ticks(low, high, about = 5) {
  const raw = (high - low) / about || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step)
    found.push(Number(v.toPrecision(10)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  const decades = Math.log10(high / low);
  const every = Math.max(1, Math.ceil(decades / 6));
  for (let k = Math.ceil(Math.log10(low) - 1e-9); 10 ** k <= high * 1.0001; k++)
    if (k % every === 0) found.push(Number((10 ** k).toPrecision(6)));
  if (found.length >= 2) return found;
  const more = [];
  for (let k = Math.floor(Math.log10(low)); 10 ** k <= high; k++)
    for (const m of [1, 2, 5]) more.push(Number((m * 10 ** k).toPrecision(6)));
  return more.filter((v) => v >= low * 0.9999 && v <= high * 1.0001);
}

function tickText(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(0).replace("e-", "e−").replace("e+", "e");
  if (size >= 1000) return value.toLocaleString("en");
  return String(value);
}

// What all charts share: a card with a title, a note, buttons, and a drawing as wide as the card.

function card(spec, draw) {
  const plot = element("div", { class: "plot" });
  const tools = element("span", { class: "tools" }, spec.tools || []);
  tools.append(
    element("button", { type: "button", title: "the numbers of this chart", onclick: () => save(csv(spec.table()), spec.title, "csv", "text/csv") }, "CSV"),
    element("button", { type: "button", title: "this chart as an image", onclick: () => savePng(plot.querySelector("svg"), spec.title) }, "PNG"),
  );
  const figure = element("figure", { class: spec.wide ? "card wide" : "card" },
    element("figcaption", {}, element("b", {}, spec.title), tools),
    spec.note ? element("p", { class: "note" }, spec.note) : null,
    spec.legend ? legend(spec.legend) : null, plot);
  const redraw = () => {
    const width = Math.max(plot.clientWidth, 240);
    plot.replaceChildren(draw(width, plot));
  };
  redraws.push(redraw);
  figure.redraw = redraw;
  return figure;
}

function legend(entries) {
  return element("div", { class: "legend" }, entries.map((one) =>
    element("span", {}, drawn("svg", { width: 22, height: 10, "aria-hidden": "true" },
      one.band ? drawn("rect", { x: 0, y: 1, width: 22, height: 8, style: `fill:${one.colour};opacity:.25` }) : null,
      drawn("line", { x1: 0, x2: 22, y1: 5, y2: 5, style: `stroke:${one.colour};stroke-width:2;stroke-dasharray:${one.dash || "none"}` })),
    one.name)));
}

function frame(width, height, margin, x, y, options) {
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  for (const value of y.ticks) {
    svg.append(drawn("line", { x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value), style: "stroke:var(--grid)" }));
    svg.append(drawn("text", { x: margin.left - 6, y: y(value) + 4, "text-anchor": "end" }, tickText(value)));
  }
  let end = -Infinity; // labels that would run into each other are left out
  for (const value of x.ticks) {
    const text = tickText(value), half = text.length * 3.2 + 5, place = x(value);
    svg.append(drawn("line", { x1: place, x2: place, y1: height - margin.bottom, y2: height - margin.bottom + 4, style: "stroke:var(--line)" }));
    if (place - half < end) continue;
    svg.append(drawn("text", { x: place, y: height - margin.bottom + 16, "text-anchor": "middle" }, text));
    end = place + half;
  }
  svg.append(drawn("line", { x1: margin.left, x2: width - margin.right, y1: height - margin.bottom, y2: height - margin.bottom, style: "stroke:var(--line)" }));
  svg.append(drawn("text", { x: width - margin.right, y: height - 2, "text-anchor": "end" }, options.xLabel || ""));
  return svg;
}

function tip(plot) {
  const box = element("div", { class: "tip", hidden: "" });
  plot.append(box);
  return {
    show(place, top, lines) {
      box.replaceChildren(...lines.map((line) => element("div", {},
        line.colour ? element("i", { style: `background:${line.colour}` }) : null, line.text)));
      box.hidden = false;
      const room = plot.clientWidth, width = box.offsetWidth;
      box.style.left = `${Math.max(0, place + width + 16 > room ? place - width - 12 : place + 12)}px`;
      box.style.top = `${top}px`;
    },
    hide() { box.hidden = true; },
  };
}

function hover(svg, plot, width, move, leave) {
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    const factor = width / box.width;
    move((event.clientX - box.left) * factor, (event.clientY - box.top) * factor, 1 / factor);
  };
  svg.addEventListener("pointermove", at);
  svg.addEventListener("pointerdown", at);
  svg.addEventListener("pointerleave", leave);
}

// A chart of lines over the steps.
// series: [{name, x, y, low, high, colour, dash}]; lines: [{y, name}], levels across the chart.

function lineChart(spec) {
  const series = spec.series.filter((s) => known(s.y).length);
  if (!series.length) return null;
  spec.legend = series.map((s) => ({ ...s, band: Boolean(s.low) }));
  for (const line of spec.lines || []) if (line.name) spec.legend.push({ name: line.name, colour: "var(--soft)", dash: "2 3" });
  spec.table = () => tableOf(series);
  const usable = (v) => v !== null && v !== undefined && isFinite(v) && (!spec.log || v > 0);

  return card(spec, (width, plot) => {
    const height = spec.height || Math.max(190, Math.min(270, width * 0.5));
    const margin = { left: 52, right: 12, top: 8, bottom: 34 };
    const xs = known(series.flatMap((s) => s.x));
    const ys = series.flatMap((s) => s.y).filter(usable);
    const levels = (spec.lines || []).map((l) => l.y).filter(usable);
    let [low, high] = range(ys, spec.clip);
    for (const line of spec.lines || []) if (line.ys) levels.push(...line.ys.filter((v) => usable(v) && v > low / 30 && v < high * 30));
    for (const v of levels) { low = Math.min(low, v); high = Math.max(high, v); }
    if (spec.include) for (const v of spec.include) { low = Math.min(low, v); high = Math.max(high, v); }
    [low, high] = padded(low, high, spec.log);
    const x = scale(Math.min(...xs), Math.max(...xs), margin.left, width - margin.right, false);
    const y = scale(low, high, height - margin.bottom, margin.top, spec.log);
    const svg = frame(width, height, margin, x, y, { xLabel: "step" });
    const inside = (v) => Math.max(margin.top, Math.min(height - margin.bottom, y(v)));

    for (const line of spec.lines || []) {
      if (Array.isArray(line.ys)) svg.append(path(line.x, line.ys, x, (v) => inside(v), usable, "stroke:var(--soft);stroke-dasharray:2 3;fill:none"));
      else if (usable(line.y)) svg.append(drawn("line", { x1: margin.left, x2: width - margin.right, y1: inside(line.y), y2: inside(line.y), style: "stroke:var(--soft);stroke-dasharray:2 3" }));
    }
    for (const s of series) if (s.low) svg.append(band(s, x, inside, usable));
    for (const s of series) {
      svg.append(path(s.x, s.y, x, inside, usable, `stroke:${s.colour};stroke-width:${s.width || 1.8};stroke-dasharray:${s.dash || "none"};fill:none;stroke-linejoin:round`));
      s.y.forEach((v, i) => {
        const alone = !usable(s.y[i - 1]) && !usable(s.y[i + 1]);
        if (usable(v) && (alone || s.x.length <= 40)) svg.append(drawn("circle", { cx: x(s.x[i]), cy: inside(v), r: alone ? 3 : 2.2, style: `fill:${s.colour}` }));
      });
    }
    const cursor = drawn("line", { y1: margin.top, y2: height - margin.bottom, style: "stroke:var(--soft);visibility:hidden" });
    svg.append(cursor);
    queueMicrotask(() => {
      const box = tip(plot);
      hover(svg, plot, width, (px, py, factor) => {
        const step = nearest([...new Set(xs)], px, x);
        if (step === null) return;
        cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step));
        cursor.style.visibility = "visible";
        const lines = series.map((s) => {
          const i = s.x.indexOf(step);
          if (i < 0 || !usable(s.y[i]) && !spec.log) return i < 0 ? null : { colour: s.colour, text: `${s.name}: –` };
          const error = s.low && usable(s.high[i]) ? ` ± ${number((s.high[i] - s.low[i]) / 2)}` : "";
          return { colour: s.colour, text: `${s.name}: ${number(s.y[i])}${error}` };
        }).filter(Boolean);
        box.show(x(step) * factor, py * factor + 14, [{ text: `step ${number(step)}` }, ...lines]);
      }, () => { cursor.style.visibility = "hidden"; box.hide(); });
    });
    return svg;
  });
}

function range(values, clip) {
  if (!values.length) return [0, 1];
  let low = Math.min(...values), high = Math.max(...values);
  if (clip) { low = Math.max(low, clip[0]); high = Math.min(high, clip[1]); }
  return [low, high];
}

function padded(low, high, log) {
  if (log) {
    if (low === high) return [low / 2, high * 2];
    const room = (high / low) ** 0.05;
    return [low / room, high * room];
  }
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

function path(xs, ys, x, y, usable, style) {
  let d = "", pen = false;
  ys.forEach((v, i) => {
    if (!usable(v)) { pen = false; return; }
    d += `${pen ? "L" : "M"}${x(xs[i]).toFixed(1)},${y(v).toFixed(1)}`;
    pen = true;
  });
  return drawn("path", { d, style });
}

function band(s, x, y, usable) {
  const parts = [];
  let upper = [], lower = [];
  const close = () => {
    if (upper.length > 1) parts.push(`M${upper.join("L")}L${lower.reverse().join("L")}Z`);
    else if (upper.length) parts.push(`M${upper[0]}L${lower[0]}`);
    upper = []; lower = [];
  };
  s.x.forEach((step, i) => {
    if (!usable(s.low[i]) || !usable(s.high[i])) return close();
    upper.push(`${x(step).toFixed(1)},${y(s.high[i]).toFixed(1)}`);
    lower.push(`${x(step).toFixed(1)},${y(s.low[i]).toFixed(1)}`);
  });
  close();
  return drawn("path", { d: parts.join(""), style: `fill:${s.colour};stroke:${s.colour};stroke-opacity:.35;stroke-width:.5;fill-opacity:.18` });
}

function nearest(values, place, map) {
  let best = null, distance = Infinity;
  for (const v of values) {
    const d = Math.abs(map(v) - place);
    if (d < distance) { distance = d; best = v; }
  }
  return best;
}

function tableOf(series) {
  const steps = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const header = ["step", ...series.flatMap((s) => (s.low ? [s.name, `${s.name}, low`, `${s.name}, high`] : [s.name]))];
  const at = series.map((s) => new Map(s.x.map((step, i) => [step, i])));
  return [header, ...steps.map((step) => [step, ...series.flatMap((s, k) => {
    const i = at[k].get(step);
    return s.low ? [s.y[i], s.low[i], s.high[i]] : [s.y[i]];
  })])];
}

// Layers by steps, as colours.

const SHADES = [[20, 24, 82], [56, 80, 160], [44, 140, 150], [110, 190, 100], [250, 225, 70]];

function shade(t) {
  const place = Math.max(0, Math.min(0.9999, t)) * (SHADES.length - 1);
  const k = Math.floor(place), part = place - k;
  return SHADES[k].map((v, i) => Math.round(v + (SHADES[k + 1][i] - v) * part));
}

function heatMap(run, title) {
  const steps = run.series.step, layers = run.layers;
  const values = known(layers.flatMap((l) => l.gsnr)).filter((v) => v > 0);
  if (!values.length) return null;
  const [low, high] = padded(Math.min(...values), Math.max(...values), true);
  const short = shortNames(layers.map((l) => l.layer));
  const spec = {
    title, wide: true,
    note: "Each row a layer, the first on top; grey where it cannot be told from zero or was not measured.",
    table: () => [["step", ...layers.map((l) => l.layer)], ...steps.map((s, i) => [s, ...layers.map((l) => l.gsnr[i])])],
  };
  return card(spec, (width, plot) => {
    const room = Math.min(width * 0.36, 9 + 6.2 * Math.max(...short.map((n) => n.length)));
    const margin = { left: room, right: 70, top: 6, bottom: 34 };
    const height = Math.max(160, Math.min(620, layers.length * 14)) + margin.top + margin.bottom;
    const cell = (height - margin.top - margin.bottom) / layers.length;
    const canvas = element("canvas", { width: steps.length, height: layers.length });
    const pen = canvas.getContext("2d"), image = pen.createImageData(steps.length, layers.length);
    layers.forEach((l, j) => steps.forEach((_, i) => {
      const v = l.gsnr[i], k = 4 * (j * steps.length + i);
      const paint = v > 0 ? shade(Math.log(v / low) / Math.log(high / low)) : [128, 128, 128];
      image.data.set([...paint, v > 0 ? 255 : 60], k);
    }));
    pen.putImageData(image, 0, 0);
    const x = scale(-0.5, steps.length - 0.5, margin.left, width - margin.right, false);
    x.ticks = [];
    const y = scale(0, 1, 0, 1, false);
    y.ticks = [];
    const svg = frame(width, height, margin, x, y, { xLabel: "step" });
    svg.append(drawn("image", { href: canvas.toDataURL(), x: margin.left, y: margin.top, width: width - margin.left - margin.right, height: height - margin.top - margin.bottom, preserveAspectRatio: "none", style: "image-rendering:pixelated" }));
    const every = Math.ceil(11 / cell);
    short.forEach((name, j) => {
      if (j % every) return;
      const most = Math.floor((room - 10) / 6);
      svg.append(drawn("text", { x: margin.left - 5, y: margin.top + (j + 0.5) * cell + 4, "text-anchor": "end" }, name.length > most ? "…" + name.slice(1 - most) : name));
    });
    let end = -Infinity;
    steps.forEach((step, i) => {
      const place = x(i), half = tickText(step).length * 3.2 + 6;
      if (place - half < end || place + half > width - margin.right + 20) return;
      svg.append(drawn("text", { x: place, y: height - margin.bottom + 16, "text-anchor": "middle" }, tickText(step)));
      end = place + half;
    });
    const bar = scale(low, high, height - margin.bottom, margin.top, true);
    for (let k = 0; k < 40; k++) {
      const size = (height - margin.top - margin.bottom) / 40;
      svg.append(drawn("rect", { x: width - 58, y: height - margin.bottom - (k + 1) * size, width: 10, height: size + 0.5, fill: `rgb(${shade((k + 0.5) / 40)})` }));
    }
    for (const v of bar.ticks) svg.append(drawn("text", { x: width - 44, y: bar(v) + 4 }, tickText(v)));
    queueMicrotask(() => {
      const box = tip(plot);
      hover(svg, plot, width, (px, py, factor) => {
        const i = Math.round((px - margin.left) / (width - margin.left - margin.right) * steps.length - 0.5);
        const j = Math.floor((py - margin.top) / cell);
        if (i < 0 || j < 0 || i >= steps.length || j >= layers.length) return box.hide();
        box.show(px * factor, py * factor + 14, [{ text: layers[j].layer }, { text: `step ${number(steps[i])}` }, { text: `GSNR ${number(layers[j].gsnr[i])}` }]);
      }, () => box.hide());
    });
    return svg;
  });
}

function shortNames(names) {
  const parts = names.map((n) => n.split("/"));
  const same = parts.length > 1 && parts.every((p) => p.length > 1 && p[0] === parts[0][0]);
  return same ? parts.map((p) => p.slice(1).join("/")) : names;
}

// From which layers the gap comes: a bar for now, a mark for the first measurement.

function shares(run, title) {
  const short = shortNames(run.layers.map((l) => l.layer));
  let rows = run.layers.map((l, i) => ({ name: short[i], now: l.last.gap_share, first: known(l.gap_share)[0] ?? null }));
  rows = rows.filter((r) => r.now !== null && r.now !== undefined);
  if (!rows.length) return null;
  const all = rows, most = 16;
  if (rows.length > most) {
    const ordered = [...rows].sort((a, b) => b.now - a.now);
    const chosen = new Set(ordered.slice(0, most - 1)), rest = ordered.slice(most - 1);
    rows = rows.filter((r) => chosen.has(r));
    const total = (key) => rest.reduce((sum, r) => sum + (r[key] || 0), 0);
    rows.push({ name: `${rest.length} others`, now: total("now"), first: total("first") });
  }
  const spec = {
    title, note: "Share of the variance that opens the gap, (14), layer by layer. A mark: at the first measurement.",
    table: () => [["layer", "first", "last"], ...all.map((r) => [r.name, r.first, r.now])],
  };
  return card(spec, (width, plot) => {
    const room = Math.min(width * 0.42, 10 + 6.2 * Math.max(...rows.map((r) => r.name.length)));
    const line = 20, margin = { left: room, right: 44, top: 4, bottom: 34 };
    const height = rows.length * line + margin.top + margin.bottom;
    const high = Math.max(...rows.flatMap((r) => [r.now, r.first || 0]), 0.01);
    const x = scale(0, high, margin.left, width - margin.right, false);
    x.ticks = ticks(0, high, 4);
    const y = scale(0, 1, 0, 1, false);
    y.ticks = [];
    const svg = frame(width, height, margin, x, y, { xLabel: "share of the gap" });
    rows.forEach((r, i) => {
      const top = margin.top + i * line, most = Math.floor((room - 10) / 6);
      svg.append(drawn("text", { x: margin.left - 5, y: top + 14, "text-anchor": "end" }, r.name.length > most ? "…" + r.name.slice(1 - most) : r.name));
      svg.append(drawn("rect", { x: margin.left, y: top + 4, width: Math.max(0.5, x(r.now) - margin.left), height: line - 8, rx: 2, style: "fill:var(--c0)" }, drawn("title", {}, `${r.name}: ${number(r.now)}`)));
      if (r.first !== null) svg.append(drawn("line", { x1: x(r.first), x2: x(r.first), y1: top + 2, y2: top + line - 2, style: "stroke:var(--c1);stroke-width:2.5" }));
      svg.append(drawn("text", { x: width - 2, y: top + 14, "text-anchor": "end" }, `${Math.round(100 * r.now)} %`));
    });
    return svg;
  });
}

// The parameters' GSNR, of a layer or of all, first and now.

function histogram(run, title, key) {
  const h = run.histograms;
  if (!h) return null;
  const choose = element("select", { "aria-label": "layer" }, element("option", { value: "-1" }, "all layers"),
    h.layers.map((name, i) => element("option", { value: i }, name)));
  choose.value = kept[key] !== undefined && kept[key] < h.layers.length ? kept[key] : "-1";
  const counts = (which) => {
    const k = Number(choose.value), lists = k < 0 ? h[which].filter(Boolean) : [h[which][k] || []];
    const sum = h.edges.slice(1).map((_, i) => lists.reduce((total, list) => total + (list[i] || 0), 0));
    const whole = sum.reduce((a, b) => a + b, 0);
    return whole ? sum.map((n) => n / whole) : sum;
  };
  const spec = {
    title, tools: [choose],
    note: "Share of the parameters, by powers of ten; those below zero by chance are left out.",
    legend: [{ name: `first, step ${number(h.steps[0])}`, colour: "var(--c7)" }, { name: `now, step ${number(h.steps[1])}`, colour: "var(--c0)", band: true }],
    table: () => [["GSNR from", "to", "first", "now"], ...counts("first").map((v, i) => [10 ** h.edges[i], 10 ** h.edges[i + 1], v, counts("last")[i]])],
  };
  const figure = card(spec, (width, plot) => {
    const first = counts("first"), last = counts("last");
    const used = first.map((v, i) => v + last[i] > 0);
    const from = Math.max(0, used.indexOf(true) - 1), to = Math.min(first.length, used.lastIndexOf(true) + 2);
    const height = Math.max(190, Math.min(270, width * 0.5)), margin = { left: 44, right: 12, top: 8, bottom: 34 };
    if (to <= from) return drawn("svg", { viewBox: `0 0 ${width} 40`, width, height: 40 }, drawn("text", { x: 4, y: 20 }, "no parameter of this layer has a positive GSNR"));
    const x = scale(10 ** h.edges[from], 10 ** h.edges[to], margin.left, width - margin.right, true);
    const y = scale(0, Math.max(...first, ...last) * 1.08, height - margin.bottom, margin.top, false);
    const svg = frame(width, height, margin, x, y, { xLabel: "GSNR of a parameter" });
    const outline = (values) => {
      let d = `M${x(10 ** h.edges[from])},${y(0)}`;
      for (let i = from; i < to; i++) d += `L${x(10 ** h.edges[i]).toFixed(1)},${y(values[i]).toFixed(1)}L${x(10 ** h.edges[i + 1]).toFixed(1)},${y(values[i]).toFixed(1)}`;
      return d + `L${x(10 ** h.edges[to])},${y(0)}`;
    };
    svg.append(drawn("path", { d: outline(last), style: "fill:var(--c0);fill-opacity:.25;stroke:var(--c0);stroke-width:1.5" }));
    svg.append(drawn("path", { d: outline(first), style: "fill:none;stroke:var(--c7);stroke-width:1.5" }));
    queueMicrotask(() => {
      const box = tip(plot);
      hover(svg, plot, width, (px, py, factor) => {
        const i = h.edges.findIndex((e, k) => k >= from && k < to && px >= x(10 ** e) && px < x(10 ** h.edges[k + 1]));
        if (i < 0) return box.hide();
        box.show(px * factor, py * factor + 14, [{ text: `GSNR ${number(10 ** h.edges[i])} to ${number(10 ** h.edges[i + 1])}` },
          { colour: "var(--c7)", text: `first: ${number(100 * first[i])} %` }, { colour: "var(--c0)", text: `now: ${number(100 * last[i])} %` }]);
      }, () => box.hide());
    });
    return svg;
  });
  choose.addEventListener("change", () => { kept[key] = Number(choose.value); keep(); figure.redraw(); });
  return figure;
}

// The charts of the whole model; of several runs one over the other.

function named(run, name) { return SEVERAL ? `${run.name}: ${name}` : name; }

function curves(parts) {
  // parts: [{name, of: "column", se, dash, colour}]; a colour per run where there are several
  return RUNS.flatMap((run, k) => parts.map((part, i) => {
    const y = run.series[part.of];
    if (!y) return null;
    const se = part.se && run.series[part.se];
    const edge = (sign) => se && y.map((v, j) => (v === null || se[j] === null || se[j] === undefined ? null : v + sign * 2 * se[j]));
    return { name: named(run, part.name), x: run.series.step, y, low: edge(-1), high: edge(1),
      colour: colour(SEVERAL ? k : part.colour ?? i), dash: part.dash, width: part.width };
  })).filter(Boolean);
}

function wholeCharts() {
  const byCallback = RUNS.every((r) => r.byCallback);
  const training = byCallback ? "probe set" : "training";
  const losses = lineChart({
    title: "Loss", series: curves([{ name: training, of: "loss", colour: 0 }, { name: byCallback ? "test" : "validation", of: "test_loss", colour: 1, dash: SEVERAL ? "6 4" : null }]),
    note: byCallback ? "In inference mode, at the same parameters." : "The training loss is Keras's mean over the epoch's steps, in training mode.",
  });
  const varies = RUNS.some((r) => new Set(known(r.series.learning_rate || [])).size > 1);
  const rate = varies ? lineChart({ title: "Learning rate", height: 150, log: true, series: curves([{ name: "rate", of: "learning_rate", colour: 4 }]) }) : null;
  const gap = lineChart({
    title: "Generalisation gap", include: [0], lines: [{ y: 0 }],
    series: curves([{ name: "measured", of: "gap", se: "gap_se", colour: 1 }, { name: "first-order theory (14)", of: "gap_predicted", colour: 0, dash: "6 4" }]),
    note: byCallback
      ? "How far test and probe loss have parted since the first measurement (band: 2 s.e.); and what the theory adds up to, a rate of single steps: what later steps undo is not taken off."
      : "What first-order theory adds up to over the steps, from training data alone: a rate of single steps, too large late in training. GSNRCallback with test_data measures the gap itself.",
  });
  const osgr = lineChart({
    title: "OSGR: how much of a step carries over", clip: [-1, 2], include: [0, 1], lines: [{ y: 1 }],
    series: curves([{ name: "measured", of: "osgr_measured", se: "osgr_measured_se", colour: 1, dash: SEVERAL ? "2 3" : null }, { name: "predicted", of: "osgr_predicted", se: "osgr_predicted_se", colour: 0 }]),
    note: "1: a step helps unseen data as much as the training set. Bands: 2 s.e.",
  });
  const gsnr = lineChart({
    title: "GSNR of the parameters", log: true,
    series: curves([{ name: "95th percentile", of: "gsnr/p95", colour: 3, width: 1.2 }, { name: "mean", of: "gsnr/mean", colour: 0, width: 2.2 }, { name: "median", of: "gsnr/median", colour: 2, width: 1.2 }].slice(SEVERAL ? 1 : 0, SEVERAL ? 2 : 3)),
    lines: SEVERAL ? [] : [{ x: RUNS[0].series.step, ys: RUNS[0].series["gsnr/least"] || [], name: "a mean below cannot be told from zero" }],
    note: "Corrected for the number of examples.",
  });
  const batches = SEVERAL ? [] : known([RUNS[0].batch]);
  const noise = lineChart({
    title: "Noise scale", log: true, series: curves([{ name: "noise scale, in examples", of: "noise_scale", colour: 5 }]),
    lines: batches.map((y) => ({ y, name: `batch size, ${number(Math.round(y))}` })),
    note: "Batches far below it: larger ones still pay.",
  });
  const sign = lineChart({
    title: "Agreement of signs", include: [0.5], lines: [{ y: 0.5, name: "a coin's" }],
    series: curves([{ name: "two examples' gradients agree", of: "same_sign/mean", colour: 6 }]),
    note: "Chance that two examples' gradients have the same sign, mean over the parameters.",
  });
  return [losses, gap, osgr, gsnr, noise, sign, rate].filter(Boolean);
}

function layerCharts(run, k) {
  const charts = [], title = (text) => (SEVERAL ? `${text}, ${run.name}` : text);
  if (!run.layers.length || !run.series.step) return charts;
  if (run.layers.length <= 12) {
    const short = shortNames(run.layers.map((l) => l.layer));
    charts.push(lineChart({
      title: title("GSNR by layer"), log: true,
      series: run.layers.map((l, i) => ({ name: short[i], x: run.series.step, y: l.gsnr, colour: colour(i), dash: i > 11 ? "4 3" : null })),
      lines: [{ x: run.series.step, ys: run.series["gsnr/least"] || [], name: "of all parameters, the least that can be told from zero" }],
      note: "Mean over a layer's parameters, corrected; a gap in a line: it cannot be told from zero there.",
    }));
  } else charts.push(heatMap(run, title("GSNR by layer")));
  charts.push(histogram(run, title("The parameters' GSNR"), `histogram${k}`), shares(run, title("Where the gap comes from")));
  return charts.filter(Boolean);
}

// Tables

function sortable(columns, rows, key) {
  const body = element("tbody");
  const heads = columns.map((column, i) => element("th", { class: column.n ? "n" : null, scope: "col" },
    element("button", { type: "button", onclick: () => sort(i, !(state.by === i && state.down)) }, column.name)));
  const state = kept[key] || { by: -1, down: false };
  const lines = rows.map((row) => ({ row, line: element("tr", {}, columns.map((c) => {
    const value = row[c.of];
    return element("td", { class: c.n ? "n" : c.class }, c.n ? c.text ? c.text(value, row) : number(value) : value);
  })) }));
  function sort(by, down) {
    state.by = by; state.down = down; kept[key] = state; keep();
    show();
  }
  function show() {
    const ordered = [...lines];
    if (state.by >= 0 && columns[state.by]) {
      const { of, n } = columns[state.by], sign = state.down ? -1 : 1;
      ordered.sort((a, b) => {
        const [u, v] = [a.row[of], b.row[of]];
        if (n) return u === null || u === undefined ? 1 : v === null || v === undefined ? -1 : sign * (u - v);
        return sign * String(u).localeCompare(String(v));
      });
    }
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== state.by ? "none" : state.down ? "descending" : "ascending"));
    body.replaceChildren(...ordered.map((one) => one.line));
  }
  show();
  return element("div", { class: "wideTable" }, element("table", {}, element("thead", {}, element("tr", {}, heads)), body));
}

function layerTable(run, k) {
  const percent = (v) => (v === null || v === undefined ? "–" : `${Number((100 * v).toPrecision(3))} %`);
  const columns = [
    { name: "layer", of: "layer", class: "name" }, { name: "class", of: "class" },
    { name: "parameters", of: "parameters", n: true }, { name: "GSNR", of: "gsnr", n: true },
    { name: "agreement", of: "sign", n: true }, { name: "dead", of: "dead", n: true, text: percent },
    { name: "share of the gap", of: "share", n: true, text: percent }, { name: "measured by", of: "route", class: "way" },
  ];
  const rows = run.layers.map((l) => ({
    layer: l.layer, class: l.class, parameters: l.parameters, gsnr: l.measured ? l.last.gsnr : null, sign: l.last.same_sign,
    dead: l.last.dead === null || !l.parameters ? null : l.last.dead / l.parameters, share: l.last.gap_share, route: l.route,
  }));
  return element("figure", { class: "card wide" }, element("figcaption", {}, element("b", {}, SEVERAL ? `Layers, ${run.name}` : "Layers"),
    element("span", { class: "tools" }, element("button", { type: "button", onclick: () => save(csv([columns.map((c) => c.name), ...rows.map((r) => columns.map((c) => r[c.of]))]), "layers", "csv", "text/csv") }, "CSV"))),
    element("p", { class: "note" }, "Of the last measurement that told; press a heading to sort."), sortable(columns, rows, `layers${k}`));
}

function differences() {
  if (!SEVERAL) return null;
  const rows = DATA.differing.map((row) => element("tr", {}, element("th", { scope: "row" }, row.setting), row.values.map((v) => element("td", { class: "name" }, v))));
  return element("figure", { class: "card wide" }, element("figcaption", {}, element("b", {}, "What differs in their settings")),
    rows.length ? element("div", { class: "wideTable" }, element("table", {}, element("thead", {}, element("tr", {}, element("th", {}, "setting"), RUNS.map((r) => element("th", {}, r.name)))), element("tbody", {}, rows)))
      : element("p", { class: "note" }, "Nothing that is recorded."));
}

// Saving

function csv(rows) {
  const cell = (v) => {
    if (v === null || v === undefined) return "";
    const text = String(v);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function save(content, title, ending, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const link = element("a", { href: URL.createObjectURL(blob), download: `${DATA.title} ${title}`.replace(/[^\w\-]+/g, "_") + `.${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function savePng(svg, title) {
  const copy = svg.cloneNode(true), style = getComputedStyle(document.documentElement);
  const [, , width, height] = copy.getAttribute("viewBox").split(" ").map(Number);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.prepend(drawn("rect", { width, height, style: "fill:var(--card)" }));
  copy.prepend(drawn("style", {}, "text{font:11px sans-serif;fill:var(--soft)}"));
  const text = new XMLSerializer().serializeToString(copy).replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  const image = new Image();
  image.onload = () => {
    const canvas = element("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    canvas.toBlob((blob) => save(blob, title, "png"));
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
}

function keep() {
  try { sessionStorage.setItem(KEPT, JSON.stringify({ ...kept, scroll: scrollY })); } catch { /* a browser that keeps nothing */ }
}

// The page

function badge(run) {
  let text = run.state, of = run.state;
  if (run.state === "running" && run.written) {
    const silent = Date.now() / 1000 - run.written;
    if (silent > 60 + 10 * (DATA.refresh || 6)) { text = `running? no news for ${silent > 5400 ? `${Math.round(silent / 3600)} h` : `${Math.round(silent / 60)} min`}`; of = "stopped"; }
  }
  return element("span", { class: `badge ${of}` }, text);
}

function section(run) {
  return [
    SEVERAL ? element("h2", {}, run.name, " ", badge(run)) : null,
    element("dl", { class: "head" }, run.head.map(([label, text]) => element("div", {}, element("dt", {}, label), element("dd", {}, text)))),
    run.warnings.length ? element("ul", { class: "warnings" }, run.warnings.map((text) => element("li", {}, text))) : null,
    element("div", { class: "tiles" }, run.tiles.map((tile) => element("div", { class: `tile ${tile.tone}` },
      element("div", { class: "label" }, tile.label), element("span", { class: "value" }, tile.value), element("span", { class: "error" }, tile.error), element("p", {}, tile.sentence)))),
  ];
}

function build() {
  const title = SEVERAL ? "Trainings side by side" : RUNS[0].name;
  const main = document.querySelector("main");
  main.append(element("header", {}, element("h1", {}, title), SEVERAL ? null : badge(RUNS[0]),
    element("span", { class: "soft" }, DATA.refresh ? `looks again every ${DATA.refresh} s` : `as of ${DATA.made}`)));
  for (const run of RUNS) main.append(...section(run).filter(Boolean));
  const charts = element("div", { class: "charts" }, differences(), wholeCharts(),
    RUNS.map((run, k) => layerCharts(run, k)), RUNS.map((run, k) => (run.layers.length && run.tiles.length ? layerTable(run, k) : null)));
  main.append(charts);
  main.append(element("footer", {}, `Made ${DATA.made} by tf_gsnr. Liu et al., Understanding Why Neural Networks Generalize Well Through GSNR of Parameters, ICLR 2020; numbers in brackets are its equations.`));
  redraws.forEach((draw) => draw());
  if (kept.scroll) scrollTo(0, kept.scroll);
  let due = null, width = innerWidth;
  addEventListener("resize", () => { if (innerWidth === width) return; width = innerWidth; clearTimeout(due); due = setTimeout(() => redraws.forEach((draw) => draw()), 120); });
  addEventListener("beforeprint", () => redraws.forEach((draw) => draw()));
  addEventListener("pagehide", keep);
  if (DATA.refresh) {
    const again = () => (document.hidden || document.querySelector(".tip:not([hidden])") ? setTimeout(again, 1000) : (keep(), location.reload()));
    setTimeout(again, 1000 * DATA.refresh);
  }
}

build();
