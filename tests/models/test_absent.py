"""A teacher that leaves the memory and comes back."""

import pytest
import torch

from convert.core.errors import UserError
from convert.models.absent import out_of_memory
from tests.conftest import tiny_teacher, token_ids


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_comes_back_as_it_was(family, tied):
    teacher = tiny_teacher(family, tie_word_embeddings=tied).requires_grad_(False)
    before = teacher(token_ids()).logits
    with out_of_memory(teacher, lambda: tiny_teacher(family, tie_word_embeddings=tied).requires_grad_(False)):
        held = [*teacher.parameters(), *teacher.buffers()]
        assert held and all(tensor.is_meta for tensor in held)
    assert torch.equal(teacher(token_ids()).logits, before)
    assert not any(p.requires_grad for p in teacher.parameters())
    ends = teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == tied


def test_another_teacher_does_not_come_back():
    teacher, other = tiny_teacher("llama"), tiny_teacher("llama")
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    words = "loaded again behind a step must be the one from before"
    with pytest.raises(UserError, match=words), out_of_memory(teacher, lambda: other):
        pass


def test_after_an_exception_nothing_is_loaded():
    teacher = tiny_teacher("llama")
    with pytest.raises(KeyError), out_of_memory(teacher, lambda: pytest.fail("loaded")):
        raise KeyError
