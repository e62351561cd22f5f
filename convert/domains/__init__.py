"""What differs between kinds of models: text and images."""

from convert.domains.base import Domain
from convert.models.catalog import domain_name, resolve


def domain_of(teacher: str, target: str | None = None) -> Domain:
    """The domain that a teacher's name belongs to. `target` is the domain of what it becomes, if that is known: it
    decides for a model that only the hub knows.

    Raises UserError for a name that stands for nothing, and where the two differ."""
    if domain_name(resolve(teacher), target) == "vision":
        from convert.domains.vision import Vision

        return Vision()
    from convert.domains.language import Language

    return Language()
