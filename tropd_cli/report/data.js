// The page's data, and which region every token falls in under a rule. Token i runs over all sequences; units: nats.

const data = JSON.parse(document.getElementById('data').textContent);
const {columns, views, units, texts, spelled} = data;
const tokenCount = columns.text.length;
const REGIONS = [['t', 'trust'], ['o', 'outlier'], ['g', 'guidance'], ['i', 'ignored']];
const REGION_NAME = Object.fromEntries(REGIONS);
const FINISH = {eos: 'ended by itself', length: 'cut at the cap', given: 'given text'};
const hasUniform = columns.uniform.some(value => value !== null);

{
  let start = 0;
  for (const sequence of data.sequences) {
    sequence.start = start;
    start += sequence.length;
  }
}

const scaled = (value, unit) => value === null ? null : value / unit;
const isStudent = i => columns.author[i] === 's';
const logRatio = i => columns.ratio[i] === units.never ? -Infinity : scaled(columns.ratio[i], units.ratio);

/** min(p/q, 1), or null where a log-probability is missing. */
function acceptance(i) {
  const ratio = logRatio(i);
  return ratio === null ? null : Math.exp(Math.min(ratio, 0));
}

/** How far p and q are apart: 0, 1 or 2. */
function strength(i) {
  const ratio = logRatio(i);
  return ratio === null ? 2 : data.stronger.filter(limit => Math.abs(ratio) >= limit).length;
}

/** The letter of token i's region. `rule` is {kind, threshold}; kind 'recorded' takes the view's own regions. */
function regionOf(view, i, rule) {
  const recorded = view.region[i];
  const accepted = acceptance(i);
  if (rule.kind === 'recorded' || recorded === 'g' || recorded === 'i' || accepted === null) return recorded;
  if (rule.kind === 'threshold') return logRatio(i) >= rule.threshold ? 't' : 'o';
  const uniform = columns.uniform[i] === null ? 0.5 : columns.uniform[i] / units.uniform;
  return uniform < accepted ? 't' : 'o';
}

/** 1 - w: the weight on the outlier estimator, 0 or 1 but for soft regions. */
function outlierWeight(view, i, rule) {
  const region = regionOf(view, i, rule);
  if (region === 'g' || region === 'i') return 0;
  if (rule.kind === 'soft') return 1 - (acceptance(i) ?? 1);
  if (rule.kind === 'recorded' && view.weight) return view.weight[i] / units.milli;
  return region === 'o' ? 1 : 0;
}

const isSoft = (view, rule) => rule.kind === 'soft' || (rule.kind === 'recorded' && view.weight !== null);

/** Tokens per region, the mean outlier weight of the student's tokens, and how many regions the rule changed. */
function count(view, rule) {
  const tokens = {t: 0, o: 0, g: 0, i: 0};
  let weight = 0, students = 0, changed = 0;
  for (let i = 0; i < tokenCount; i++) {
    const region = regionOf(view, i, rule);
    tokens[region]++;
    if (region !== view.region[i]) changed++;
    if (isStudent(i)) {
      students++;
      weight += outlierWeight(view, i, rule);
    }
  }
  return {tokens, changed, outlierShare: students ? weight / students : null};
}

/** Mean outlier weight of the student's tokens in each tenth of their response. */
function shareByTenth(view, rule) {
  const sums = Array(10).fill(0), counts = Array(10).fill(0);
  for (const {start, length} of data.sequences) {
    for (let place = 0; place < length; place++) {
      if (!isStudent(start + place)) continue;
      const tenth = Math.floor(place * 10 / length);
      sums[tenth] += outlierWeight(view, start + place, rule);
      counts[tenth]++;
    }
  }
  return sums.map((sum, tenth) => counts[tenth] ? sum / counts[tenth] : null);
}

/** The ten tokens that are outliers most often: {text, outliers, occurrences, ratio, wanted: [[text, count]]}. */
function frequentOutliers(view, rule) {
  const found = new Map();
  for (let i = 0; i < tokenCount; i++) {
    if (!isStudent(i)) continue;
    const text = columns.text[i];
    if (!found.has(text)) found.set(text, {text, outliers: 0, occurrences: 0, ratios: [], wanted: new Map()});
    const entry = found.get(text);
    entry.occurrences++;
    if (regionOf(view, i, rule) !== 'o') continue;
    entry.outliers++;
    if (Number.isFinite(logRatio(i))) entry.ratios.push(logRatio(i));
    if (columns.top[i].length) entry.wanted.set(columns.top[i][0], (entry.wanted.get(columns.top[i][0]) ?? 0) + 1);
  }
  return [...found.values()].filter(entry => entry.outliers)
    .sort((a, b) => b.outliers - a.outliers || (texts[a.text] < texts[b.text] ? -1 : 1)).slice(0, 10)
    .map(({ratios, wanted, ...entry}) => ({
      ...entry,
      ratio: ratios.length ? ratios.reduce((a, b) => a + b) / ratios.length : null,
      wanted: [...wanted].sort((a, b) => b[1] - a[1]).slice(0, 3),
    }));
}

// ── numbers and elements ────────────────────────────────────────────────────────────────────────────────────────────

const minus = text => text.replace('-', '−');
const rounded = (value, digits) => (Math.round(value * 10 ** digits) / 10 ** digits + 0).toFixed(digits); // no −0.0
const nats = (value, digits = 3) => value === null ? '–' : value === -Infinity ? '−∞' : minus(rounded(value, digits));
const percent = (share, digits = 1) => share === null ? '–' : `${(100 * share).toFixed(digits)} %`;
const whole = number => number.toLocaleString('en');

/** An element with text and attributes. Model text only ever arrives here, as text. */
function make(tag, {text, className, ...attributes} = {}, children = []) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const byId = id => document.getElementById(id);
