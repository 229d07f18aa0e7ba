"""Each row of the table of bad inputs comes out right: early, and with the argument, its value and the fix."""

import time

import pytest
import torch
from bad_rows import CLASSES, Row, Shared, outcome
from count_rows import all_rows
from quick import embedded_at


ROWS = all_rows()
# Rows that do not come out right, each with the reason.
EXCEPTIONS: dict[str, str] = {}


@pytest.fixture(scope="module")
def shared(quick_folder):
    with embedded_at(quick_folder):
        shared = Shared()
        shared.load()
        yield shared


def test_the_table_is_large_and_each_row_has_a_name_of_its_own():
    assert len(ROWS) >= 400
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert EXCEPTIONS.keys() <= {row.name for row in ROWS}
    assert all(row.words for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[ascii(row.name)[1:-1] for row in ROWS])
def test_a_bad_input_is_refused_early_and_clearly(row, shared):
    found, said = outcome(row, shared)
    if row.name in EXCEPTIONS:
        assert found != "right", f"{row.name} is right now: take it out of the exceptions"
    else:
        assert found == "right", f"{row.name} is {found}: {said}; wanted {row.error.__name__} with {row.words}"


LAYER = torch.nn.Linear(1, 1)


def _late(shared):
    LAYER(torch.zeros(1))
    raise ValueError("`x=1` is wrong")


@pytest.mark.parametrize(
    ("found", "give"),
    [
        ("late", _late),
        ("silent", lambda shared: LAYER(torch.zeros(1))),
        ("silent", lambda shared: None),
        ("obscure", lambda shared: int("x")),
        ("obscure", lambda shared: [].x),
        ("hanging", lambda shared: time.sleep(5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_class_is_found(found, give, shared):
    assert found in CLASSES
    assert outcome(Row("planted", give, ("`x=1`",)), shared, limit=0.3)[0] == found
