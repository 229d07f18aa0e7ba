"""Plants faults in the package, one at a time, and tells which of them no test notices: `python tests/plant_faults.py`.

A fault changes one expression or statement of one line. The line is drawn, with a recorded seed, from all lines of the
package that hold a place for one; then the place, then the fault. `faults_of` lists the operators.

The tests of a fault are run in a copy of the repository until one fails: the test files of the module's own name and those
that name the module; then, for the faults that all of these have passed, the others of its folder. A test that fails is run once more without the fault,
and is left out if it fails there too. A fault that makes a test compute for longer than `CPU_SECONDS`, or wait for longer than
`--timeout`, is noticed too.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = "diffusers_fvg"
CPU_SECONDS = 400
NEGATED = {ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
NEGATED |= {ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<"}
NEIGHBOUR = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*"}


class Fault(NamedTuple):
    line: int
    """From 1."""
    start: int
    end: int
    """Bytes of the line that are replaced."""
    operator: str
    new: str

    def plant(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        text = lines[self.line - 1].encode()
        lines[self.line - 1] = (text[: self.start] + self.new.encode() + text[self.end :]).decode()
        return "".join(lines)


# -- faults -----------------------------------------------------------------------------------------------------------


def faults_of(source: str) -> list[Fault]:
    """Every fault that can be planted in a module, by line. Docstrings and annotations hold none, nor do errors' texts."""
    lines, found = [line.encode() for line in source.splitlines()], []
    for node in _walk(ast.parse(source)):
        if node.lineno != node.end_lineno:
            continue
        written = lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode(errors="replace")
        # Of what stands in an f-string, Python 3.11 does not always tell the place.
        if _normal(written) == ast.unparse(node):
            place = (node.lineno, node.col_offset, node.end_col_offset)
            found += [Fault(*place, operator, new) for operator, new in _changes(node)]
    return sorted(found)


def _normal(text: str) -> str | None:
    with contextlib.suppress(SyntaxError, ValueError):
        # A `return` stands outside a function here, which parses.
        return ast.unparse(ast.parse(text))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yields expressions and statements whose value matters; `is_test` marks a condition."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or field in ("annotation", "returns", "exc", "type_params"):
                continue
            child.is_test = field == "test" and not isinstance(child, ast.Compare | ast.UnaryOp)
            if hasattr(child, "lineno"):
                yield child
            yield from _walk(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields names of operators and the text that replaces the node."""
    if node.is_test:
        yield "condition negated", f"(not {_closed(node)})"
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            kinds = {"comparison negated": NEGATED, "comparison at its limit": NEIGHBOUR}
            for name, signs in kinds.items():
                if type(operator) in signs:
                    yield name, f"({_closed(left)} {signs[type(operator)]} {_closed(right)})"
        case ast.BoolOp(op=operator, values=values):
            word = " or " if isinstance(operator, ast.And) else " and "
            yield "and/or", f"({word.join(map(_closed, values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not removed", _closed(operand)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in ARITHMETIC:
            yield "arithmetic", f"({_closed(left)} {ARITHMETIC[type(operator)]} {_closed(right)})"
        case ast.Constant(value=bool(value)):
            yield "constant", str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", f"({value + 1})"
            yield "constant", f"({value - 1})"
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return removed", "return None"
        case ast.Call(func=function, args=arguments, keywords=keywords):
            for dropped in keywords:
                rest = [keyword for keyword in keywords if keyword is not dropped]
                yield "argument dropped", ast.unparse(ast.Call(func=function, args=arguments, keywords=rest))
        case ast.Expr(value=ast.Call()):
            yield "call removed", "pass"


def _closed(value: ast.expr) -> str:
    return ast.unparse(value) if isinstance(value, ast.Name | ast.Constant | ast.Call) else f"({ast.unparse(value)})"


def draw(sources: dict[str, str], seed: int, count: int) -> list[tuple[str, Fault]]:
    """`count` faults on different lines, each line of all modules as likely as any other that holds a place for one."""
    places = {}
    for path in sorted(sources):
        for fault in faults_of(sources[path]):
            places.setdefault((path, fault.line), []).append(fault)
    generator = random.Random(seed)
    lines = generator.sample(list(places), count)
    return [(path, generator.choice(places[path, line])) for path, line in lines]


# -- tests ------------------------------------------------------------------------------------------------------------


def nearest_tests(root: Path, path: str) -> list[list[str]]:
    """Returns the test files of a module of the package: the nearest ones, and the others of its folder."""
    module = Path(path).with_suffix("")
    dotted = ".".join(module.parts).removesuffix(".__init__")
    parent, _, name = dotted.rpartition(".")
    told = re.compile(rf"\b{re.escape(dotted)}\b|from {re.escape(parent)} import [^\n]*\b{name}\b")
    files = {
        file.relative_to(root).as_posix(): file.read_text() for file in sorted((root / "tests").rglob("test_*.py"))
    }
    own = [file for file in files if Path(file).stem == f"test_{name}"]
    first = own + [file for file, text in files.items() if file not in own and told.search(text)]
    folder = f"tests/{module.parts[1]}/" if len(module.parts) > 2 else "tests/test_"
    rest = [file for file in files if file.startswith(folder) and file not in first]
    return [first, rest] if first else [rest, []]


class Outcome(NamedTuple):
    failed: str | None
    """The first test that failed, or how the run ended without one."""
    seconds: float


def _pytest(root: Path, tests: list[str], log: Path) -> None:
    """In a process of its own, which has imported all but the package and its tests."""
    os.setsid()
    os.chdir(root)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = str(root)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        status = pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=no", *tests])
    sys.stdout.flush()
    os._exit(int(status))


def run_tests(root: Path, tests: list[str], timeout: float) -> Outcome:
    begin, log = time.monotonic(), root.with_name("log")
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(root, tests, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return Outcome("no end", time.monotonic() - begin)
    out, seconds = log.read_text(errors="replace"), time.monotonic() - begin
    if process.exitcode in (0, 5):
        return Outcome(None, seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", out, re.MULTILINE)
    return Outcome(failed[1] if failed else f"exit status {process.exitcode}: {out.strip()[-200:]}", seconds)


def try_fault(root: Path, path: str, fault: Fault, tests: list[str], timeout: float) -> dict:
    """Plants a fault in the copy, runs tests and takes it out again: a line of the report."""
    file = root / path
    source = file.read_text(encoding="utf-8")
    planted, noticed, unsure, seconds = fault.plant(source), None, [], 0.0
    compile(planted, path, "exec")
    while noticed is None:
        _write(file, planted)
        try:
            outcome = run_tests(root, tests + [f"--deselect={test}" for test in unsure], timeout)
        finally:
            _write(file, source)
        seconds += outcome.seconds
        if outcome.failed is None or outcome.failed in unsure:
            break
        if "::" in outcome.failed and run_tests(root, [outcome.failed], timeout).failed:
            # The test fails without the fault, too, so only the others count.
            unsure.append(outcome.failed)
        else:
            noticed = outcome.failed
    before, after = (text.splitlines()[fault.line - 1].strip() for text in (source, planted))
    place = {"line": f"{path}:{fault.line}", "operator": fault.operator, "before": before, "after": after}
    seen = {"noticed_by": noticed, "fails_anyway": unsure}
    return place | seen | {"test_files": len(tests), "seconds": round(seconds)}


def _write(file: Path, source: str) -> None:
    file.write_text(source, encoding="utf-8")
    # Python would reuse bytecode of a source with the same size and second of writing.
    Path(importlib.util.cache_from_source(file)).unlink(missing_ok=True)


def _import_the_rest() -> None:
    """Imports the other packages that the package and its tests need, once for all runs."""
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("conftest")
    for name in ("accelerate", "peft", "scipy.stats"):
        importlib.import_module(name)
    from diffusers import CogVideoXPipeline, StableDiffusionXLPipeline, WanImageToVideoPipeline  # noqa: F401
    from transformers import LlamaForCausalLM, UMT5EncoderModel  # noqa: F401

    sys.path.pop(0)
    # The copy has its own versions.
    del sys.modules["conftest"], sys.modules["hub_server"]
    assert PACKAGE not in sys.modules


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--timeout", type=float, default=1800, help="wall-clock seconds of one run of tests")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    parser.add_argument(
        "--output", type=Path, default=Path("faults.jsonl"), help="what stands there is not tried again"
    )
    options = parser.parse_args(arguments)
    sources = {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in (ROOT / PACKAGE).rglob("*.py")
    }
    drawn = draw(sources, options.seed, options.count)
    if options.list:
        for path, fault in drawn:
            print(f"{path}:{fault.line} {fault.operator}\n  {fault.plant(sources[path]).splitlines()[fault.line - 1]}")
        return
    done = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place
        _import_the_rest()
        root = Path(place) / "repository"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache"))
        for distance, name in enumerate(("nearest", "folder")):
            for path, fault in drawn:
                tests = nearest_tests(root, path)[distance]
                seen = [record for record in done if record["line"] == f"{path}:{fault.line}"]
                if not tests or any(record["noticed_by"] or record["tests"] == name for record in seen):
                    continue
                record = try_fault(root, path, fault, tests, options.timeout) | {"tests": name}
                done.append(record)
                with options.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    noticed = {record["line"] for record in done if record["noticed_by"]}
    print(f"{len(drawn)} faults, {len(drawn) - len(noticed)} survive:")
    for record in {record["line"]: record for record in done if record["line"] not in noticed}.values():
        print(f"{record['line']} {record['operator']}\n  {record['before']}\n  {record['after']}")


if __name__ == "__main__":
    main()
