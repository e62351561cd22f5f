"""What every task promises, and the parsers on what models write."""

import re

import pytest

from convert.evaluation.tasks import LETTERS, TASKS, Item
from convert.evaluation.tasks.chat import WORDS, letter
from convert.evaluation.tasks.recall import KNOWN


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_has_fair_examples(task):
    items = task.items(40, 0)
    assert len({item.example for item in items}) == 40 and len({item.prompt for item in items}) == len(items)
    for item in items:
        assert len(set(item.choices)) == 4
        assert not any(a != b and b.startswith(a) for a in item.choices for b in item.choices)
        right = [choice for choice in item.choices if task.parse(choice) == item.answer]
        assert right == [item.choices[item.gold]]
        assert not item.prompt[-1].isspace()
    places = [item.gold for item in task.items(160, 0)]
    assert all(places.count(place) > len(places) / 8 for place in range(4))  # no place is right more often than others


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_seed_decides_the_examples(task):
    assert task.items(12, 3) == task.items(12, 3) != task.items(12, 4)


def test_names_and_brackets_come_from_files_that_no_training_sees():
    from convert.data.corpus import corpus, is_held_out

    seen = "".join(text for key, text in corpus("stdlib").documents() if not is_held_out(key))
    for name in ("names", "brackets", "indentation"):
        assert not any(item.prompt in seen for item in TASKS[name].items(12, 0))


@pytest.mark.parametrize("task", [t for t in TASKS.values() if t.training_prompts], ids=lambda task: task.name)
def test_training_prompts_are_of_no_held_out_example(task):
    """Whatever the seeds are. What is asked is compared, since options may stand in another order."""
    from convert.data.corpus import corpus, is_held_out

    def asked(prompt: str) -> str:
        return prompt.split("\n")[0] if task.chat else prompt

    prompts = [prompt for seed in (0, 1) for prompt in task.training_prompts(200, seed)]
    assert len(prompts) >= 200 and task.training_prompts(200, 0) == prompts[: len(task.training_prompts(200, 0))]
    examples = {asked(item.prompt) for seed in range(2) for item in task.items(60, seed)}
    assert not examples & {asked(prompt) for prompt in prompts}
    if task.name in ("names", "brackets", "indentation"):
        held_out = "".join(text for key, text in corpus("stdlib").documents() if is_held_out(key))
        assert not any(prompt in held_out for prompt in prompts)


def test_every_task_but_the_long_one_and_those_on_request_has_training_prompts():
    usual = [task for task in TASKS.values() if not task.on_request]
    assert [task.name for task in usual if task.training_prompts is None] == ["needle"]


def test_options_stand_once_at_each_letter():
    items = TASKS["facts"].items(8, 0)
    for question in range(8):
        rotations = [item for item in items if item.example == question]
        assert sorted(item.answer for item in rotations) == list(LETTERS)


@pytest.mark.parametrize(
    "text, prediction",
    [
        ("B", "B"),
        (" b.", "B"),
        ("**C**", "C"),
        ("The correct answer is: D. Because", "D"),
        ("(A) Europe", "A"),
        ("Africa", None),
        ("", None),
        ("E", None),
        ("'B'", "B"),
        ("The answer is 'B'.", "B"),
        ("B because Cairo is there", "B"),
        ("The correct answer is B because", "B"),
        ("I would choose B", "B"),
        ("A is wrong, the answer is C", "C"),
        ("A river", None),
        ("A because of it", "A"),
        ("C'est la vie", None),
        ("Answer with A", None),
    ],
)
def test_letters_are_found(text, prediction):
    assert letter(text) == prediction


@pytest.mark.parametrize(
    "task, text, prediction",
    [
        ("sums", "17 + 25 = 42", "42"),
        ("sums", "The answer is 42.", "42"),
        ("sums", "17 and 25", None),
        ("sums", "The sum of 17 and 25 is 42.", "42"),
        ("sums", "\u22125", "-5"),
        ("sums", "42.0", "42"),
        ("sums", "4.5", None),
        ("facts", "Answer: B", "B"),
        ("facts", "a list", None),
        ("facts", "The right option is B.", "B"),
        ("facts", "(c)", "C"),
        ("facts", "A good choice is B", "B"),
        ("facts", "D Asia", "D"),
        ("forms", '{"name":"x"}', '{"name": "x"}'),
        ("forms", "a;b ; c", "a; b; c"),
        ("sums", "-3", "-3"),
        ("sums", "5-8 = - 3", "-3"),
        ("sums", "\u20132", "-2"),
        ("sums", "17 \u2013 25 = \u22128", "-8"),
        ("keys", " 47", "47"),
        ("keys", "x", None),
        ("brackets", "))", "))"),
        ("brackets", "x)", None),
        ("indentation", "\n        return", "8"),
        ("indentation", "\n\nclass", "0"),
        ("indentation", " + 1", None),
        ("copying", " a, b)", "a, b"),
        ("copying", " a, b", None),
        ("names", " self.x", "self"),
        ("names", ")", None),
        ("forms", " \n", None),
    ],
)
def test_answers_are_found(task, text, prediction):
    assert TASKS[task].parse(text) == prediction


@pytest.mark.parametrize("name, there", [("facts", 400), ("sums", 1000), ("forms", 81)])
def test_no_example_comes_twice_and_all_are_found(name, there):
    items = TASKS[name].items(1000, 0)
    asked = {item.example: item.prompt.split("\n")[0] for item in items}
    assert len(set(asked.values())) == len(asked) >= there
    assert len({item.example for item in TASKS[name].items(48, 0)}) == 48


def test_every_city_is_in_one_part_of_the_world():
    asked = {item.prompt.split("\n")[0] for item in TASKS["facts"].items(600, 0) if item.group == "time zones"}
    assert len(asked) > 100 and not any(city in question for question in asked for city in ("Istanbul", "Nicosia"))


@pytest.mark.parametrize(
    "name, text, share",
    [
        ("multi_value", "a)\nrun(b)\nrun(c)\n", 1),
        ("multi_value", "c)\nrun(a)\nrun(x)\nrun(y)", 2 / 3),  # in any order
        ("multi_value", "ab)\n", 0),
        ("multi_value", "no call", 0),
        ("multi_value_chat", "They are 1234 and 5678.", 2 / 3),
        ("multi_value_chat", "12345678", 0),
    ],
)
def test_of_several_values_the_share_that_was_found_counts(name, text, share):
    from convert.evaluation.scoring import Answer, graded

    answer = "a, b, c" if name == "multi_value" else "1234, 5678, 9999"
    found = graded(TASKS[name], Item(0, "", answer, (), 0), Answer(0, False, None, text))
    assert found.score == pytest.approx(share) and found.correct == (share == 1)


@pytest.mark.parametrize("name", ["tracking", "tracking_chat"])
def test_a_chain_leads_to_its_answer(name):
    """What the text says, followed by hand, is the answer, and every choice is in the text."""
    for item in TASKS[name].items(12, 0):
        links = dict(re.findall(r"^(\w+) = '?(\w+)'?$", item.prompt, re.M))
        links |= dict(re.findall(r"The (\w+) has the (?:same number as the|number) (\w+)\.", item.prompt))
        links = {name: value for name, value in links.items() if name in (*KNOWN, *WORDS)}
        at = re.search(r"(?:assert (\w+) == '|does the (\w+) have\?.*)$", item.prompt)
        place = at[1] or at[2]
        while place in links:
            place = links[place]
        assert all(re.search(rf"\b{re.findall(r'[a-z]+|[0-9]+', choice)[0]}\b", item.prompt) for choice in item.choices)
        assert place == item.answer and len(links) in (6, 8, 12)


def test_probes_are_asked_on_request_alone():
    assert {name for name, task in TASKS.items() if task.on_request} == {
        f"{name}{chat}" for name in ("multi_key", "multi_value", "tracking") for chat in ("", "_chat")
    }
