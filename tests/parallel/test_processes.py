"""What processes see and decide, they see and decide alike."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core.processes import gathered, rank
from convert.evaluation.generation import generate
from convert.models.sharding import copied
from convert.runs import ledger
from convert.runs.ledger import check_shared, open_run
from tests.conftest import tiny_teacher
from tests.evaluation.scripted import chatty_tokenizer
from tests.parallel.fork import finished, start, together


def test_a_folder_that_is_not_shared_is_refused_before_anything_is_trained(tmp_path):
    """Each machine may have a run of that name."""
    for name in ("0", "1"):
        open_run(tmp_path / name, {"machine": name}, False)
    assert finished(start(tmp_path / "apart", 2, _checked, tmp_path, True)) == [1, 1]
    for name in ("0", "1"):
        said = (tmp_path / "apart" / f"raised-{name}").read_text()
        assert said.startswith("UserError: The run's folder must be one that all processes share"), said
    together(tmp_path / "shared", 2, _checked, tmp_path, False)


def _checked(place: Path, is_apart: bool) -> None:
    ledger.SEEN_WITHIN = 0.5
    check_shared(place / str(rank() * is_apart))


def test_processes_that_share_a_model_write_until_the_first_one_ends(tmp_path):
    """Rounding may differ between them, and with it the token that ends a text. A model that each has whole writes
    wherever it is called, and in one process alone, too."""
    model, tokenizer = tiny_teacher("llama"), chatty_tokenizer()
    assert together(tmp_path / "shared", 2, _written, model, tokenizer, True) == [3, 3]
    assert together(tmp_path / "whole", 2, _written, model, tokenizer, False) == [3, 0]


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, is_shared: bool) -> int:
    calls: list[int] = []

    def is_complete(_: str) -> bool:
        calls.append(rank())
        return len(calls) >= (3 if rank() == 0 else 1)

    if is_shared or rank() == 0:
        generate(copied(model) if is_shared else model, tokenizer, [[5, 6, 7]], 8, stop=is_complete)
    gathered(None)  # one that ends sooner would leave the others while they are still meeting
    return len(calls)
