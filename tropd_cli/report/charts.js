// Two charts as inline SVG: R's histogram by region and the outlier share over the response.

const WIDTH = 400, HEIGHT = 250, LEFT = 46, BOTTOM = 36, TOP = 10, RIGHT = 12;
const LOWEST = -10, HIGHEST = 4, BINS = 56;

function draw(tag, attributes, text) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const label = (x, y, anchor, text) => draw('text', {x, y, 'text-anchor': anchor}, text);

const inside = {
  x: share => LEFT + share * (WIDTH - LEFT - RIGHT),
  y: share => HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP),
};

function canvas(label) {
  const svg = draw('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label});
  svg.append(draw('line', {class: 'axis', x1: LEFT, x2: WIDTH - RIGHT, y1: inside.y(0), y2: inside.y(0)}));
  return svg;
}

function bar(className, x, width, height, title) {
  const rect = draw('rect', {
    class: className, x: inside.x(x), width: (WIDTH - LEFT - RIGHT) * width,
    y: inside.y(height), height: inside.y(0) - inside.y(height),
  });
  rect.append(draw('title', {}, title));
  return rect;
}

/** Tokens per bin of R; [trust, outlier]. The first and last bin hold everything beyond the axis. */
function ratioBins(view, rule) {
  const bins = {t: Array(BINS).fill(0), o: Array(BINS).fill(0)};
  for (let i = 0; i < tokenCount; i++) {
    const region = regionOf(view, i, rule), ratio = logRatio(i);
    if (!bins[region] || ratio === null || !isStudent(i)) continue;
    const place = Math.floor((ratio - LOWEST) / (HIGHEST - LOWEST) * BINS);
    bins[region][Math.min(Math.max(place, 0), BINS - 1)]++;
  }
  return [bins.t, bins.o];
}

/** Both regions from the axis up, on a logarithmic scale: a stack would hide the tail. */
function drawHistogram(view, rule) {
  const [trust, outlier] = ratioBins(view, rule);
  const svg = canvas('Histogram of R, trusted tokens and outliers, logarithmic');
  const most = Math.max(1, ...trust, ...outlier);
  const decades = Math.max(1, Math.ceil(Math.log10(most)));
  const height = value => value ? (Math.log10(value) + 0.25) / (decades + 0.25) : 0;
  for (let power = 0; power <= decades; power++) {
    const y = inside.y(height(10 ** power));
    svg.append(draw('line', {class: 'axis', x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y}));
    svg.append(label(LEFT - 6, y + 4, 'end', whole(10 ** power)));
  }
  const place = ratio => (ratio - LOWEST) / (HIGHEST - LOWEST);
  for (let k = 0; k < BINS; k++) {
    const from = LOWEST + k * (HIGHEST - LOWEST) / BINS;
    const title = `R from ${nats(from, 2)}: ${whole(trust[k])} trusted, ${whole(outlier[k])} outliers`;
    if (trust[k]) svg.append(bar('trust', k / BINS, 0.92 / BINS, height(trust[k]), title));
    if (outlier[k]) svg.append(bar('outlier', (k + 0.22) / BINS, 0.5 / BINS, height(outlier[k]), title));
  }
  for (let ratio = LOWEST; ratio <= HIGHEST; ratio += 2) {
    const sign = ratio === LOWEST ? '≤ ' : ratio === HIGHEST ? '≥ ' : '';
    svg.append(label(inside.x(place(ratio)), HEIGHT - 19, 'middle', sign + nats(ratio, 0)));
  }
  if (rule.kind === 'threshold') {
    const x = inside.x(place(rule.threshold));
    svg.append(draw('line', {class: 'limit', x1: x, x2: x, y1: TOP, y2: inside.y(0)}));
  }
  svg.append(label(WIDTH - RIGHT, HEIGHT - 3, 'end', 'nats; tokens, logarithmic'));
  return svg;
}

/** Grouped bars, one per shown strategy, paler to the right. */
function drawPosition(panes) {
  const shares = panes.map(({view, rule}) => shareByTenth(view, rule));
  const highest = Math.max(0.05, ...shares.flat().map(share => share ?? 0));
  const top = Math.ceil(highest * 10) / 10;
  const svg = canvas('Outlier share of the student tokens in each tenth of the response');
  for (const share of [0, top / 2, top]) {
    const y = inside.y(share / top);
    svg.append(draw('line', {class: 'axis', x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y}));
    svg.append(label(LEFT - 6, y + 4, 'end', percent(share, 0)));
  }
  shares.forEach((tenths, pane) => tenths.forEach((share, tenth) => {
    if (share === null) return;
    const width = 0.8 / panes.length;
    const rect = bar(
      'outlier', (tenth + 0.1 + pane * width) / 10, width * 0.94 / 10, share / top,
      `${panes[pane].label}, tenth ${tenth + 1}: ${percent(share)}`,
    );
    rect.style.opacity = 1 - 0.7 * pane / panes.length;
    svg.append(rect);
  }));
  for (let tenth = 0; tenth < 10; tenth++) {
    svg.append(label(inside.x((tenth + 0.5) / 10), HEIGHT - 19, 'middle', tenth + 1));
  }
  svg.append(label(WIDTH - RIGHT, HEIGHT - 3, 'end', 'of the student\'s tokens, start to end'));
  return svg;
}
