"""`dopfast verify`: whether everything is as it was written."""

from collections import Counter

from dop_fast.cli._click import Call, Outcome, command, table
from dop_fast.cli._progress import track

NAMED = 5  # damaged files that are named before the rest is counted


@command("dopfast verify", compute=False, without=("seed", "force"))
def verify(call: Call) -> Outcome:
    """Read everything back and find damage.

    Every chunk of the stores, every mask, checkpoint and file of weights has a checksum, which
    a single flipped bit breaks. JSON files are only read.
    """
    from dop_fast import integrity
    from dop_fast.errors import StoreError

    found = list(track(integrity.verify(call.workspace), lambda one: f"read {one.path}", None))
    damaged = [one for one in found if one.state == integrity.DAMAGED]
    if damaged:
        rest = len(damaged) - NAMED
        raise StoreError(
            f"{len(damaged)} of {len(found)} are damaged: "
            + "; ".join(one.about for one in damaged[:NAMED])
            + (f"; and {rest} more" if rest > 0 else ""),
            damaged[0].hint,
        )
    counts = Counter(one.path.partition("/")[0] for one in found)
    told = (*table(("what", "read"), counts.items()), "no damage found")
    return Outcome(
        result={"found": [vars(one) for one in found]},
        lines=told if found else ("there is nothing to read yet",),
        read=(str(call.workspace.root),),
        warnings=tuple(
            f"{one.path} has no checksum: {one.about}"
            for one in found
            if one.state == integrity.UNKNOWN
        ),
    )
