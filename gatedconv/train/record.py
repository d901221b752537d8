"""The form of records that are read back: what a file lacks or holds wrongly is told by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Form = type | tuple[type, ...] | Mapping[str, Any]
"""A type, several, or a mapping of keys to forms; a key that ends in "?" may be absent."""

NUMBER = (int, float)


def require_form(value: Any, form: Form, where: str, error: type[ValueError] = ValueError) -> None:
    """Check that a value read from a file has the form that it was written in; other keys may be there too.

    Args:
        value: what was read.
        form: what it has to be.
        where: names the file, and within it the place.
        error: the class of error to raise.

    Raises:
        ValueError: `error`, naming the place, what was expected and what was found.
    """
    kinds = (dict,) if isinstance(form, Mapping) else form if isinstance(form, tuple) else (form,)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise error(f"{where}: expected {names}, found {type(value).__name__}")
    if isinstance(form, Mapping):
        for key, inner in form.items():
            name = key.removesuffix("?")
            if name in value:
                require_form(value[name], inner, f"{where}: {name}", error)
            elif name == key:
                raise error(f"{where}: missing key {name!r}")
