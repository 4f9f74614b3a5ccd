"""The tune file: what `llmkern tune` measured on one card, as JSON. The format is in docs/gpu.md.

Where it lies: LLMKERN_TUNE_FILE, else tune-<card>.json in $XDG_CACHE_HOME/llmkern, which is
~/.cache/llmkern. LLMKERN_TUNE_FILE set to nothing: no file is read. A file of another card, of
another version of llmkern or of another format is passed over with a warning; one that is broken is
an error.
"""

import json
import math
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from llmkern.choice import BACKENDS, OPS, Measured
from llmkern.errors import TuneFileError, TuneWarning
from llmkern.version import __version__

FORMAT = 2
VARIABLE = "LLMKERN_TUNE_FILE"
SIZES = {"norm": 2, "attention": 4, "linear": 3}  # numbers in a row's size (choice.size_of)


class Tuned(NamedTuple):
    """The contents of a file; `rows` only where the format is ours."""

    format: int
    llmkern: str
    card: str
    torch: str
    triton: str | None
    measured: str  # date and time
    direction: str  # "forward", or "forward+backward"
    rows: tuple[Measured, ...]


def path(card: str) -> Path | None:
    """Where the file of a card lies; None where reading is turned off or nobody has a home."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # a user that the system does not know
            return None
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return Path(cache) / "llmkern" / f"tune-{name}.json"


def read(file: Path) -> Tuned:
    """The checked contents of a file.

    Raises:
        TuneFileError: it cannot be read, or is not what `llmkern tune` writes.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TuneFileError(f"{file} cannot be read as a tune file: {error}") from error
    check = _Check(file)
    check(isinstance(data, dict), "it", "an object", data)
    check(_is(data.get("format"), int), "format", "a whole number", data.get("format"))
    if data["format"] != FORMAT:
        return Tuned(data["format"], "", "", "", None, "", "", ())
    texts = [name for name, kind in Tuned.__annotations__.items() if kind is str]
    for name in texts:
        check(_is(data.get(name), str), name, "a text", data.get(name))
    check(_is(data.get("triton"), str, type(None)), "triton", "a text or null", data.get("triton"))
    check(_is(data.get("rows"), list), "rows", "a list", data.get("rows"))
    rows = tuple(_row(row, f"rows[{n}]", check) for n, row in enumerate(data["rows"]))
    return Tuned(FORMAT, rows=rows, triton=data["triton"], **{name: data[name] for name in texts})


class _Check:
    """Calls raise unless the condition holds."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, condition: bool, name: str, rule: str, got: Any) -> None:
        if not condition:
            raise TuneFileError(
                f"{self.file} is not a tune file: {name} must be {rule}, got {got!r} "
                "(`llmkern tune` writes a new one)"
            )


def _is(value: Any, *kinds: type) -> bool:
    """isinstance, with True and False no numbers."""
    return type(value) in kinds


def _row(row: Any, name: str, check: _Check) -> Measured:
    check(_is(row, dict), name, "an object", row)
    op, kind, size, us, choice = (row.get(field) for field in Measured._fields)
    check(op in OPS, f"{name}.op", f"one of {', '.join(OPS)}", op)
    kinds = _is(kind, dict) and all(_is(value, str, bool) for value in kind.values())
    check(kinds, f"{name}.kind", "an object of texts, true and false", kind)
    whole = _is(size, list) and all(_is(n, int) and n >= 0 for n in size)
    check(whole and len(size) == SIZES[op], f"{name}.size", f"{SIZES[op]} whole numbers", size)
    timed = _is(us, dict) and all(
        _is(time, int, float) and 0 < time < math.inf for time in us.values()
    )
    check(timed and set(us) == set(BACKENDS), f"{name}.us",
          f"a positive number for each of {', '.join(BACKENDS)}", us)  # fmt: skip
    check(choice in BACKENDS, f"{name}.choice", f"one of {', '.join(BACKENDS)}", choice)
    return Measured(op, kind, tuple(size), us, choice)


def stale(tuned: Tuned, card: str) -> str | None:
    """Why the rows do not speak for this card and this version; None if they do."""
    if tuned.format != FORMAT:
        return f"it has format {tuned.format}, this version reads {FORMAT}"
    if tuned.llmkern != __version__:
        return f"it was measured with llmkern {tuned.llmkern}, this is {__version__}"
    if tuned.card != card:
        return f"it was measured on {tuned.card}, this is {card}"
    return None


def load(card: str) -> tuple[Tuned, Path] | None:
    """What was measured on a card, and where that stands; None where nothing was.

    Raises:
        TuneFileError: the file is broken.
    """
    file = path(card)
    if file is None or not _exists(file):
        if file is not None and os.environ.get(VARIABLE):
            warnings.warn(f"{VARIABLE}: there is no file {file}", TuneWarning, stacklevel=2)
        return None
    tuned = read(file)
    reason = stale(tuned, card)
    if reason is not None:
        said = f"{file} is not used: {reason}; `llmkern tune` writes a new one"
        warnings.warn(said, TuneWarning, stacklevel=2)
        return None
    return tuned, file


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError as error:  # a folder that this user may not enter
        warnings.warn(f"tune files are not used: {error}", TuneWarning, stacklevel=3)
        return False


def write(file: Path, tuned: Tuned) -> None:
    """Write the file whole or not at all: readers see the old one or the new one.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    data = tuned._asdict() | {"rows": [row._asdict() for row in tuned.rows]}
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, made = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(data, out, indent=1)
        os.replace(made, file)
    finally:
        Path(made).unlink(missing_ok=True)


def merged(old: Tuned | None, new: Tuned) -> Tuned:
    """`new` with the rows of `old` that it has not measured again."""
    if old is None or stale(old, new.card) or old.direction != new.direction:
        return new
    known = {_key(row) for row in new.rows}
    kept = tuple(row for row in old.rows if _key(row) not in known)
    return new._replace(rows=kept + new.rows)


def _key(row: Measured) -> tuple:
    return row.op, tuple(sorted(row.kind.items())), row.size
