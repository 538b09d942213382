'use strict';
// Draws the charts, writes times as the reader's own, keeps the page up to date, switches between light and dark.
const REFRESH_MS = 4000, SLOWEST_MS = 60000;
const root = document.documentElement;

// ------------------------------------------------------------------------------------------- light and dark
// Before anything is painted. A file opened from a disk may have no store.
const stored = (value) => {
  try {
    if (value === undefined) return localStorage.getItem('theme');
    localStorage.setItem('theme', value);
  } catch { /* then the choice is forgotten */ }
  return null;
};
const system = matchMedia('(prefers-color-scheme: dark)');
const chosen = stored();
if (chosen === 'light' || chosen === 'dark') root.dataset.theme = chosen;
const isDark = () => root.dataset.theme ? root.dataset.theme === 'dark' : system.matches;

// --------------------------------------------------------------------------------------------------- charts
const painted = (value, key, colours) =>
  Array.isArray(value) ? value.map((one) => painted(one, key, colours))
  : value && typeof value === 'object'
    ? Object.fromEntries(Object.entries(value).map(([key, one]) => [key, painted(one, key, colours)]))
  : /color$/.test(key) && typeof value === 'string' && value.startsWith('--') ? colours.getPropertyValue(value) : value;

// plotly takes numbers on an axis of dates for UTC.
const here = (ms) => ms - 60000 * new Date(ms).getTimezoneOffset();
const localised = ({data, layout}) => layout.meta?.times ? {
  data: data.map((one) => ({...one, x: one.x.map(here)})),
  layout: {...layout, shapes: layout.shapes.map((one) =>
    one.xref === 'paper' ? one : {...one, x0: here(one.x0), x1: here(one.x1)})},
} : {data, layout};

const draw = (place) => {
  if (!window.Plotly || !place.clientWidth) return;
  const {data, layout} = painted(localised(JSON.parse(place.nextElementSibling.textContent)), '', getComputedStyle(root));
  const size = {width: place.clientWidth, height: place.clientHeight};
  Plotly.react(place, data, {...layout, ...size}, {displayModeBar: false});
};
const places = () => [...document.querySelectorAll('.plot')];
const sizes = new ResizeObserver((changed) => changed.forEach(({target}) => draw(target)));

// ---------------------------------------------------------------------------------------------------- times
const ago = new Intl.RelativeTimeFormat('en', {numeric: 'auto'});
const clock = new Intl.DateTimeFormat('en-GB', {hour: '2-digit', minute: '2-digit', second: '2-digit'});
const day = new Intl.DateTimeFormat('en-GB', {day: 'numeric', month: 'short', hour: '2-digit', minute: '2-digit'});
const written = (time) => {
  const then = new Date(time.dateTime), seconds = (Date.now() - then) / 1000;
  if (root.dataset.still !== undefined || seconds >= 86400) return day.format(then);
  if (seconds < 5) return 'just now';
  const [count, unit] = seconds < 60 ? [seconds, 'second'] : seconds < 3600 ? [seconds / 60, 'minute'] : [seconds / 3600, 'hour'];
  return ago.format(-Math.round(count), unit);
};
const writeTimes = (within) => within.querySelectorAll('time').forEach((time) => {
  const text = written(time), title = clock.format(new Date(time.dateTime));
  if (time.textContent !== text) time.textContent = text;
  if (time.title !== title) time.title = title;
});

// -------------------------------------------------------------------------------------------------- buttons
const ready = (within) => {
  for (const button of within.querySelectorAll('.copy')) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.onclick = async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = 'copied';
      setTimeout(() => { button.textContent = 'copy'; }, 1500);
    };
  }
  within.querySelectorAll('.plot').forEach((place) => sizes.observe(place));
  writeTimes(within);
};

// ------------------------------------------------------------------------------------------------ up to date
const sources = new Map();  // a section's id -> its HTML as it came
const held = (section) => section.contains(document.activeElement) ||
  (getSelection().type === 'Range' && section.contains(getSelection().anchorNode));

const replace = (old, fresh) => {
  const section = document.importNode(fresh, true);
  const drawn = new Map([...old.querySelectorAll('.plot')].map((place) => [place.getAttribute('aria-label').split(':')[0], place]));
  for (const place of section.querySelectorAll('.plot')) {
    const before = drawn.get(place.getAttribute('aria-label').split(':')[0]);
    if (before && before.className.split(' ')[1] === place.className.split(' ')[1]) {
      before.setAttribute('aria-label', place.getAttribute('aria-label'));
      place.replaceWith(before);
    }
  }
  const open = old.querySelector('details')?.open;
  old.replaceWith(section);
  if (open) section.querySelector('details').open = true;
  ready(section);
  section.querySelectorAll('.plot').forEach(draw);
};

const take = (text) => {
  const fresh = new DOMParser().parseFromString(text, 'text/html');
  const main = document.querySelector('main');
  let after = null;
  const wanted = [...fresh.querySelectorAll('main > section, body > footer')];
  for (const section of wanted) {
    const old = document.getElementById(section.id), source = section.outerHTML;
    if (!old) {
      const added = document.importNode(section, true);
      after ? after.after(added) : main.prepend(added);
      ready(added);
    } else if (sources.get(section.id) !== source && !held(old)) {
      replace(old, section);
    } else if (sources.get(section.id) !== source) {
      continue;  // its turn comes when nobody holds it any more
    }
    sources.set(section.id, source);
    after = section.parentElement.tagName === 'MAIN' ? document.getElementById(section.id) : after;
  }
  const ids = new Set(wanted.map((section) => section.id));
  document.querySelectorAll('main > section').forEach((section) => ids.has(section.id) || section.remove());
  fresh.querySelectorAll('script[src]').forEach(({src}) => {
    if (![...document.scripts].some((one) => one.src === src)) location.reload();  // the server is another version
  });
};

let wait = REFRESH_MS;
const refresh = async () => {
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href, {signal: AbortSignal.timeout(10000)});
      if (!answer.ok) throw new Error(answer.status);
      take(await answer.text());
      wait = REFRESH_MS;
      delete root.dataset.lost;
    } catch {
      wait = Math.min(2 * wait, SLOWEST_MS);
      root.dataset.lost = '';
    }
  }
  document.querySelector('.asof')?.classList.toggle('lost', 'lost' in root.dataset);
  setTimeout(refresh, wait);
};

addEventListener('DOMContentLoaded', () => {
  const theme = document.querySelector('.theme');
  const say = () => { theme.textContent = isDark() ? 'light' : 'dark'; theme.setAttribute('aria-label', `switch to ${theme.textContent}`); };
  theme.hidden = false;
  say();
  theme.onclick = () => {
    root.dataset.theme = isDark() ? 'light' : 'dark';
    stored(root.dataset.theme);
    say();
    places().forEach(draw);
  };
  system.addEventListener('change', () => { say(); places().forEach(draw); });
  matchMedia('print').addEventListener('change', () => places().forEach(draw));
  document.querySelectorAll('main > section, body > footer').forEach((one) => sources.set(one.id, one.outerHTML));
  ready(document);
  setInterval(() => writeTimes(document), 1000);
  if (root.dataset.still === undefined) setTimeout(refresh, wait);
});
