"""The progress bar; apart from the other plumbing, since it loads rich."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text


class Rate(ProgressColumn):
    """How many in a second, or how long each takes where that is more than one."""

    def render(self, task: Task) -> Text:
        """Return the text; nothing before the second item is done."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.1f}/s" if speed >= 1 else f"{1 / speed:,.1f} s each")


def bar() -> Progress:
    """Return a bar on stderr that vanishes when all is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate())
    return Progress(*columns, Remaining(), console=Console(stderr=True), transient=True)
