"""Text of strangers in Markdown: shown as it is, never read as markup."""

import dataclasses
import re
from typing import Any

from convert.core.console import visible


def escaped(found: Any) -> Any:
    """All texts in a value as Markdown that shows them as they are: no markup, HTML, link or further line comes of a
    name. Dataclasses, dictionaries (but not their keys) and lists are gone through."""
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        values = {field.name: escaped(getattr(found, field.name)) for field in dataclasses.fields(found)}
        return dataclasses.replace(found, **values)
    if isinstance(found, dict):
        return {key: escaped(value) for key, value in found.items()}
    if isinstance(found, list):
        return [escaped(value) for value in found]
    if not isinstance(found, str):
        return found
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", visible(found))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")


def code(text: str) -> str:
    """Code in a line, between more backticks than it holds in a row."""
    text = visible(text)
    fence = "`" * (_most_backticks(text) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text or ' '}`"


def block(text: str) -> str:
    """A block of code, between more backticks than it holds in a row."""
    fence = "`" * max(3, _most_backticks(text) + 1)
    return f"{fence}\n{visible(text, keep=chr(10) + chr(9))}\n{fence}"


def _most_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
