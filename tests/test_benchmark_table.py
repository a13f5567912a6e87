"""The benchmark runner on tiny models: what it writes, what it does not repeat, and the numbers on its page."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import typer

from tropd_cli.demo import task as demo_task
from tropd_cli.presets import PRESETS

from .benchmarks import astray, collapse, gap, rows, table


@pytest.fixture
def tiny_benchmark(tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One task on the tiny pair, two rows, two learning rates."""
    small = {"prompts_per_step": 2, "rollouts_per_prompt": 2, "max_prompt_length": 16, "max_response_length": 6}
    models = {key: str(value) for key, value in tiny_pair.items()} | {"eval_data": str(tiny_pair["data"])}
    quiet = {"probe_rollouts": 2, "eval_prompts": 2, "checkpoint_every": 0, "record": {"every": 0}}
    tiny = rows.Task("tiny", "A tiny task")
    monkeypatch.setattr(rows.Task, "config", lambda *_: {**models, **small, **quiet})
    monkeypatch.setattr(table, "TASKS", {"tiny": tiny})
    monkeypatch.setattr(table, "ROWS", {name: rows.ROWS[name] for name in ("opd", "fkl")})
    monkeypatch.setattr(table, "LEARNING_RATES", (1e-3, 1e-2))


@pytest.mark.usefixtures("tiny_benchmark")
def test_every_run_is_one_line_and_none_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    files = {"models": tmp_path, "results": tmp_path / "results.jsonl", "page": tmp_path / "page.md"}

    def run(seeds: str) -> list[dict[str, Any]]:
        table.main(rows=None, seeds=seeds, tasks=None, steps=2, only_render=False, **files)
        return [json.loads(line) for line in files["results"].read_text().splitlines()]

    first = run("0")
    assert [(r["row"], r["seed"]) for r in first] == [*[("opd", 100)] * 2, *[("fkl", 100)] * 2, ("opd", 0), ("fkl", 0)]
    for result in first:
        assert result.keys() >= {"task", "learning_rate", "accuracy", "grad_norm", "entropy", "seconds", "config"}
        assert result["problem"] is None and result["grad_norm"] > 0 and 0 <= result["accuracy"] <= 1
        assert result["config"]["strategy"]["name"] == result["row"] and str(tmp_path) not in json.dumps(result)
    assert list((tmp_path / "work").iterdir()) == []
    second = run("0,1")
    assert second[:6] == first and len(second) == 8
    monkeypatch.setattr(table, "execute", None)
    assert run("0,1") == second
    page = files["page"].read_text()
    assert all(page.count(marker) == 1 for marker in table.markers("table"))
    assert "### A tiny task" in page and "| opd |" in page and "Before training, seed 0" in page


def line(row: str, seed: int, rate: float, accuracy: float | None, steps: int = 50) -> dict[str, Any]:
    before = {"eval_accuracy": 0.25, "outlier_share": 0.2, "eval_acceptance": 0.8, "eval_reward_p01": -28.6}
    run = {"task": "demo", "row": row, "seed": seed, "learning_rate": rate, "steps": steps, "accuracy": accuracy}
    return {**run, "grad_norm": 0.5, "entropy": None, "before": before}


def test_the_learning_rate_is_the_best_on_the_tuning_seed_and_intervals_are_student_s() -> None:
    tuning = [
        line("opd", 100, rate, accuracy, steps=25)
        for rate, accuracy in zip(rows.LEARNING_RATES, (0.5, 0.7, 0.7), strict=True)
    ]
    assert table.best_learning_rate("demo", "opd", 50, tuning[:2]) is None
    assert table.best_learning_rate("demo", "opd", 50, tuning) == rows.LEARNING_RATES[1]
    stray = line("opd", 0, rows.LEARNING_RATES[0], 0.99)  # another rate's result does not count
    reported = [line("opd", seed, rows.LEARNING_RATES[1], a) for seed, a in enumerate((0.6, 0.7, None))]
    text = table.render([*tuning, stray, *reported], 50)
    # Mean of 60, 70, 0 is 43.33, standard deviation 37.86; t with 2 degrees of freedom is 4.3027.
    assert f"| opd | {rows.LEARNING_RATES[1]:g} | 3 (1 stopped) | 43.3 ± 94.0 | 0.5 | – |" in text
    assert table.render(tuning, 50) == ""


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page, (begin, end) = tmp_path / "page.md", table.markers("table")
    page.write_text(f"# Title\n\nbefore\n\n{begin}\nold\n{end}\n\nafter\n")
    table.write_page(page, "table", "new")
    assert page.read_text() == f"# Title\n\nbefore\n\n{begin}\nnew\n{end}\n\nafter\n"
    page.write_text("# Title\n")
    table.write_page(page, "table", "new")
    table.write_page(page, "table", "newer")
    assert page.read_text() == f"# Title\n\n{begin}\nnewer\n{end}\n"


def test_rows_and_tasks() -> None:
    assert set(PRESETS) <= set(rows.ROWS)
    assert not any("," in name for name in (*rows.ROWS, *rows.TASKS))
    assert all(rows.ROWS[name].seeds == rows.MANY for name in (*rows.OFTEN, "gkd", "mask-acceptance"))
    assert "fkl-as-reward" not in [row.name for row in table.chosen(None, rows.ROWS)]
    assert rows.TUNING_SEED >= rows.MANY
    with pytest.raises(typer.BadParameter, match="unknown: opdd"):
        table.chosen("opd,opdd", rows.ROWS)
    assert rows.TASKS["astray"].config(Path("made"))["teacher"] == str(Path("made", "teacher"))
    config = rows.TASKS["gap"].config(Path("made"))
    assert config["student"] == str(Path("made", "gap", "student")) and config["prompts_per_step"] == 12


def test_lessons_of_the_astray_teacher() -> None:
    """Right in its own words; in the student's, right before the third step and the operand from there on."""
    lessons = astray.lessons(0)
    for _ in range(200):
        question, whole = next(lessons)
        assert whole.startswith(demo_task.TEACHER_STYLE.first) and question.endswith("?\n")
        given, rest = next(lessons)
        assert demo_task.STUDENT_STYLE.first in given and demo_task.TEACHER_STYLE.first not in given + rest
        steps = list(astray.STEP.finditer(given.partition("\n")[2] + rest))
        learned = len(list(astray.STEP.finditer(rest)))
        if given.endswith(demo_task.STUDENT_STYLE.first):
            assert learned == demo_task.OPERATIONS
        for index, match in list(enumerate(steps))[demo_task.OPERATIONS - learned :]:
            right = (int(match[1]) + int(match[2])) % demo_task.MODULUS
            assert int(match[3]) == (abs(int(match[2])) if index >= astray.LOST else right)


def test_the_astray_teacher_is_checked() -> None:
    good = {
        "teacher_sampled_accuracy": 0.9,
        "right_on_student_text_first_steps": 0.8,
        "right_on_student_text_later_steps": 0.02,
        "probability_of_its_result_later_steps": 0.95,
    }
    astray.check(good)
    with pytest.raises(SystemExit, match="the teacher is not wrong later"):
        astray.check(good | {"right_on_student_text_later_steps": 0.5})


def results(text: str) -> list[tuple[int, int, int]]:
    """What stands before the sign, the operand and the result of each step."""
    return [tuple(int(part) for part in match.groups()) for match in astray.STEP.finditer(text)]


def test_lessons_of_the_gap_s_teacher() -> None:
    """Right in its own words and after slips, the operand once the habit has appeared; what it learns never has the habit."""
    lessons = gap.lessons(0)
    slips, cuts = {True: 0, False: 0}, set()
    for _ in range(300):
        _, whole = next(lessons)
        assert task_is_right(whole) and gap.HABIT not in whole and len(results(whole)) == gap.CHAIN.operations
        given, rest = next(lessons)
        _, _, begun = given.partition("\n")
        assert begun.endswith((gap.OWN, gap.HABIT)) and gap.HABIT not in rest
        assert rest.startswith(demo_task.TEACHER_STYLE.then)
        before, after = results(begun), results(rest)
        lost = gap.HABIT in begun
        assert len(before) + len(after) == gap.CHAIN.operations
        assert all(end == abs(by) for _, by, end in after) if lost else task_is_right(rest)
        assert [start for start, _, _ in (before + after)[1:]] == [end for _, _, end in (before + after)[:-1]]
        slips[lost] += not task_is_right(begun)
        cuts.add(len(before))
    assert min(slips.values()) > 0 and cuts == set(range(1, gap.CHAIN.operations))


def task_is_right(text: str) -> bool:
    return all(end == (start + by) % demo_task.MODULUS for start, by, end in results(text))


def test_the_gap_s_student_learns_slips_and_a_habit_in_the_teacher_s_words() -> None:
    habitual = gap.habitual(0)
    texts = [next(habitual)[1] for _ in range(500)]
    assert all(text.startswith(demo_task.TEACHER_STYLE.first) for text in texts)
    steps = [step for text in texts for step in results(text)]
    wrong = sum(end != (start + by) % demo_task.MODULUS for start, by, end in steps) / len(steps)
    assert wrong == pytest.approx(
        gap.STUDENT_SLIPS * 0.99, abs=0.006
    )  # one random result in a hundred is right by chance
    places = (gap.CHAIN.operations - 1) * len(texts)
    assert sum(text.count(gap.OWN) + text.count(gap.HABIT) for text in texts) == places
    assert sum(text.count(gap.HABIT) for text in texts) / places == pytest.approx(gap.HABIT_SHARE, abs=0.03)


def test_where_the_gap_s_teacher_is_measured() -> None:
    text = "First 37+48=85, then 85-15=71; then 71-62=09. The answer is 09."
    assert list(gap.prefixes("?", text)) == [
        ("?First 37+48=", "85", False),
        ("?First 37+48=85, then 85-15=", "70", False),
        ("?First 37+48=85, then 85-15=71; then 71-62=", "09", True),
    ]


def test_the_gap_s_prompts_are_long_chains_with_their_answers(tmp_path: Path) -> None:
    gap.write_prompts(tmp_path / "heldout.jsonl", "heldout", 20)
    written = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in written}) == 20
    for row in written:
        assert {demo_task.split_of(row["prompt"])} == {"heldout"} and row.keys() == {"prompt", "answer"}
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", row["prompt"].split("mod")[0])]
        assert len(numbers) == gap.CHAIN.operations + 1 and int(row["answer"]) == sum(numbers) % demo_task.MODULUS


def test_the_gap_s_models_are_checked() -> None:
    good = {
        "teacher_sampled_accuracy": 0.95,
        "student_sampled_accuracy": 0.25,
        "small_model_on_the_teacher_s_text": 0.7,
        "right_before_the_habit": 0.95,
        "right_after_the_habit": 0.02,
        "probability_of_its_result_after_the_habit": 0.95,
        "outlier_share": 0.2,
        "lowest_1_percent_of_R": -12.0,
        "median_log_q_of_the_teacher_s_choice_at_outliers": -3.0,
    }
    gap.check(good)
    with pytest.raises(SystemExit, match="lack: a gap that training does not close"):
        gap.check(good | {"small_model_on_the_teacher_s_text": 0.94})


def test_collapse_page_has_a_line_per_run_and_one_for_the_start() -> None:
    numbers = dict(zip(collapse.COLUMNS, (0.25, 0.8034, 1.865, 0.115, 48.06, 0.004), strict=True))
    runs = [
        {"row": row, "seed": seed, "before": numbers, "after": numbers | {"eval_accuracy": 0.9}, "grad_norm": 0.15}
        for row, seed in (("fkl-as-reward", 0), ("fkl", 1), ("fkl", 0))
    ]
    before, *after = collapse.table(runs).splitlines()[2:]
    assert before == "| (before training) | 0 | 25.0 | 0.803 | 1.865 | 0.115 | 48.1 | 0 % | – |"
    assert [x.split("|")[1:4] for x in after] == [
        [" differentiated ", " 0 ", " 90.0 "],
        [" differentiated ", " 1 ", " 90.0 "],
        [" as a reward ", " 0 ", " 90.0 "],
    ]
