"""Seeded token rows that look like a recorded run: a student writing arithmetic chains, a teacher who differs in style
and in the digits. And the hostile text every report has to survive."""

from __future__ import annotations

import math
import random

from tropd_cli.report.rows import Choice, TokenRow

STUDENT_STYLE = ("Take ", "next ", "; ", ". So the result is ")
TEACHER_STYLE = ("First ", "then ", ", ", ". The answer is ")
WORDS = {
    "Take ": "First ", "next ": "then ", "; ": ", ", "So ": "The ", "the ": "answer ", "result ": "answer "
}  # fmt: skip
TOP_K = 5

#: Every text here must come out as text: in HTML, on a terminal, as a JSON line, as a CSV cell.
HOSTILE = (
    "<script>window.hacked = 1</script>", "</script>", "</style>", "<!--", "-->", "]]>", "<img src=x onerror=hacked()>",
    "{{SCRIPT}}", "{{DATA}}", "&lt;", "&", '"', "'", "\\", "`${hacked}`", "__proto__", "constructor",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\r", "\b\b", "\x00", "\x7f", "\u2028", "\u2029",
    "\u202eabc", "\u200f", "\u200b", "\ufeff", "\u2066x", "שלום", "مرحبا", "e" + "\u0301" * 40, "\u0301", "\ud83d",
    " \U0001f600", " <0xF0><0x9F>", "<0x98>", "<0x80>!", "<0xFF>", "=1+1", "@SUM(1)", "-2", "+3", " ", "  ", "\t", "\n",
    "\n\n", "", "[bold red]markup[/]", ":smile:", "a,b;c", "\ue000", "\U000e0041", "�",
)  # fmt: skip


def chain_tokens(draw: random.Random, style: tuple[str, str, str, str], steps: int) -> list[str]:
    """The tokens of one worked chain: words with their space, single digits and signs."""
    first, then, between, end = style
    total = draw.randrange(10, 100)
    tokens = [first]
    for step in range(steps):
        number, sign = draw.randrange(10, 100), draw.choice("+-")
        result = (total + number if sign == "+" else total - number) % 100
        tokens += [*([between, then] if step else []), *f"{total:02d}{sign}{number}={result:02d}"]
        total = result
    return [*tokens, *(word + " " for word in end.split()), *f"{total:02d}", ".", "<eos>"]


def _candidates(draw: random.Random, token: str, after_equals: bool) -> list[str]:
    if token.isdigit() and after_equals:
        return [token, *draw.sample([d for d in "0123456789" if d != token], TOP_K)]
    others = draw.sample(["First ", "then ", ", ", "The ", "answer ", "is ", "1", "7", "+", "-", "so "], TOP_K + 1)
    return [token, *([WORDS[token]] if token in WORDS else []), *(o for o in others if o != token)][: TOP_K + 1]


def _distribution(draw: random.Random, count: int, peak: int, sharpness: float) -> list[float]:
    weights = [math.exp(draw.gauss(0.0, 1.0) + (sharpness if place == peak else 0.0)) for place in range(count)]
    rest = 0.002 * sum(weights)
    return [weight / (sum(weights) + rest) for weight in weights]


def token_row(
    draw: random.Random, sequence: int, position: int, token: str, *, after_equals: bool, author: str
) -> TokenRow:
    """One row whose distributions live on six tokens and 0.2 % elsewhere."""
    names = _candidates(draw, token, after_equals)
    style = token in WORDS
    unsure = after_equals and draw.random() < 0.35
    student = _distribution(draw, len(names), 0, 1.5 if unsure else 5.0)
    teacher = _distribution(draw, len(names), 1 if style or unsure else 0, 4.0 if style else 5.0)
    order = sorted(range(len(names)), key=lambda place: -teacher[place])
    p, q = teacher[0], student[0]
    uniform = draw.random()
    ratio = math.log(p / q)
    region = "guidance" if author == "teacher" else "trust" if uniform < min(p / q, 1.0) else "outlier"
    listed = [Choice(names[place], math.log(teacher[place]), math.log(student[place])) for place in order[:TOP_K]]
    mass = sum(math.exp(choice.teacher_logprob or 0.0) for choice in listed)
    return TokenRow(
        sequence=sequence,
        position=position,
        token_id=sum(map(ord, token)) % 600,
        token=token,
        written_by=author,
        student_logprob=math.log(q),
        teacher_logprob=math.log(p),
        region=region,
        credit={"trust": ratio, "outlier": 0.0, "guidance": 0.001}[region],
        credit_top_k_mass=mass if region == "outlier" else 0.0,
        student_entropy=-sum(w * math.log(w) for w in student),
        teacher_entropy=-sum(w * math.log(w) for w in teacher),
        teacher_rank=order.index(0),
        teacher_top_k=listed,
        uniform=uniform,
    )


def chain_rows(sequences: int = 4, *, steps: int = 4, seed: int = 0, prefix: int = 7) -> list[TokenRow]:
    """Rows of a trust-region recording. Every third sequence starts with `prefix` teacher-written tokens; every fourth
    is cut before its end."""
    draw = random.Random(seed)
    rows = []
    for sequence in range(sequences):
        guided = prefix if sequence % 3 == 1 else 0
        teacher_part = chain_tokens(draw, TEACHER_STYLE, steps)
        tokens = teacher_part[:guided] + chain_tokens(draw, STUDENT_STYLE, steps)[guided:]
        finish = "eos"
        if sequence % 4 == 3:
            tokens, finish = tokens[:-6], "length"
        made = [
            token_row(
                draw,
                sequence,
                position,
                token,
                after_equals=position > 0 and "=" in tokens[max(0, position - 2) : position],
                author="teacher" if position < guided else "student",
            )
            for position, token in enumerate(tokens)
        ]
        made[0].prompt = f"What is {draw.randrange(10, 100)}+{draw.randrange(10, 100)} mod 100?\n"
        made[0].group, made[0].sample = sequence // 2, sequence % 2
        made[-1].finish = finish
        rows += made
    return rows


def with_strategy(rows: list[TokenRow], name: str, *, floor: float | None = None) -> list[TokenRow]:
    """The same tokens under another strategy: everything trusted, or outliers below a floor under R."""
    import dataclasses

    def region(row: TokenRow) -> str:
        if row.written_by == "teacher" or (floor is not None and row.log_ratio < floor):
            return "guidance" if row.written_by == "teacher" else "outlier"
        return "trust"

    return [
        dataclasses.replace(row, strategy=name, region=region(row), credit=row.log_ratio, credit_top_k_mass=0.0)
        for row in rows
    ]


def hostile_rows(sequence: int = 0) -> list[TokenRow]:
    """One row per hostile text, in prompt and top-k too."""
    draw = random.Random(1)
    rows = [
        token_row(draw, sequence, position, "7", after_equals=True, author="student")
        for position in range(len(HOSTILE))
    ]
    for place, (row, text) in enumerate(zip(rows, HOSTILE, strict=True)):
        row.token, row.token_id = text, place
        row.teacher_top_k[0].token = text
    rows[0].prompt = "".join(HOSTILE)
    rows[-1].finish = "length"
    return rows
