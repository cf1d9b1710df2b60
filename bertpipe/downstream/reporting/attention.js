// What attention.html.jinja does with its numbers. Texts go into the page as text alone, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const count = data.tokens.length;
const numbers = (text) => new Uint16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const weights = numbers(data.weights);
const weight = (layer, head, from, to) => weights[((layer * data.heads + head) * count + from) * count + to] / 65535;
const LINE = 21; // height of a token beside the arrows
const state = { layer: 0, heads: [0], token: data.start, direction: "from" };
const element = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const channels = (name) => [1, 3, 5].map((at) => parseInt(colour(name).slice(at, at + 2), 16));

function make(tag, attributes = {}, text = null, svg = false) {
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

// A canvas of size x size pixels, coloured by value(row, column) from -1 to 1.
function image(canvas, size, value, shade = Math.sqrt) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), pixels = context.createImageData(size, size);
  const above = channels("accent"), below = channels("warn");
  for (let row = 0, at = 0; row < size; row++) {
    for (let column = 0; column < size; column++, at += 4) {
      const number = value(row, column);
      pixels.data.set(number < 0 ? below : above, at);
      pixels.data[at + 3] = 255 * shade(Math.abs(number));
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// One tab stop for a group of buttons; the arrow keys move between them, `wide` of them a line.
function rove(buttons, wide) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide };
  buttons.forEach((button, place) => {
    button.addEventListener("keydown", (event) => {
      const next = buttons[place + steps[event.key]];
      if (!next) return;
      event.preventDefault();
      next.focus();
    });
    button.addEventListener("focus", () => buttons.forEach((other) => { other.tabIndex = other === button ? 0 : -1; }));
  });
  buttons[0].tabIndex = 0;
}

// A large heat map with a cell that the pointer and the arrow keys move. Returns the function that draws it.
function heatmap(host, size, value, { names = null, shade, label, read, pick = null }) {
  const canvas = make("canvas", { tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-label": label });
  const output = make("output", { "aria-live": "polite" }), small = document.createElement("canvas");
  host.replaceChildren(canvas, output);
  let cell = null, left = 0, edge = 1;
  function draw(repaint = false) {
    if (repaint) image(small, size, value, shade);
    const wide = host.clientWidth, ratio = window.devicePixelRatio || 1;
    if (!wide) return;
    const context = canvas.getContext("2d");
    const font = (pixels) => { context.font = `${pixels}px ${getComputedStyle(document.body).fontFamily}`; };
    font(12);
    const longest = names ? Math.min(wide / 4, 8 + Math.max(...names.map((name) => context.measureText(name).width))) : 0;
    left = names && (wide - longest) / size >= 8 ? longest : 0;
    edge = Math.min((wide - left) / size, 30);
    const whole = Math.ceil(left + edge * size) + 1;
    canvas.style.width = canvas.style.height = `${whole}px`;
    canvas.width = canvas.height = Math.round(whole * ratio);
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, left, left, edge * size, edge * size);
    context.strokeStyle = colour("rule");
    context.strokeRect(left, left, edge * size, edge * size);
    font(Math.min(12, edge));
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let place = 0; left && place < size; place++) {
      const middle = left + edge * (place + 0.5), across = cell && cell[1] === place;
      context.fillStyle = colour(cell && cell[0] === place ? "accent" : "muted");
      context.fillText(names[place], left - 4, middle, left - 6);
      context.save();
      context.translate(middle, left - 4);
      context.rotate(Math.PI / 2);
      context.fillStyle = colour(across ? "accent" : "muted");
      context.fillText(names[place], 0, 0, left - 6);
      context.restore();
    }
    if (cell) {
      context.lineWidth = 2;
      context.strokeStyle = colour("ink");
      context.strokeRect(left + edge * cell[1], left + edge * cell[0], Math.max(edge, 3), Math.max(edge, 3));
    }
  }
  function move(row, column) {
    if (row < 0 || column < 0 || row >= size || column >= size || (cell && cell[0] === row && cell[1] === column)) return;
    cell = [row, column];
    output.textContent = read(row, column);
    draw();
  }
  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientY - box.top, event.clientX - box.left].map((at) => Math.floor((at - left) / edge));
  };
  canvas.addEventListener("pointermove", (event) => move(...under(event)));
  canvas.addEventListener("click", (event) => { move(...under(event)); if (pick && cell) pick(cell[0]); });
  canvas.addEventListener("focus", () => { if (!cell) move(0, 0); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step && cell) { event.preventDefault(); move(cell[0] + step[0], cell[1] + step[1]); }
    if (event.key === "Enter" && pick && cell) pick(cell[0]);
  });
  draw(true);
  return draw;
}

const special = (place) => (data.special[place] ? " special" : "");
const outgoing = () => state.direction === "from";
const share = (head, other) =>
  outgoing() ? weight(state.layer, head, state.token, other) : weight(state.layer, head, other, state.token);

// Tokens in two columns, those that attend on the left, and a line for each weight of the chosen one.
function arrows(head) {
  const svg = make("svg", { viewBox: `0 0 320 ${count * LINE}`, "aria-hidden": "true" }, null, true);
  const height = (place) => (place + 0.5) * LINE, at = height(state.token);
  for (let other = 0; other < count; other++) {
    const value = share(head, other), ends = outgoing() ? [at, height(other)] : [height(other), at];
    if (value < 0.005) continue;
    const [x, y] = [outgoing() ? 214 : 0, height(other) - LINE / 2 + 1];
    svg.append(make("rect", { x, y, width: 106, height: LINE - 2, rx: 4, opacity: 0.45 * value }, null, true));
    svg.append(make("line", { x1: 108, y1: ends[0], x2: 212, y2: ends[1], "stroke-width": 0.8 + 4 * value, opacity: 0.12 + 0.88 * value }, null, true));
  }
  for (let place = 0; place < count; place++) {
    for (const first of [true, false]) {
      const name = data.tokens[place], text = name.length > 14 ? name.slice(0, 13) + "…" : name;
      const picked = place === state.token && first === outgoing() ? " picked" : "";
      const where = { x: first ? 102 : 220, y: height(place), "text-anchor": first ? "end" : "start", "dominant-baseline": "central" };
      const made = make("text", { ...where, class: `token${special(place)}${picked}` }, text, true);
      made.addEventListener("click", () => pick(place));
      svg.append(made);
    }
  }
  return svg;
}

// The largest weights of the chosen token, in words.
function inWords(head) {
  const order = [...Array(count).keys()].sort((a, b) => share(head, b) - share(head, a)).slice(0, 5);
  return order.map((other) => `${data.tokens[other]} ${(100 * share(head, other)).toFixed(1)} %`).join(", ");
}

// What the choice of a token or a direction changes.
let figures = [];
function update() {
  const name = data.tokens[state.token], doing = outgoing() ? `“${name}” attends to` : `to “${name}” attend`;
  words.forEach((button, place) => button.setAttribute("aria-pressed", place === state.token));
  for (const { head, caption, host } of figures) {
    const [entropy, distance] = [data.entropy, data.distance].map((rows) => rows[state.layer][head].toFixed(2));
    const title = make("b", {}, `Layer ${state.layer + 1}, head ${head + 1}`);
    caption.replaceChildren(title, `: entropy ${entropy} nats, mean distance ${distance} tokens. ${doing} ${inWords(head)}.`);
    host.replaceChildren(arrows(head));
  }
  const said = state.heads.map((head) => `head ${head + 1}: ${doing} ${inWords(head)}`);
  element("status").textContent = `Layer ${state.layer + 1}: ${said.join("; ")}`;
}

// What the choice of a layer or of heads changes.
function show() {
  const { layer, heads } = state, chosen = element("chosen");
  for (const button of small) {
    const [row, column] = button.dataset.head.split(",").map(Number);
    button.setAttribute("aria-pressed", row === layer && heads.includes(column));
  }
  element("layer").value = layer;
  [...element("heads").children].forEach((button, head) => button.setAttribute("aria-pressed", heads.includes(head)));
  chosen.className = heads.length === 1 ? "chosen one" : "chosen";
  chosen.replaceChildren();
  figures = heads.map((head) => {
    const figure = make("figure"), caption = make("figcaption");
    const host = make("div", { class: "arrows" }), map = make("div", { class: "map" });
    figure.append(caption, host, map);
    chosen.append(figure);
    const draw = heatmap(map, count, (row, column) => weight(layer, head, row, column), {
      names: data.tokens,
      label: `Layer ${layer + 1}, head ${head + 1}: weights of ${count} by ${count} tokens; arrow keys move, Enter chooses the row's token`,
      read: (row, column) => `${data.tokens[row]} → ${data.tokens[column]}: ${weight(layer, head, row, column).toFixed(4)}`,
      pick,
    });
    return { head, caption, host, draw };
  });
  update();
  for (const { host } of figures) host.scrollTop = Math.max(0, state.token * LINE - 200);
}

function pick(token) { state.token = token; update(); }
function enlarge(head) {
  const [layer, column] = head.split(",").map(Number);
  Object.assign(state, { layer, heads: [column] });
  show();
  element("closer").scrollIntoView();
}
function toggle(head) {
  const rest = state.heads.filter((other) => other !== head);
  if (rest.length === state.heads.length) rest.push(head);
  if (rest.length) state.heads = rest.sort((a, b) => a - b);
  show();
}

const small = [...document.querySelectorAll(".layers button")];
function paint() {
  for (const button of small) {
    const [layer, head] = button.dataset.head.split(",").map(Number);
    image(button.firstChild, count, (row, column) => weight(layer, head, row, column));
  }
  redraw(true);
}
const words = data.tokens.map((token, place) => {
  const title = `${place + 1}: ${data.pieces[place]}`, button = make("button", { type: "button", title, tabindex: -1, dir: "auto" }, token);
  button.className = special(place).trim();
  button.addEventListener("click", () => pick(place));
  return button;
});
element("words").append(...words);
rove(words, 1);
rove(small, data.heads);
for (const target of document.querySelectorAll("[data-head]")) target.addEventListener("click", () => enlarge(target.dataset.head));
[...element("heads").children].forEach((button, head) => button.addEventListener("click", () => toggle(head)));
element("layer").addEventListener("change", (event) => { state.layer = Number(event.target.value); show(); });
element("direction").addEventListener("change", (event) => { state.direction = event.target.value; update(); });
const fixed = [...document.querySelectorAll("[data-positions]")].map((host) => {
  const { size, values } = data.positions[host.dataset.positions], all = numbers(values);
  const value = (row, column) => (2 * all[row * size + column]) / 65535 - 1;
  return heatmap(host, size, value, {
    shade: (number) => number,
    label: `Similarity of ${size} by ${size} positions; arrow keys move`,
    read: (row, column) => `positions ${row} and ${column}: ${value(row, column).toFixed(4)}`,
  });
});
const redraw = (repaint) => [...figures.map((figure) => figure.draw), ...fixed].forEach((draw) => draw(repaint));
show();
paint();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
let waiting = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => redraw(false)); });
