import importlib

import pytest
from trace_argument import count, trace, trace_pipeline


# Files and moves between them, at most: those that make the video; the record, which is written last; and for a prompt what
# stage 1 reads in it, to ask about it and to check the answer (four files of `rewrite/`).
BOUNDS = {"prompt": (4 + 1 + 4, 8 + 1 + 16), "anchors": (4 + 1, 6 + 1)}

PACKAGE = {
    "__init__.py": "",
    "entry.py": """
from . import checks, models, steps
from .request import Request

def call(text, size):
    checks.check(text)
    checks.check_size(size)
    return run(Request([text], size))

def run(request):
    for _ in steps.walk(request):
        [checks.check(item) for item in request.texts]
    model = models.Model(size=request.size, given={"request": request})
    return request.first(), model.draw("".join(list(request.first())))
""",
    "checks.py": """
def check(text):
    return lambda: text

def check_size(size):
    return size
""",
    "models.py": """
class Model:
    def __init__(self, **options):
        self.options = options

    def draw(self, caption):
        return encode((self.options["given"],)) + caption

def encode(inputs, *rest):
    return inputs[0]["request"].texts[0]
""",
    "request.py": """
from dataclasses import dataclass

@dataclass(frozen=True)
class Request:
    texts: list
    size: int

    def first(self):
        return self.texts[0]
""",
    "steps.py": """
def walk(request):
    yield request
    yield request
""",
}
# The loop runs twice. No stations: a copy of the text, `self`, a generator, the size, a dataclass's `__init__`.
STATIONS = """entry.py:call checks.py:check entry.py:run checks.py:check checks.py:check models.py:Model.__init__
models.py:encode""".split()


def test_stations_of_a_package_as_read_by_hand(tmp_path, monkeypatch):
    folder = tmp_path / "traced_package"
    folder.mkdir()
    for name, code in PACKAGE.items():
        (folder / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.import_module("traced_package.entry")
    text = " ".join(["a", "cat"])
    stations = trace(lambda: entry.call(text, 8), text, importlib.import_module("traced_package"))
    assert [":".join(station) for station in stations] == STATIONS
    assert count(stations) == (3, 4)


@pytest.mark.parametrize("argument", BOUNDS)
def test_a_reader_follows_an_argument_through_few_files(argument):
    stations = trace_pipeline(argument)
    assert stations[0].function.endswith(".__call__")
    files, moves = count(stations)
    most_files, most_moves = BOUNDS[argument]
    assert 1 < files <= most_files and 1 < moves <= most_moves, "\n".join(map(":".join, stations))
