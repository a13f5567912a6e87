// How a token is shaded under each choice of colour, and the legend that says so. Classes are in page.css.

const RATIO_LIMITS = [0.1, 0.5, 1, 3, 6], ENTROPY_LIMITS = [0.05, 0.25, 0.75, 1.5, 2.5];
const SHARE_LIMITS = [0.05, 0.2, 0.4, 0.6, 0.8];

const level = (value, limits) => limits.filter(limit => value >= limit).length;
const shade = (hue, value, limits) => level(value, limits) ? hue + level(value, limits) : '';
const signed = value => value === null ? '' : shade(value > 0 ? 'blue' : 'orange', Math.abs(value), RATIO_LIMITS);
const entropyShade = value => shade('green', (value ?? 0) / units.milli, ENTROPY_LIMITS);

function regionShade(pane, i, region) {
  if (region === 'g') return 'purple2';
  if (region === 'i') return '';
  if (isSoft(pane.view, pane.rule)) return shade('orange', outlierWeight(pane.view, i, pane.rule), SHARE_LIMITS);
  return region === 'o' ? `orange${3 + strength(i)}` : strength(i) ? `blue${strength(i)}` : '';
}

/** Credit on the token itself by its sign; where there is none, the teacher's top k carry it. */
function creditShade({view}, i) {
  if (view.credit[i]) return signed(view.credit[i] / units.milli);
  return shade('green', Math.abs(view.mass[i] ?? 0) / units.milli, SHARE_LIMITS);
}

const shades = {
  region: regionShade,
  ratio: (_, i) => signed(logRatio(i)),
  acceptance: (_, i) => shade('orange', 1 - (acceptance(i) ?? 1), SHARE_LIMITS),
  credit: creditShade,
  student_entropy: (_, i) => entropyShade(columns.student_entropy[i]),
  teacher_entropy: (_, i) => entropyShade(columns.teacher_entropy[i]),
};

const scale = (hue, names) => names.map((name, index) => [`${hue}${index + 1}`, name]);
const signedLegend = what => [
  ...scale('orange', RATIO_LIMITS.map(limit => `≤ −${limit}`)).reverse(), ['', `${what} near 0`],
  ...scale('blue', RATIO_LIMITS.map(limit => `≥ ${limit}`)),
];
const TRUST_LEGEND = [['', 'trust'], ['blue1', 'trust, |R| ≥ 1'], ['blue2', 'trust, |R| ≥ 3']];
const OUTLIER_LEGEND = [['o orange3', 'outlier'], ['o orange4', 'outlier, |R| ≥ 1'], ['o orange5', 'outlier, |R| ≥ 3']];
const SOFT_LEGEND = [['o', 'drawn as outlier'], ...scale('orange', SHARE_LIMITS.map(limit => `1 − w ≥ ${limit}`))];
const OTHER_LEGEND = [['g purple2', 'teacher wrote it'], ['i', 'ignored']];

function regionLegend() {
  const soft = panes.filter(({view, rule}) => isSoft(view, rule)).length;
  const hard = soft < panes.length ? [...TRUST_LEGEND, ...OUTLIER_LEGEND] : [];
  return [...hard, ...(soft ? SOFT_LEGEND : []), ...OTHER_LEGEND];
}

const entropyLegend = () => [['', 'certain'], ...scale('green', ENTROPY_LIMITS.map(limit => `≥ ${limit} nats`))];
const legends = {
  region: regionLegend,
  ratio: () => signedLegend('R'),
  acceptance: () => [['', 'accepted'], ...scale('orange', SHARE_LIMITS.map(limit => `P ≤ ${(1 - limit).toFixed(2)}`))],
  credit: () => [...signedLegend('credit'), ...scale('green', SHARE_LIMITS.map(limit => `top k ≥ ${limit}`))],
  student_entropy: entropyLegend,
  teacher_entropy: entropyLegend,
};
