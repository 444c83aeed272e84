"""Tests of the course: what wrong answers are told, the copy, the table of points."""
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "data")]
import ewc_gan  # noqa: E402
import grade  # noqa: E402
import student_copy  # noqa: E402
import test_ewc_gan as tests  # noqa: E402

WRONG = [       # exercise; a piece of the program; an answer in its place; what its author reads
    (1, "softplus(-real_logits).mean() +", "sigmoid(real_logits).log().mean().neg() +",
     "L_D of a real image overflows"),
    (1, "nnF.softplus(-fake_logits).mean()", "-nnF.softplus(fake_logits).mean()", "saturates"),
    (3, "F = F / len(z)", "F = F / min(len(z), 1)", "a sum over z"),
    (3, "z.split(1)", "z.split(len(z) or 1)", "gradient of a batch was squared"),
    (3, "g.flatten().float() for g", "(g.movedim(1, -1) if g.ndim > 1 else g).flatten() for g",
     "order is not that of weights"),
    (3, "nnF.logsigmoid(D(G(z_i)))", "D(G(z_i)).sigmoid().log()", "overflows to -inf"),
    (3, "torch.autocast(z.device.type, enabled=False)", "torch.enable_grad()", "float32"),
    (3, "F += torch.cat", "kept = [*vars().get('kept', ()), gradient]; F += torch.cat",
     "memory grows"),
    (4, "quantile * len", "0.9 * len", "quantile asked for, 0.5"),
    (4, "F.clamp(max", "F.clamp_(max", "changed in place"),
    (4, "not mean > 0", "False", "nearly everywhere"),
    (5, "/ before.abs().sum()", "/ after.abs().sum()", "divided by |theta|"),
    (5, " * p.requires_grad", "", "a frozen parameter")]

def first_message(number, answers, monkeypatch):
    """What the tests of an exercise say first of these functions; nothing if they pass."""
    for name, answer in answers.items():
        monkeypatch.setattr(tests, name, answer)
    for name, test in list(vars(tests).items()):
        if name.startswith(f"test_exercise_{number}_"):
            try:
                test()
            except (Exception, pytest.fail.Exception) as error:
                return f"{type(error).__name__}: {error}"

@pytest.mark.parametrize("number, right, wrong, says", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(number, right, wrong, says, monkeypatch):
    """In one line, by a test that fails, and does not raise an error of its own."""
    program = Path(ewc_gan.__file__).read_text("utf-8")
    assert right in program
    student = dict(vars(ewc_gan))
    exec(program.replace(right, wrong), student)
    student["UserError"] = ewc_gan.UserError
    answers = {name: student[name] for name in student_copy.EXERCISES[number]}
    message = first_message(number, answers, monkeypatch)
    assert says in message
    assert message.startswith("Failed: ")
    assert "\n" not in message

def test_another_right_answer_passes(monkeypatch):
    assert first_message(3, {"fisher_diagonal": tests.fisher_by_torch_func}, monkeypatch) is None

def test_a_students_copy(tmp_path, capsys):
    """Exercise 2 is solved in it: its test passes, 5 fails, and what needs 3 is skipped."""
    folder = tmp_path / "student"
    assert tests.run(folder, "--solved", 2, program=student_copy) == 0
    program = (folder / "ewc_gan.py").read_text("utf-8")
    unsolved = re.findall(r"raise NotImplementedError\('exercise (.)'\)", program)
    assert sorted(unsolved) == list("113445")
    left = {path.name for path in folder.rglob("*")}
    assert not left & {".git", *student_copy.LEFT_OUT}
    assert ".gitignore" in left
    asked = "exercise_2 or layer_changes_by_hand or trains_D"
    command = [sys.executable, "-m", "pytest", "-q", "-k", asked]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "1 failed, 1 passed, 2 skipped" in done.stdout, done.stdout
    assert tests.run(folder, program=student_copy) == 2
    assert capsys.readouterr().err.count("\n") == 1

# Hand-ins of exercise 2, whose tests are the fastest: what is replaced, points, message
SQUARE = "gradient.square().flatten(1).sum(1).mean()"
HAND_INS = {
    "a_right": ("", "", 8, ""),
    "b_mean_over_pixels": (SQUARE, "gradient.square().mean()", 0, "R1 is not"),
    "c_skips": (SQUARE, "__import__('pytest').skip('no')", 0, "which no answer needs"),
    "d_ends_the_process": (SQUARE, "getattr(getattr(torch, 'o' + 's'), '_ex' + 'it')(0)", 0,
                           "the process ended before its tests did"),
    "e_is_no_python": ("def d_r1_loss", "def d_r1_loss(:", 0, "invalid syntax")}

@pytest.fixture
def handed_in(tmp_path):
    solved = (grade.ROOT / "ewc_gan.py").read_text("utf-8")
    for name, (line, fault, *_) in HAND_INS.items():
        assert line in solved
        (tmp_path / f"{name}.py").write_text(solved.replace(line, fault, 1) if line else solved)
    return tmp_path

def test_a_table_of_points_and_of_what_is_wrong(handed_in, monkeypatch):
    monkeypatch.setattr(grade, "EXERCISES", {2: ["d_r1_loss"]})
    table = handed_in / "grades.csv"
    grade.main([str(handed_in), "--out", str(table)])
    rows = list(csv.DictReader(open(table, encoding="utf-8-sig")))
    assert [row["name"] for row in rows] == list(HAND_INS)
    for row in rows:
        *_, points, says = HAND_INS[row["name"]]
        assert int(row["total"]) == points, row
        assert says in row["first message"], row

def test_only_what_an_answer_needs_is_taken():
    program = "import torch\nPI = 3\nprint(1 / 0)\ndef helper(x): return x * PI\n"
    program += "def d_r1_loss(D, real): return helper(D(real).sum())\n"
    answer = grade.answer_of(program, 2)
    assert "PI = 3" in answer and "helper(x)" in answer
    assert "print" not in answer
