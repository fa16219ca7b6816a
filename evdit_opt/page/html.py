"""HTML that is escaped by construction: text becomes text, only ``tag`` makes markup."""

import html

__all__ = ["Html", "join", "tag"]

VOID = frozenset({"meta", "input", "br"})
"""Elements without content and without an end tag."""


class Html(str):
    """Markup. A plain ``str`` is text, whatever it holds."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | int | float | bool) -> Html:
    """An element.

    Args:
        name: such as "td".
        children: markup (``Html``), or text, which is escaped.
        attributes: ``class_`` is class, ``data_label`` is data-label. True has no value, False is
            left out.
    """
    shown = "".join(
        f" {_name(key)}" if value is True else f' {_name(key)}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not False
    )
    if name in VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Elements and texts one after the other."""
    return Html("".join(c if isinstance(c, Html) else html.escape(c) for c in children))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
