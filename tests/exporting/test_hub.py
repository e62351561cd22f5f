"""An export works where our packages are not: the same logits, every way to generate, saved again. Two such processes
in all."""

import ast
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from convert.core.errors import UserError
from convert.exporting import hub as export_module
from convert.exporting.code import model_code
from convert.exporting.hub import export
from convert.exporting.verify import check_in_clean_process, export_and_verify, run_without_us
from convert.models.student import ConvertedForCausalLM
from tests.conftest import VOCAB, tiny_teacher, token_ids
from tests.models.test_student import student_of

# teacher, mixer, layers: gpt_neox without tied embeddings, llama with them and with grouped-query attention
CASES = {
    "neox-linear": ("gpt_neox", "linear", None),
    "neox-mamba": ("gpt_neox", "mamba", None),
    "llama-mamba2": ("llama", "mamba2", None),
    "llama-partial": ("llama", "mamba", (0, 2)),
    "qwen3-gate-swa": ("qwen3", "gate-swa", (0, 2)),
    "qwen3-mla": ("qwen3", "mla", None),
    "qwen3-hybrid": ("qwen3", "mamba2+gate-swa", (0, 2)),
    "llama-hybrid": ("llama", "mla+mamba", None),
}
IDS = token_ids(2, 20)


def make_student(family: str, mixer: str, layers: tuple[int, ...] | None) -> ConvertedForCausalLM:
    return student_of(family, mixer, layers, tie_word_embeddings=family == "llama")


def mixers_of(student: ConvertedForCausalLM) -> set[str]:
    return {mixer["name"] for mixer in student.config.mixers if mixer is not None}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", pad_token="w0")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def students() -> dict[str, ConvertedForCausalLM]:
    return {name: make_student(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def folders(students, tokenizer, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exports")
    for name, student in students.items():
        export(student, tokenizer, place / name, card=f"# {name}")
    export(students["llama-partial"], tokenizer, place / "bf16", card="# bf16", dtype=torch.bfloat16)
    return {folder.name: folder for folder in place.iterdir()}


def answers(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every way to generate. The clean process gets this function's source."""
    padded = torch.tensor([[0, 0, 0, 7, 8, 9], [11, 12, 13, 14, 15, 16]])
    short, options = padded[:1, 3:], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    torch.manual_seed(3)
    return {
        "logits": logits,
        "greedy": model.generate(short, **options),
        "sampled": model.generate(short, **options | {"do_sample": True}),
        "beams": model.generate(short, num_beams=3, **options),
        "batch": model.generate(padded, attention_mask=padded.ne(0).long(), **options),
    }


CLEAN = """
import inspect, json
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()

place, again = Path(sys.argv[1]), Path(sys.argv[2])
ids, results = torch.load(again / "ids.pt"), {}
torch.set_num_threads(1)
for name in sys.argv[3:]:
    model = load(place / name)
    results[name] = answers(model, ids)
    results[name]["module"] = type(model).__module__
model.save_pretrained(again / name)
del model
results["again"] = answers(load(again / name), ids)

half = load(place / "bf16")
output = half(input_ids=ids, use_cache=True)
results["bf16"] = {
    "model": half.dtype, "logits": output.logits,
    "states": [t.dtype for layer in output.past_key_values.layers for t in getattr(layer, "state", None) or ()],
}
tokenizer = AutoTokenizer.from_pretrained(place / name, trust_remote_code=True)
results["text"] = tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False)
torch.save(results, again / "results.pt")
"""


@pytest.fixture(scope="module")
def clean(folders, tmp_path_factory) -> dict:
    again = tmp_path_factory.mktemp("again")
    torch.save(IDS, again / "ids.pt")
    source = Path(__file__).read_text(encoding="utf-8")
    function = next(
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "answers"
    )
    script = "import torch\n" + ast.get_source_segment(source, function) + CLEAN
    run_without_us(script, str(folders["bf16"].parent), str(again), *CASES)
    return torch.load(again / "results.pt") | {"again_folder": again / list(CASES)[-1]}


@pytest.mark.parametrize("name", CASES)
def test_a_process_without_us_answers_the_same(name, students, clean):
    ours, theirs = answers(students[name], IDS), clean[name]
    # each folder runs its own code
    assert theirs["module"].startswith(f"transformers_modules.{name.replace('-', '_hyphen_')}.")
    # ours ran compiled kernels, theirs PyTorch operators: the promise of an export, and one that a perturbed value
    # fails
    allowed = max(1e-4, 1e-5 * ours["logits"].abs().max())
    assert (
        (ours["logits"] - theirs["logits"]).abs().max()
        <= allowed
        < (ours["logits"] * 1.001 - theirs["logits"]).abs().max()
    )
    for way in ("greedy", "sampled", "beams", "batch"):
        assert torch.equal(ours[way], theirs[way]), way
    assert torch.equal(theirs["batch"][0, -6:], theirs["greedy"][0, -6:])  # padding changed nothing


def test_saved_again_by_a_process_without_us(clean, students):
    name = list(CASES)[-1]
    assert torch.equal(clean["again"]["logits"], clean[name]["logits"])
    assert torch.equal(clean["again"]["greedy"], clean[name]["greedy"])
    for file, source in model_code(mixers_of(students[name])).items():
        assert (clean["again_folder"] / file).read_text(encoding="utf-8") == source


def test_tokenizer_and_card_travel(clean, folders):
    assert clean["text"] == "w5"
    assert (folders["neox-mamba"] / "README.md").read_text() == "# neox-mamba"


def test_bfloat16_keeps_its_states_in_float32(clean):
    assert clean["bf16"]["model"] == torch.bfloat16
    assert clean["bf16"]["logits"].isfinite().all()
    assert set(clean["bf16"]["states"]) == {torch.float32}


def test_check_in_clean_process_sees_a_changed_weight(folders, students, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    logits = check_in_clean_process(folders["llama-mamba2"], IDS)
    student = copy.deepcopy(students["llama-mamba2"])
    with torch.no_grad():
        assert (student(IDS, use_cache=False).logits - logits).abs().max() <= 1e-4
        student.slots()[1].mixer.rate.s.add_(0.1)
        assert (student(IDS, use_cache=False).logits - logits).abs().max() > 1e-3


def test_our_packages_are_hidden_and_theirs_are_not(tmp_path):
    for package in ("convert", "kernels.chunk_scan"):
        with pytest.raises(RuntimeError, match="exit code 1:\n(.*\n)*ModuleNotFoundError: No module named"):
            run_without_us(f"sys.path.insert(0, ROOT)\nimport {package}")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'theirs'")
    assert (
        run_without_us("sys.path.append(sys.argv[1])\nimport kernels\nprint(kernels.name)", str(tmp_path)) == "theirs\n"
    )


@pytest.mark.parametrize("trust", [True, False])
def test_a_process_with_us_uses_our_classes(trust, folders, students):
    model = AutoModelForCausalLM.from_pretrained(folders["llama-partial"], trust_remote_code=trust).eval()
    assert type(model) is ConvertedForCausalLM
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, students["llama-partial"](IDS, use_cache=False).logits)


def test_tied_embeddings_stay_tied(folders):
    def names(folder: Path) -> set[str]:
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return set(weights.keys())

    for name in ("llama-mamba2", "bf16"):
        assert "host.lm_head.weight" not in names(folders[name])
        model = AutoModelForCausalLM.from_pretrained(folders[name])
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {"host.gpt_neox.embed_in.weight", "host.lm_head.weight"} <= names(folders["neox-linear"])


def test_the_student_is_left_alone(students, tokenizer, tmp_path):
    student = students["llama-partial"]
    config, state = student.config.to_dict(), {name: t.clone() for name, t in student.state_dict().items()}
    export(student, tokenizer, tmp_path / "x", card="", dtype=torch.bfloat16)
    assert student.config.to_dict() == config
    assert student.dtype == torch.float32
    assert all(torch.equal(t, state[name]) for name, t in student.state_dict().items())
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_export_leaves_the_old_one(students, tokenizer, tmp_path, monkeypatch):
    folder, student = tmp_path / "x", students["neox-linear"]
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_files", half_written)
        with pytest.raises(OSError, match="disk full"):
            export(student, tokenizer, folder, card="new")
        assert list(tmp_path.iterdir()) == []
    export(student, tokenizer, folder, card="old")
    old = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_files", half_written)
        with pytest.raises(OSError, match="disk full"):
            export(student, tokenizer, folder, card="new")
        assert contents(folder) == old and list(tmp_path.iterdir()) == [folder]
        folder.rename(tmp_path / "x.replaced")  # what SIGKILL between the two renames leaves
        (tmp_path / "x.writing").mkdir()
        with pytest.raises(OSError, match="disk full"):
            export(student, tokenizer, folder, card="new")
        assert contents(folder) == old and list(tmp_path.iterdir()) == [folder]
    (tmp_path / "x.writing").mkdir()  # what SIGKILL before them leaves
    (tmp_path / "x.writing" / "stale.py").touch()
    export(student, tokenizer, folder, card="new")
    assert contents(folder) == old | {"README.md": b"new"} and list(tmp_path.iterdir()) == [folder]


def half_written(folder, *_):
    (folder / "model.safetensors").write_bytes(b"half")
    raise OSError("disk full")


def test_a_failed_swap_of_folders_puts_the_old_one_back(students, tokenizer, tmp_path, monkeypatch):
    folder, rename = tmp_path / "x", Path.rename
    export(students["neox-linear"], tokenizer, folder, card="old")

    def refuse(self, target):
        if self.name == "x.writing":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(KeyboardInterrupt):
        export(students["neox-linear"], tokenizer, folder, card="new")
    assert (folder / "README.md").read_text() == "old" and list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_something_else_is_refused(students, tokenizer, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not an earlier export"):
        export(students["neox-linear"], tokenizer, tmp_path / "x", card="")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "thesis.tex"]


def test_a_plain_student_is_saved_without_code(tokenizer, tmp_path):
    """A model of transformers' own, which a training from scratch makes: it loads without trust_remote_code."""
    student = tiny_teacher("llama", tie_word_embeddings=True)
    found = export_and_verify(
        student,
        tokenizer,
        tmp_path / "model",
        card="code",
        card_without_code="none",
        dtype=torch.float32,
        input_ids=IDS,
    )
    assert found["max_abs_logit"] <= found["allowed"] and "native" not in found
    assert not list(tmp_path.rglob("*.py")) and (tmp_path / "model" / "README.md").read_text() == "none"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config and config["rope_theta"] == 1e4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, student(IDS).logits)


def test_one_kind_of_export_replaces_another(students, tokenizer, tmp_path):
    export(students["llama-partial"], tokenizer, tmp_path / "x", card="")
    export(tiny_teacher("llama"), tokenizer, tmp_path / "x", card="")
    assert not list((tmp_path / "x").glob("*.py"))
    export(students["llama-hybrid"], tokenizer, tmp_path / "x", card="")
    assert (tmp_path / "x" / "convert_mixers_mla.py").exists()
