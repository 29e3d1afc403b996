"""What the answer to an unknown name is, the same wherever a user may give one."""

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: str, known: Iterable[str], *, plural: str | None = None) -> ValueError:
    """The error that answers an unknown name with the nearest known one and the list of all.

    Args:
        what: What was to be named, such as "model family".
        name: The name that was given.
        known: Every name that would have done, in the order in which they are to be listed.
        plural: Heads the list; `what` with an s unless given.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> print(unknown_name("family", "pythai", ["gpt2", "pythia"], plural="families"))
        unknown family 'pythai'; did you mean 'pythia'? families: gpt2, pythia
    """
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return ValueError(f"unknown {what} {name!r}{suggestion} {plural or what + 's'}: {', '.join(known)}")
