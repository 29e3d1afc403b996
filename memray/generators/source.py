"""Functions of Python's standard library: source that people wrote, and that lies on every machine."""

import ast
import functools
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from memray.generators.sample import Generator, Purpose, Sample, random_generator

Function = ast.FunctionDef | ast.AsyncFunctionDef

BODY_LINES = range(2, 17)
"""Lines of a body: one would leave next to nothing to recite, and long ones are not read whole by small models."""

# Tests, which are one function a thousand times; and what some installations leave out, or what is mostly tables.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "tkinter", "turtledemo", "encodings", "pydoc_data"}


@dataclass(frozen=True, kw_only=True)
class PythonSource(Generator):
    """A function of the standard library of the Python that runs: the prefix is its signature, the reference its body.

    Both are dedented, each by itself, and a line end parts them: put four blanks before every line of a body, and the
    function compiles. Docstrings are left out, for they are prose, and would be most of what is to be recited;
    comments stay. No two functions of a corpus have the same signature, or the same body: of those that do, the first
    is taken. None stands within another, and none has a string of several lines, which dedenting would change.

    The order is random, and that is all that the seed decides. Another version of Python has another library, as has
    now and then another build: there a seed gives other samples, and the digest of token ids that is logged with every
    trial tells the corpora apart.
    """

    # Python 3.11 has 4,815 of them, 3.12 has 4,602, 3.13 has 4,678: what is promised must be known before any is read.
    limit: ClassVar[int] = 4400

    def _samples(self, num_samples: int, seed: int) -> list[Sample]:
        functions = library_functions()
        if len(functions) < self.limit:
            raise ValueError(
                f"the standard library must have {self.limit} functions of {BODY_LINES[0]} to {BODY_LINES[-1]} lines, "
                f"but that of Python {platform.python_version()} in {_library()} has {len(functions)}; run one whose "
                "library is complete, as source"
            )
        order = random_generator(seed, Purpose.SOURCE_ORDER).permutation(len(functions))
        return [functions[which] for which in order[:num_samples].tolist()]


@functools.cache
def library_functions() -> Sequence[Sample]:
    """Every function that can be a sample, in the order of module names and lines; read once a process."""
    found: dict[str, str] = {}
    bodies: set[str] = set()
    for path in library_modules():
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.split("\n")  # not splitlines, which takes a form feed for a line end
        for function in _functions(ast.parse(source).body):
            parts = _parts(function, lines)
            if parts and parts[0] not in found and parts[1] not in bodies:
                found[parts[0]] = parts[1]
                bodies.add(parts[1])
    return [Sample(signature, f"\n{body}") for signature, body in found.items()]


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def library_modules() -> Iterator[Path]:
    """The files of the library, none of what else lies in its folder."""
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        path = _library() / name
        if path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")
        elif path.is_dir():
            inside = (each for each in path.rglob("*.py") if not _SKIPPED & set(each.relative_to(path).parts))
            yield from sorted(inside, key=Path.as_posix)


def _functions(statements: Sequence[ast.stmt]) -> Iterator[Function]:
    """Those of a module and of its classes, none within another."""
    for statement in statements:
        if isinstance(statement, Function):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            yield from _functions(statement.body)


def _parts(function: Function, lines: Sequence[str]) -> tuple[str, str] | None:
    """Signature and body, or nothing where the function is no sample."""
    first = function.body[0]
    before = lines[function.lineno - 1 : first.lineno - 1]
    is_documented = ast.get_docstring(function, clean=False) is not None
    begin = (first.end_lineno or first.lineno) if is_documented else first.lineno - 1
    within = lines[begin : function.end_lineno]
    while within and not within[0].strip():
        within = within[1:]
    # One line may hold all; a comment, or what decorates the first statement, may stand before it.
    if not before or not before[-1].endswith(":") or len(within) not in BODY_LINES:
        return None
    signature, body = _dedented(before), _dedented(within)
    if signature is None or body is None:
        return None
    text = signature + body
    is_plain = text.isascii() and not any(mark in text for mark in ('"""', "'''", "\\\n", "\t", "\f"))
    return (signature, body) if is_plain else None


def _dedented(lines: Sequence[str]) -> str | None:
    """The lines without what the first is indented by; nothing where another is indented by less."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    if any(line.strip() and not line.startswith(indent) for line in lines):
        return None
    return "\n".join(line[len(indent) :].rstrip() for line in lines)
