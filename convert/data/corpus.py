"""Sources of text, and which of their documents are held out.

This module needs the standard library alone, so that a command can refuse wrong data before it imports anything large.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.core.errors import UserError
from convert.core.fields import checked
from convert.core.files import parse_json, sha256
from convert.core.places import path_of
from convert.data.hub import hub_data

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
SAMPLED = "teacher:"  # and a file of prompts
HUB = ("hub", "stream")  # data sets of the hub: tokenised onto the disk first, or read while they are trained on
HELD_OUT_SHARE = 1 / 16  # of the documents, by a hash of their key (ours)

# What every distribution of Python 3.11 and later ships: no tests, idlelib, tkinter, venv or ensurepip (Debian packs
# them apart), nothing removed by 3.14, no tables of data (encodings, pydoc_data).
STDLIB = """
_collections_abc _compat_pickle _markupbase _py_abc _pydecimal _pyio _strptime _threading_local _weakrefset abc
antigravity argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd code codecs codeop collections colorsys
compileall concurrent configparser contextlib contextvars copy copyreg csv ctypes curses dataclasses datetime dbm
decimal difflib dis doctest email enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass
gettext glob graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword linecache
locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers opcode operator optparse os
pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr
pydoc queue quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib
socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny
tarfile tempfile textwrap this threading timeit token tokenize tomllib trace traceback tracemalloc tty types typing
unittest urllib uuid warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
""".split()


@dataclass(frozen=True)
class Corpus:
    """A source of text or of conversations. `files` are read in order; `hub` is (name, configuration) of a data set for
    `datasets`. `is_streamed`: it is read while it is trained on, and never lies on the disk as a whole. `is_sampled`:
    the teacher completes the prompts in the files, or without files those of the tasks."""

    spec: str
    root: Path = Path()
    files: tuple[Path, ...] = ()
    hub: tuple[str, str | None] | None = None
    is_streamed: bool = False
    is_sampled: bool = False

    def documents(self) -> Iterator[tuple[str, str]]:
        """(key, text) pairs. The key decides the split, so it depends on no absolute path. Of what is streamed, whose
        rows have no numbers that count, it is the text."""
        if self.hub:
            yield from self._streamed() if self.is_streamed else _hub_documents(*self.hub)
        for file in self.files:
            key = file.relative_to(self.root).as_posix()
            if file.suffix == ".jsonl":
                yield from ((f"{key}:{number}", _json_text(row, where)) for number, where, row in _json_rows(file))
            elif (text := _read_text(file)).strip():
                yield key, text

    def _streamed(self) -> Iterator[tuple[str, str]]:
        """Each text as its own key. Raises UserError at the end of data of which nothing is held out."""
        assert self.hub is not None
        read = held_out = 0
        for text in (text for _, text in _hub_documents(*self.hub) if text):
            read, held_out = read + 1, held_out + is_held_out(text)
            yield text, text
        if read and not held_out:
            raise UserError(
                f"A stream holds out a sixteenth of its documents, by a hash of each; of the {read} documents of"
                f" {self.hub[0]} that is none. Give hub:{self.hub[0]}, which holds out a part of the text."
            )

    def rows(self) -> Iterator[tuple[str, str, Any]]:
        """(key, where it stands, value) of every line of the .jsonl files, or row of the hub data set."""
        if self.hub:
            for number, row in _hub_rows(*self.hub):
                yield f"{number}", f"Row {number} of {self.hub[0]}", row
        for file in self.files:
            if file.suffix == ".jsonl":
                key = file.relative_to(self.root).as_posix()
                yield from ((f"{key}:{number}", where, row) for number, where, row in _json_rows(file))

    def places(self) -> list[Path]:
        """The files and folders on this machine that hold the text: a run's folder must be apart from them."""
        if self.hub:
            return [Path(self.hub[0])]
        if self.spec == "stdlib":
            return [self.root]
        if not self.files:
            return []
        inside = {file.parent for file in self.files if file.parent != self.root} | {
            file for file in self.files if file.is_symlink()
        }
        return [path_of(self.spec.removeprefix(SAMPLED), "--data"), *inside]

    def fingerprint(self) -> str:
        """A hash that changes when any of the text does; for a hub data set, when its name or configuration does."""
        digest = hashlib.sha256((repr(self.hub) + " streamed" * self.is_streamed).encode())
        for file in self.files:
            digest.update(_bytes(file.relative_to(self.root).as_posix()) + b"\0")
            digest.update(bytes.fromhex(sha256(file)))
        return digest.hexdigest()[:16]


@checked
def check_exists(spec: str | Path) -> None:
    """Raises UserError where `spec` names no text, by one look at the disk."""
    spec = str(spec)
    kind, colon, name = spec.partition(":")
    if colon and kind in HUB:
        if not name.partition(":")[0]:
            raise UserError(f"A hub data set is written {kind}:NAME or {kind}:NAME:CONFIG; got {spec!r}.")
    elif spec.startswith(SAMPLED):
        if not spec.endswith(".jsonl") or not path_of(spec.removeprefix(SAMPLED), "--data").is_file():
            raise UserError(
                f"Prompts for the teacher are a file, written teacher:FILE.jsonl; there is none at {spec!r}."
            )
    elif spec not in ("stdlib", "teacher") and not path_of(spec, "--data").exists():
        raise UserError(
            f"There is no data at {spec!r}. Give 'stdlib', a file or folder of {', '.join(TEXT_SUFFIXES)}, hub:NAME or"
            " stream:NAME; training steps also take 'teacher' and teacher:FILE.jsonl."
        )


def whole_name(spec: str) -> str:
    """The name of data, with a path in it written in full."""
    head = SAMPLED if spec.startswith(SAMPLED) else ""
    place = Path(spec.removeprefix(head)).expanduser()
    return spec if spec in ("stdlib", "teacher") or not place.exists() else f"{head}{place.absolute()}"


@checked
def corpus(spec: str | Path) -> Corpus:
    """The data that `spec` names: "stdlib", a file or folder of .txt/.md/.py/.jsonl, "hub:NAME[:CONFIG]",
    "stream:NAME[:CONFIG]", or what the teacher writes after the prompts of a file ("teacher:FILE.jsonl") or of the
    tasks ("teacher"). Raises UserError where there is none; nothing is read yet."""
    spec = str(spec)
    check_exists(spec)
    if spec == "teacher":
        return Corpus(spec, is_sampled=True)
    if spec.startswith(SAMPLED):
        file = path_of(spec.removeprefix(SAMPLED), "--data")
        return Corpus(spec, file.parent, (file,), is_sampled=True)
    if spec == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = [p for name in STDLIB for p in (root / f"{name}.py", root / name) if p.exists()]
        files = [f for p in found for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]
        skipped = {"test", "tests", "__pycache__"}
        return Corpus(spec, root, tuple(f for f in files if not skipped & set(f.relative_to(root).parts)))
    if spec.startswith(tuple(f"{kind}:" for kind in HUB)):
        kind, _, rest = spec.partition(":")
        name, _, config = rest.partition(":")
        return Corpus(spec, hub=(name, config or None), is_streamed=kind == "stream")
    path = path_of(spec, "--data")
    root = path if path.is_dir() else path.parent
    files = sorted(f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file()) if path.is_dir() else [path]
    if files == [path] and not path.is_file():  # a pipe would be waited for, a device never ends
        raise UserError(f"Data is read from files and folders; {spec!r} is neither. Write it to a file first.")
    if not files:
        raise UserError(f"The folder {spec!r} has no {', '.join(TEXT_SUFFIXES)} files.")
    if files[0].suffix not in TEXT_SUFFIXES:
        raise UserError(f"Data files end in {', '.join(TEXT_SUFFIXES)}; got {files[0].name!r}.")
    return Corpus(spec, root, tuple(files))


def _read_text(file: Path) -> str:
    """The text of a file, without the mark that some editors put at its start (U+FEFF)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"Data must be UTF-8 text; {file} is not (byte {error.start}). Convert or remove it.") from None
    if "\0" in text:
        raise UserError(f"Data must be text; {file} holds NUL bytes, so it looks binary. Remove it.")
    return text


def _json_rows(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place in words and value of every line that is not blank."""
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if line.strip():
            where = f"Line {number} of {file}"
            # a number may have thousands of digits: only texts count
            yield number, where, parse_json(line, where, parse_int=float)


def _json_text(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise UserError(f'{where} must be a string or an object with a "text" field.')
    check_characters(text, where)
    return text


def check_characters(text: str, where: str) -> None:
    """Raises UserError where the text holds half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character. Mend or remove it."
        ) from None


def _hub_documents(name: str, config: str | None) -> Iterator[tuple[str, str]]:
    empty = 0
    for number, row in _hub_rows(name, config):
        text = text_of(row, name, f"row {number}")
        if text is None:  # a stream is long: what was read so far is worth more than the row
            empty += 1
        else:
            yield f"{number}", text
    if empty:
        print(f"{empty:,} rows of {name} have no text (null); they were left out.")


def text_of(row: dict[str, Any], name: str, place: str = "a row") -> str | None:
    """The text of a row, None where it has none. Raises UserError for a row of another kind."""
    if "text" not in row:
        raise UserError(f"Data set {name} has no 'text' column; it has {', '.join(row)}.")
    text: Any = row["text"]
    if not isinstance(text, str | None):
        raise UserError(f"The 'text' of data set {name} must be strings; {place} has a {type(text).__name__}.")
    return text


def _hub_rows(name: str, config: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and columns of every row, streamed."""
    with hub_data(name, config, "Without network use --data stdlib or --data FOLDER.", split="train") as rows:
        yield from enumerate(rows)


def is_held_out(key: str) -> bool:
    """Whether a document belongs to the held-out split: by a hash of its key, the same on every machine."""
    return int.from_bytes(hashlib.sha256(_bytes(key)).digest()[:8]) / 2**64 < HELD_OUT_SHARE


def _bytes(name: str) -> bytes:
    """The bytes of a file's name, the same in every locale, also of a name that is not UTF-8."""
    return name.encode("utf-8", "surrogateescape")
