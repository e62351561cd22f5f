"""Masks of chat templates token by token, rows of every kind, and the cache of conversations."""

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from convert.core.errors import UserError
from convert.data import corpus as sources
from convert.data.chat import Conversation, chat_tokens, check, conversations, is_chat, marked
from convert.data.corpus import corpus
from convert.data.packing import PackedBatches
from tests.data.conftest import make_tokenizer

# The formats of Qwen2.5 (with its default system prompt), Llama 3 and Mistral, and the parts of a conversation with
# whether an assistant wrote them.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helper.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
TURNS = (
    ("user", "the scan"),
    ("assistant", "does not grow"),
    ("user", "of a state"),
    ("assistant", "it reads\n\ntext"),
)
FORMATS = {
    "chatml": (
        CHATML,
        ["<|im_start|>", "<|im_end|>"],
        TURNS,
        [
            ("<|im_start|>system\nYou are a helper.<|im_end|>\n<|im_start|>user\nthe scan<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("does not grow<|im_end|>", True),
            ("\n<|im_start|>user\nof a state<|im_end|>\n<|im_start|>assistant\n", False),
            ("it reads\n\ntext<|im_end|>", True),
            ("\n", False),
        ],
    ),
    "llama 3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        (("system", "the text"), *TURNS),
        [
            ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nthe text<|eot_id|>", False),
            ("<|start_header_id|>user<|end_header_id|>\n\nthe scan<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("does not grow<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\nof a state<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("it reads\n\ntext<|eot_id|>", True),
        ],
    ),
    "mistral": (
        MISTRAL,
        ["<s>", "</s>"],
        TURNS,
        [
            ("<s>[INST] the scan [/INST]", False),
            (" does not grow</s>", True),
            ("[INST] of a state [/INST]", False),
            (" it reads\n\ntext</s>", True),
        ],
    ),
}
MARKED = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}END{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}",
)
MARKS = {  # what the marks take in beside the content
    "with the end": MARKED.replace("END", "<|im_end|>{% endgeneration %}"),
    "without the end": MARKED.replace("END", "{% endgeneration %}<|im_end|>"),
}
THINKING = (  # as Qwen3: the generation prompt closes an empty thought, which earlier turns do not show
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def chatty(template: str | None, special: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def conversation(*messages: tuple[str, str], is_plain: bool = False) -> Conversation:
    return Conversation("a", "Line 1 of a", tuple(messages), is_plain)


def of_parts(tokenizer, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
    return sum(ids, []), [learnt for found, (_, learnt) in zip(ids, parts, strict=True) for _ in found]


@pytest.mark.parametrize("template, special, messages, parts", FORMATS.values(), ids=FORMATS)
def test_masks_token_by_token(template, special, messages, parts):
    tokenizer = chatty(template, special)
    assert marked(tokenizer, conversation(*messages)) == [of_parts(tokenizer, parts)]


@pytest.mark.parametrize("template", MARKS.values(), ids=MARKS)
def test_marks_of_the_template_decide(template):
    """They give what prefixes give, also where they leave out the end of a turn."""
    _, special, messages, parts = FORMATS["chatml"]
    tokenizer = chatty(template, special)
    assert marked(tokenizer, conversation(*messages)) == [of_parts(tokenizer, parts)]


def test_a_template_that_drops_thoughts_gives_a_document_for_each_answer():
    tokenizer = chatty(THINKING, FORMATS["chatml"][1])
    begin = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    first = [
        ("<|im_start|>user\nthe scan<|im_end|>\n" + begin, False),
        ("does not grow<|im_end|>", True),
        ("\n", False),
    ]
    second = [
        ("<|im_start|>user\nthe scan<|im_end|>\n<|im_start|>assistant\ndoes not grow<|im_end|>\n", False),
        ("<|im_start|>user\nof a state<|im_end|>\n" + begin, False),
        ("it reads\n\ntext<|im_end|>", True),
        ("\n", False),
    ]
    thought = conversation(TURNS[0], ("assistant", "<think>\nit reads</think>text"))
    parts = [("<|im_start|>user\nthe scan<|im_end|>\n<|im_start|>assistant\n", False)]
    parts += [("<think>\nit reads</think>text<|im_end|>", True), ("\n", False)]
    assert marked(tokenizer, thought) == [of_parts(tokenizer, parts)]
    found = marked(tokenizer, conversation(*TURNS))
    assert found == [of_parts(tokenizer, first), of_parts(tokenizer, second)]


def test_without_a_template_a_prompt_goes_on_with_its_completion():
    tokenizer = chatty(None, [])
    row = conversation(("user", "the state "), ("assistant", "of a scan"), is_plain=True)
    expected = [of_parts(tokenizer, [("the state ", False), ("of a scan<end>", True)])]
    assert marked(tokenizer, row) == expected
    ended = conversation(("user", "the state "), ("assistant", "of a scan<end>"), is_plain=True)
    assert marked(tokenizer, ended) == expected
    with pytest.raises(UserError, match=r"Line 1 of a has messages, and the teacher has no chat template.*Give rows"):
        marked(tokenizer, conversation(*TURNS))


TEMPLATES = {
    "no prefix": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
        "mark",
    ),
    "raises": (MISTRAL, "no system message"),
    "nothing of its own": (
        "{% for m in messages %}{% if m.role == 'user' %}u{% endif %}{% endfor %}",
        "no token of its",
    ),
}


@pytest.mark.parametrize("template, words", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_that_do_not_tell_are_refused_with_the_line(template, words):
    with pytest.raises(UserError, match=f"Line 1 of a: .*{words}"):
        marked(chatty(template, []), conversation(("system", "s"), *TURNS))


def write(folder, *rows, name="chat.jsonl"):
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def dicts(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


ROW = {"messages": dicts(*TURNS)}


def test_rows_of_every_kind(tmp_path):
    shares = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), "ab", strict=True)]
    file = write(tmp_path / "d", ROW, "", {"conversations": shares}, {"prompt": "p", "completion": "c", "n": 1})
    found = list(conversations(corpus(str(file))))
    assert [row.messages for row in found] == [
        TURNS, (("user", "a"), ("assistant", "b")), (("user", "p"), ("assistant", "c"))
    ]  # fmt: skip
    assert [row.is_plain for row in found] == [False, False, True]
    assert [row.key for row in found] == ["chat.jsonl:1", "chat.jsonl:3", "chat.jsonl:4"]
    prompts = list(conversations(corpus(f"teacher:{file}")))
    assert [row.messages for row in prompts] == [TURNS[:3], (("user", "a"),), (("user", "p"),)]


WRONG = {
    "no assistant": ({"messages": dicts(("user", "a"))}, "has no turn of an assistant"),
    "order": ({"messages": dicts(("assistant", "a"), ("user", "b"))}, "message 1 is by the assistant, and the user is"),
    "twice": ({"messages": dicts(*TURNS[:2], ("assistant", "b"))}, "message 3 is by the assistant, and the user is"),
    "late system": ({"messages": dicts(*TURNS, ("system", "a"))}, "message 5 is by the system, and the user is next"),
    "role": ({"messages": dicts(("user", "a"), ("tool", "b"))}, "message 2 has the role 'tool'; roles are"),
    "content": ({"messages": [{"role": "user", "content": ["a"]}]}, "message 1 must be text, and is"),
    "number": ({"prompt": 5, "completion": "a"}, "the prompt must be text, and is 5"),
    "null": ({"prompt": "a", "completion": None}, "the completion must be text, and is None"),
    "empty": ({"prompt": "a", "completion": " \n"}, "has an empty completion"),
    "no list": ({"messages": "hello"}, "must have a list of messages"),
    "none": ({"messages": []}, "must have a list of messages"),
    "text": ({"text": "a"}, "must be an object with messages, conversations, or prompt and completion"),
    "surrogate": ({"prompt": "a", "completion": "\ud800"}, "half of a surrogate pair"),
    "no JSON": ("{", "is not JSON"),
}


@pytest.mark.parametrize("row, words", WRONG.values(), ids=WRONG)
def test_wrong_rows_are_refused_with_their_line_before_anything_is_loaded(row, words, tmp_path):
    file = write(tmp_path / "d", ROW, "", row)
    with pytest.raises(UserError, match=f"Line 3 of .*chat.jsonl.*{words}"):
        check(corpus(str(file)), "all")


def test_what_is_no_conversation(tmp_path, folder):
    text, mixed = corpus(str(folder)), write(tmp_path / "d", ROW).parent
    assert not is_chat(text) and not is_chat(corpus("stdlib")) and is_chat(corpus(str(mixed)))
    check(text, "all")
    with pytest.raises(UserError, match="masking=completions needs conversations; .* does not begin with a row of"):
        check(text, "completions")
    (mixed / "README.md").write_text("about")
    with pytest.raises(UserError, match=r"begins with a row of messages and has README.md. Move the .jsonl files"):
        check(corpus(str(mixed)), "completions")
    with pytest.raises(UserError, match="has no message of a user to answer"):
        check(corpus(f"teacher:{write(tmp_path / 'e', {'messages': dicts(('system', 'a'))})}"), "completions")


def test_wrong_rows_of_a_hub_data_set_are_left_out_and_counted(monkeypatch, capsys):
    rows = [ROW, {"messages": dicts(("user", "a"))}, {"messages": None}, ROW]
    monkeypatch.setattr(sources, "_hub_rows", lambda *_: iter(enumerate(rows)))
    assert [row.key for row in conversations(corpus("hub:some/chats"))] == ["0", "3"]
    assert (
        "2 rows of hub:some/chats are no conversations and were left out. The last one: Row 2"
        in capsys.readouterr().out
    )


def test_conversations_are_cached_with_their_masks(tmp_path, cache, capsys):
    """Each whole in its split; another template makes another entry, and a flipped bit of a mask is seen."""
    tokenizer = chatty(CHATML, FORMATS["chatml"][1])
    rows = [{"messages": dicts(("user", f"the scan {i}"), ("assistant", "grow " * (i % 5 + 1)))} for i in range(60)]
    source = corpus(str(write(tmp_path / "d", *rows)))
    found = chat_tokens(source, tokenizer)
    expected = [marked(tokenizer, row)[0] for row in conversations(source)]
    stored = []
    for tokens in (found.train, found.held_out):
        ends = [*tokens.starts[1:].tolist(), len(tokens)]
        for start, end in zip(tokens.starts.tolist(), ends, strict=True):
            stored.append((tokens.ids[start:end].tolist(), tokens.completions[start:end].tolist()))
    assert sorted(stored) == sorted(expected) and len(found.held_out.starts) >= 1
    packed = PackedBatches(found.train, 128, 1)
    labels = np.concatenate([packed(step).labels.numpy().ravel() for step in range(len(packed.rows))])
    learnt = found.train.ids[found.train.completions]
    assert sorted(labels[labels != -100]) == sorted(learnt)  # what an assistant wrote, and nothing else
    tokenizer.chat_template = CHATML.replace("helper", "scan")
    assert chat_tokens(source, tokenizer).fingerprint != found.fingerprint
    tokenizer.chat_template = CHATML
    file = cache / found.fingerprint / "train_completions.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert np.array_equal(chat_tokens(source, tokenizer).train.completions, found.train.completions)
    assert "train_completions.npy changed" in capsys.readouterr().out


def test_few_conversations_hold_one_back_whole(tmp_path):
    tokenizer = chatty(CHATML, FORMATS["chatml"][1])
    found = chat_tokens(corpus(str(write(tmp_path / "d", ROW, ROW))), tokenizer)
    assert len(found.train.starts) == len(found.held_out.starts) == 1
    assert found.train.ids.tolist() == found.held_out.ids.tolist()
    with pytest.raises(UserError, match="must be two or more, one of them held out"):
        chat_tokens(corpus(str(write(tmp_path / "e", ROW))), tokenizer)
