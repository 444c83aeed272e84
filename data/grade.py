"""Grade a folder of handed-in ewc_gan.py: points for each exercise, in one table.

    python data/grade.py HANDINS --out grades.csv

HANDINS has a file NAME.py, or a folder NAME with an ewc_gan.py, for each student.  The functions
of one exercise, and the helpers and imports that they need, go into a copy in which all else is
solved: no exercise costs the points of another.  Its tests run in a process of their own.  They
give full points if all pass; half if all but one do, of two or more.  Nothing else of the file
runs, and what no answer needs (REFUSED) gives 0.  This stops shortcuts, but no real attack.
"""
import argparse
import ast
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from student_copy import EXERCISES, ROOT, write_copy

LIMIT = 120                 # seconds for the tests of an exercise
POINTS = {1: 8, 2: 8, 3: 14, 4: 10, 5: 10}
REFUSED = set("""os os.path sys Path pathlib shutil subprocess importlib inspect gc ctypes
    pytest _pytest unittest test_ewc_gan conftest builtins open exec globals vars setattr exit
    quit _exit SystemExit KeyboardInterrupt __import__ __dict__ __globals__""".split())

def definitions(program):
    """{name: the statement at the top level that defines it}"""
    found = {}
    for statement in ast.parse(program, "ewc_gan.py").body:
        is_named = hasattr(statement, "name")               # a function or a class
        for node in [statement] if is_named else ast.walk(statement):
            names = [getattr(node, key, None) for key in ("asname", "name", "id")]
            if any(names) and not isinstance(getattr(node, "ctx", None), ast.Load):
                found[next(filter(None, names)).partition(".")[0]] = statement
    return found

def refuse(statement, known):
    for node in ast.walk(statement):
        words = {getattr(node, key, None) for key in ("id", "attr", "name", "module")}
        if words & REFUSED:
            raise ValueError(f"it uses {min(words & REFUSED)}, which no answer needs")
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node).partition(".")[0] in known:        # as in torch.allclose = ...
                raise ValueError(f"it changes {ast.unparse(node)}, which is not its own")

def answer_of(program, number):
    """The functions of an exercise, and what they need that the repository does not have."""
    known = definitions((ROOT / "ewc_gan.py").read_text("utf-8"))
    found = definitions(program)
    waiting = list(EXERCISES[number])
    needed = []
    for name in waiting:                                            # it grows meanwhile
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] not in needed:
            refuse(found[name], known)
            needed.append(found[name])
            names = {x.id for x in ast.walk(found[name]) if isinstance(x, ast.Name)}
            waiting += names & found.keys() - known.keys()
    needed.sort(key=lambda statement: statement.lineno)
    return "\n\n".join(ast.unparse(statement) for statement in needed)

def message_of(test):
    """What a test says in the report: nothing if it passed."""
    message = "".join(child.get("message", child.tag) for child in test)
    if message == "collection failure":                 # its last lines have the reason
        reasons = re.findall("^E +(.*)", "".join(test.itertext()), re.MULTILINE)
        message = [message, *reasons][-1]
    return message.removeprefix("Failed: ").partition("\n")[0]

def run_tests(number, answer):
    """{name of a test: what it says} with this answer at the end of a solved copy."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "copy")
        report = Path(folder, "report.xml")
        write_copy(copy, solved=EXERCISES)
        with open(copy / "ewc_gan.py", "a", encoding="utf-8") as program:
            program.write(f"\n{answer}\n")
        tests = ["-m", "pytest", "-k", f"exercise_{number}", f"--junitxml={report}"]
        silent = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.DEVNULL)
        try:
            subprocess.run([sys.executable, *tests], cwd=copy, timeout=LIMIT, **silent)
        except subprocess.TimeoutExpired:
            raise ValueError(f"stopped after {LIMIT} seconds")
        if not report.exists():
            raise ValueError("the process ended before its tests did")
        cases = ElementTree.parse(report).iter("testcase")
        return {test.get("name"): message_of(test) for test in cases}

def grade(number, program, expected):
    """The points of an exercise, and what the first test that fails says."""
    try:
        says = run_tests(number, answer_of(program, number))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as reason:
        return 0, f"exercise {number}: {reason}"
    failed = [name for name in expected if says.get(name, "missing")]
    if not failed:
        return POINTS[number], ""
    half = POINTS[number] // 2 if len(failed) == 1 < len(expected) else 0
    return half, f"exercise {number}: {next(filter(None, says.values()), 'missing tests')}"

def grade_all(paths, table):
    """Write and print a row for each hand-in, as soon as it is graded."""
    expected = {number: run_tests(number, "") for number in EXERCISES}
    if not all(says and not any(says.values()) for says in expected.values()):
        raise ValueError("the solutions fail here, too: run python -m pytest")
    rows = csv.writer(table)
    rows.writerow(["name", *(f"exercise {n}" for n in EXERCISES), "total", "first message"])
    for path in paths:
        file = path / "ewc_gan.py" if path.is_dir() else path
        program = file.read_text("utf-8-sig", "replace") if file.exists() else ""
        graded = [grade(n, program, expected[n]) for n in EXERCISES]
        points = [n for n, _ in graded]
        message = next((message for _, message in graded if message), "")
        rows.writerow([path.stem, *points, sum(points), message])
        table.flush()
        print(f"{path.stem:20}", *(f"{n:3}" for n in points), f"{sum(points):4}  {message}")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.stdout.reconfigure(errors="backslashreplace")   # of a console that lacks a letter
    p.error = lambda message: p.exit(2, f"grade.py: {message}\n")
    p.add_argument("handins", metavar="HANDINS", type=Path)
    p.add_argument("--out", type=Path, default=Path("grades.csv"), help="(default: %(default)s)")
    args = p.parse_args(argv)
    try:
        paths = sorted(x for x in args.handins.iterdir() if x.is_dir() or x.suffix == ".py")
        if not paths:
            raise ValueError(f"{args.handins}: has no NAME.py, and no folder NAME")
        with open(args.out, "w", newline="", encoding="utf-8-sig") as table:    # for Excel
            grade_all(paths, table)
    except OSError as error:
        p.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        p.error(error)

if __name__ == "__main__":
    main()
