'use strict';

const LOADED = 4;  // cases whose volumes stay in memory
const overview = document.querySelector('#overview tbody');
const cases = document.getElementById('cases');
const rowOf = article => overview.querySelector(`[data-case="${article.id}"]`);
const articles = () => [...cases.children].filter(article => !article.hidden);

// what the browser keeps; where it keeps nothing, the page works all the same

const store = {
  read(key) {
    try { return JSON.parse(localStorage.getItem('nnunet_pdddpm:' + key)); } catch { return null; }
  },
  write(key, value) {
    try {
      if (value === null) localStorage.removeItem('nnunet_pdddpm:' + key);
      else localStorage.setItem('nnunet_pdddpm:' + key, JSON.stringify(value));
    } catch { trouble('This browser keeps no verdicts for this page: export them before it is closed.'); }
  },
};

function trouble(text) {
  const place = document.getElementById('trouble');
  place.textContent = text;
  place.hidden = false;
}

// volumes

async function unpacked(text, voxels) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  const buffer = await new Response(stream).arrayBuffer();
  return buffer.byteLength === voxels ? new Uint8Array(buffer) : new Uint16Array(buffer);
}

async function greyValues(data) {
  const picture = new Image();
  picture.src = data.image;
  await picture.decode();
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const [depth, rows, columns] = data.shape;
  const grey = new Uint8Array(depth * rows * columns);
  for (let z = 0; z < depth; z++) {
    const [x, y] = [z % data.columns * columns, Math.floor(z / data.columns) * rows];
    const tile = context.getImageData(x, y, columns, rows).data;
    for (let i = 0, at = z * rows * columns; i < rows * columns; i++) grey[at + i] = tile[4 * i];
  }
  return grey;
}

async function load(data) {
  const voxels = data.shape.reduce((a, b) => a * b);
  const [grey, uncertainty, consensus, stock, ...differences] = await Promise.all([
    greyValues(data), ...[data.uncertainty, data.consensus, data.stock, ...data.samples].map(t => unpacked(t, voxels))]);
  const samples = differences.map(sample => Uint16Array.from(sample, (value, i) => value ^ consensus[i]));
  return { grey, uncertainty, consensus: [consensus], stock: [stock], samples };
}

// a slice as it is shown: superior or anterior on top, the patient's right or anterior at the left
function section(volume, { shape, flipped }, axis, index) {
  const [down, right] = [0, 1, 2].filter(a => a !== axis);
  const step = [shape[1] * shape[2], shape[2], 1];
  const rows = shape[down], columns = shape[right];
  const values = new volume.constructor(rows * columns);
  for (let i = 0; i < rows; i++) {
    const start = index * step[axis] + (flipped && axis > 0 ? rows - 1 - i : i) * step[down];
    for (let j = 0; j < columns; j++) values[i * columns + j] = volume[start + j * step[right]];
  }
  return { values, rows, columns };
}

// the box around each value of a slice: first and last row, first and last column
function boxes({ values, rows, columns }) {
  const found = new Map();
  for (let i = 0, at = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++, at++) {
      if (!values[at]) continue;
      const box = found.get(values[at]);
      if (!box) found.set(values[at], [i, i, j, j]);
      else {
        box[1] = i;
        if (j < box[2]) box[2] = j;
        if (j > box[3]) box[3] = j;
      }
    }
  }
  return found;
}

// lines between midpoints of the sides of a square of four pixel centres, by which of them are inside (1 upper left,
// 2 upper right, 4 lower right, 8 lower left); the inside is on their right. A midpoint is [x, y] in half pixels
const T = [1, 0], R = [2, 1], B = [1, 2], L = [0, 1];
const LINES = [[], [T, L], [R, T], [R, L], [B, R], [T, L, B, R], [B, T], [B, L], [L, B], [T, B], [R, T, L, B], [R, B],
  [L, R], [T, R], [L, T], []];

// the boundary of a region of a slice as path data in half pixels: pixel (i, j) fills (2j, 2i) to (2j + 2, 2i + 2)
function outline({ values, columns }, around, region) {
  const parts = region.map(value => around.get(value)).filter(Boolean);
  if (!parts.length) return '';
  const [top, bottom, left, right] = [0, 1, 2, 3].map(k => Math[k % 2 ? 'max' : 'min'](...parts.map(box => box[k])));
  const wide = right - left + 3, inside = new Uint8Array(wide * (bottom - top + 3));
  for (let i = top; i <= bottom; i++) {
    for (let j = left; j <= right; j++) {
      if (region.includes(values[i * columns + j])) inside[(i - top + 1) * wide + j - left + 1] = 1;
    }
  }
  const next = new Map(), key = (x, y) => y * 2 * wide + x;
  for (let at = 0; at < inside.length - wide - 1; at++) {
    const x = 2 * (at % wide), y = 2 * Math.floor(at / wide);
    const lines = LINES[inside[at] | inside[at + 1] << 1 | inside[at + wide + 1] << 2 | inside[at + wide] << 3];
    for (let k = 0; k < lines.length; k += 2) {
      next.set(key(x + lines[k][0], y + lines[k][1]), [x + lines[k + 1][0], y + lines[k + 1][1]]);
    }
  }
  let path = '';
  for (const start of next.keys()) {  // those that a line has passed are gone
    const points = [];
    for (let at = start, point; (point = next.get(at)); at = key(...point)) {
      next.delete(at);
      const [[ax, ay], [bx, by]] = [points.at(-2) ?? point, points.at(-1) ?? point];
      if (points.length > 1 && (bx - ax) * (point[1] - by) === (by - ay) * (point[0] - bx)) points.pop();
      points.push(point);
    }
    path += 'M' + points.map(([x, y]) => `${x + 2 * left - 1} ${y + 2 * top - 1}`).join('L') + 'Z';
  }
  return path;
}

// cases

const loaded = new Map();  // article -> promise of its volumes, the last used last
const states = new Map();  // article -> what is shown

function stateOf(article) {
  if (!states.has(article)) {
    const data = JSON.parse(article.querySelector('script.volumes').textContent);
    states.set(article, { data, at: [...data.places[start ? start.value : 'uncertain']] });
    article.querySelectorAll('figure').forEach(figure => prepare(figure, data));
  }
  return states.get(article);
}

function volumesOf(article) {
  const promise = loaded.get(article) ?? load(stateOf(article).data);
  loaded.delete(article);
  loaded.set(article, promise);
  if (loaded.size > LOADED) loaded.delete(loaded.keys().next().value);
  return promise;
}

function add(parent, tag, attributes = {}) {
  const element = document.createElementNS(parent.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return parent.appendChild(element);
}

function prepare(figure, { shape, spacing }) {
  const axis = Number(figure.dataset.axis), [down, right] = [0, 1, 2].filter(a => a !== axis);
  for (const canvas of figure.querySelectorAll('canvas')) [canvas.width, canvas.height] = [shape[right], shape[down]];
  const svg = figure.querySelector('svg');
  const scaled = add(svg, 'g', { transform: `scale(${spacing[right] / 2} ${spacing[down] / 2})` });
  for (const kind of ['samples', 'stock', 'consensus']) {
    const group = add(scaled, 'g', { class: kind });
    NAMES.forEach((name, i) => {
      add(add(group, 'path', { class: `label-${i}` }), 'title').textContent = `${name}, ${kind}`;
    });
  }
  if (shape[0] > 1) add(svg, 'path', { class: 'cross' });
}

function paint(canvas, { values, rows, columns }, colour) {
  const pixels = new ImageData(columns, rows);
  values.forEach((value, i) => pixels.data.set(colour(value), 4 * i));
  canvas.getContext('2d').putImageData(pixels, 0, 0);
}

function draw(figure, { data, at }, volumes) {
  const axis = Number(figure.dataset.axis), index = at[axis];
  const [down, right] = [0, 1, 2].filter(a => a !== axis);
  const slice = volume => section(volume, data, axis, index);
  if (figure.drawn !== index) {
    paint(figure.querySelector('canvas.grey'), slice(volumes.grey), value => [value, value, value, 255]);
    paint(figure.querySelector('canvas.uncertainty'), slice(volumes.uncertainty),
      value => [...UNCERTAINTY, 255 * ALPHA * value / MOST]);
    for (const kind of ['samples', 'stock', 'consensus']) {
      const slices = volumes[kind].map(slice), around = slices.map(boxes);
      figure.querySelectorAll(`.${kind} path`).forEach((path, i) => {
        path.setAttribute('d', slices.map((shown, k) => outline(shown, around[k], REGIONS[i])).join(''));
      });
    }
    figure.drawn = index;
  }
  const cross = figure.querySelector('.cross');
  if (cross) {
    const size = [down, right].map(a => data.shape[a] * data.spacing[a]);
    const [y, x] = [down, right].map(a => (at[a] + 0.5) * data.spacing[a]);
    cross.setAttribute('d', `M0 ${data.flipped && axis > 0 ? size[0] - y : y}H${size[1]}M${x} 0V${size[0]}`);
  }
  const slider = figure.querySelector('input');
  if (slider) {
    const [step, last] = [data.step[axis], data.last[axis]];
    const number = Math[step < 0 ? 'max' : 'min'](data.first[axis] + step * index, last);
    slider.value = index;
    slider.setAttribute('aria-valuetext', `slice ${number}`);
    figure.querySelector('output').value = number;
  }
}

async function show(article) {
  try {
    const state = stateOf(article), volumes = await volumesOf(article);
    article.querySelectorAll('figure').forEach(figure => draw(figure, state, volumes));
    article.classList.add('drawn');
  } catch (error) {
    trouble(`${article.dataset.name} cannot be drawn, this browser may be too old for this page: ${error}`);
  }
}

function go(article, place) {
  const state = stateOf(article);
  state.at = [...(state.data.places[place] ?? state.data.places.uncertain)];
  return show(article);
}

// the place in the volume that a pointer is at
function pointed(figure, event, { data, at }) {
  const axis = Number(figure.dataset.axis), [down, right] = [0, 1, 2].filter(a => a !== axis);
  const frame = figure.querySelector('.view').getBoundingClientRect();
  const index = (share, a) => Math.min(Math.max(Math.floor(share * data.shape[a]), 0), data.shape[a] - 1);
  const place = [...at], row = index((event.clientY - frame.top) / frame.height, down);
  place[down] = data.flipped && axis > 0 ? data.shape[down] - 1 - row : row;
  place[right] = index((event.clientX - frame.left) / frame.width, right);
  return place;
}

for (const article of cases.children) {
  for (const figure of article.querySelectorAll('figure')) {
    const axis = Number(figure.dataset.axis), view = figure.querySelector('.view');
    const move = index => {
      const state = stateOf(article);
      state.at[axis] = Math.min(Math.max(index(state.at[axis]), 0), state.data.shape[axis] - 1);
      show(article);
    };
    figure.querySelector('input')?.addEventListener('input', event => move(() => Number(event.target.value)));
    const follow = event => {
      if (!event.buttons || event.button > 0) return;
      const state = stateOf(article);
      state.at = pointed(figure, event, state);
      show(article);
    };
    if (article.querySelector('figure + figure')) {
      view.addEventListener('pointerdown', follow);
      view.addEventListener('pointermove', follow);
    }
    view.addEventListener('wheel', event => {  // of a small one it scrolls the page
      if (!figure.classList.contains('large') || event.ctrlKey) return;
      event.preventDefault();
      move(index => index + Math.sign(event.deltaY));
    }, { passive: false });
    const enlarge = figure.querySelector('.enlarge');
    enlarge.addEventListener('click', () => enlarge.setAttribute('aria-pressed', figure.classList.toggle('large')));
  }
  for (const button of article.querySelectorAll('[data-place]')) {
    button.addEventListener('click', () => go(article, button.dataset.place));
  }
}

const near = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting && !entry.target.classList.contains('drawn')) show(entry.target);
}, { rootMargin: '600px' });

const start = document.getElementById('start');
if (start) {
  start.value = store.read('start') ?? start.value;
  if (!start.value) start.selectedIndex = 0;
  start.addEventListener('change', () => {
    store.write('start', start.value);
    for (const article of states.keys()) go(article, start.value);
  });
}
for (const article of cases.children) near.observe(article);

for (const box of document.querySelectorAll('#layers input')) {
  const apply = () => document.body.classList.toggle('without-' + box.value, !box.checked);
  box.addEventListener('change', apply);
  apply();  // a reloaded page keeps its boxes
}

// the overview's columns sort; the cases below follow

function sortBy(button) {
  const header = button.closest('th');
  const before = header.getAttribute('aria-sort');
  const order = before === 'none' ? button.dataset.first : before === 'ascending' ? 'descending' : 'ascending';
  for (const other of header.parentElement.children) other.setAttribute('aria-sort', 'none');
  header.setAttribute('aria-sort', order);
  const sign = order === 'ascending' ? 1 : -1;
  const isText = [0, header.parentElement.cells.length - 1].includes(header.cellIndex);
  // what has no number comes first in ascending order: nothing vouches for it
  const key = row => {
    const value = row.cells[header.cellIndex].dataset.value;
    return isText ? value : value === '' ? -Infinity : Number(value);
  };
  const compare = (a, b) => isText ? a.localeCompare(b, 'en', { numeric: true }) : a === b ? 0 : a < b ? -1 : 1;
  const rows = [...overview.rows].sort((a, b) => sign * compare(key(a), key(b)));
  overview.append(...rows);
  cases.append(...rows.map(row => document.getElementById(row.dataset.case)));
}

for (const button of document.querySelectorAll('#overview thead button')) {
  button.addEventListener('click', () => sortBy(button));
}

// review

const reviewOf = article => store.read(article.dataset.key) ?? article.review ?? { verdict: '', comment: '', time: '' };

function tell(article) {
  const { verdict, comment } = reviewOf(article);
  for (const button of article.querySelectorAll('[data-verdict]')) {
    button.setAttribute('aria-pressed', button.dataset.verdict === verdict);
  }
  const input = article.querySelector('.review input');
  if (input.value !== comment) input.value = comment;
  const cell = rowOf(article).querySelector('.verdict');
  cell.dataset.value = verdict;
  cell.textContent = verdict;
  if (comment) add(cell, 'small').textContent = comment;
}

function review(article, change) {
  const now = { ...reviewOf(article), ...change, time: new Date().toISOString() };
  article.review = now.verdict || now.comment ? now : { verdict: '', comment: '', time: '' };
  store.write(article.dataset.key, now.verdict || now.comment ? now : null);
  tell(article);
  filter();
}

const toggle = (article, verdict) => review(article, { verdict: reviewOf(article).verdict === verdict ? '' : verdict });

for (const article of cases.children) {
  for (const button of article.querySelectorAll('[data-verdict]')) {
    button.addEventListener('click', () => toggle(article, button.dataset.verdict));
  }
  article.querySelector('.review input').addEventListener('change', event => review(article, { comment: event.target.value }));
  tell(article);
}

document.getElementById('export').addEventListener('click', () => {
  const lines = [['dataset', 'case', 'verdict', 'comment', 'time', 'mask_crc32']];
  for (const row of overview.rows) {
    const article = document.getElementById(row.dataset.case), { verdict, comment, time } = reviewOf(article);
    lines.push([DATASET, article.dataset.name, verdict, comment, time, article.dataset.mask]);
  }
  const quoted = lines.map(line => line.map(cell => `"${cell.replaceAll('"', '""')}"`).join(',') + '\r\n');
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob(['\ufeff', ...quoted], { type: 'text/csv' }));  // with the mark Excel looks for
  link.download = `review_${DATASET}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

// which cases are shown, and from one to the next

const search = document.getElementById('search'), choice = document.getElementById('filter');

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, reviewed = 0;
  for (const article of cases.children) {
    const notes = [...article.querySelectorAll('.flags, .remark')].map(note => note.textContent).join(' ');
    const text = `${article.dataset.name} ${notes}`.toLowerCase();
    const { verdict } = reviewOf(article);
    const chosen = { '': true, open: !verdict, flagged: notes !== '' }[choice.value] ?? verdict === choice.value;
    article.hidden = rowOf(article).hidden = !(chosen && words.every(word => text.includes(word)));
    shown += !article.hidden;
    reviewed += verdict !== '';
  }
  document.getElementById('count').value = `${shown} of ${cases.children.length} shown, ${reviewed} reviewed`;
}

search.addEventListener('input', filter);
choice.addEventListener('change', filter);
document.getElementById('tools').addEventListener('submit', event => event.preventDefault());
filter();

let chosen = null;  // the case that keys are for: the one gone to, as long as it is in sight

function current() {
  const seen = article => article.getBoundingClientRect();
  if (chosen && !chosen.hidden && seen(chosen).bottom > 0 && seen(chosen).top < innerHeight) return chosen;
  return articles().findLast(article => seen(article).top < innerHeight / 2 && seen(article).bottom > 0) ?? null;
}

function goTo(article) {
  chosen = article;
  article.scrollIntoView({ behavior: 'instant' });
  article.focus({ preventScroll: true });
}

function step(by) {
  const all = articles(), now = all.indexOf(current());
  const index = now < 0 ? (by > 0 ? all.findIndex(a => a.getBoundingClientRect().top > 0) : -1) : now + by;
  if (all[index]) goTo(all[index]);
}

// at once: the browser scrolls later, and a key pressed before would be for the case that was in sight
document.getElementById('overview').addEventListener('click', event => {
  const link = event.target.closest('a[href^="#case"]');
  if (link) goTo(document.getElementById(link.hash.slice(1)));
});

document.getElementById('next').addEventListener('click', () => step(1));
document.getElementById('previous').addEventListener('click', () => step(-1));
cases.addEventListener('focusin', event => { chosen = event.target.closest('article'); });
cases.addEventListener('pointerdown', event => { chosen = event.target.closest('article'); });

const VERDICTS = { a: 'accept', l: 'look again', r: 'reject' };
const keys = document.getElementById('keys');
keys.checked = store.read('keys') ?? true;
keys.addEventListener('change', () => store.write('keys', keys.checked));

document.addEventListener('keydown', event => {
  const typing = event.target.matches('input:not([type=range], [type=checkbox]), select, textarea');
  if (typing || !keys.checked || event.ctrlKey || event.altKey || event.metaKey) return;
  const act = {
    n: () => step(1), p: () => step(-1), '/': () => search.focus(),
    c: () => current()?.querySelector('.review input').focus(),
  }[event.key] ?? (VERDICTS[event.key] && (() => current() && toggle(current(), VERDICTS[event.key])));
  if (!act) return;
  event.preventDefault();
  act();
});

document.getElementById('print').addEventListener('click', async () => {
  for (const article of articles()) if (!article.classList.contains('drawn')) await show(article);
  window.print();
});
