"""What was kept of a teacher's distributions over the next token, to learn from without the teacher.

N tokens · K most likely tokens · S drawn tokens
"""

from typing import NamedTuple

from torch import Tensor


class RecordedTeacher(NamedTuple):
    """A part of a teacher's distributions p, in nats.

    `ids` [N, K + S]: the K most likely tokens, and S that were drawn from all others, each as likely as p says.
    `log_p` [N, K + 1]: log p of the first K, and the logarithm of what all others have together.
    `negative_entropy` [N]: the sum of p log p over the vocabulary, where tokens were drawn."""

    ids: Tensor
    log_p: Tensor
    negative_entropy: Tensor | None = None

    def rows(self, rows: slice) -> "RecordedTeacher":
        """Some of the tokens, in the types that a loss computes with."""
        entropy = None if self.negative_entropy is None else self.negative_entropy[rows]
        return RecordedTeacher(self.ids[rows].long(), self.log_p[rows].float(), entropy)
