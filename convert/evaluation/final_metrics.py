"""The numbers of a finished student, beside its teacher."""

import dataclasses

from convert.data.batches import Batch, held_out_batches
from convert.data.text import TokenData
from convert.evaluation import perplexity as measure
from convert.models.loading import Teacher
from convert.recipes.base import Recipe, Train

PROMPT_TOKENS = 48


def held_out(text: TokenData, recipe: Recipe) -> list[Batch]:
    """The batches every perplexity of a run is measured on."""
    last = [step.settings for step in recipe.steps if isinstance(step, Train)][-1]
    return held_out_of(text, recipe.tokens, last.seq_len, last.micro_tokens)


def held_out_of(text: TokenData, budget: int, seq_len: int, micro_tokens: int) -> list[Batch]:
    """A quarter of the training budget, within 8 k (or all of a smaller budget) and 256 k tokens."""
    count = min(max(budget // 4, min(budget, 8192)), 1 << 18)
    return held_out_batches(text.held_out, seq_len, max(1, micro_tokens // seq_len), count)


def numbers(student, taught: Teacher, text: TokenData, batches: list[Batch]) -> dict:
    """What is measured on the finished student, beside its teacher."""
    both = measure.compare(student, taught.model, batches)
    return {
        "perplexity": {
            "teacher": both.perplexity_teacher,
            "student": both.perplexity_student,
            "ratio": both.perplexity_student / both.perplexity_teacher,
        },
        "agreement": {"top1": both.top1},
        "kl": {"mean_nats": both.kl_nats},
        "measured_tokens": both.tokens,
        **_contexts(student, taught),
        "half_lives": measure.half_lives(student, batches[:4]),
        "continuations": _continuations(student, taught, text),
    }


def _contexts(student, taught: Teacher) -> dict:
    """Cache and speed by length of context, measured where that is quick; by formula at every length beside it."""
    models = {"teacher": taught.model, "student": student}
    measured = {
        who: measure.contexts(model, taught.dtype, measure.CONTEXT_LENGTHS, measure.PREFILL_SECONDS)
        for who, model in models.items()
    }
    lengths = [length for length in measured["teacher"] if length in measured["student"]]
    formulas = {who: measure.cache_formula(model) for who, model in models.items()}
    sizes = {who: {str(length): measured[who][length].bytes for length in lengths} for who in models} | {
        "formula": {
            who: {
                str(length): measure.formula_bytes(layers, length, taught.dtype) for length in measure.CONTEXT_LENGTHS
            }
            for who, layers in formulas.items()
        },
        "break_even_tokens": measure.break_even(*formulas.values(), taught.dtype),
    }
    speeds = {who: [dataclasses.asdict(measured[who][length]) for length in lengths] for who in models}
    return {"cache_bytes": sizes, "contexts": speeds}


def _continuations(student, taught: Teacher, text: TokenData) -> list[dict]:
    """Greedy continuations of three held-out documents by both models."""
    starts = [int(s) for s in text.held_out.starts if s + PROMPT_TOKENS < len(text.held_out)][:3] or [0]
    prompts = [
        taught.tokenizer.decode(text.held_out.ids[s : s + PROMPT_TOKENS].tolist(), skip_special_tokens=True)
        for s in starts
    ]
    said = [measure.continuations(model, taught.tokenizer, prompts) for model in (taught.model, student)]
    return [{"prompt": p, "teacher": t, "student": s} for p, t, s in zip(prompts, *said, strict=True)]
