"""What proc(5) says of tasks."""

from __future__ import annotations


def task_state(folder: str) -> str:
    """The state of the process or thread whose /proc folder this is, as a letter.

    Raises FileNotFoundError or ProcessLookupError when it has ended.
    """
    with open(f"{folder}/stat") as file:
        # What is in the parentheses is the task's own choice.
        return file.read().rpartition(")")[2].split()[0]
