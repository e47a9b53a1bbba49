"""Text that is not ours, made safe to show: names of objects and processes, answers of servers."""

from __future__ import annotations


def escaped(text: str) -> str:
    """A text on one line that no terminal and no reader takes for anything else.

    Control characters, line ends, bidirectional and other invisible ones become `\\x1b` and the
    like. Text that can be printed stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def escaped_lines(text: str) -> str:
    """The same for a text of several lines, whose line ends are ours."""
    return "\n".join(map(escaped, text.split("\n")))
