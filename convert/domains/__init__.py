"""What differs between kinds of models: text and images."""

from convert.core.errors import UserError
from convert.domains.base import Domain
from convert.models.catalog import resolve


def domain_of(teacher: str, target: str | None = None) -> Domain:
    """The domain that a teacher's name belongs to. `target` is the domain of what it becomes, if that is known: it
    decides for a model that only the hub knows.

    Raises UserError for a name that stands for nothing, and where the two differ."""
    source = resolve(teacher)
    domain = source.domain or target or "language"
    if target is not None and domain != target:
        kinds = {"language": "language models", "vision": "image classifiers"}
        raise UserError(
            f"A target must fit its teacher; this one is for {kinds[target]}, and {source.name} is one of the"
            f" {kinds[domain]}. --help lists the targets of both."
        )
    if domain == "vision":
        from convert.domains.vision import Vision

        return Vision()
    from convert.domains.language import Language

    return Language()
