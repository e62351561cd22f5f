"""What a teacher writes that several processes share out."""

import dataclasses
import json
import os
from pathlib import Path

from convert.core.processes import rank, world
from convert.data.corpus import corpus
from convert.evaluation.completions import prepare
from convert.models.catalog import NANO
from convert.models.loading import Teacher, load_teacher
from convert.models.sharding import copied
from tests.parallel.fork import finished, start, together


def _prepared(place: Path, teacher: Teacher, is_apart: bool = False) -> tuple[str, int]:
    os.environ["CONVERT_CACHE"] = str(place / f"cache-{world()}-{rank() * is_apart}")
    if world() > 1:
        teacher = dataclasses.replace(teacher, model=copied(teacher.model))
    data = prepare(corpus(f"teacher:{place / 'prompts.jsonl'}"), teacher, 60, 24)
    return data.fingerprint, len(data.train)


def test_processes_that_share_a_teacher_out_write_what_one_does_and_need_one_cache(tmp_path):
    prompts = [json.dumps({"prompt": f"def f{i}(x):"}) for i in range(8)]
    teacher = load_teacher(str(NANO))  # with threads, which a process that was forked may not start
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    found = together(tmp_path / "two", 2, _prepared, tmp_path, teacher)
    assert found == together(tmp_path / "one", 1, _prepared, tmp_path, teacher) * 2
    assert finished(start(tmp_path / "apart", 2, _prepared, tmp_path, teacher, True)) == [1, 1]
    for number in range(2):
        said = (tmp_path / "apart" / f"raised-{number}").read_text()
        assert said.startswith("UserError: Processes that share a teacher out read its completions from one cache"), (
            said
        )
