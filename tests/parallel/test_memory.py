"""No process holds a whole model: while one is loaded, copied, swapped, measured, saved, exported and read back, a
process never has as much memory as its parameters take."""

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from convert.core.processes import rank
from convert.data.batches import Batches
from convert.evaluation.generation import generate
from convert.evaluation.perplexity import perplexity
from convert.exporting.hub import write_weights
from convert.models.loading import load_teacher
from convert.models.saving import fingerprint, load_in_parts, save_student
from convert.models.sharding import copied
from convert.models.swap import swap
from tests.e2e.conftest import teacher  # noqa: F401  # a fixture
from tests.parallel.fork import together
from tests.training.stages import tokens

STATUS = Path("/proc/self/status")
PROCESSES = 5
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's count of a process's memory")


def resident() -> int:
    """Bytes of this process in memory, without pages of files, which the system drops where it needs room."""
    with STATUS.open("rb", buffering=0) as status:
        return int(status.read().partition(b"RssAnon:")[2].split(maxsplit=1)[0]) * 1024


class Peak:
    """The most memory that a process had while this was open, above what it had before."""

    def __enter__(self) -> "Peak":
        self.before, self.most, self.is_over = resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.is_over.wait(0.004):
            self.most = max(self.most, resident() - self.before)

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()


def used(small: Path, folder: Path, out: Path, is_shared: bool) -> dict[str, int]:
    """Peaks of what a run does with the model of a folder, by name; a small one is loaded first, for its imports."""
    found = {}
    batches = [Batches(tokens(), 32, 1, 3)(i) for i in range(2)]

    def peak(name: str, work, *args):
        with Peak() as seen:
            result = work(*args)
        found[name] = seen.most
        return result

    load_teacher(small, shared=is_shared)
    with Peak() as overall:
        loaded = peak("load", lambda: load_teacher(folder, shared=is_shared))
        model = loaded.model
        perplexity(model, batches)
        student = peak("copy", copied, model)
        student = peak("swap", swap, student, "linear")
        peak("perplexity", perplexity, student, batches)
        peak("generate", generate, student, loaded.tokenizer, [[5, 6, 7]], 3)
        peak("fingerprint", fingerprint, student)
        for name in ("step", "export"):
            if rank() == 0:
                (out / name).mkdir(parents=True)
        peak("save", save_student, student, out / "step")
        peak("export", write_weights, student, out / "export", torch.bfloat16, ())
        del student
        gc.collect()  # as the pipeline does after each step
        if is_shared:
            peak("read back", load_in_parts, out / "step", model)
    return found | {"all of it": overall.most}


def measured(small: Path, place: Path) -> None:
    """Print the bytes of a model, and the peaks of one process that has it whole and of several that share it out."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=320, intermediate_size=1280, num_hidden_layers=18, num_attention_heads=8,
        max_position_embeddings=128, eos_token_id=2, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    size = 4 * model.num_parameters()
    model.save_pretrained(place / "model")
    del model
    for file in small.glob("tokenizer*"):
        (place / "model" / file.name).write_bytes(file.read_bytes())
    whole = together(place / "one", 1, used, small, place / "model", place / "out-one", False)
    many = together(place / "many", PROCESSES, used, small, place / "model", place / "out", True)
    print(json.dumps([size, whole[0], many]))


def test_no_process_ever_holds_a_whole_model(teacher, tmp_path):  # noqa: F811
    """The same path with one process does, so that the measurement would see it. All start from a process without a
    past, and what is freed goes back to the system at once: memory that other tests left would count again here."""
    script = f"from tests.parallel.test_memory import *\nmeasured(Path({str(teacher)!r}), Path({str(tmp_path)!r}))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    size, whole, many = json.loads(ran.stdout.splitlines()[-1])
    assert whole["copy"] > 0.9 * size and whole["all of it"] > size
    for found in many:
        print({name: f"{peak / size:.2f}" for name, peak in found.items()})
        assert all(peak < 0.5 * size for name, peak in found.items() if name != "all of it"), found
        assert found["all of it"] < size
