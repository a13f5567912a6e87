// The page: panes of text per strategy, the controls above them, and what changes when one moves.

const state = {
  shown: views.map((_, index) => index), colour: 'region', kind: 'recorded', threshold: data.rule.threshold,
};
const RECORDED = {kind: 'recorded'};
let panes = [];      // {view, rule, label, tokens: [element per token]}
let current = null;  // {pane, i}: the token in the details

/** The first shown strategy is the one a what-if rule is tried on; the others stay as recorded beside it. */
function describePanes() {
  const rule = {kind: state.kind, threshold: state.threshold};
  const whatIf = {
    acceptance: 'what if: drawn by u', soft: 'what if: soft', threshold: `what if: R ≥ ${nats(state.threshold, 2)}`,
  }[state.kind];
  return state.shown.map((index, place) => {
    const view = views[index], name = view.name || 'as recorded';
    if (place || !whatIf) return {view, rule: RECORDED, label: name};
    return {view, rule, label: view.name ? `${view.name} → ${whatIf}` : whatIf};
  });
}

// ── what every change redraws ───────────────────────────────────────────────────────────────────────────────────────

/** Colours, marks and counts; elements are touched only where their class changes. */
function refresh() {
  panes.forEach((pane, place) => Object.assign(pane, describePanes()[place]));
  const references = panes.length > 1 ? panes : [...panes, {view: panes[0].view, rule: RECORDED}];
  let different = 0;
  for (let i = 0; i < tokenCount; i++) {
    const regions = references.map(({view, rule}) => regionOf(view, i, rule));
    const differs = regions.some(region => region !== regions[0]);
    if (differs) different++;
    panes.forEach((pane, place) => {
      const mark = regions[place] === 't' ? '' : ` ${regions[place]}`;
      const here = current && current.i === i ? ' here' : '';
      const name = `k${mark} ${shades[state.colour](pane, i, regions[place])}${differs ? ' differs' : ''}${here}`;
      if (pane.names[i] !== name) pane.tokens[i].className = pane.names[i] = name;
    });
  }
  showCounts();
  showDifferences(different);
  byId('histogram').replaceChildren(drawHistogram(panes[0].view, panes[0].rule));
  byId('position').replaceChildren(drawPosition(panes));
  showFrequent();
  for (const title of document.querySelectorAll('.pane h3')) {
    title.textContent = panes[title.parentElement.dataset.pane].label;
  }
  byId('threshold-value').textContent = `R ≥ ${nats(state.threshold, 2)}`;
  byId('legend').replaceChildren(
    ...legends[state.colour]().map(([className, text]) => make('span', {className: `k ${className}`, text})),
  );
  if (current) showDetails(current.i, panes);
}

function showCounts() {
  const head = make('tr', {}, [
    make('th', {text: panes.length > 1 || state.kind !== 'recorded' ? 'tokens by region' : ''}), make('th'),
    ...REGIONS.map(([, name]) => make('th', {className: 'number', text: name})),
    make('th', {className: 'number', text: 'outlier share', title: "mean of 1 − w over the student's tokens"}),
  ]);
  byId('counts').replaceChildren(head, ...panes.map(({view, rule, label}, place) => {
    const {tokens, outlierShare} = count(view, rule);
    const stack = make('div', {className: 'stack'}, REGIONS.map(([letter]) => {
      const part = make('span', {className: `fill-${letter}`});
      part.style.width = `${100 * tokens[letter] / Math.max(tokenCount, 1)}%`;
      return part;
    }));
    return make('tr', {'data-pane': place}, [
      make('td', {text: label}), make('td', {className: 'bar'}, [stack]),
      ...REGIONS.map(([letter, name]) => make('td', {
        className: 'number', 'data-region': name, 'data-count': tokens[letter],
        text: `${whole(tokens[letter])} · ${percent(tokens[letter] / Math.max(tokenCount, 1))}`,
      })),
      make('td', {className: 'number', 'data-region': 'share', 'data-count': outlierShare, text: percent(outlierShare)}),
    ]);
  }));
}

function showDifferences(different) {
  const many = panes.length > 1;
  byId('next-difference').disabled = !different;
  byId('differences').dataset.count = different;
  byId('differences').textContent = !many && state.kind === 'recorded' ? ''
    : `${many ? 'The strategies differ' : 'The rule differs from the recording'} on the region of `
      + `${whole(different)} of ${whole(tokenCount)} tokens, framed by dashes.`;
}

function showFrequent() {
  const quote = text => make('span', {className: 'mono', text: `“${texts[text]}”`});
  const found = frequentOutliers(panes[0].view, panes[0].rule);
  byId('frequent-box').hidden = !found.length;
  const head = ['token', 'outliers', 'of', 'mean R', 'the teacher wanted'];
  byId('frequent').replaceChildren(
    make('tr', {}, head.map((text, place) => make('th', {text, className: place > 0 && place < 4 ? 'number' : ''}))),
    ...found.map(({text, outliers, occurrences, ratio, wanted}) => make('tr', {}, [
      make('td', {}, [quote(text)]),
      ...[whole(outliers), whole(occurrences), nats(ratio, 2)].map(value => make('td', {className: 'number', text: value})),
      make('td', {}, wanted.slice(0, 2).flatMap(([wish, times], place) => [
        place ? ', ' : '', texts[wish] === texts[text] ? 'the same' : quote(wish), ` ${times}×`,
      ])),
    ])),
  );
}

// ── building ────────────────────────────────────────────────────────────────────────────────────────────────────────

/** All panes' tokens; long texts stay smooth because the browser skips what is off screen. */
function build() {
  panes = describePanes().map(pane => ({...pane, tokens: [], names: []}));
  byId('sequences').replaceChildren(...data.sequences.map(sequence => {
    const grid = make('div', {className: 'panes'}, panes.map((pane, place) => buildPane(sequence, pane, place)));
    grid.style.gridTemplateColumns = `repeat(${panes.length}, minmax(0, 1fr))`;
    const title = `Sequence ${sequence.index} · ${whole(sequence.length)} tokens`
      + (sequence.finish ? ` · ${FINISH[sequence.finish]}` : '');
    return make('section', {className: 'sequence'}, [
      make('h2', {text: title}),
      ...(sequence.prompt === null ? [] : [make('p', {className: 'prompt mono', text: withBreaks(sequence.prompt)})]),
      grid,
    ]);
  }));
  refresh();
}

const withBreaks = text => text.replaceAll('⏎', '⏎\n');

function buildPane(sequence, pane, place) {
  const text = make('div', {className: 'text mono'});
  for (let i = sequence.start; i < sequence.start + sequence.length; i++) {
    const shown = withBreaks(texts[columns.text[i]]);
    const token = make('span', {text: shown, 'data-i': i, tabindex: i === sequence.start ? 0 : -1});
    pane.tokens[i] = token;
    text.append(token);
  }
  const title = make('h3');
  title.hidden = panes.length === 1;
  return make('div', {className: 'pane', 'data-pane': place}, [title, text]);
}

function buildHead() {
  const fact = ([name, value]) => make('div', {}, [make('dt', {text: name}), make('dd', {text: value})]);
  byId('facts').append(...data.facts.map(fact));
  const summary = data.summaries[0];
  if (!summary) return;
  byId('advice').append(...summary.advice.map(text => make('p', {text})));
  const {eos, length, given} = summary.finish, ratio = summary.log_ratio, forward = summary.forward_kl;
  const ends = `${eos} ended, ${length} cut${given ? `, ${given} given` : ''}`;
  const cards = [
    ['acceptance', percent(summary.acceptance), 'mean min(p/q, 1)'],
    ['reverse KL', nats(summary.reverse_kl), 'nats, −mean R'],
    ['forward KL', forward === null ? '–' : `≥ ${nats(forward)}`, forward === null ? '' : 'nats, from the top k'],
    ['R, 5 % tail', nats(ratio.quantiles['0.05'], 2), `1 %: ${nats(ratio.quantiles['0.01'], 2)}, least ${nats(ratio.min, 2)}`],
    ['entropy', nats(summary.student_entropy), `student; teacher ${nats(summary.teacher_entropy)}`],
    ['outlier |credit|', percent(summary.outlier_credit_share), 'of all, as recorded'],
    ['within reach?', nats(summary.wanted_logprob, 2), 'nats, at the first outlier'],
    ['length', summary.response_length.mean?.toFixed(0) ?? '–', ends],
    ['repetition', percent(summary.repetition), '4-grams seen before'],
  ];
  byId('cards').append(...cards.map(([name, value, note]) => make('div', {}, [
    make('dt', {text: name}), make('dd', {text: value}), make('dd', {className: 'note', text: note}),
  ])));
  byId('notes').textContent = data.notes.join(' ');
}

function buildStrategies() {
  if (views.length < 2) return;
  byId('strategies').append(...views.map((view, index) => {
    const box = make('input', {type: 'checkbox', 'data-view': index});
    box.checked = true;
    box.addEventListener('change', () => {
      const chosen = [...byId('strategies').querySelectorAll('input')].filter(other => other.checked);
      if (!chosen.length) box.checked = true;
      state.shown = (chosen.length ? chosen : [box]).map(other => Number(other.dataset.view));
      build();
    });
    return make('label', {}, [box, make('span', {text: view.name})]);
  }));
}

// ── pointer and keyboard ────────────────────────────────────────────────────────────────────────────────────────────

function select(i, pane) {
  for (const {tokens, names} of panes) {
    if (current) tokens[current.i].className = names[current.i] = names[current.i].replace(' here', '');
    tokens[i].className = names[i] = `${names[i]} here`;
  }
  current = {i, pane: Math.min(pane, panes.length - 1)};
  showDetails(i, panes);
}

function selectElement({target}) {
  const token = target.closest?.('.text [data-i]');
  if (token) select(Number(token.dataset.i), Number(token.closest('.pane').dataset.pane));
}

function moveTo(i) {
  if (i < 0 || i >= tokenCount) return;
  panes[current?.pane ?? 0].tokens[i].focus();
}

/** The next token, wrapping around, for which `matches` holds. */
function jump(matches) {
  const from = current ? current.i + 1 : 0;
  for (let step = 0; step < tokenCount; step++) {
    const i = (from + step) % tokenCount;
    if (!matches(i)) continue;
    moveTo(i);
    panes[current?.pane ?? 0].tokens[i].scrollIntoView({block: 'center'});
    return;
  }
}

const nextOutlier = () => jump(i => panes.some(({view, rule}) => regionOf(view, i, rule) === 'o'));
const nextDifference = () => jump(i => panes[0].names[i].includes(' differs'));

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input, select')) return;
  const moves = {ArrowRight: () => moveTo(current.i + 1), ArrowLeft: () => moveTo(current.i - 1)};
  const action = {o: nextOutlier, d: nextDifference}[event.key] ?? (current && moves[event.key]);
  if (!action) return;
  event.preventDefault();
  action();
}

/** Slider events come faster than frames: the last one before a frame wins. */
let waiting = false;
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; refresh(); });
}

function listen() {
  byId('colour').addEventListener('change', ({target}) => { state.colour = target.value; refresh(); });
  byId('rule').addEventListener('change', ({target}) => { state.kind = target.value; refresh(); });
  byId('threshold').addEventListener('input', ({target}) => {
    state.threshold = Number(target.value);
    state.kind = byId('rule').value = 'threshold';
    soon();
  });
  byId('theme').addEventListener('change', ({target}) => { document.documentElement.dataset.theme = target.value; });
  byId('next-outlier').addEventListener('click', nextOutlier);
  byId('next-difference').addEventListener('click', nextDifference);
  byId('sequences').addEventListener('mouseover', selectElement);
  byId('sequences').addEventListener('focusin', selectElement);
  document.addEventListener('keydown', pressed);
}

// A browser may keep the controls of an earlier visit.
for (const [id, value] of [['colour', state.colour], ['rule', state.kind], ['theme', '']]) byId(id).value = value;
byId('threshold').value = state.threshold;
state.threshold = Number(byId('threshold').value);
byId('rule').querySelector('[value=acceptance]').disabled = !hasUniform;
byId('details').append(make('p', {
  className: 'quiet', text: 'Point at a token, or press Tab and the arrow keys. o: next outlier. d: next difference.',
}));
buildHead();
buildStrategies();
listen();
if (tokenCount) build();
