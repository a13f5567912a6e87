"""The demo is what it says: disjoint splits, a lossless tokenizer, an able teacher, a weak student."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tropd_cli import demo
from tropd_cli.demo import make, task


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.TEACHER)


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(demo.TEACHER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def student():
    return AutoModelForCausalLM.from_pretrained(demo.STUDENT, dtype=torch.float32).eval()


def test_splits_share_no_problem_whatever_the_seed():
    train = {row["prompt"] for seed in range(3) for row in task.problems("train", 2000, seed)}
    heldout = {row["prompt"] for seed in range(3) for row in task.problems("heldout", 2000, seed)}
    assert not train & heldout
    assert {task.split_of(prompt) for prompt in train} == {"train"}


def test_problems_are_different_and_the_same_for_the_same_seed():
    rows = task.problems("train", 500, seed=3)
    assert rows == task.problems("train", 500, seed=3)
    assert rows != task.problems("train", 500, seed=4)
    assert len({row["prompt"] for row in rows}) == 500


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test', allowed: train, heldout"):
        task.problems("test", 1, seed=0)


def test_answers_are_right():
    for row in task.problems("heldout", 200, seed=0):
        chain = row["prompt"].removeprefix("What is ").removesuffix(" mod 100?\n")
        assert int(row["answer"]) == eval(chain) % 100  # digits and signs only
        assert task.is_correct(row["response"], row["answer"])


def test_worked_solution_written_out():
    numbers = [37, 48, -15, -62, 29]
    assert task.question(numbers) == "What is 37+48-15-62+29 mod 100?\n"
    assert task.solution(numbers, task.TEACHER_STYLE) == (
        "First 37+48=85, then 85-15=70, then 70-62=08, then 08+29=37. The answer is 37."
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First 37+48=85. The answer is 85.", "85"),
        ("Take 37+48=85. So the result is 08.", "08"),
        ("The answer is 12. No: the answer is 13.", "13"),
        ("First 37+48=85, then 85", None),
        ("The answer is 137.", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert task.extract_answer(text) == answer
    assert not task.is_correct(text, "99")


def test_tokenizer_round_trip(tokenizer):
    rows = task.problems("heldout", 50, seed=0)
    texts = [row["prompt"] + row["response"] for row in rows]
    texts += ["  two  spaces, then a\ttab\n\nand Ünïcode: 東京 ≤ 🦆 ", "First,then ; 1234 don't", " ", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(chr(draw.randrange(32, 0x2FF)) for _ in range(20))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_the_one_the_task_builds(tokenizer):
    assert tokenizer.get_vocab() == task.build_tokenizer().get_vocab()
    assert len(tokenizer) >= 256
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = task.problems("train", 1, seed=0)[0]["response"]
    assert tokenizer.encode(text) == task.build_tokenizer().encode(text).ids
    assert 20 <= len(tokenizer.encode(text)) <= 80


def test_both_models_have_the_same_vocabulary(tokenizer, teacher, student):
    assert AutoTokenizer.from_pretrained(demo.STUDENT).get_vocab() == tokenizer.get_vocab()
    assert teacher.config.vocab_size == student.config.vocab_size == len(tokenizer)


def test_end_and_padding_ids_are_the_tokenizer_s(tokenizer, teacher, student):
    for model in (teacher, student):
        assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


def test_weights_are_small():
    sizes = [file.stat().st_size for folder in (demo.TEACHER, demo.STUDENT) for file in folder.iterdir()]
    assert sum(sizes) < 4e6


def test_teacher_is_able(teacher, tokenizer):
    assert make.accuracy(teacher, tokenizer, count=64, seed=None) >= 0.95
    assert make.accuracy(teacher, tokenizer, count=128, seed=0) >= 0.95


def test_student_is_weak_but_not_hopeless(student, tokenizer):
    assert 0.15 <= make.accuracy(student, tokenizer, count=256, seed=0) <= 0.40


def test_student_truly_disagrees_with_the_teacher(student, teacher, tokenizer):
    outlier_share, lowest_reward = make.disagreement(student, teacher, tokenizer, count=64, seed=0)
    assert outlier_share > 0.10
    assert lowest_reward < -6
