"""Text that is streamed: chunks are the same whoever makes them and when, and nothing held out is in them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub.errors import HTTPError

from convert.core.errors import UserError
from convert.data import hub
from convert.data import stream as streams
from convert.data.batches import StreamBatches
from convert.data.corpus import Corpus, corpus, is_held_out
from convert.data.stream import Stream, stream

pytest.importorskip("datasets")

TEXTS = [f"Text {i} of many: " + "a few words that come again. " * (1 + i % 13) for i in range(300)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(hub, "is_hub_reachable", lambda: False)


def source(folder, num_files: int, rows: list[dict] | None = None) -> Corpus:
    """A data set of so many files, whose rows are dealt out."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": text} for text in TEXTS] if rows is None else rows
    for i in range(num_files):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[i::num_files]))
    return corpus(f"stream:{folder}")


def chunks(of: Stream, numbers) -> list[bytes]:
    return [of.of_epoch(i).ids.tobytes() + of.of_epoch(i).starts.tobytes() for i in numbers]


@pytest.mark.parametrize("num_files, num_parts", [(8, 8), (3, 1), (12, 4), (1, 1)])
def test_parts_have_equally_many_files(num_files, num_parts, tokenizer, tmp_path):
    made = Stream(source(tmp_path / "data", num_files), tokenizer, 1000)
    assert made.num_parts == num_parts
    tokens = made.of_epoch(0)
    assert len(tokens) == len(made) == 1000 // num_parts * num_parts
    assert tokens.starts[0] == 0 and (np.diff(tokens.starts) > 0).all() and tokens.starts[-1] < len(tokens)


def test_a_chunk_is_the_same_in_any_order_after_any_loss(tokenizer, tmp_path):
    """Made in turn, made anew from where its parts stand, and made where nothing is known of those before."""
    data = source(tmp_path / "data", 4)
    straight = Stream(data, tokenizer, 1200)
    wanted = chunks(straight, range(9))  # of which the data are read more than once
    assert len(set(wanted)) == 9
    kept = {file.name[:6] for file in straight.folder.glob("*.npz")}
    assert len(list(straight.folder.glob("*.json"))) == 4 * 9
    assert kept == {"000006", "000007", "000008"}

    assert chunks(Stream(data, tokenizer, 1200), [7, 3]) == [wanted[7], wanted[3]]
    for file in straight.folder.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:-9] if "-1" in file.name else b"")
    assert chunks(Stream(data, tokenizer, 1200), [8]) == [wanted[8]]
    shutil.rmtree(straight.folder)
    assert chunks(Stream(data, tokenizer, 1200), [8]) == [wanted[8]]


def test_a_position_leads_there_without_what_came_before(tokenizer, tmp_path, monkeypatch):
    data = source(tmp_path / "data", 4)
    batches = StreamBatches(Stream(data, tokenizer, 1200), 16, 8, 3, 51)
    wanted, position = batches(50).input_ids, json.loads(json.dumps(batches.position(50)))
    assert position["chunk"] > 3
    shutil.rmtree(batches.tokens.folder)
    again = StreamBatches(Stream(data, tokenizer, 1200), 16, 8, 3, 51)
    again.go_to(position)
    made, seen = Stream._made, []
    monkeypatch.setattr(Stream, "_made", lambda self, part, number: seen.append(number) or made(self, part, number))
    monkeypatch.setattr(Stream, "_note", lambda *_: None)
    assert (again(50).input_ids == wanted).all()
    assert min(seen) == position["chunk"]
    with pytest.raises(UserError, match=r"A run goes on with the data that it began with.* --fresh"):
        StreamBatches(Stream(data, tokenizer, 1600), 16, 8, 3).go_to(position)


def test_one_that_is_behind_makes_what_another_removed_and_no_more(tokenizer, tmp_path, monkeypatch):
    data = source(tmp_path / "data", 2)
    behind, ahead = Stream(data, tokenizer, 400), Stream(data, tokenizer, 400)
    wanted = chunks(behind, [0]) + chunks(ahead, range(9))[1:]
    made, seen = streams._taken, []
    monkeypatch.setattr(streams, "_taken", lambda *args: seen.append(args) or made(*args))
    assert chunks(behind, [1, 2]) == wanted[1:3]
    assert len(seen) == 4  # two parts of two chunks


def test_a_place_that_was_lost_long_ago_is_found_again(tokenizer, tmp_path):
    """Without a call for each chunk, of which there may be many thousands."""
    data = source(tmp_path / "data", 1)
    straight = Stream(data, tokenizer, 40)
    wanted = chunks(straight, [1500])
    for file in straight.folder.glob("*.json"):
        file.unlink()
    (straight.folder / "001500-0.npz").unlink()
    assert chunks(Stream(data, tokenizer, 40), [1500]) == wanted
    assert [file.name for file in straight.folder.glob("*.npz")] == ["001500-0.npz"]


def test_data_that_changed_are_other_data(tokenizer, tmp_path):
    before = StreamBatches(Stream(source(tmp_path / "data", 2), tokenizer, 400), 16, 2, 0)
    before(0)
    position = before.position(0)
    after = Stream(source(tmp_path / "data", 2, [{"text": f"other {text}"} for text in TEXTS]), tokenizer, 400)
    assert after.folder != before.tokens.folder
    with pytest.raises(UserError, match="A run goes on with the data that it began with"):
        after.go_to(position)


def test_no_chunk_is_begun_that_no_step_needs(tokenizer, tmp_path):
    made = Stream(source(tmp_path / "data", 2), tokenizer, 1200)
    batches = StreamBatches(made, 16, 10, 0, num_steps=10)  # 74 windows in a chunk
    begun = [sorted(made._coming) for step in range(10) if batches(step)]
    assert begun == [[0]] * 3 + [[0, 1]] * 4 + [[1]] * 3


def test_a_process_that_ends_does_not_wait_for_a_chunk(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(
        "import threading, time\nfrom convert.data.stream import Stream\n"
        "made = Stream.__new__(Stream)\nmade._coming, made._one_at_a_time = {}, threading.Lock()\n"
        "made._chunk = lambda number: time.sleep(60)\nmade.begin(0)\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=50)


def test_data_without_a_held_out_document_are_refused(tokenizer, tmp_path):
    rows = [{"text": text} for text in TEXTS if not is_held_out(text)][:70]
    with pytest.raises(UserError, match=r"of the 70 documents of .* that is none\. Give hub:"):
        stream(source(tmp_path / "data", 2, rows), tokenizer, 100)


def test_what_the_hub_says_in_the_middle_is_a_sentence(tokenizer, tmp_path, monkeypatch):
    made = Stream(source(tmp_path / "data", 1), tokenizer, 400)

    def broken(*_):
        raise HTTPError("the connection broke")
        yield

    monkeypatch.setattr(streams, "_groups", broken)
    with pytest.raises(UserError, match=r"could not be read \(.*\)\. Without network .* the same command goes on"):
        made.of_epoch(0)


def test_a_chunk_that_failed_ahead_of_time_is_tried_again(tokenizer, tmp_path, monkeypatch):
    made = Stream(source(tmp_path / "data", 1), tokenizer, 400)
    with monkeypatch.context() as patched:
        patched.setattr(Stream, "_chunk", lambda *_: 1 / 0)
        assert isinstance(made.begin(1).exception(), ZeroDivisionError)
    assert len(made.of_epoch(1).ids) == len(made)


def test_processes_make_a_chunk_together(tokenizer, tmp_path, monkeypatch):
    """Each begins with other parts, and what one made the other reads."""
    data = source(tmp_path / "data", 8)
    wanted, made, seen = chunks(Stream(data, tokenizer, 1600), [0]), Stream._made, []
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(streams, "world", lambda: 2)
    monkeypatch.setattr(Stream, "_made", lambda self, part, number: seen.append(part) or made(self, part, number))
    for rank in (1, 0):
        monkeypatch.setattr(streams, "rank", lambda rank=rank: rank)
        assert chunks(Stream(data, tokenizer, 1600), [0]) == wanted
    assert seen == [4, 5, 6, 7, 0, 1, 2, 3]


def test_every_document_is_read_once_before_any_again_and_none_that_is_held_out(tokenizer, tmp_path):
    data = source(tmp_path / "data", 2)
    held_out = [text for text in TEXTS if is_held_out(text)]
    assert 5 < len(held_out) < 60
    found = stream(data, tokenizer, 100_000)
    assert len(found.held_out.starts) == len(held_out)
    names = {tuple(tokenizer(text)["input_ids"]): text for text in TEXTS}
    read: list[str] = []
    small = Stream(data, tokenizer, 200)
    for i in range(40):
        tokens = small.of_epoch(i)
        half = len(tokens) // 2
        for begin, end in zip(tokens.starts, [*tokens.starts[1:], len(tokens)], strict=True):
            if end % half:  # not cut at the end of a part
                read.append(names[tuple(tokens.ids[begin : end - 1].tolist())])  # without the end token
    assert not set(read) & set(held_out)
    first = read[: len(read) // 3]
    assert len(first) == len(set(first))


def test_an_epoch_of_batches_has_every_window_of_a_chunk_once(tokenizer, tmp_path):
    made = Stream(source(tmp_path / "data", 2), tokenizer, 1200)
    batches = StreamBatches(made, 16, 7, 0)
    assert batches.per_epoch == 1200 // 16 - 1
    rows = [tuple(row) for step in range(22) for row in batches(step).input_ids.tolist()]
    for epoch in range(2):
        ids = made.of_epoch(epoch).ids.tolist()
        cuts = [[tuple(ids[i : i + 16]) for i in range(at, len(ids) - 15, 16)] for at in range(16)]
        mine = rows[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
        assert any(sorted(mine) == sorted(cut[: batches.per_epoch]) for cut in cuts)
    crossing = batches(10)  # windows 70 to 76, of which the last three are of the next chunk
    assert crossing.input_ids.shape == crossing.labels.shape == crossing.position_ids.shape == (7, 16)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"messages": []}] * 9, "has no 'text' column; it has messages"),
        ([{"text": 3}] * 9, r"must be strings; row 0 has a int"),
        ([{"text": ""}, {"text": None}] * 9, "holds no text"),
    ],
)
def test_rows_without_text_are_refused_before_training(rows, said, tokenizer, tmp_path):
    with pytest.raises(UserError, match=said):
        stream(source(tmp_path / "data", 2, rows), tokenizer, 1000)


def test_a_part_without_text_is_refused(tokenizer, tmp_path):
    data = source(tmp_path / "data", 2, [{"text": "one"}, {"text": None}] * 40)
    with pytest.raises(UserError, match="Part 2 of 2 of the data set .* has no text"):
        Stream(data, tokenizer, 100).of_epoch(0)


def test_a_disk_that_cannot_take_a_chunk_is_a_sentence(tokenizer, tmp_path, monkeypatch):
    made = Stream(source(tmp_path / "data", 2), tokenizer, 400)
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"Chunks of a stream must be cached, and .* \(.*No space left.*CONVERT_CACHE"):
        made.of_epoch(0)
    assert not list(made.folder.glob("*.npz*"))


def test_a_stream_has_a_name():
    with pytest.raises(UserError, match="written stream:NAME or stream:NAME:CONFIG; got 'stream:'"):
        corpus("stream:")
    with pytest.raises(UserError, match="There is no data at 'stream'"):
        corpus("stream")  # which may be a folder
    assert corpus("stream:some/set:config").hub == ("some/set", "config") and corpus("stream:some/set").is_streamed
