"""The final metrics of a language model: what is measured on a finished student, beside its teacher."""

from transformers import PreTrainedModel

from convert.data.batches import Batch, held_out_batches
from convert.data.text import TokenData
from convert.evaluation.generation import continuations
from convert.evaluation.half_lives import half_lives
from convert.evaluation.inference import (
    CONTEXT_LENGTHS,
    PREFILL_SECONDS,
    break_even,
    cache_formula,
    context_costs,
    formula_bytes,
)
from convert.evaluation.perplexity import compare
from convert.models.loading import Teacher
from convert.runs.language_schemas import (
    Agreement,
    CacheBytes,
    CacheFormula,
    ContextCosts,
    Continuation,
    Divergence,
    LanguageMetrics,
    Perplexity,
)
from convert.runs.schemas import Headline

PROMPT_TOKENS = 48
CONTINUED = 3  # held-out documents


def held_out(text: TokenData, tokens: int, seq_len: int, micro_tokens: int) -> list[Batch]:
    """The batches on which every perplexity of a run is measured: sequences of `seq_len` tokens, as many at once as
    `micro_tokens` allows.

    They hold a quarter of the tokens that the run trains on, but at least 8 k (or all of a smaller budget) and at most
    256 k."""
    count = min(max(tokens // 4, min(tokens, 8192)), 1 << 18)
    return held_out_batches(text.held_out, seq_len, max(1, micro_tokens // seq_len), count)


def final_metrics(student: PreTrainedModel, teacher: Teacher, text: TokenData, batches: list[Batch]) -> LanguageMetrics:
    """Measure a finished student beside its teacher on held-out batches of `text`. Several processes share the batches
    of the comparison, and do the rest alike."""
    both = compare(student, teacher.model, batches)
    cache_bytes, contexts = _context_costs(student, teacher)
    return LanguageMetrics(
        headline=Headline(name="perplexity", unit="", teacher=both.perplexity_teacher, student=both.perplexity_student),
        perplexity=Perplexity(
            teacher=both.perplexity_teacher,
            student=both.perplexity_student,
            ratio=both.perplexity_student / both.perplexity_teacher,
        ),
        agreement=Agreement(top1=both.top1),
        kl=Divergence(mean_nats=both.kl_nats),
        measured_tokens=both.tokens,
        cache_bytes=cache_bytes,
        contexts=contexts,
        half_lives=half_lives(student, batches[:4]),
        continuations=_continuations(student, teacher, text),
    )


def _context_costs(student: PreTrainedModel, teacher: Teacher) -> tuple[CacheBytes, ContextCosts]:
    """Cache and speed by length of context, measured where that is quick; and by formula at every length."""
    models = {"teacher": teacher.model, "student": student}
    costs = {
        name: context_costs(model, teacher.dtype, CONTEXT_LENGTHS, PREFILL_SECONDS) for name, model in models.items()
    }
    lengths = [length for length in costs["teacher"] if length in costs["student"]]
    formulas = {name: cache_formula(model) for name, model in models.items()}
    by_formula = {
        name: {str(length): formula_bytes(layers, length, teacher.dtype) for length in CONTEXT_LENGTHS}
        for name, layers in formulas.items()
    }
    cache_bytes = CacheBytes(
        teacher={str(length): costs["teacher"][length].bytes for length in lengths},
        student={str(length): costs["student"][length].bytes for length in lengths},
        formula=CacheFormula(**by_formula),
        break_even_tokens=break_even(formulas["teacher"], formulas["student"], teacher.dtype),
    )
    return cache_bytes, ContextCosts(**{name: [costs[name][length] for length in lengths] for name in models})


def _continuations(student: PreTrainedModel, teacher: Teacher, text: TokenData) -> list[Continuation]:
    """Greedy continuations of three held-out documents by both models."""
    starts = [int(s) for s in text.held_out.starts if s + PROMPT_TOKENS < len(text.held_out)][:CONTINUED] or [0]
    prompts = [
        teacher.tokenizer.decode(text.held_out.ids[s : s + PROMPT_TOKENS].tolist(), skip_special_tokens=True)
        for s in starts
    ]
    written = [continuations(model, teacher.tokenizer, prompts) for model in (teacher.model, student)]
    return [Continuation(prompt=p, teacher=t, student=s) for p, t, s in zip(prompts, *written, strict=True)]
