"""Print, for each exercise, how many wrong answers its check refuses, with the right words, and how many right ones it accepts."""

from collections import Counter

from mutants import collect
from tinylib import checks


def main() -> int:
    """Run every check on every answer; return 1 if one of them is judged wrongly."""
    wrong, right = collect()
    kept, refused, named, good, accepted = (Counter() for _ in range(5))
    for name, attempt, words in wrong:
        report = checks.run(name, attempt)
        kept[name] += 1
        refused[name] += not report.passed
        named[name] += not report.passed and words.lower() in report.message.lower()
    for name, attempt in right:
        good[name] += 1
        accepted[name] += checks.run(name, attempt).passed
    rows = [(name, *(count[name] for count in (kept, refused, named, good, accepted))) for name in kept]
    rows.append((f"all {len(rows)} exercises", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    print(f"{'exercise':<26}{'wrong':>7}{'refused':>9}{'by its name':>13}{'right':>7}{'accepted':>10}")
    for name, *numbers in rows:
        print(f"{name:<26}" + "".join(f"{n:>{width}}" for n, width in zip(numbers, (7, 9, 13, 7, 10), strict=True)))
    return int(kept != refused or kept != named or good != accepted)


if __name__ == "__main__":
    raise SystemExit(main())
