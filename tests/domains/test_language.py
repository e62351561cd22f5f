"""The domain of text behind the interface that a run knows."""

import inspect

import pytest
import torch

from convert.core.errors import UserError
from convert.domains import domain_of
from convert.domains.base import Domain
from convert.domains.language import Language
from convert.models.catalog import resolve
from convert.models.from_scratch import Sizes
from convert.models.loading import read_config
from convert.models.swap import swap
from convert.runs.schemas import Report
from tests.conftest import tiny_teacher


def config_of(name: str):
    return read_config(resolve(name))


def test_every_teacher_is_language_so_far():
    domain = domain_of("neox-nano")
    assert isinstance(domain, Language) and (domain.name, domain.unit, domain.headline) == (
        "language", "tokens", "perplexity",
    )  # fmt: skip


def test_a_domain_that_leaves_something_out_cannot_be_made():
    class Half(Domain):
        name, unit, headline = "half", "halves", "error"

    with pytest.raises(TypeError, match="abstract"):
        Half()
    methods = {name for name, _ in inspect.getmembers(Domain, inspect.isfunction)}
    assert all(getattr(Language, name) is not getattr(Domain, name) for name in methods)


def test_the_outline_of_a_converted_model_names_its_mixers():
    teacher = tiny_teacher("llama")
    assert Language().outline(teacher.config)[1] == (None, None, None)
    student = swap(teacher, "mamba2", layers=(0, 2))
    host, mixers = Language().outline(student.config)
    assert host.model_type == "llama" and mixers == ("mamba2", None, "mamba2")


def test_teachers_of_one_run_share_their_tokens():
    domain, nano = Language(), config_of("neox-nano")
    assert domain.problem_of_pair(nano, nano) is None
    assert "4,096 tokens, this one 50,304" in domain.problem_of_pair(nano, config_of("pythia-14m"))


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_a_student_is_built_with_the_teachers_vocabulary(family):
    domain, nano = Language(), config_of("neox-nano")
    sizes = Sizes(layers=2, width=64, heads=2, inner=96)
    config = domain.build_config(family, sizes, nano)
    with torch.device("meta"):
        model = domain.empty_model(config)
    assert config.vocab_size == nano.vocab_size and config.num_hidden_layers == 2
    assert model.get_output_embeddings().weight.shape == (4096, 64)
    assert model.get_input_embeddings().padding_idx is None  # its embedding would never learn


def test_a_family_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="rwkv"):
        Language().build_config("rwkv", Sizes(), config_of("neox-nano"))


def test_rules_and_reports_are_the_domains_own():
    assert [rule.name for rule in Language().monitor_rules(["generation<0.2"])] == ["generation"]
    assert issubclass(Language().report_type, Report)
