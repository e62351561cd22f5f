"""Text -> tokens, in a cache; which documents are held out."""

import hashlib
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.core.fields import checked
from convert.core.files import parse_json, sealed, sha256, unsealed, write_text
from convert.core.places import cache_folder, path_of
from convert.data.prompts import leading
from convert.models.loading import is_hub_reachable

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
ARRAYS = ("train", "train_starts", "held_out", "held_out_starts")
HELD_OUT_SHARE = 1 / 16  # of the documents, by a hash of their key (ours)

# What every distribution of Python 3.11 and later ships: no tests, idlelib, tkinter, venv or ensurepip (Debian packs
# them apart), nothing removed by 3.14, no tables of data (encodings, pydoc_data).
STDLIB = """
_collections_abc _compat_pickle _markupbase _py_abc _pydecimal _pyio _strptime _threading_local _weakrefset abc
antigravity argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd code codecs codeop collections colorsys
compileall concurrent configparser contextlib contextvars copy copyreg csv ctypes curses dataclasses datetime dbm decimal
difflib dis doctest email enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext
glob graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword linecache locale
logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers opcode operator optparse os pathlib
pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue
quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket
socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny tarfile tempfile
textwrap this threading timeit token tokenize tomllib trace traceback tracemalloc tty types typing unittest urllib uuid
warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
""".split()


@dataclass(frozen=True)
class Corpus:
    """Where text comes from. `files` are read in order; `hub` is (name, config) of a `datasets` data set."""

    spec: str
    root: Path | None = None
    files: tuple[Path, ...] = ()
    hub: tuple[str, str | None] | None = None

    def documents(self) -> Iterator[tuple[str, str]]:
        """(key, text) pairs. The key decides the split, so it depends on no absolute path."""
        if self.hub:
            yield from _hub_documents(*self.hub)
        for file in self.files:
            key = file.relative_to(self.root).as_posix()
            text = _read_text(file)
            if file.suffix == ".jsonl":
                for number, line in enumerate(text.split("\n"), 1):
                    if line.strip():
                        yield f"{key}:{number}", _json_text(file, number, line)
            elif text.strip():
                yield key, text

    def places(self) -> list[Path]:
        """On this machine: what a run's folder must be apart from."""
        if self.hub:
            return [Path(self.hub[0])]
        if self.spec == "stdlib":
            return [self.root]
        inside = {file.parent for file in self.files if file.parent != self.root} | {
            file for file in self.files if file.is_symlink()
        }
        return [path_of(self.spec, "--data"), *inside]

    def fingerprint(self) -> str:
        """Changes when any of the text does; for a hub data set, when its name or configuration does."""
        digest = hashlib.sha256(repr(self.hub).encode())
        for file in self.files:
            digest.update(_bytes(file.relative_to(self.root).as_posix()) + b"\0")
            digest.update(bytes.fromhex(sha256(file)))
        return digest.hexdigest()[:16]


@checked
def corpus(spec: str | Path) -> Corpus:
    """ "stdlib", a file or folder of .txt/.md/.py/.jsonl, or "hub:NAME[:CONFIG]"."""
    spec = str(spec)
    if spec == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = [p for name in STDLIB for p in (root / f"{name}.py", root / name) if p.exists()]
        files = [f for p in found for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]
        skipped = {"test", "tests", "__pycache__"}
        return Corpus(spec, root, tuple(f for f in files if not skipped & set(f.relative_to(root).parts)))
    if spec.startswith("hub:"):
        name, _, config = spec[4:].partition(":")
        if not name:
            raise UserError(f"A hub data set is written hub:NAME or hub:NAME:CONFIG; got {spec!r}.")
        return Corpus(spec, hub=(name, config or None))
    path = path_of(spec, "--data")
    if not path.exists():
        raise UserError(
            f"There is no data at {spec!r}. Give 'stdlib', a file or folder of {', '.join(TEXT_SUFFIXES)}, or hub:NAME."
        )
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
    """Without the mark that some editors put at the start (U+FEFF)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"Data must be UTF-8 text; {file} is not (byte {error.start}). Convert or remove it.") from None
    if "\0" in text:
        raise UserError(f"Data must be text; {file} holds NUL bytes, so it looks binary. Remove it.")
    return text


def _json_text(file: Path, number: int, line: str) -> str:
    where = f"Line {number} of {file}"
    row = parse_json(line, where, parse_int=float)  # a number may have thousands of digits: only the text counts
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise UserError(f'{where} must be a string or an object with a "text" field.')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character. Mend or remove it."
        ) from None
    return text


def _hub_documents(name: str, config: str | None) -> Iterator[tuple[str, str]]:
    try:
        import datasets
    except ImportError:
        raise UserError("Hub data sets need the `datasets` package: pip install -e '.[data]'.") from None
    unreachable = not is_hub_reachable()
    try:
        with hub_offline(datasets.config, when=unreachable):
            rows = datasets.load_dataset(name, config, split="train", streaming=True)
        empty = 0
        for number, row in enumerate(rows):
            if "text" not in row:
                raise UserError(f"Data set {name} has no 'text' column; it has {', '.join(row)}.")
            if row["text"] is None:  # a stream is long: what was read so far is worth more than the row
                empty += 1
            elif isinstance(row["text"], str):
                yield f"{number}", row["text"]
            else:
                raise UserError(
                    f"The 'text' of data set {name} must be strings; row {number} has a {type(row['text']).__name__}."
                )
        if empty:
            print(f"{empty:,} rows of {name} have no text (null); they were left out.")
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:  # ValueError: no such configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "the local cache lacks it and the hub gives no answer" if unreachable else reason
        raise UserError(
            f"The data set {name!r} could not be read ({reason}). Without network use --data stdlib or --data FOLDER."
        ) from None


@contextmanager
def hub_offline(settings, when: bool) -> Iterator[None]:
    """`datasets` looks into its cache at once. By itself it would first try the hub for half a minute, and say so each
    time."""
    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = before or when
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before


@dataclass(frozen=True)
class Tokens:
    """Token ids of whole documents, one after another. `starts`: where each begins."""

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TokenData:
    train: Tokens
    held_out: Tokens
    fingerprint: str
    text_bytes: int


def is_held_out(key: str) -> bool:
    """Whether a document belongs to the held-out split: by a hash of its key, the same on every machine."""
    return int.from_bytes(hashlib.sha256(_bytes(key)).digest()[:8]) / 2**64 < HELD_OUT_SHARE


def _bytes(name: str) -> bytes:
    """Of a file's name, also of one that is not UTF-8, the same in every locale."""
    return name.encode("utf-8", "surrogateescape")


def tokenizer_fingerprint(tokenizer) -> str:
    """Of what decides the ids: the serialised tokenizer, without the padding and truncation of its last call, and the
    end token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps([state, tokenizer.eos_token_id]).encode()).hexdigest()[:16]


@checked
def tokenize(
    source: Corpus, tokenizer: PreTrainedTokenizerBase, limit: Annotated[int, (1, 1e14)] | None = None
) -> TokenData:
    """Tokenise once into a memory-mapped cache; later calls read it. `limit` stops a hub stream after so many tokens.

    A damaged cache is set aside and rebuilt."""
    limit = limit if source.hub else None
    key = hashlib.sha256(f"{source.fingerprint()} {tokenizer_fingerprint(tokenizer)} {limit} 2".encode()).hexdigest()[
        :20
    ]
    folder = cache_folder() / "tokens" / key
    if folder.exists() and (damage := _cache_damage(folder)):
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{key}.damaged-"))
        folder.rename(aside)
        print(f"The token cache {folder} is damaged ({damage}); it was moved to {aside.name} and is rebuilt.")
    if not folder.exists():
        try:
            _write_cache(source, tokenizer, limit, folder)
        except OSError as error:
            raise UserError(
                f"The tokens must be cached, and {folder.parent} cannot take them ({error}). Free some space, or set"
                " CONVERT_CACHE."
            ) from error
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    parts = [
        Tokens(np.load(folder / f"{part}.npy", mmap_mode="r"), np.load(folder / f"{part}_starts.npy"))
        for part in ("train", "held_out")
    ]
    return TokenData(*parts, fingerprint=key, text_bytes=meta["text_bytes"])


def _write_cache(source: Corpus, tokenizer, limit: int | None, folder: Path) -> None:
    """Tokens go to disk as they come: a data set may be larger than the memory."""
    dtype = (
        np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    )  # ids may be larger than their number
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.writing-"))
    try:
        starts, text_bytes = _write_raw(source, tokenizer, limit, aside, dtype)
        if not text_bytes:
            raise UserError(f"The data {source.spec!r} holds no text.")
        raw = {
            part: np.memmap(aside / part, dtype, "r") if ends[-1] else np.empty(0, dtype)
            for part, ends in starts.items()
        }
        if all(len(ids) for ids in raw.values()):
            arrays = dict(raw) | {f"{part}_starts": np.array(ends[:-1]) for part, ends in starts.items()}
        else:  # too few documents to split by document: the last sixteenth of the tokens is held out
            part = "train" if len(raw["train"]) else "held_out"
            stream, begins = raw[part], np.array(starts[part][:-1])
            cut = int(len(stream) * (1 - HELD_OUT_SHARE))
            arrays = {"train": stream[:cut], "train_starts": begins[begins < cut]}
            arrays |= {"held_out": stream[cut:], "held_out_starts": np.concatenate([[0], begins[begins > cut] - cut])}
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        for part in raw:
            (aside / part).unlink()
        digests = {name: sha256(aside / f"{name}.npy") for name in arrays}
        meta = {"source": source.spec, "text_bytes": text_bytes, "sha256": digests}
        write_text(aside / "meta.json", json.dumps(sealed(meta)))
        if not folder.exists():  # another process may have finished first, with the same content
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_raw(source: Corpus, tokenizer, limit: int | None, aside: Path, dtype) -> tuple[dict[str, list[int]], int]:
    """Files `train` and `held_out` of bare ids. Where their documents start, and the end; the bytes of text read."""
    starts, text_bytes, keys, texts = {"train": [0], "held_out": [0]}, 0, [], []
    front = leading(tokenizer)
    with ExitStack() as stack:
        files = {part: stack.enter_context((aside / part).open("wb")) for part in starts}
        bar = stack.enter_context(tqdm(total=limit, unit="tok", unit_scale=True, desc="tokenise", delay=3))

        def flush():
            found = tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"] if texts else []
            for key, ids in zip(keys, found, strict=True):
                ids = front + ids
                if ids[-1:] != [tokenizer.eos_token_id]:
                    ids = ids + [tokenizer.eos_token_id]
                part = "held_out" if is_held_out(key) else "train"
                files[part].write(np.array(ids, dtype).tobytes())
                starts[part].append(starts[part][-1] + len(ids))
                bar.update(len(ids))
            keys.clear(), texts.clear()

        for key, text in source.documents():
            keys.append(key), texts.append(text)
            text_bytes += len(text.encode())
            if len(keys) == 64:
                flush()
                if limit and starts["train"][-1] >= limit:
                    break
        flush()
    return starts, text_bytes


def _cache_damage(folder: Path) -> str | None:
    try:
        meta = unsealed(parse_json((folder / "meta.json").read_bytes(), "meta.json"))
        if not isinstance(meta["text_bytes"], int):
            return "meta.json changed"
        changed = [f"{name}.npy" for name in ARRAYS if sha256(folder / f"{name}.npy") != meta["sha256"][name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed" if changed else None
