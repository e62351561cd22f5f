"""What differs between kinds of models: text today, images next."""

from convert.domains.base import Domain


def domain_of(teacher: str) -> Domain:
    """The domain that a teacher's name belongs to. Language is the only one so far."""
    from convert.domains.language import Language

    return Language()
