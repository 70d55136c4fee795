"""Two more exercises of chapter 02: which numbers does a rotation turn together, and what if it is the wrong ones?

A wrong convention has the right shapes and crashes nothing; the only way to know is to ask the function itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from course.exercises.exercise import Exercise, require
from dsa.model.rope import Rope


def angles(width: int, *positions: int) -> Rope:
    """The angles of some positions, plain rotary frequencies."""
    freq = 10000.0 ** -(torch.arange(0, width, 2) / width)
    turned = torch.tensor(positions, dtype=torch.float32)[:, None] * freq  # (T, R/2)
    return Rope(turned.cos(), turned.sin())


def my_partners(rotate, width: int) -> Tensor:
    """With which dimension each one is turned: -> (width,), whole numbers.

    rotate(x, position) turns x (width,) and is all you have. A dimension
    that it does not turn is its own partner.
    """
    eye = torch.eye(width)
    turned = torch.stack([rotate(row, 1) for row in eye])
    leaked = (turned * (1 - eye)).abs()  # what arrives elsewhere
    own = torch.arange(width)
    return torch.where(leaked.amax(-1) > 1e-6, leaked.argmax(-1), own)


def _neighbours_assumed(rotate: Callable, width: int) -> Tensor:
    """Does not ask, and answers neighbours."""
    return torch.arange(width) ^ 1


def _halves_assumed(rotate: Callable, width: int) -> Tensor:
    """Does not ask, and answers halves."""
    return torch.arange(width).roll(width // 2)


def _at_the_start(rotate: Callable, width: int) -> Tensor:
    """Asks at position 0, where nothing is turned."""
    eye = torch.eye(width)
    leaked = (torch.stack([rotate(row, 0) for row in eye]) * (1 - eye)).abs()
    return torch.where(leaked.amax(-1) > 1e-6, leaked.argmax(-1), torch.arange(width))


def _everything_turns(rotate: Callable, width: int) -> Tensor:
    """Takes for granted that every dimension is turned."""
    eye = torch.eye(width)
    return (torch.stack([rotate(row, 1) for row in eye]) * (1 - eye)).abs().argmax(-1)


def _rotary_first(rotate: Callable, width: int) -> Tensor:
    """Counts what turns and takes for granted that it comes first: in MLA it comes last."""
    eye, found = torch.eye(width), torch.arange(width)
    turned = torch.stack([rotate(row, 1) for row in eye])
    R = int(((turned - eye).abs().amax(-1) > 1e-7).sum())
    found[:R] = found[:R] ^ 1 if turned[0, 1] else found[:R].roll(R // 2)
    return found


def _turn(name: str, R: int, first: int = 0) -> Callable[[Tensor, int], Tensor]:
    """A rotation of R dimensions, from `first` on, by one of the two conventions."""

    def rotate(x: Tensor, position: int) -> Tensor:
        before, x, after = x[:first], x[first : first + R], x[first + R :]
        turned = getattr(angles(R, position), name)(x[None, None, None]).flatten()
        return torch.cat([before, turned, after])

    return rotate


def _check_partners(answer: Callable) -> None:
    whole, half = torch.arange(8), torch.arange(4)
    cases = (
        ("neighbours", _turn("interleaved", 8), whole ^ 1),
        ("halves", _turn("half_split", 8), whole.roll(4)),
        ("neighbours in the first half of 8", _turn("interleaved", 4), torch.cat([half ^ 1, half + 4])),
        ("halves in the first half of 8", _turn("half_split", 4), torch.cat([half.roll(2), half + 4])),
        ("neighbours in the last half of 8", _turn("interleaved", 4, 4), torch.cat([half, (half ^ 1) + 4])),
    )
    for name, rotate, right in cases:
        found = answer(rotate, 8)
        require(getattr(found, "shape", None) == (8,), "return a tensor of 8 whole numbers")
        require(
            found.tolist() == right.tolist(),
            f"for {name} the partners are {right.tolist()}, yours are {found.tolist()}",
        )


def my_for_halves(weight: Tensor) -> Tensor:
    """Reorder the rows of a rotary projection, (R, D) -> (R, D).

    The weight was trained with rotated neighbours (2i, 2i + 1). Afterwards
    a program that rotates halves (i, i + R/2) gives the same scores.
    """
    return torch.cat([weight[0::2], weight[1::2]])


def _other_way(weight: Tensor) -> Tensor:
    """Goes the other way, from halves to neighbours."""
    return torch.stack(weight.chunk(2), dim=1).flatten(0, 1)


def _halves_swapped(weight: Tensor) -> Tensor:
    """Swaps the halves: the pairs are still the wrong ones."""
    return torch.cat(weight.chunk(2)[::-1])


def _as_it_is(weight: Tensor) -> Tensor:
    """Changes nothing: the shapes fit, and nothing crashes."""
    return weight.clone()


def _order_lost(weight: Tensor) -> Tensor:
    """Finds the pairs but turns each the other way round: query and key agree, the direction does not."""
    return torch.cat([weight[1::2], weight[0::2]])


def _slow_first(weight: Tensor) -> Tensor:
    """Finds the pairs and lists them backwards: each now turns at another pair's pace."""
    return torch.cat([weight[0::2].flip(0), weight[1::2].flip(0)])


def _check_for_halves(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(5)
    R, D, rope = 8, 12, angles(8, *range(10))
    w_q, w_k = torch.randn(R, D, generator=generator), torch.randn(R, D, generator=generator)
    x = torch.randn(1, 10, 1, D, generator=generator)
    found = answer(w_k.clone())
    require(getattr(found, "shape", None) == (R, D), f"a weight of shape ({R}, {D}) keeps its shape")
    same = found.sort(0).values.equal(w_k.sort(0).values)
    require(same, "the same rows must be there, in another order: change no number")
    right = rope.interleaved(x @ w_q.T)[0, :, 0] @ rope.interleaved(x @ w_k.T)[0, :, 0].T
    mine = rope.half_split(x @ answer(w_q.clone()).T)[0, :, 0] @ rope.half_split(x @ found.T)[0, :, 0].T
    gap = float((mine - right).abs().max())
    require(gap < 1e-3, f"with your rows and rotated halves the scores differ by up to {gap:.1f}")


EXERCISES = (
    Exercise(
        "Which convention is it?", 2, 15,
        "Somebody hands you a rotation and no documentation. Find out which dimensions it turns together. This is how "
        "one settles whether two programs mean the same by RoPE, before any weights are loaded.",
        ("Give it a vector that is 1 in one dimension and 0 elsewhere, at a position other than 0.",
         "A part of that 1 arrives in exactly one other dimension: the partner.",
         "`argmax` finds it. Where nothing arrives anywhere, the dimension is its own partner."),
        my_partners, (_neighbours_assumed, _halves_assumed, _at_the_start, _everything_turns, _rotary_first),
        _check_partners,
    ),
    Exercise(
        "Mend the convention in the weights", 3, 20,
        "A program that you cannot change rotates halves; the checkpoint wants neighbours. You may reorder the rows of "
        "the projections that make the rotary query and key, and nothing else. Conversion scripts really do this.",
        ("Pair i of the neighbours is (2i, 2i + 1); pair i of the halves is (i, i + R/2). Both turn by frequency i.",
         "So what stood in 2i must go to i, and what stood in 2i + 1 to i + R/2.",
         "Slices with a step: all even rows first, then all odd ones."),
        my_for_halves, (_other_way, _halves_swapped, _as_it_is, _order_lost, _slow_first), _check_for_halves,
    ),
)  # fmt: skip
