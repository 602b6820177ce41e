"""`dopfast report`: everything on one page."""

from dop_fast.cli._click import Call, Outcome, command


@command("dopfast report", compute=False)
def report(call: Call) -> Outcome:
    """Write one HTML page: concepts, stitched patches, masks, training curves, comparison."""
    from dop_fast import report as page

    path = page.write(call.workspace)
    return Outcome(
        result={"report": path},
        lines=(str(path),),
        read=(str(call.workspace.root),),
        wrote=(str(path),),
        next="open it in a browser",
    )
