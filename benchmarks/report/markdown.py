"""Cells and tables: how figures are written, in Markdown and on the terminal."""

PASS_NAMES = {"training": "forward + backward", "inference": "forward", "step": "time"}


def seconds(value: float) -> str:
    """Return a time in seconds as text in s, ms or µs, such as "1.25 ms", with three significant digits.

    Trailing zeros are dropped. Times of 1,000 s or more are in whole seconds.
    """
    shown = float(f"{value:.3g}")  # which may be 1000 of a unit where the value is a little less
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if shown * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}" if shown * factor < 1000 else f"{value * factor:.0f} {unit}"
    raise AssertionError


def memory(value: int | None) -> str:
    """Return a number of bytes as text in MiB or GiB, such as "12.5 MiB" or "1.25 GiB"; "" for None.

    From 1,000 MiB on, the text is in GiB with two decimals. Below, it is in MiB with up to three significant digits.
    """
    if value is None:
        return ""
    mib = value / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 1000 else f"{mib:.3g} MiB" if mib < 100 else f"{mib:.0f} MiB"


def rate(name: str, value: float) -> str:
    """Return a rate as text with three significant digits, such as "12.5 GB/s" or "1.2 TFLOP/s".

    `name` is the name of a measured speed limit, such as "copy" or "matmul float32". If it begins with "matmul",
    `value` is in FLOPs a second, else in bytes a second. The unit has the prefix T for 10¹² or more, G for less.
    """
    unit, scale = ("FLOP/s", value) if name.startswith("matmul") else ("B/s", value)
    return f"{scale / 1e12:.3g} T{unit}" if float(f"{scale:.3g}") >= 1e12 else f"{scale / 1e9:.3g} G{unit}"


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table with the header cells `header` and the rows of cells `lines`.

    The first column is aligned left, all others right. Cells are used as they are, without escaping.
    """
    return [
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
