"""Parts of a list: even, in order, nothing twice; and how they are named."""

from __future__ import annotations

import pytest

from swift.utils.errors import UserError
from swift.utils.parts import Part, parse_part


@pytest.mark.parametrize(("length", "count"), [(0, 3), (2, 4), (10, 4), (12, 4), (7, 1)])
def test_parts_cover_a_list_once_and_evenly(length: int, count: int) -> None:
    parts = [Part(number, count).of(length) for number in range(count)]
    assert [place for part in parts for place in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # Two ranks in each point of an array share that point's part.
    again = [Part(number, count).among(rank, 2).of(length) for number in range(count) for rank in range(2)]
    assert [place for part in again for place in part] == list(range(length))


def test_names_of_parts() -> None:
    assert parse_part(None) == Part(0, 1)
    assert parse_part("2/4") == Part(1, 4)
    assert str(Part(1, 4)) == "2/4"
    array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in zip(("MIN", "MAX", "COUNT"), ("5", "11", "4"))}
    assert [parse_part("array", array | {"SLURM_ARRAY_TASK_ID": at}).number for at in ("5", "7", "9", "11")] == [
        0,
        1,
        2,
        3,
    ]
    assert parse_part(None, array | {"SLURM_ARRAY_TASK_ID": "7"}) == Part(0, 1)  # only when asked for
    for text, says in (("0/4", "from 1 to N"), ("5/4", "from 1 to N"), ("a/4", "such as 1/4"), ("array", "job array")):
        with pytest.raises(UserError, match=says):
            parse_part(text, {})
    with pytest.raises(UserError, match="not evenly numbered"):
        parse_part("array", array | {"SLURM_ARRAY_TASK_ID": "6"})
