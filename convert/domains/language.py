"""Causal language models: the domain of text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.core.processes import launched, on_first, world
from convert.data import chat
from convert.data.batches import Batch, Batches, StreamBatches, held_out_batches
from convert.data.corpus import Corpus, corpus, whole_name
from convert.data.packing import PackedBatches
from convert.data.stream import Stream
from convert.data.text import TokenData, tokenizer_fingerprint
from convert.domains.base import Domain
from convert.mixers.projections import refusal
from convert.models import from_scratch
from convert.models.catalog import Source, resolve
from convert.models.loading import Teacher, load_teacher, read_config
from convert.models.saving import fingerprint, load_in_parts, load_student
from convert.models.sharding import copied

if TYPE_CHECKING:
    from convert.evaluation.monitor import Monitor
    from convert.evaluation.rules import Rule
    from convert.reports.sections import Sections
    from convert.runs.evaluation_schemas import Evaluation
    from convert.runs.language_schemas import LanguageMetrics, LanguageReport
    from convert.training.settings import Settings


class Language(Domain[Source, Teacher, Corpus, TokenData]):
    """Perplexity on held-out text is the headline metric; training counts tokens."""

    name = "language"
    unit = "tokens"
    headline = "perplexity"
    shares_models = True

    # what a plan does not need is imported where it is used, so that a plan is quick

    @property
    def report_type(self) -> "type[LanguageReport]":
        from convert.runs.language_schemas import LanguageReport

        return LanguageReport

    @property
    def sections(self) -> "Sections":
        from convert.reports.language import LANGUAGE

        return LANGUAGE

    # --- before a run

    def resolve(self, teacher: str) -> Source:
        return resolve(teacher)

    def read_config(self, source: Source, trust_remote_code: bool = False) -> PreTrainedConfig:
        if source.gguf and launched() > 1:
            raise UserError(
                f"Several processes read rows of safetensors files, and {source.where} would be unpacked whole. Start"
                " one process, or give the model's folder of safetensors."
            )
        return read_config(source, trust_remote_code=trust_remote_code)

    def outline(self, config: PreTrainedConfig) -> tuple[PreTrainedConfig, tuple[str | None, ...]]:
        if config.model_type != "converted":
            return config, (None,) * getattr(config, "num_hidden_layers", 0)
        return config.host, tuple(mixer and mixer["name"] for mixer in config.mixers)

    def problem(self, config: PreTrainedConfig) -> str | None:
        return refusal(self.outline(config)[0])

    def problem_of_pair(self, run: PreTrainedConfig, step: PreTrainedConfig) -> str | None:
        if run.vocab_size == step.vocab_size:
            return None
        return (
            f"Teachers of one run share one tokenizer; the run's has {run.vocab_size:,} tokens, this one"
            f" {step.vocab_size:,}."
        )

    def problem_of_loaded_pair(self, run: Teacher, step: Teacher) -> str | None:
        if run.tokenizer.get_vocab() == step.tokenizer.get_vocab():
            return None
        return "Teachers of one run share one tokenizer; these two have different tokens for the same numbers."

    def empty_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config)

    def build_config(self, model: str, sizes: Any, teacher: PreTrainedConfig) -> PreTrainedConfig:
        return from_scratch.build_config(model, sizes, self.outline(teacher)[0])

    def describe_student(self, model: str, options: Any, config: PreTrainedConfig) -> str:
        return f"a {model} of {config.num_hidden_layers} layers, width {config.hidden_size}"

    def build(self, model: str, options: Any, teacher: Teacher) -> PreTrainedModel:
        with torch.device(teacher.model.device):
            built = self.empty_model(self.build_config(model, options, teacher.model.config))
        built.generation_config = teacher.model.generation_config
        return built if world() == 1 else copied(built)

    def keep_start(self, student: PreTrainedModel, teacher: Teacher, batches: Sequence[Batch], folder: Path) -> None:
        pass  # a report tells nothing of it

    def corpus(self, spec: str) -> Corpus:
        return corpus(spec)

    def whole_data(self, spec: str) -> str:
        return whole_name(spec)

    def check_data(self, corpus: Corpus, settings: "Settings") -> None:
        chat.check(corpus, settings.masking)

    def monitor_rules(self, rules: Sequence[str]) -> "list[Rule]":
        from convert.evaluation.monitor import METRICS
        from convert.evaluation.rules import Rule

        return [Rule.of(rule, METRICS) for rule in rules]

    # --- models and data of a run

    def load_teacher(self, source: Source, device: str, trust_remote_code: bool, shared: bool = False) -> Teacher:
        return load_teacher(source, device=device, trust_remote_code=trust_remote_code, shared=shared)

    def copy(self, model: PreTrainedModel) -> PreTrainedModel:
        return copied(model)

    def load_student(self, folder: Path, teacher: PreTrainedModel) -> PreTrainedModel:
        return load_student(folder, teacher, self.empty_model) if world() == 1 else load_in_parts(folder, teacher)

    def origins(self, teacher: Teacher, data: TokenData) -> dict[str, str]:
        return {
            "teacher": fingerprint(teacher.model),
            "tokenizer": tokenizer_fingerprint(teacher.tokenizer),
            "data": data.fingerprint,
        }

    def prepare(self, corpus: Corpus, teacher: Teacher, limit: int, settings: "Settings") -> TokenData:
        from convert.evaluation.completions import prepare

        return prepare(corpus, teacher, limit, settings.seq_len)

    def batches(self, data: TokenData, settings: "Settings") -> Batches | PackedBatches:
        s = settings
        chat.check_masking(data.train.completions is not None, s.masking, "the data")
        if isinstance(data.train, Stream):
            return StreamBatches(data.train, s.seq_len, s.num_sequences, s.seed, s.num_steps)
        if data.train.completions is None:
            return Batches(data.train, s.seq_len, s.num_sequences, s.seed)
        return PackedBatches(data.train, s.seq_len, s.num_sequences, s.seed, s.masking)

    def held_out(self, data: TokenData, budget: int, settings: "Settings") -> list[Batch]:
        from convert.evaluation import final_metrics

        return final_metrics.held_out(data, budget, settings.seq_len, settings.micro_tokens)

    def probe(self, data: TokenData, length: int) -> Batch:
        length = min(length, len(data.held_out) - 1)
        return held_out_batches(data.held_out, length, 1, length)[0]

    def check(self, teacher: Teacher, tasks: str | None) -> None:
        from convert.evaluation.runner import chosen

        chosen(tasks, teacher.tokenizer)

    # --- measurements

    def measure(self, model: PreTrainedModel, batches: Sequence[Batch]) -> float:
        from convert.evaluation.perplexity import perplexity

        return perplexity(model, list(batches))

    def recall_loss(self, model: PreTrainedModel, teacher: Teacher) -> float:
        from convert.evaluation import associative_recall

        return associative_recall.recall_loss(model, teacher.tokenizer)

    def monitor(self, teacher: Teacher, batches: Sequence[Batch], rules: "Sequence[Rule]") -> "Monitor":
        from convert.evaluation.monitor import Monitor

        return Monitor(teacher, list(batches)[: max(1, len(batches) // 4)], rules)  # a quarter, to be quick (ours)

    def final_metrics(
        self, student: PreTrainedModel, teacher: Teacher, data: TokenData, batches: Sequence[Batch], folder: Path
    ) -> "LanguageMetrics":
        from convert.evaluation import final_metrics

        return final_metrics.final_metrics(student, teacher, data, list(batches))

    def evaluate(
        self, models: Mapping[str, PreTrainedModel], teacher: Teacher, tasks: str | None, examples: int, folder: Path
    ) -> "Evaluation":
        from convert.evaluation import runner

        answers = folder / "answers.jsonl"
        chosen = runner.chosen(tasks, teacher.tokenizer)
        found = runner.evaluate_tasks(dict(models), teacher.tokenizer, chosen, limit=examples, file=answers)
        on_first(runner.write, found, folder / "evaluation.json")
        return found

    def try_it(self, run: Path) -> str:
        return f'python -m convert.generate {run} "def add("'

    def export(
        self, student: PreTrainedModel, teacher: Teacher, folder: Path, cards: tuple[str, str], data: TokenData
    ) -> dict[str, Any]:
        from convert.exporting.verify import export_and_verify

        return export_and_verify(
            student,
            teacher.tokenizer,
            folder,
            card=cards[0],
            card_without_code=cards[1],
            dtype=teacher.dtype,
            input_ids=torch.from_numpy(data.held_out.ids[:64].astype("int64"))[None],
        )
