"""An exercise that no chapter has: its solution, three wrong answers, its checker."""

from course.exercises.exercise import Exercise, require


def largest(numbers: list[int], k: int) -> list[int]:
    """The k largest numbers, largest first."""
    ordered = sorted(numbers, reverse=True)
    return ordered[:k]


def smallest(numbers, k):
    """Takes the other end of the order."""
    return sorted(numbers)[:k]


def all_of_them(numbers, k):
    """Forgets to cut."""
    return sorted(numbers, reverse=True)


def unsorted(numbers, k):
    """Forgets to sort."""
    return numbers[:k]


def check_largest(answer):
    found = answer([3, 1, 4, 1, 5], 2)
    require(len(found) == 2, f"with k = 2 there should be 2 numbers; there are {len(found)}")
    require(found == [5, 4], f"the 2 largest of 3, 1, 4, 1, 5 are [5, 4]; you returned {found}")


SAMPLE = Exercise(
    title="The k largest",
    difficulty=1,
    minutes=5,
    task="Return the $k$ largest numbers.",
    hints=("Sort first.", "`sorted` can sort downwards.", "Cut with `[:k]`."),
    solution=largest,
    wrong=(smallest, all_of_them, unsorted),
    check=check_largest,
)
