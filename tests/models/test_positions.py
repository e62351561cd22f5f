"""Masks and positions say where the tokens of a call are, or are refused."""

import pytest
import torch

from convert.models.cache import CACHE_NAME
from convert.models.swap import swap
from tests.conftest import assert_close, tiny_teacher
from tests.models.test_student import CACHED
from tests.models.test_student_arguments import IDS, LEFT, PACKED


@torch.no_grad()
def test_cache_position_is_where_the_cache_ends():
    """Loops written for transformers 4 number the tokens of each call, padding counted; another number would be another
    place."""
    student = swap(tiny_teacher("llama"), "mamba2", layers=(1,))
    first = student(IDS[:, :7], attention_mask=LEFT[:, :7], cache_position=torch.arange(7), use_cache=True)
    further = dict(attention_mask=LEFT, past_key_values=first[CACHE_NAME])
    for wrong in (
        torch.arange(5),
        torch.arange(6, 11),
        torch.arange(7, 13),
        torch.tensor([7, 8, 9, 10, 12]),
        torch.tensor(7),
    ):
        with pytest.raises(ValueError, match="cache_position, .* must count on from there"):
            student(IDS[:, 7:], cache_position=wrong, **further)
    last = student(IDS[:, 7:], cache_position=torch.arange(7, 12), **further)
    assert_close(last.logits, student(IDS, attention_mask=LEFT).logits[:, 7:], CACHED)


WRONG_MASKS = {
    "four dimensions": torch.ones(2, 1, 12, 12, dtype=torch.bool),
    "three dimensions": torch.ones(2, 12, 12),
    "one dimension": torch.ones(12),
    "too short": torch.zeros(2, 1),
    "too long": torch.ones(2, 13),
    "more rows": torch.ones(3, 12),
    "one row for two": torch.ones(1, 12),
    "a list": [[1] * 12] * 2,
    "a dictionary": {"full_attention": torch.ones(2, 12)},
}


WRONG_VALUES = {
    "not a number": torch.full((2, 12), torch.nan),
    "added to scores": torch.zeros(2, 12).masked_fill(LEFT == 0, -torch.inf),
    "documents": 1 + (PACKED == 0).cumsum(1),
    "half": torch.full((2, 12), 0.5),
    "negative": -LEFT,
}


@pytest.mark.parametrize("layers", [None, (1,), ()])
@torch.no_grad()
def test_masks_that_mean_something_else_are_refused(layers):
    """A mixer would go by the last column, or by whatever is not zero."""
    student = swap(tiny_teacher("llama"), "mamba2", layers=layers)
    for words, masks in (("must be \\[2, 12\\], and is", WRONG_MASKS), ("must hold 1 for tokens and 0", WRONG_VALUES)):
        for mask in masks.values():
            with pytest.raises(ValueError, match=f"An attention mask .*{words}"):
                student(IDS, attention_mask=mask)
    expected = student(IDS, attention_mask=LEFT).logits
    for kind in (torch.bool, torch.int32, torch.float32, torch.uint8):
        assert torch.equal(student(IDS, attention_mask=LEFT.to(kind)).logits, expected)


@torch.no_grad()
def test_masks_of_a_call_that_goes_on():
    """Of all tokens so far; the mask of this call alone leaves kept attention without that of the keys before."""
    for layers in (None, (1,)):
        student = swap(tiny_teacher("llama"), "mamba2", layers=layers)
        expected = student(IDS, attention_mask=LEFT).logits[:, 7:]

        def go_on(mask, student=student):
            cache = student(IDS[:, :7], attention_mask=LEFT[:, :7], use_cache=True)[CACHE_NAME]
            return student(IDS[:, 7:], attention_mask=mask, past_key_values=cache).logits

        assert_close(go_on(LEFT), expected, CACHED)
        for mask in (LEFT[:, 1:], LEFT[:, :6], torch.ones(2, 13)):
            with pytest.raises(ValueError, match="with 5 tokens after 7 it must be "):
                go_on(mask)
        if layers is None:
            assert_close(go_on(LEFT[:, 7:]), expected, CACHED)
        else:
            with pytest.raises(ValueError, match=r"it must be \[2, 12\], and is \[2, 5\]"):
                go_on(LEFT[:, 7:])
