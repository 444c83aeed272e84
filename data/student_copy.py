"""Write the student's copy of this repository: the exercises of ASSIGNMENTS.md, unsolved.

    python data/student_copy.py DIR
    python data/student_copy.py DIR --solved 1 2 3      # for those who are stuck

The bodies of the exercises' functions raise NotImplementedError.  The teacher's sheet, results
and grader, and tests that contain a solution, are left out; there is no .git.
"""
import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = {
    1: ["d_logistic_loss", "g_nonsaturating_loss"],
    2: ["d_r1_loss"],
    3: ["fisher_diagonal"],
    4: ["ewc_penalty", "scaled_fisher"],
    5: ["layer_changes"]}
FILES = ["ewc_gan.py", "pretrain_source.py", "test_ewc_gan.py", "README.md",
         "requirements.txt", "LICENSE", ".gitignore"]
LEFT_OUT = ["ASSIGNMENTS.md", "RESULTS.md", "student_copy.py", "grade.py", "test_grade.py"]
END_OF_TESTS = "\n# ---------- Left out of a student's copy"        # in test_ewc_gan.py
CONFTEST = '''\
"""Tests that need an unsolved exercise are skipped, unless they grade it."""
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except NotImplementedError as error:
        exercise = str(error)
    if item.name.startswith("test_exercise"):
        pytest.fail(f"{exercise} is not solved yet", pytrace=False)
    pytest.skip(f"needs {exercise}")
pytest_runtest_setup = pytest_runtest_call
'''

def without_solutions(program, solved):
    """ewc_gan.py with the bodies of the functions of unsolved exercises replaced."""
    lines = program.splitlines()
    for node in reversed(ast.parse(program).body):      # from the end: lines keep their place
        for number, names in EXERCISES.items():
            if getattr(node, "name", None) in names and number not in solved:
                first, *_, last = [*node.body[1:], node.body[-1]]       # after the docstring
                gap = f"    raise NotImplementedError('exercise {number}')"
                lines[first.lineno - 1:last.end_lineno] = [gap]
    return "\n".join(lines) + "\n"

def without_links(text):
    """A document without links to what is left out, and to lines, which are others there."""
    left_out = "|".join(map(re.escape, LEFT_OUT))
    text = re.sub(rf"\[([^]]*)\]\([^)]*(?:{left_out})[^)]*\)", r"\1", text)
    return re.sub(r"#L\d+", "", text)

def write_copy(folder, solved):
    data = [path for path in sorted(ROOT.glob("data/**/*")) if path.is_file()]
    for path in [*(ROOT / name for name in FILES), *data]:
        content = path.read_bytes()
        if path.suffix == ".md":
            content = without_links(content.decode()).encode()
        if path.name == "ewc_gan.py":
            content = without_solutions(content.decode(), solved).encode()
        if path.name == "test_ewc_gan.py":
            content = content[:content.index(END_OF_TESTS.encode())]
        if path.name not in LEFT_OUT and path.parent.name != "__pycache__":
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    (folder / "conftest.py").write_text(CONFTEST)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"student_copy.py: {message}\n")
    p.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    p.add_argument("--solved", type=int, nargs="+", choices=EXERCISES, default=[])
    args = p.parse_args(argv)
    if args.folder.exists():
        p.error(f"{args.folder}: exists; name a new folder")
    try:
        write_copy(args.folder.resolve(), args.solved)
    except OSError as error:
        p.error(f"{error.filename}: {error.strerror}")
    print(f"{args.folder}: in it, run python -m pytest -k exercise_1 -x -q --tb=short")

if __name__ == "__main__":
    main()
