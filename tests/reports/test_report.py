"""What a person reads: few lines, however many layers."""

import pytest

from convert.evaluation.half_lives import QUANTILES
from convert.reports.language import HALF_LIFE_LINES, half_life_lines


def lives(layers: int) -> dict:
    """In layer i every quantile is i + 1 tokens, but the last is for ever in the odd layers."""
    return {i: {str(q): None if q == QUANTILES[-1] and i % 2 else i + 1.0 for q in QUANTILES} for i in range(layers)}


def test_few_layers_have_a_line_each():
    assert half_life_lines({}) == []
    assert half_life_lines(lives(2)) == [
        "Half-lives in layer 0: 5% 1.0, 25% 1.0, 50% 1.0, 75% 1.0, 95% 1.0 tokens.",
        "Half-lives in layer 1: 5% 2.0, 25% 2.0, 50% 2.0, 75% 2.0, 95% never tokens.",
    ]


@pytest.mark.parametrize("layers", [8, 9, 16, 30, 80])
def test_many_layers_share_lines(layers):
    lines = half_life_lines(lives(layers))
    assert len(lines) <= HALF_LIFE_LINES
    assert f"{layers - 1}" in lines[-1].split(":")[0]


def test_the_median_of_neighbours():
    first, *_, last = half_life_lines(lives(31))
    assert first == "Half-lives in layers 0 to 3 (medians): 5% 2.0, 25% 2.0, 50% 2.0, 75% 2.0, 95% 3.0 tokens."
    assert last == "Half-lives in layers 28 to 30 (medians): 5% 30, 25% 30, 50% 30, 75% 30, 95% 31 tokens."
