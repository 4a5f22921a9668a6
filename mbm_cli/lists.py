"""A list that is one argument of the command line: its commas, and those that belong to a value."""

_CLOSING = {"[": "]", "{": "}"}


def split_at_commas(text: str) -> list[str]:
    """The values of ``a,b,...`` as they are written, without blanks around them.

    A comma within brackets, braces or quotes belongs to the value, as in ``{conv1: exact, default: mbm},mbm-t8``.
    What is opened and not closed goes on to the end; quotes count only where a value begins or within brackets.
    """
    values, start = [], 0
    open_until: list[str] = []
    for i, character in enumerate(text):
        if open_until and character == open_until[-1]:
            open_until.pop()
        elif open_until and open_until[-1] in "'\"":
            continue
        elif character in _CLOSING:
            open_until.append(_CLOSING[character])
        elif character in "'\"" and (open_until or not text[start:i].strip()):
            open_until.append(character)
        elif character == "," and not open_until:
            values.append(text[start:i].strip())
            start = i + 1
    return [*values, text[start:].strip()]
