'use strict';

// the overview's columns sort; the cases below follow
const overview = document.querySelector('#overview tbody');
const cases = document.getElementById('cases');

function sortBy(button) {
  const header = button.closest('th');
  const before = header.getAttribute('aria-sort');
  const order = before === 'none' ? button.dataset.first : before === 'ascending' ? 'descending' : 'ascending';
  for (const other of header.parentElement.children) other.setAttribute('aria-sort', 'none');
  header.setAttribute('aria-sort', order);
  const sign = order === 'ascending' ? 1 : -1;
  const isText = header.cellIndex === 0;
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

for (const box of document.querySelectorAll('#layers input')) {
  const apply = () => document.body.classList.toggle('without-' + box.value, !box.checked);
  box.addEventListener('change', apply);
  apply();  // a reloaded page keeps its boxes
}

for (const button of document.querySelectorAll('button.enlarge')) {
  button.addEventListener('click', () => {
    const large = button.closest('figure').classList.toggle('large');
    button.setAttribute('aria-pressed', large);
  });
}

function showSlice(article, slices, index) {
  const slice = slices[index];
  const plane = article.querySelector('.planes svg');
  plane.querySelector('image.grey').setAttribute('href', slice.image);
  plane.querySelector('image.uncertainty').setAttribute('href', slice.uncertainty);
  for (const kind of ['consensus', 'stock']) {
    plane.querySelectorAll(`.${kind} path`).forEach((path, label) => path.setAttribute('d', slice[kind][label]));
  }
  for (const line of article.querySelectorAll('path.level')) {
    line.setAttribute('d', line.getAttribute('d').replace(/^M0 [^H]+/, `M0 ${slice.height.toFixed(3)}`));
  }
  article.querySelector('output').value = slice.number;
}

for (const article of cases.children) {
  const slider = article.querySelector('input[type=range]');
  if (!slider) continue;
  let slices;  // read when first needed: a page may hold many cases
  const show = () => {
    slices ??= JSON.parse(article.querySelector('script.slices').textContent);
    slider.setAttribute('aria-valuetext', `slice ${slices[slider.value].number}`);
    showSlice(article, slices, slider.value);
  };
  slider.addEventListener('input', show);
  article.querySelector('button.back').addEventListener('click', () => {
    slider.value = slider.dataset.mostUncertain;
    show();
  });
  slider.value = slider.dataset.mostUncertain;
}
