"""`dopfast doctor`: what it runs on, and whether its kernels work here."""

from pathlib import Path
from typing import Any

from dop_fast.cli._click import Outcome, command, table


@command("dopfast doctor", workspace=False, compute=False, without=("seed", "force"))
def doctor() -> Outcome:
    """Check this machine: versions, devices, kernels, disk.

    Each kernel runs once beside its reference. The output is text for a bug report.
    """
    from dop_fast import doctor as examination
    from dop_fast.errors import DopFastError

    facts, checks = examination.facts(Path()), examination.checks()
    wrong = [f"{one.kernel} on the {one.device}" for one in checks if one.agrees is False]
    lines = (*_lines(facts), "", *table(("kernel", "on", "state", "check"), map(_row, checks)))
    if wrong:
        raise DopFastError(
            "\n".join((*lines, "", f"not what the reference gives: {', '.join(wrong)}")),
            "report it with this text",
        )
    return Outcome(result={**facts, "kernels": [vars(one) for one in checks]}, lines=lines)


def _lines(facts: dict[str, Any]) -> tuple[str, ...]:
    lines = []
    for part, found in facts.items():
        items = [f"{k} {v}" for k, v in found.items()] if isinstance(found, dict) else found
        lines += [f"{part:<9} {', '.join(items)}"]
    return tuple(lines)


def _row(check: Any) -> tuple[str, ...]:
    if check.agrees is None:
        return check.kernel, check.device, f"inactive: {check.why}", ""
    state = f"slow: {check.why}" if check.why else "active"
    told = "agrees" if check.agrees else "DIFFERS"
    return check.kernel, check.device, state, f"{told}, {check.time_s * 1000:.0f} ms"
