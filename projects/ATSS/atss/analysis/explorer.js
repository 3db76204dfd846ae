"use strict";
// The page of tools/explore.py. A server answers `load`, or the page holds the answers itself.
const DATA = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
// Colours of Okabe and Ito, which colour-blind people can tell apart.
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2"];
const MARK = {positive: "positive", lost: "lost", chosen: "dropped", candidate: "candidate"};
const SORTS = {
  positives: ["fewest positives", i => views[0].positives[i]],
  best: ["lowest best overlap", i => views[0].objects.best[i]],
  lost: ["most lost anchors", i => -views[0].lostOf[i].length],
  differs: ["largest difference", i => views[1] ? -differing[i] : i],
  size: ["smallest", i => area(i)],
  number: ["number", i => i],
};
const MOST_ROWS = 200;
const SIZES = {all: [0, Infinity], small: [0, 32 ** 2], medium: [32 ** 2, 96 ** 2], large: [96 ** 2, Infinity]};
const state = {image: DATA.image, object: -1, rules: [...DATA.start], weights: Math.max(0, DATA.weights.length - 1),
  sort: "positives", class: -1, size: "all", axis: "similarity", detections: false, least: 0.3};
let scene = null, picture = null, small = null, views = [], found = null, differing = [];
let details = [], order = [], hovered = null, camera = {x: 0, y: 0, zoom: 1}, panes = [], shownImage = -1;

// ------------------------------------------------------------------------------------------------
// Answers
// ------------------------------------------------------------------------------------------------

const cache = new Map();

async function load(kind, ...values) {
  const key = [kind, ...values].join("|");
  if (DATA.answers) {
    if (!(key in DATA.answers)) throw new Error(`This page has no ${kind} of ${values.slice(1).join(", ")}.`);
    return DATA.answers[key];
  }
  if (!cache.has(key)) {
    const names = {image: ["image"], rule: ["image", "rule", "weights"], detections: ["image", "weights"],
      object: ["image", "rule", "weights", "object"]}[kind];
    const query = new URLSearchParams(names.map((name, i) => [name, values[i]]));
    let response;
    try {
      response = await fetch(`${kind}?${query}`);
    } catch {
      throw new Error("The server cannot be reached.");
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    if (cache.size > 200) cache.clear();
    cache.set(key, answer);
  }
  return cache.get(key);
}

async function loadPicture(image) {
  const blob = await (await fetch(DATA.answers ? DATA.answers[`picture|${image}`] : `picture?image=${image}`)).blob();
  const whole = await createImageBitmap(blob);
  const scale = Math.min(1, 1400 / Math.max(whole.width, whole.height));
  if (scale === 1) return [whole, whole];
  const size = {resizeWidth: Math.round(whole.width * scale), resizeQuality: "high"};
  return [whole, await createImageBitmap(whole, size)];
}

// One update at a time; of those that are asked for meanwhile, only the last is made.
let running = false, pending = false;

async function update() {
  if (running) { pending = true; return; }
  running = true;
  document.body.dataset.state = "busy";
  try {
    do {
      pending = false;
      await refresh();
    } while (pending);
    show("");
  } catch (error) {
    show(error.message);
    if (pending) setTimeout(update);
  } finally {
    running = false;
    document.body.dataset.state = "ready";
  }
}

async function refresh() {
  const image = state.image, rules = state.rules.filter(x => x);
  if (image !== shownImage) {
    const next = await load("image", image);
    [picture, small] = await loadPicture(image);
    scene = next;
    first = firstOfLevels();
    views = [];
    shownImage = image;
    camera = {x: scene.width / 2, y: scene.height / 2, zoom: 1};
  }
  if (state.object >= scene.boxes.length) state.object = -1;
  const answers = await Promise.all(rules.map(rule => load("rule", image, rule, state.weights)));
  views = answers.map(index);
  const has = rules.map((_, i) => state.object >= 0 && load("object", image, rules[i], state.weights, state.object));
  details = await Promise.all(has);
  found = state.detections && DATA.weights.length ? await load("detections", image, state.weights) : null;
  differing = views[1] ? scene.boxes.map((_, i) => difference(i).size) : [];
  hovered = null;
  showObjects();
  showDetails();
  layOut();
  link();
}

// Add the positives and the lost anchors of each object to an answer.
function index(answer) {
  const ofObject = scene.boxes.map(() => []), lostOf = scene.boxes.map(() => []), owner = new Map(), score = new Map();
  answer.anchors.forEach((anchor, i) => {
    ofObject[answer.owners[i]].push(anchor);
    owner.set(anchor, answer.owners[i]);
    if (answer.scores) score.set(anchor, answer.scores[i]);
  });
  answer.lost[0].forEach((object, i) => lostOf[object].push(answer.lost[1][i]));
  return {...answer, ofObject, lostOf, owner, score, positives: ofObject.map(x => x.length)};
}

// The anchors that only one of two rules gives an object.
function difference(object) {
  const [a, b] = views.map(view => new Set(view.ofObject[object]));
  return new Set([...[...a].filter(x => !b.has(x)), ...[...b].filter(x => !a.has(x))]);
}

// ------------------------------------------------------------------------------------------------
// Anchors
// ------------------------------------------------------------------------------------------------

let first = [];

function firstOfLevels() {
  let sum = 0;
  return scene.sizes.map(([h, w], i) => [sum, sum += h * w * scene.shapes[i].length][0]);
}

function anchorAt(number) {
  const level = first.findLastIndex(x => x <= number), shapes = scene.shapes[level];
  const place = Math.floor((number - first[level]) / shapes.length), width = scene.sizes[level][1];
  const stride = scene.strides[level], [w, h] = shapes[(number - first[level]) % shapes.length];
  const x = (place % width + scene.offset) * stride, y = (Math.floor(place / width) + scene.offset) * stride;
  return {number, level, x, y, box: [x - w / 2, y - h / 2, x + w / 2, y + h / 2]};
}

const area = i => (([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1))(scene.boxes[i]);
const colour = i => COLOURS[i % COLOURS.length];
const className = k => DATA.classes[k] ?? `class ${k}`;

// ------------------------------------------------------------------------------------------------
// Canvas
// ------------------------------------------------------------------------------------------------

const canvas = get("canvas"), pen = canvas.getContext("2d", {alpha: false});
let drawn = 0;

function layOut() {
  const width = canvas.clientWidth, height = canvas.clientHeight, count = Math.max(views.length, 1);
  // Panes beside or above each other, as the image is larger.
  const fits = (w, h) => scene ? Math.min(w / scene.width, h / scene.height) : 1;
  const beside = fits(width / count, height) >= fits(width, height / count);
  const [w, h] = beside ? [width / count, height] : [width, height / count];
  panes = Array.from({length: count}, (_, i) => ({x: beside ? i * w : 0, y: beside ? 0 : i * h, w, h}));
  draw();
}

function draw() {
  cancelAnimationFrame(drawn);
  drawn = requestAnimationFrame(paint);
}

const scaleOf = pane => camera.zoom * Math.min(pane.w / scene.width, pane.h / scene.height) * 0.97;
const onScreen = (pane, x, y) => [pane.x + pane.w / 2 + (x - camera.x) * scaleOf(pane), pane.y + pane.h / 2 + (y - camera.y) * scaleOf(pane)];

function paint() {
  const ratio = devicePixelRatio, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.fillStyle = getComputedStyle(get("controls")).backgroundColor;
  pen.fillRect(0, 0, width, height);
  if (scene && picture) panes.forEach(paintPane);
}

function paintPane(pane, i) {
  const scale = scaleOf(pane), [left, top] = onScreen(pane, 0, 0), view = views[i], chosen = state.object;
  pen.save();
  pen.beginPath();
  pen.rect(pane.x, pane.y, pane.w - (pane.x + pane.w < canvas.clientWidth ? 2 : 0), pane.h - (pane.y + pane.h < canvas.clientHeight ? 2 : 0));
  pen.clip();
  const source = scale * scene.width * devicePixelRatio > 1.3 * small.width ? picture : small;
  pen.drawImage(source, left, top, scene.width * scale, scene.height * scale);
  pen.fillStyle = `rgba(20, 23, 27, ${chosen < 0 ? 0.15 : 0.4})`;  // so that marks stand out
  pen.fillRect(left, top, scene.width * scale, scene.height * scale);
  const isVisible = (x, y, room = 12) => x > pane.x - room && x < pane.x + pane.w + room && y > pane.y - room && y < pane.y + pane.h + room;
  scene.boxes.forEach((box, object) => {
    if (object !== chosen) outline(pane, box, colour(object), chosen < 0 ? 1.5 : 0.7, chosen < 0 ? 1 : 0.5);
  });
  if (found) paintDetections(pane);
  if (view) {
    const marks = {faint: new Map(), hollow: new Map(), full: new Map(), cross: new Map()};
    const add = (kind, ink, number) => {
      const anchor = anchorAt(number), [x, y] = onScreen(pane, anchor.x, anchor.y);
      if (!isVisible(x, y)) return;
      const map = marks[kind], key = ink + anchor.level;
      if (!map.has(key)) map.set(key, {ink, level: anchor.level, points: []});
      map.get(key).points.push([x, y]);
    };
    const detail = details[i];
    if (chosen >= 0 && detail) detail.anchors.forEach((a, k) => view.owner.get(a) === chosen || detail.chosen[k] || add("hollow", colour(chosen), a));
    view.anchors.forEach((a, k) => add(chosen < 0 || view.owners[k] === chosen ? "full" : "faint", colour(view.owners[k]), a));
    if (chosen >= 0) view.lostOf[chosen].forEach(a => add("cross", colour(view.owner.get(a)), a));
    for (const [kind, map] of Object.entries(marks)) for (const mark of map.values()) paintMarks(kind, mark, scale);
    if (chosen >= 0 && views[1]) {
      const other = new Set(views[1 - i].ofObject[chosen]);
      ring(pane, view.ofObject[chosen].filter(a => !other.has(a)).map(anchorAt), scale);
    }
  }
  if (chosen >= 0) outline(pane, scene.boxes[chosen], "#fff", 4.5), outline(pane, scene.boxes[chosen], colour(chosen), 2.5);
  if (hovered) {
    outline(pane, hovered.box, "#fff", 1.5);
    const k = details[i] ? details[i].anchors.indexOf(hovered.number) : -1;
    pen.setLineDash([5, 4]);
    if (k >= 0 && details[i].boxes) outline(pane, details[i].boxes[k], "#fff", 1.5);
    pen.setLineDash([]);
  }
  if (view) caption(pane, i, view);
  pen.restore();
}

function outline(pane, [x1, y1, x2, y2], ink, width, alpha = 1) {
  const [left, top] = onScreen(pane, x1, y1), scale = scaleOf(pane), w = (x2 - x1) * scale, h = (y2 - y1) * scale;
  if (left > pane.x + pane.w || top > pane.y + pane.h || left + w < pane.x || top + h < pane.y) return;
  pen.globalAlpha = alpha;
  pen.strokeStyle = ink;
  pen.lineWidth = width;
  pen.strokeRect(left, top, w, h);
  pen.globalAlpha = 1;
}

// Add the shape of a level to the path: circle, square, triangle, diamond, hexagon and again.
function shape(context, level, x, y, r) {
  const corners = [0, 4, 3, 4, 6][level % 5], turn = [0, Math.PI / 4, -Math.PI / 2, 0, 0][level % 5];
  if (!corners) { context.moveTo(x + r, y); context.arc(x, y, r, 0, 7); return; }
  for (let i = 0; i <= corners; i++) {
    const angle = turn + 2 * Math.PI * i / corners, size = r * (corners === 3 ? 1.25 : 1.15);
    context[i ? "lineTo" : "moveTo"](x + size * Math.cos(angle), y + size * Math.sin(angle));
  }
}

function radius(level, scale) {
  const room = scene.strides[level] * scale * 0.42;  // marks of one level do not touch
  return Math.max(1.6, Math.min(3.2 + 0.9 * level, room));
}

function paintMarks(kind, {ink, level, points}, scale) {
  const r = radius(level, scale);
  pen.beginPath();
  for (const [x, y] of points) {
    if (kind === "cross") { const s = r + 1.5; pen.moveTo(x - s, y - s); pen.lineTo(x + s, y + s); pen.moveTo(x + s, y - s); pen.lineTo(x - s, y + s); }
    else shape(pen, level, x, y, r);
  }
  pen.globalAlpha = kind === "faint" ? 0.45 : 1;
  pen.fillStyle = pen.strokeStyle = ink;
  if (kind === "full" || kind === "faint") {
    pen.fill();
    pen.strokeStyle = "#14171b";
    pen.lineWidth = r < 2 ? 0 : 1;
    if (r >= 2 && kind === "full") pen.stroke();
  } else {
    pen.strokeStyle = "#14171b";
    pen.lineWidth = kind === "cross" ? 4.5 : 3;
    pen.stroke();
    pen.strokeStyle = ink;
    pen.lineWidth = kind === "cross" ? 2.2 : 1.4;
    pen.stroke();
  }
  pen.globalAlpha = 1;
}

function ring(pane, anchors, scale) {
  pen.beginPath();
  for (const anchor of anchors) {
    const [x, y] = onScreen(pane, anchor.x, anchor.y), r = radius(anchor.level, scale) * 1.3 + 2;
    pen.moveTo(x + r, y);
    pen.arc(x, y, r, 0, 7);
  }
  pen.strokeStyle = "#fff";
  pen.lineWidth = 1.2;
  pen.stroke();
}

function caption(pane, i, view) {
  const counts = state.object < 0 ? view.anchors.length : view.positives[state.object];
  const text = `${state.rules.filter(x => x)[i]}: ${counts} positive${counts === 1 ? "" : "s"}`;
  pen.font = "600 13px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.fillStyle = "rgba(20, 23, 27, .85)";
  pen.fillRect(pane.x + 8, pane.y + 8, pen.measureText(text).width + 16, 24);
  pen.fillStyle = "#fff";
  pen.fillText(text, pane.x + 16, pane.y + 20.5);
}

function paintDetections(pane) {
  pen.font = "600 11px system-ui, sans-serif";
  pen.textBaseline = "bottom";
  found.boxes.forEach((box, i) => {
    if (found.scores[i] < state.least) return;
    pen.setLineDash([6, 4]);
    outline(pane, box, "#fff", 1.6);
    pen.setLineDash([]);
    const [x, y] = onScreen(pane, box[0], box[3]), text = `${className(found.classes[i])} ${found.scores[i].toFixed(2)}`;
    pen.fillStyle = "rgba(20, 23, 27, .8)";
    pen.fillRect(x, y, pen.measureText(text).width + 6, 15);
    pen.fillStyle = "#fff";
    pen.fillText(text, x + 3, y + 13);
  });
}

// ------------------------------------------------------------------------------------------------
// Panels
// ------------------------------------------------------------------------------------------------

// Make an element with attributes and children.
function make(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG.has(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element[name] = value;
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const SVG = new Set(["svg", "line", "path", "rect", "text", "g"]);

function show(sentence) {
  get("message").textContent = sentence;
  get("message").hidden = !sentence;
}

function shownObjects() {
  const [low, high] = SIZES[state.size], [, value] = SORTS[state.sort];
  const kept = scene.boxes.map((_, i) => i).filter(i => (state.class < 0 || scene.classes[i] === state.class) && area(i) >= low && area(i) < high);
  return kept.sort((a, b) => value(a) - value(b) || a - b);
}

function showObjects() {
  order = views.length ? shownObjects() : [];
  const none = views[0] ? views[0].positives.filter(x => !x).length : 0;
  get("only").hidden = !views[1];
  get("count").textContent = scene.boxes.length ? `${order.length} of ${scene.boxes.length} objects` + (none ? `, ${none} without a positive` : "") + (order.length > MOST_ROWS ? `; the first ${MOST_ROWS}:` : "") : "This image has no objects.";
  const present = [...new Set(scene.classes)].sort((a, b) => className(a).localeCompare(className(b)));
  if (state.class >= 0 && !present.includes(state.class)) state.class = -1;
  get("class").replaceChildren(make("option", {value: -1}, "all classes"), ...present.map(k => make("option", {value: k}, className(k))));
  get("class").value = state.class;
  // A thousand rows would take longer than the rule.
  get("list").replaceChildren(...order.slice(0, MOST_ROWS).map(i => {
    const counts = views.map(view => view.positives[i]).join(" | ");
    const lost = views[0].lostOf[i].length;
    const notes = [views[0].objects.candidates[i] ? `best ${views[0].objects.best[i].toFixed(2)}` : "no candidate", lost ? `${lost} lost` : "", views[1] && differing[i] ? `${differing[i]} differ` : ""];
    const [x1, y1, x2, y2] = scene.boxes[i];
    return make("li", {role: "option", id: `object-${i}`, "aria-selected": i === state.object, onclick: () => choose(i)},
      make("i", {style: `background: ${colour(i)}`}),
      make("span", {}, make("b", {}, `#${i} ${className(scene.classes[i])}`), make("small", {}, `${Math.round(x2 - x1)} x ${Math.round(y2 - y1)}, ${notes.filter(x => x).join(", ")}`)),
      make("data", {class: views[0].positives[i] ? "" : "none", title: "positives"}, counts));
  }));
  const list = get("list"), row = get(`object-${state.object}`);
  if (row) {  // scrollIntoView would also scroll a small screen's page
    const top = row.offsetTop - list.offsetTop;
    list.scrollTop = Math.max(top + row.offsetHeight - list.clientHeight, Math.min(list.scrollTop, top));
  }
}

function showDetails() {
  const panel = get("details"), object = state.object;
  get("axis").hidden = object < 0;
  get("near").disabled = object < 0;
  if (object < 0) {
    panel.replaceChildren(make("p", {class: "soft"}, "Choose an object in the list or in the picture: its candidates, their overlaps and the anchors that it loses are shown here."));
    return;
  }
  const axes = [...new Set(details.flatMap(x => ["similarity", "probability", "cost"].filter(name => name in x)))];
  if (!axes.includes(state.axis)) state.axis = "similarity";
  get("axis").replaceChildren(...axes.map(x => make("option", {value: x}, x === "similarity" ? "overlap" : x)));
  get("axis").value = state.axis;
  panel.replaceChildren(...details.flatMap((detail, i) => ofRule(detail, views[i], state.rules.filter(x => x)[i], object)));
}

// The state of each pair of the chosen object.
function kindOf(detail, view, object, k) {
  const owner = view.owner.get(detail.anchors[k]);
  if (owner === object) return "positive";
  if (detail.chosen[k]) return owner === undefined ? "chosen" : "lost";
  return "candidate";
}

function ofRule(detail, view, rule, object) {
  const kinds = detail.anchors.map((_, k) => kindOf(detail, view, object, k));
  const numbers = {positives: view.positives[object], candidates: detail.anchors.length, lost: view.lostOf[object].length, k: view.objects.k?.[object],
    mean: view.objects.mean?.[object], deviation: view.objects.std?.[object], threshold: view.objects.threshold?.[object]};
  const facts = Object.entries(numbers).filter(([, x]) => x !== undefined && x !== null);
  const decimals = new Set(["mean", "deviation", "threshold"]);
  return [
    make("h3", {}, rule),
    make("dl", {}, ...facts.map(([name, x]) => make("div", {}, make("dt", {}, name), make("dd", {"data-name": name}, decimals.has(name) ? x.toFixed(4) : String(x))))),
    detail.anchors.length ? plot(detail, view, kinds, object) : make("p", {class: "soft"}, "No anchor is a candidate."),
    table(detail, view, kinds),
  ];
}

function plot(detail, view, kinds, object) {
  const values = detail[state.axis] ?? detail.similarity, finite = values.filter(x => x !== null);
  const lines = state.axis === "similarity" ? ["mean", "threshold"].map(x => [x, view.objects[x]?.[object]]).filter(([, x]) => x != null) : [];
  const low = state.axis === "cost" ? Math.min(...finite) : 0, span = Math.max(...finite, ...lines.map(x => x[1]), low + 1e-6) - low;
  const width = 300, left = 26, row = 20, levels = scene.strides.length, height = levels * row + 34;
  const across = x => left + 8 + (x - low) / span * (width - left - 24);
  const parts = scene.strides.flatMap((stride, level) => [
    make("line", {x1: left, x2: width, y1: 24 + level * row, y2: 24 + level * row, class: "grid"}),
    make("text", {x: 0, y: 28 + level * row}, String(stride))]);
  lines.forEach(([name, x], i) => parts.push(
    make("line", {x1: across(x), x2: across(x), y1: 12, y2: height - 16, class: name}),
    make("text", {x: across(x), y: 8, "text-anchor": i && lines[1][1] - lines[0][1] < span / 4 ? "start" : "middle", class: "label"}, name)));
  for (const kind of Object.keys(MARK).toReversed()) kinds.forEach((other, k) => {
    if (other !== kind || values[k] === null) return;
    // Anchors of one level often have equal overlaps: spread them.
    const {level} = anchorAt(detail.anchors[k]), x = across(values[k]), y = 24 + level * row + (k % 3 - 1) * 4;
    const path = {d: "", moveTo(a, b) { this.d += `M${a.toFixed(1)} ${b.toFixed(1)}`; }, lineTo(a, b) { this.d += `L${a.toFixed(1)} ${b.toFixed(1)}`; },
      arc(a, b, r) { this.d += `a${r} ${r} 0 1 0 ${-2 * r} 0a${r} ${r} 0 1 0 ${2 * r} 0`; }};
    if (kind === "lost") path.d = `M${x - 4} ${y - 4}L${x + 4} ${y + 4}M${x + 4} ${y - 4}L${x - 4} ${y + 4}`;
    else shape(path, level, x, y, 4.5);
    parts.push(make("path", {d: path.d, class: kind, onmouseenter: () => { hovered = anchorAt(detail.anchors[k]); draw(); }}));
  });
  const digits = span + low < 10 ? 2 : 0;
  parts.push(make("text", {x: left + 8, y: height - 2}, low.toFixed(digits)), make("text", {x: width, y: height - 2, "text-anchor": "end"}, (low + span).toFixed(digits)),
    make("text", {x: (width + left) / 2, y: height - 2, "text-anchor": "middle"}, `${state.axis === "similarity" ? "overlap" : state.axis} by stride`));
  return make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "candidates by level"}, ...parts);
}

function table(detail, view, kinds) {
  const names = ["similarity", "probability", "cost"].filter(x => x in detail), rank = Object.keys(MARK), most = 60;
  const rows = detail.anchors.map((anchor, k) => k).sort((a, b) => rank.indexOf(kinds[a]) - rank.indexOf(kinds[b]) || (detail.similarity[b] ?? 0) - (detail.similarity[a] ?? 0));
  const head = ["stride", ...names.map(x => x === "similarity" ? "overlap" : x), ...(view.scores ? ["target"] : []), "anchor is"];
  const body = rows.slice(0, most).map(k => {
    const anchor = anchorAt(detail.anchors[k]), owner = view.owner.get(anchor.number), target = kinds[k] === "positive" ? view.score.get(anchor.number) : undefined;
    const cells = [scene.strides[anchor.level], ...names.map(x => detail[x][k]?.toFixed(x === "cost" ? 2 : 3) ?? "-"), ...(view.scores ? [target?.toFixed(3) ?? ""] : []),
      MARK[kinds[k]] + (kinds[k] === "lost" ? ` to #${owner}` : "")];
    return make("tr", {onmouseenter: () => { hovered = anchor; draw(); }}, ...cells.map(x => make("td", {}, String(x))));
  });
  const rest = rows.length > most ? [make("p", {class: "soft"}, `and ${rows.length - most} more`)] : [];
  return make("details", {open: views.length < 2}, make("summary", {}, "anchors"), make("table", {}, make("thead", {}, make("tr", {}, ...head.map(x => make("th", {}, x)))), make("tbody", {}, ...body)), ...rest);
}

// A rule's text: its name, then the arguments whose values are not the config's.
function ruleText(name, values) {
  const changed = DATA.rules[name].arguments.filter(x => String(values[x.key]) !== String(x.value));
  return [name, ...changed.map(x => `${x.key}=${Array.isArray(x.value) ? `(${values[x.key]},)` : values[x.key]}`)].join(" ");
}

function valuesOf(text) {
  const [name, ...words] = text.split(" "), values = Object.fromEntries((DATA.rules[name]?.arguments ?? []).map(x => [x.key, x.value]));
  for (const word of words) values[word.split("=")[0].toUpperCase()] = word.slice(word.indexOf("=") + 1).replace(/^\(|,?\)$/g, "");
  return [name, values];
}

function showControls() {
  get("rules").replaceChildren(...state.rules.map((text, i) => {
    const [name, values] = valuesOf(text || ""), set = value => { state.rules[i] = value; showControls(); update(); };
    const box = make("fieldset", {}, make("legend", {}, i ? "second rule" : "rule"));
    if (DATA.answers) {  // computed beforehand
      const texts = i ? ["", ...DATA.texts] : DATA.texts;
      const range = make("input", {type: "range", min: 0, max: texts.length - 1, "aria-label": "value", oninput: event => set(texts[event.target.value])});
      range.value = texts.indexOf(text);
      box.append(choice(texts, text, set, i ? "second rule" : "rule"), texts.length > 2 ? range : "");
      return box;
    }
    const names = Object.keys(DATA.rules).filter(x => DATA.weights.length || !DATA.rules[x].predictions);
    box.append(choice(i ? ["", ...names] : names, name, set, i ? "second rule" : "rule"));
    for (const argument of DATA.rules[name]?.arguments ?? []) box.append(control(argument, values[argument.key], value => {
      values[argument.key] = value;
      state.rules[i] = ruleText(name, values);
      update();
    }));
    return box;
  }));
}

function choice(texts, value, set, label) {
  const select = make("select", {"aria-label": label, onchange: event => set(event.target.value)}, ...texts.map(x => make("option", {value: x}, x || "no second rule")));
  select.value = value;
  return select;
}

// A control for an argument, by its type and range.
function control(argument, value, set) {
  const {key, kind, choices, low = 0, high = Infinity} = argument, label = key.toLowerCase().replaceAll("_", " ");
  if (choices || kind === "bool") {
    const select = choice(choices ?? ["True", "False"], kind === "bool" ? (String(value).toLowerCase() === "true" ? "True" : "False") : value, set, label);
    return make("label", {class: "argument"}, make("span", {}, label), select);
  }
  if (kind !== "int" && kind !== "float") {
    const input = make("input", {type: "text", "aria-label": label, onchange: event => set(event.target.value.replaceAll(" ", ""))});
    input.value = value;
    return make("label", {class: "argument"}, make("span", {}, label), input);
  }
  const most = Math.min(high, Math.max(Number(value), 4 * argument.value, kind === "int" ? 10 : 1)), step = kind === "int" ? 1 : most > 4 ? 0.1 : 0.01;
  const range = make("input", {type: "range", min: Math.ceil(low / step) * step, max: most, step, "aria-label": label, "data-key": key});
  const number = make("input", {type: "number", min: low, max: Number.isFinite(high) && high, step: kind === "int" ? 1 : "any", "aria-label": `${label}, exact`});
  range.value = number.value = value;
  range.oninput = () => { number.value = range.value; set(range.value); };
  number.onchange = () => { if (number.value !== "") { range.value = number.value; set(number.value); } };
  return make("div", {class: "argument"}, make("span", {}, label), range, number);
}

// ------------------------------------------------------------------------------------------------
// Links, mouse and keyboard
// ------------------------------------------------------------------------------------------------

function link() {
  const words = {image: state.image, a: state.rules[0], b: state.rules[1], object: state.object, weights: state.weights, sort: state.sort, class: state.class, size: state.size, detections: Number(state.detections)};
  const view = camera.zoom > 1 ? {view: [camera.x, camera.y].map(Math.round).join() + "," + camera.zoom.toFixed(2)} : {};
  history.replaceState(null, "", "#" + new URLSearchParams({...words, ...view}));
}

function followLink() {
  const words = new URLSearchParams(location.hash.slice(1)), number = (name, most) => {
    const value = Number(words.get(name) ?? NaN);
    return Number.isInteger(value) && value < most ? value : null;
  };
  state.image = Math.max(0, number("image", DATA.images.length) ?? state.image);
  if (words.get("a")) state.rules = [words.get("a"), words.get("b") ?? ""];
  state.object = number("object", Infinity) ?? state.object;
  state.weights = number("weights", DATA.weights.length) ?? state.weights;
  state.class = number("class", Infinity) ?? state.class;
  if (words.get("sort") in SORTS) state.sort = words.get("sort");
  if (words.get("size") in SIZES) state.size = words.get("size");
  state.detections = words.get("detections") === "1";
  showControls();
  showChoices();
  update().then(() => {
    const [x, y, zoom] = (words.get("view") ?? "").split(",").map(Number);
    if (zoom >= 1 && zoom <= 64) { camera = {x, y, zoom}; draw(); link(); }
  });
}

function showChoices() {
  get("sort").value = state.sort;
  get("size").value = state.size;
  get("image").value = DATA.images[state.image];
  get("detections").checked = state.detections;
  get("weights").value = state.weights;
  get("checkpoint").textContent = DATA.weights[state.weights] ?? "";
}

function choose(object) {
  state.object = object === state.object ? -1 : object;
  update();
}

function chooseImage(number) {
  state.image = Math.max(0, Math.min(DATA.images.length - 1, number));
  if (state.image !== shownImage) state.object = -1;
  showChoices();
  update();
}

function zoomBy(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const pane = panes.find(p => x >= p.x && x < p.x + p.w && y >= p.y && y < p.y + p.h) ?? panes[0];
  const [dx, dy] = [x - pane.x - pane.w / 2, y - pane.y - pane.h / 2], before = scaleOf(pane);
  camera.zoom = Math.max(1, Math.min(64, camera.zoom * factor));
  const after = scaleOf(pane);
  pan(dx / before - dx / after, dy / before - dy / after);
  if (camera.zoom === 1) fit();
}

function pan(dx, dy) {
  camera.x = Math.max(0, Math.min(scene.width, camera.x + dx));
  camera.y = Math.max(0, Math.min(scene.height, camera.y + dy));
  draw();
  clearTimeout(pan.timer);
  pan.timer = setTimeout(link, 200);
}

function fit() {
  camera = {x: scene.width / 2, y: scene.height / 2, zoom: 1};
  draw();
  link();
}

// Zoom so that the chosen object takes a quarter of the view.
function zoomToObject() {
  if (state.object < 0) return;
  const [x1, y1, x2, y2] = scene.boxes[state.object];
  const zoom = Math.min(scene.width / (x2 - x1), scene.height / (y2 - y1)) / 4;
  if (zoom < 1) { fit(); return; }
  camera = {x: (x1 + x2) / 2, y: (y1 + y2) / 2, zoom: Math.min(64, zoom)};
  draw();
  link();
}

function placeOf(event) {
  const {left, top} = canvas.getBoundingClientRect(), x = event.clientX - left, y = event.clientY - top;
  const i = panes.findIndex(p => x >= p.x && x < p.x + p.w && y >= p.y && y < p.y + p.h), pane = panes[Math.max(0, i)], scale = scaleOf(pane);
  return {i: Math.max(0, i), x: camera.x + (x - pane.x - pane.w / 2) / scale, y: camera.y + (y - pane.y - pane.h / 2) / scale, scale};
}

function hover(event) {
  if (!scene || !views.length) return;
  const {i, x, y, scale} = placeOf(event), view = views[i], detail = details[i];
  const near = [...(detail ? detail.anchors : []), ...view.anchors].map(anchorAt).filter(a => Math.hypot(a.x - x, a.y - y) * scale < 9);
  const best = near.sort((a, b) => Math.hypot(a.x - x, a.y - y) - Math.hypot(b.x - x, b.y - y))[0] ?? null;
  if (best?.number !== hovered?.number) { hovered = best; draw(); }
  const tip = get("tip");
  tip.hidden = !best;
  if (!best) return;
  const k = detail ? detail.anchors.indexOf(best.number) : -1, owner = view.owner.get(best.number);
  const values = k < 0 ? [] : ["similarity", "probability", "cost"].filter(n => n in detail).map(n => `${n === "similarity" ? "overlap" : n} ${detail[n][k]}`);
  tip.textContent = [`stride ${scene.strides[best.level]}`, owner === undefined ? "no object" : `positive of #${owner}`, ...values].join(", ");
  tip.style.left = `${Math.min(event.offsetX + 14, canvas.clientWidth - 190)}px`;
  tip.style.top = `${event.offsetY + 14}px`;
}

let dragged = null;
canvas.onpointerdown = event => { dragged = {x: event.clientX, y: event.clientY, far: false}; canvas.setPointerCapture(event.pointerId); };
canvas.onpointermove = event => {
  if (!dragged) { hover(event); return; }
  const dx = event.clientX - dragged.x, dy = event.clientY - dragged.y;
  if (!dragged.far && Math.hypot(dx, dy) < 4) return;
  dragged = {x: event.clientX, y: event.clientY, far: true};
  pan(-dx / scaleOf(panes[0]), -dy / scaleOf(panes[0]));
};
canvas.onpointerup = event => {
  const clicked = dragged && !dragged.far;
  dragged = null;
  if (!clicked || !scene) return;
  const {x, y} = placeOf(event), inside = scene.boxes.map((_, i) => i).filter(i => (([x1, y1, x2, y2]) => x >= x1 && x <= x2 && y >= y1 && y <= y2)(scene.boxes[i]));
  if (inside.length) choose(inside.sort((a, b) => area(a) - area(b))[0]);
  else if (state.object >= 0) choose(state.object);
};
canvas.onpointerleave = () => { hovered = null; get("tip").hidden = true; draw(); };
canvas.onwheel = event => { event.preventDefault(); if (scene) zoomBy(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY); };

const step = by => order.length && choose(order[Math.max(0, Math.min(order.length - 1, order.indexOf(state.object) + by))]);
const KEYS = {
  j: () => step(1), k: () => order.indexOf(state.object) > 0 && step(-1), "]": () => chooseImage(state.image + 1), "[": () => chooseImage(state.image - 1),
  "+": () => zoomBy(1.4), "=": () => zoomBy(1.4), "-": () => zoomBy(1 / 1.4), 0: fit, z: zoomToObject, Escape: () => state.object >= 0 && choose(state.object),
  ArrowLeft: () => pan(-40 / scaleOf(panes[0]), 0), ArrowRight: () => pan(40 / scaleOf(panes[0]), 0),
  ArrowUp: () => pan(0, -40 / scaleOf(panes[0])), ArrowDown: () => pan(0, 40 / scaleOf(panes[0])), "?": () => get("help").showModal(),
};
document.onkeydown = event => {
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey || !scene) return;
  if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
};
for (const name of ["sort", "size"]) get(name).onchange = event => { state[name] = event.target.value; showObjects(); link(); };
get("class").onchange = event => { state.class = Number(event.target.value); showObjects(); link(); };
get("axis").onchange = event => { state.axis = event.target.value; showDetails(); };
get("image").onchange = event => {
  const number = DATA.images.indexOf(event.target.value);
  if (number >= 0) chooseImage(number); else { show(`There is no image ${event.target.value}.`); }
};
get("image").onfocus = event => event.target.select();
get("previous").onclick = () => chooseImage(state.image - 1);
get("next").onclick = () => chooseImage(state.image + 1);
get("larger").onclick = () => zoomBy(1.4);
get("smaller").onclick = () => zoomBy(1 / 1.4);
get("fit").onclick = fit;
get("near").onclick = zoomToObject;
get("keys").onclick = () => get("help").showModal();
get("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (document.documentElement.style.colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.style.colorScheme = dark ? "light" : "dark";
  draw();
};
get("weights").max = Math.max(0, DATA.weights.length - 1);
get("weights").oninput = event => { state.weights = Number(event.target.value); showChoices(); update(); };
get("detections").onchange = event => { state.detections = event.target.checked; update(); };
get("least").oninput = event => { state.least = Number(event.target.value); draw(); };
get("images").append(...DATA.images.slice(0, 5000).map(x => make("option", {value: x})));
get("sort").append(...Object.entries(SORTS).map(([value, [text]]) => make("option", {value}, text)));
get("size").append(...Object.keys(SIZES).map(x => make("option", {value: x}, x === "all" ? "all sizes" : x)));
get("trained").hidden = !DATA.weights.length;
get("checkpoints").hidden = DATA.weights.length < 2;
new ResizeObserver(layOut).observe(canvas);
window.onhashchange = followLink;
followLink();
