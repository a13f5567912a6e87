"""The built-in demo: a checkable task and the folders of two tiny models. Imports nothing heavy."""

from pathlib import Path

NAME = "demo"
FOLDER = Path(__file__).resolve().parent
TEACHER = FOLDER / "teacher"
STUDENT = FOLDER / "student"
