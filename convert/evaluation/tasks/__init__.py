"""The tasks that need no network, built from what is on every machine."""

from convert.evaluation.tasks.base import LETTERS, Item, Task
from convert.evaluation.tasks.chat import CHAT
from convert.evaluation.tasks.code import CODE
from convert.evaluation.tasks.humaneval import HUMANEVAL
from convert.evaluation.tasks.probes import PROBES
from convert.evaluation.tasks.recall import RECALL, needles

TASKS = {task.name: task for task in (*CODE, *RECALL, *CHAT, *PROBES)}

__all__ = ["HUMANEVAL", "LETTERS", "TASKS", "Item", "Task", "needles"]
