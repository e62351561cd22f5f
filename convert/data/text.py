"""Turning text into tokens, once, in a cache."""

import hashlib
import json
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.core.fields import Range, checked
from convert.core.files import parse_json, sealed, sha256, unsealed, write_text
from convert.core.places import cache_folder
from convert.data.corpus import HELD_OUT_SHARE, Corpus, is_held_out
from convert.data.prompts import leading

ARRAYS = ("train", "train_starts", "held_out", "held_out_starts")


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


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of what decides the ids: the serialised tokenizer, without the padding and truncation of its last
    call, and the end token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps([state, tokenizer.eos_token_id]).encode()).hexdigest()[:16]


@checked
def tokenize(
    source: Corpus, tokenizer: PreTrainedTokenizerBase, limit: Annotated[int, Range(1, 1e14)] | None = None
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
    train, held_out = (
        Tokens(np.load(folder / f"{part}.npy", mmap_mode="r"), np.load(folder / f"{part}_starts.npy"))
        for part in ("train", "held_out")
    )
    return TokenData(train, held_out, fingerprint=key, text_bytes=meta["text_bytes"])


def _write_cache(source: Corpus, tokenizer: Any, limit: int | None, folder: Path) -> None:
    """Tokens go to disk as they come: a data set may be larger than the memory."""
    largest = max(tokenizer.get_vocab().values())  # ids may be larger than their number
    dtype = np.uint16 if largest < 1 << 16 else np.uint32
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


def _write_raw(
    source: Corpus, tokenizer: Any, limit: int | None, aside: Path, dtype: type
) -> tuple[dict[str, list[int]], int]:
    """Write files `train` and `held_out` of bare ids; return where their documents start and where the last one ends,
    and the bytes of text read."""
    starts, text_bytes = {"train": [0], "held_out": [0]}, 0
    keys: list[str] = []
    texts: list[str] = []
    front = leading(tokenizer)
    with ExitStack() as stack:
        files = {part: stack.enter_context((aside / part).open("wb")) for part in starts}
        bar = stack.enter_context(tqdm(total=limit, unit="tok", unit_scale=True, desc="tokenise", delay=3))

        def flush() -> None:
            found = tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"] if texts else []
            for key, ids in zip(keys, found, strict=True):
                ids = front + ids
                if ids[-1:] != [tokenizer.eos_token_id]:
                    ids = ids + [tokenizer.eos_token_id]
                part = "held_out" if is_held_out(key) else "train"
                files[part].write(np.array(ids, dtype).tobytes())
                starts[part].append(starts[part][-1] + len(ids))
                bar.update(len(ids))
            keys.clear()
            texts.clear()

        for key, text in source.documents():
            keys.append(key)
            texts.append(text)
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
