import ast
import json
import textwrap

import pytest
from plant_faults import draw, faults_of, nearest_tests


SOURCE = textwrap.dedent(
    '''
    """A docstring of 3 words."""

    def f(x: "Literal[7]", y=2) -> int:
        if x and not y:
            raise ValueError(f"{x + 1} is bad")
        done = x <= 4
        show(x, last=True)
        return x - y
    '''
).lstrip()
EXPECTED = {
    (3, "constant"): {"(1)", "(3)"},
    (4, "condition negated"): {"(not (x and (not y)))"},
    (4, "and/or"): {"(x or (not y))"},
    (4, "not removed"): {"y"},
    (6, "comparison negated"): {"(x > 4)"},
    (6, "comparison at its limit"): {"(x < 4)"},
    (6, "constant"): {"(3)", "(5)"},
    (7, "constant"): {"False"},
    (7, "argument dropped"): {"show(x)"},
    (7, "call removed"): {"pass"},
    (8, "return removed"): {"return None"},
    (8, "arithmetic"): {"(x + y)"},
}


def test_faults_are_those_of_the_operators():
    found = {}
    for fault in faults_of(SOURCE):
        found.setdefault((fault.line, fault.operator), set()).add(fault.new)
    assert found == EXPECTED


def test_a_fault_changes_its_place_and_nothing_else():
    wide = SOURCE.replace("x <= 4", '"\N{LATIN SMALL LETTER E WITH ACUTE}" + x <= 4')
    for fault in faults_of(wide):
        before, after = wide.splitlines(), fault.plant(wide).splitlines()
        assert [number for number, pair in enumerate(zip(before, after), 1) if pair[0] != pair[1]] == [fault.line]
        assert ast.dump(ast.parse("\n".join(after))) != ast.dump(ast.parse(wide))
    (limit,) = (fault for fault in faults_of(wide) if fault.operator == "comparison at its limit")
    assert limit.plant(wide).splitlines()[limit.line - 1].endswith("+ x) < 4)")


def test_a_seed_draws_the_same_faults_on_different_lines():
    sources = {"package/a.py": SOURCE, "package/b.py": SOURCE}
    drawn = draw(sources, 1, 8)
    assert drawn == draw(sources, 1, 8) != draw(sources, 2, 8)
    assert len({(path, fault.line) for path, fault in drawn}) == 8
    with pytest.raises(ValueError, match="larger than population"):
        draw(sources, 1, 13)


@pytest.fixture
def repository(tmp_path):
    files = {
        "package/__init__.py": "",
        "package/sums/__init__.py": "",
        "package/sums/pairs.py": "def add(x, y):\n    return x + y\n\n\ndef double(x):\n    return 2 * x\n",
        "tests/sums/test_pairs.py": """
            from package.sums.pairs import add

            def test_always_fails():
                assert add(1, 1) == 3

            def test_add():
                assert add(1, 2) == 3
            """,
        "tests/sums/test_others.py": "def test_nothing():\n    pass\n",
        "tests/test_import.py": "from package.sums import pairs\n\n\ndef test_it():\n    assert pairs.add\n",
    }
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(textwrap.dedent(text))
    return tmp_path / "root"


def test_the_nearest_tests_are_of_its_name_or_name_it(repository):
    nearest, others = nearest_tests(repository, "package/sums/pairs.py")
    assert nearest == ["tests/sums/test_pairs.py", "tests/test_import.py"] and others == ["tests/sums/test_others.py"]


def test_a_fault_is_noticed_by_a_test_that_passes_without_it(repository, run_python):
    code = f"""
    import json
    from pathlib import Path
    from plant_faults import faults_of, nearest_tests, try_fault

    root, path = Path({str(repository)!r}), "package/sums/pairs.py"
    source = (root / path).read_text()
    for fault in faults_of(source):
        if fault.operator == "arithmetic":
            record = try_fault(root, path, fault, nearest_tests(root, path)[0], 60)
            assert (root / path).read_text() == source
            print(json.dumps(record))
    """
    added, doubled = map(json.loads, run_python(code, new_interpreter=True).splitlines())
    fails_anyway = ["tests/sums/test_pairs.py::test_always_fails"]
    assert added["noticed_by"] == "tests/sums/test_pairs.py::test_add" and added["fails_anyway"] == fails_anyway
    assert doubled["noticed_by"] is None and doubled["fails_anyway"] == fails_anyway
    assert doubled["line"] == "package/sums/pairs.py:6" and doubled["after"] == "return (2 / x)"
