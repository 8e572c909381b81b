"""English numbers in words, as ``num2words`` writes them: SmolVLM2's prompt says how many frames it shows."""

from __future__ import annotations

_ONES = str.split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = str.split("twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(number: int) -> str:
    """0 to 999,999: 121 is "one hundred and twenty-one"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    above, rest = divmod(number, size)
    joined = " and " if rest < 100 else ", "
    return f"{in_words(above)} {name}" + (f"{joined}{in_words(rest)}" if rest else "")
