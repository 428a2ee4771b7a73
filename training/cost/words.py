"""The account of a run for people. In: an account. Out: names and numbers in words. Cost: none."""

from training.cost.account import Account, Price
from training.cost.marks import DOWN, EVALUATE, LOAD, PREPARE, REPEATED, SAVE, TRAIN, WAITING, WARM_UP

NAMES = {
    TRAIN: "training", WARM_UP: "first steps", EVALUATE: "evaluation", SAVE: "saving", LOAD: "loading",
    PREPARE: "preparation", WAITING: "waiting",
}  # fmt: skip
LOST = "lost to restarts"


def parts(account: Account) -> dict[str, float]:
    """Seconds by name; what restarts have cost is one part."""
    seconds = account["part_seconds"]
    lost = seconds.get(REPEATED, 0.0) + seconds.get(DOWN, 0.0)
    return {name: seconds.get(part, 0.0) for part, name in NAMES.items()} | {LOST: lost}


def totals(account: Account) -> list[tuple[str, str]]:
    """What the run took and cost."""
    rows = [
        ("wall time", duration(account["wall_seconds"])),
        ("goodput", f"{account['goodput']:.1%} of the time, waiting aside, went into steps that were kept"),
    ]
    if lost := parts(account)[LOST]:
        again, down = (duration(account["part_seconds"].get(part, 0.0)) for part in (REPEATED, DOWN))
        of_it = f"{again} of it in steps that were made again, {down} until the next start"
        rows.append((LOST, f"{duration(lost)}, {of_it}"))
    rows += price_rows(account)
    if "energy_kwh" in account:
        rows.append(("energy of the GPUs", f"{account['energy_kwh']:,.4g} kWh"))
    if "forecast_seconds" in account:
        expected, took = account["forecast_seconds"], account["steps_seconds"]
        foretold = f"the first ones foretold {duration(expected)} ({took / expected - 1:+.1%})"
        rows.append(("steps", f"{duration(took)}; {foretold}"))
    return rows


def price_rows(price: Price) -> list[tuple[str, str]]:
    """Hours, which are never called those of a GPU where there was none, and their price."""
    of = {"GPU-hours": price.get("gpu_hours"), "rank-hours (CPU)": price.get("rank_hours")}
    rows = [(name, f"{hours:,.4g}") for name, hours in of.items() if hours is not None]
    return [*rows, ("price", f"{price['price']:,.2f} {price['currency']}")] if "price" in price else rows


def in_words(account: Account) -> list[tuple[str, str]]:
    """The parts, then the totals."""
    wall = account["wall_seconds"]
    shown = {name: seconds for name, seconds in parts(account).items() if seconds and name != LOST}
    return [
        *((f"time in {name}", f"{duration(seconds)} ({seconds / wall:.1%})") for name, seconds in shown.items()),
        *totals(account),
    ]


def in_a_line(seconds: float, price: Price, *more: str) -> str:
    """``1:02:03, goodput 62.0 %, 2.07 GPU-hours, price 5.18 USD``; `more` comes after the time."""
    rows = [f"{text} {name}" if "hours" in name else f"{name} {text}" for name, text in price_rows(price)]
    return ", ".join([duration(seconds), *more, *rows])


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03`` below an hour, ``4.2 s`` below a minute."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
