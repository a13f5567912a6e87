// Everything known about one token, in the panel beside the text.

const probability = logprob => logprob === null ? '' : ` (${chance(Math.exp(Math.min(logprob, 0)))})`;
const chance = share => share > 0 && share < 0.0001 ? '< 0.01 %' : percent(share, 2);

function showDetails(i, panes) {
  const panel = byId('details');
  panel.replaceChildren();
  const sequence = data.sequences.findLast(({start}) => start <= i);
  const text = columns.text[i];
  panel.append(make('p', {className: 'token'}, [make('span', {className: 'mono', text: texts[text]})]));
  if (spelled[text] !== undefined) panel.append(make('p', {className: 'mono quiet', text: spelled[text]}));
  const student = scaled(columns.student[i], units.milli), teacher = scaled(columns.teacher[i], units.milli);
  const facts = [
    ['written by', isStudent(i) ? 'student' : 'teacher'],
    ['position', `${i - sequence.start} of ${sequence.length}`],
    ['sequence', sequence.index],
    ['token id', columns.id[i] ?? '–'],
    ['student log q', nats(student) + probability(student)],
    ['teacher log p', nats(teacher) + probability(teacher)],
    ['R = log p − log q', nats(logRatio(i))],
    ['acceptance min(p/q, 1)', acceptance(i) === null ? '–' : acceptance(i).toFixed(4)],
    ['drawn with u', columns.uniform[i] === null ? '–' : (columns.uniform[i] / units.uniform).toFixed(4)],
    ['student\'s entropy', nats(scaled(columns.student_entropy[i], units.milli))],
    ['teacher\'s entropy', nats(scaled(columns.teacher_entropy[i], units.milli))],
    ['teacher\'s rank', columns.rank[i] === 0 ? '0, its first choice' : columns.rank[i] ?? '–'],
  ];
  panel.append(list(facts));
  for (const {view, rule, label} of panes) {
    panel.append(make('h3', {text: label || 'region and credit'}));
    panel.append(list([
      ['region', REGION_NAME[regionOf(view, i, rule)]],
      ...(isSoft(view, rule) ? [['weight of the estimator', outlierWeight(view, i, rule).toFixed(3)]] : []),
      [`credit ${rule.kind === 'recorded' ? 'on the token' : 'as recorded'}`, nats(scaled(view.credit[i], units.milli))],
      ['credit on the top k', nats(scaled(view.mass[i], units.milli))],
    ]));
  }
  panel.append(...choices(columns.top[i]));
}

function list(entries) {
  return make('dl', {}, entries.flatMap(([name, value]) => [make('dt', {text: name}), make('dd', {text: value})]));
}

/** The teacher's most likely tokens, with both models' probabilities as bars. */
function choices(top) {
  if (!top.length) return [];
  const parts = [make('h3', {text: `the teacher's ${top.length / 3} most likely tokens`})];
  for (let place = 0; place < top.length; place += 3) {
    parts.push(make('div', {className: 'choice'}, [
      make('span', {className: 'mono', text: texts[top[place]]}),
      probabilityBar('teacher', top[place + 1] / units.probability),
      probabilityBar('student', top[place + 2] / units.probability),
    ]));
  }
  return parts;
}

function probabilityBar(who, share) {
  const fill = make('span', {className: `by-${who}`});
  fill.style.width = `${100 * share}%`;
  return make('div', {}, [
    make('span', {className: 'who', text: who}),
    make('span', {className: 'track'}, [fill]),
    make('span', {className: 'value', text: chance(share)}),
  ]);
}
