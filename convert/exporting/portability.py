"""A model folder for more readers than the version of transformers that wrote it: what transformers 4.57, which serving
engines still use, knows by another name. Versions from 5 on read both."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

SAMPLE = "def f(x):\n\treturn  x['é'] # 12,345 ≠ <s> naïve</s>\n"
# Settings of the tokenizer's class; tokenizer.json itself says what is added
OF_THE_CLASS = ("backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token")


def make_tokenizer_portable(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have tokenizer.json alone decide the ids: the class is the one that every version has and that adds nothing of
    its own. Where the tokenizer's own class does more than its tokenizer.json says, that class stays."""
    file = folder / "tokenizer_config.json"
    before = file.read_text(encoding="utf-8")
    settings = json.loads(before)
    settings = {name: value for name, value in settings.items() if name not in OF_THE_CLASS}
    tokens = settings.pop("extra_special_tokens", None)
    if isinstance(tokens, list):  # a dictionary in 4.57, which means something else
        settings["additional_special_tokens"] = tokens
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side,
    }  # fmt: skip
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = SAMPLE + "".join(tokenizer.all_special_tokens)
    if AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != tokenizer(text)["input_ids"]:
        file.write_text(before, encoding="utf-8")


def make_rotary_portable(folder: Path) -> None:
    """Write rope_theta and rope_scaling beside rope_parameters, of which 4.57 knows nothing: it would take a theta of
    10,000 without scaling. A configuration without rotary positions stays as it is."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if not config.get("rope_parameters"):
        return
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
