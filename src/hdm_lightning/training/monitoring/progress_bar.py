"""A progress bar for parts that are counted: done of all, share, time left."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def part_progress() -> Progress:
    """A bar to use as a context manager; it shows itself in a terminal only."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
