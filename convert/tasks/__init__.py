"""The tasks that need no network, built from what is on every machine."""

from convert.tasks.base import LETTERS, Item, Task
from convert.tasks.chat import CHAT
from convert.tasks.code import CODE
from convert.tasks.recall import RECALL, needles

TASKS = {task.name: task for task in (*CODE, *RECALL, *CHAT)}

__all__ = ["LETTERS", "TASKS", "Item", "Task", "needles"]
