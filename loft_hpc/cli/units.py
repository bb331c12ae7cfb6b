"""Amounts as people read them."""

UNITS = ("B", "kB", "MB", "GB", "TB")


def bytes_text(size: float, unit: str | None = None, decimals: int = 2) -> str:
    """Bytes with three significant digits in the decimal unit that fits: 999 B, 1.00 kB, 23.5 MB, 1,234 TB.

    With `unit`, one of `UNITS`, in that one with so many `decimals`: for columns that stand beside somebody's figures.
    """
    power = UNITS.index(unit) if unit else 0
    value = size / 1000**power
    if unit is None:
        while abs(value) >= 999.5 and power < len(UNITS) - 1:
            power += 1
            value = size / 1000**power
        decimals = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{decimals}f} {UNITS[power]}"


def times_text(ratio: float) -> str:
    """A ratio of at least 1: 1.04, 3.4, 4, 26, 1,234. Tenths from 1.1 on, whole numbers from 100 on."""
    if round(ratio, 2) == round(ratio):
        return f"{ratio:,.0f}"
    return f"{ratio:,.{2 if ratio < 1.095 else 1 if ratio < 99.95 else 0}f}"


def number_text(value: float) -> str:
    """Three significant digits without an exponent where they are many: 0.0123, 4.69, 75.1, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def hours_text(seconds: float | None) -> str:
    """Hours, for columns; a dash for a time that is not known."""
    return "-" if seconds is None else number_text(seconds / 3600)


def duration_text(seconds: float) -> str:
    """In the unit that fits: 12.3 s, 45 min, 4.69 h."""
    if seconds < 120:
        return f"{number_text(seconds)} s"
    return f"{number_text(seconds / 60)} min" if seconds < 7200 else f"{number_text(seconds / 3600)} h"
