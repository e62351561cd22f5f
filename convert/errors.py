"""The two ways a run can end badly."""


class UserError(ValueError):
    """Something the user can mend. The message is one sentence: the rule, the facts, the way out. Exit code 2."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived and the work in hand is safe on disk. The message says how to go on."""
