"""`dopfast report`: everything on one page."""

from dop_fast.cli._click import Call, Outcome, command
from dop_fast.cli._progress import track


@command("dopfast report", compute=False, without=("seed", "force"))
def report(call: Call) -> Outcome:
    """Write everything on one HTML page.

    Concepts, stitched patches, masks, training curves and the comparison; it opens from disk.
    """
    from dop_fast import report as page

    path = page.write(call.workspace, track)
    return Outcome(
        result={"report": path},
        lines=(str(path),),
        read=(str(call.workspace.root),),
        wrote=(str(path),),
        next="open it in a browser",
    )
