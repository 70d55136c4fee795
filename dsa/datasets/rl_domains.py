"""Five tiny domains whose answers a rule can check: what specialists are trained in.

They stand for the report's five, at a size that a model of a quarter of a million weights can learn:

| here | stands for | the task |
| --- | --- | --- |
| `maths` | mathematics | add two to four digits below five |
| `sorting` | competitive programming | sort three to five digits |
| `brackets` | logical reasoning | close what is open, innermost first |
| `repair` | agentic coding | run the tests, write the line they name as the specification has it, until they pass |
| `search` | agentic search | ask for a name, then for what was found, until a number comes, and report it |

The last two take several turns: after some of the model's tokens a tool speaks (:meth:`Domain.reply`), and its tokens
are not the model's own. Every prompt says whether to think. A thinker writes what it needs first (running totals,
sorted halves, what is open, the name it is about); only what comes after ``=``, or what the tool was told, counts.

A checker applies the rule to the prompt and compares with no stored solution. It must accept every right answer and
refuse every changed one, since whatever it lets through besides is what reinforcement learning will find.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from dsa.datasets import rl_symbols
from dsa.datasets.rl_symbols import (
    ANSWER,
    ASK,
    BRACKETS,
    CLOSES,
    COLON,
    DIGITS,
    END,
    FAILED,
    ID,
    NAMES,
    PASSED,
    RUN,
    Ids,
)

LEVELS = (1, 2, 3)
LINES = 8  # of a specification

World = dict[int, int]


@dataclass(frozen=True)
class Problem:
    """One prompt, as ids, and the ``world`` that only the tool sees: a name -> what it says to that name."""

    domain: str
    level: int
    thinking: bool
    prompt: Ids
    world: World

    @property
    def body(self) -> Ids:
        """The prompt without the marks of domain and mode."""
        return self.prompt[2:]


@dataclass(frozen=True)
class Domain:
    """One domain; ``own`` below are the model's tokens so far, those of the tool left out.

    - ``make(chance, level)`` -> the prompt's body and the tool's world;
    - ``solve(problem)`` -> the model's tokens of a right solution, thoughts included where the prompt asks for them;
    - ``holds(problem, own)`` -> whether the model's tokens, up to but without END, do what was asked;
    - ``reply(problem, own)`` -> what the tool says after the last of them, mostly nothing.
    """

    mark: int
    make: Callable[[Random, int], tuple[Ids, World]]
    solve: Callable[[Problem], Ids]
    holds: Callable[[Problem, Ids], bool]
    reply: Callable[[Problem, Ids], Ids] = lambda problem, own: ()


def _answered(problem: Problem, own: Ids) -> Ids | None:
    """What stands after the one ``=``; None if there is none or more than one, or a thought that nobody asked for."""
    silent = problem.thinking or own[:1] in ((ANSWER,), (ASK,))
    return own[own.index(ANSWER) + 1 :] if own.count(ANSWER) == 1 and silent else None


def _spoken(problem: Problem, thought: Sequence[Ids], answer: Ids) -> Ids:
    """Thoughts with colons between them if the prompt asks for them, then the answer."""
    joined = tuple(token for part in thought for token in (COLON, *part))[1:]
    return (*(joined if problem.thinking else ()), ANSWER, *answer, END)


# maths: a thinker writes the running totals -------------------------------------------------------------------------


def _number(value: int) -> Ids:
    return tuple(DIGITS[int(digit)] for digit in str(value))


def _terms(problem: Problem) -> list[int]:
    return [DIGITS.index(token) for token in problem.body if token in DIGITS]


def _make_maths(chance: Random, level: int) -> tuple[Ids, World]:
    terms = [chance.choice(DIGITS[:5]) for _ in range(level + 1)]
    return tuple(token for term in terms for token in (ID["+"], term))[1:], {}


def _solve_maths(problem: Problem) -> Ids:
    terms = _terms(problem)
    totals = [_number(sum(terms[:n])) for n in range(2, len(terms) + 1)]
    return _spoken(problem, totals, totals[-1])


def _holds_maths(problem: Problem, own: Ids) -> bool:
    return _answered(problem, own) == _number(sum(_terms(problem)))


# sorting: a thinker sorts both halves first -------------------------------------------------------------------------


def _make_sorting(chance: Random, level: int) -> tuple[Ids, World]:
    return tuple(chance.sample(DIGITS, level + 2)), {}


def _solve_sorting(problem: Problem) -> Ids:
    items, half = problem.body, len(problem.body) // 2
    return _spoken(problem, [tuple(sorted(items[:half])), tuple(sorted(items[half:]))], tuple(sorted(items)))


def _holds_sorting(problem: Problem, own: Ids) -> bool:
    answer = _answered(problem, own)
    return answer is not None and in_order(answer) and same_items(problem.body, answer)


def in_order(ids: Ids) -> bool:
    """Whether no id is smaller than the one before it."""
    return all(a <= b for a, b in itertools.pairwise(ids))


def same_items(a: Ids, b: Ids) -> bool:
    """Whether both hold the same ids equally often."""
    return sorted(a) == sorted(b)


# brackets: a thinker lists what is open -----------------------------------------------------------------------------


def _make_brackets(chance: Random, level: int) -> tuple[Ids, World]:
    """``level`` brackets stay open; between them stand pairs that are closed, one or two of them."""
    text = [chance.choice(list(CLOSES)) for _ in range(level)]
    for _ in range(chance.randint(1, 2)):
        place, opening = chance.randint(0, len(text)), chance.choice(list(CLOSES))
        text[place:place] = [opening, CLOSES[opening]]
    return tuple(text), {}


def still_open(ids: Ids) -> Ids | None:
    """The opening brackets that nothing closes, outermost first; None if a bracket closes what is not open."""
    stack: list[int] = []
    for token in ids:
        if token in CLOSES:
            stack.append(token)
        elif not stack or CLOSES[stack.pop()] != token:
            return None
    return tuple(stack)


def _solve_brackets(problem: Problem) -> Ids:
    opened = still_open(problem.body) or ()
    return _spoken(problem, [opened], tuple(CLOSES[token] for token in reversed(opened)))


def _holds_brackets(problem: Problem, own: Ids) -> bool:
    answer = _answered(problem, own)
    return answer is not None and all(t in BRACKETS for t in answer) and still_open(problem.body + answer) == ()


# repair: tests name a line, the specification in the prompt says what it must be; a thinker repeats the name ---------


def _make_repair(chance: Random, level: int) -> tuple[Ids, World]:
    names = chance.sample(NAMES, LINES)
    lines = {name: chance.choice(DIGITS) for name in names}
    broken = chance.sample(names, level)
    return tuple(token for line in lines.items() for token in line), {name: lines[name] for name in broken}


def _solve_repair(problem: Problem) -> Ids:
    edits = (((COLON, name) if problem.thinking else ()) + (digit,) for name, digit in problem.world.items())
    return (RUN, *(token for edit in edits for token in edit), END)


def _edits(own: Ids) -> list[int]:
    return [token for token in own if token in DIGITS]


def _reply_repair(problem: Problem, own: Ids) -> Ids:
    """The next failing line, ✓ when there is none; ✗ for good after a wrong edit."""
    done, wanted = _edits(own), list(problem.world.values())
    if RUN not in own or own[-1] not in (RUN, *DIGITS):
        return ()
    if done != wanted[: len(done)]:
        return (FAILED,)
    return (list(problem.world)[len(done)],) if len(done) < len(wanted) else (PASSED,)


def _holds_repair(problem: Problem, own: Ids) -> bool:
    notes = {COLON, *NAMES} if problem.thinking else set()
    return own[:1] == (RUN,) and _edits(own) == list(problem.world.values()) and set(own[1:]) <= {*DIGITS, *notes}


# search: a chain of names that ends in a number; a thinker notes the name before asking -------------------------------


def _make_search(chance: Random, level: int) -> tuple[Ids, World]:
    chain = [*chance.sample(NAMES, level), chance.choice(DIGITS)]
    return (chain[0],), dict(itertools.pairwise(chain))


def _solve_search(problem: Problem) -> Ids:
    asks = (((name,) if problem.thinking else ()) + (ASK, name) for name in problem.world)
    return (*(token for ask in asks for token in ask), ANSWER, list(problem.world.values())[-1], END)


def _reply_search(problem: Problem, own: Ids) -> Ids:
    """What stands under the name that was asked for, ✗ if nothing does."""
    asked = own[-2:-1] == (ASK,)
    return (problem.world.get(own[-1], FAILED),) if asked else ()


def _holds_search(problem: Problem, own: Ids) -> bool:
    asked = [name for ask, name in itertools.pairwise(own) if ask == ASK]
    to_the_point = problem.thinking or len(own) == 2 * len(asked) + 2
    found = (list(problem.world.values())[-1],)
    return to_the_point and asked == list(problem.world) and _answered(problem, own) == found


DOMAINS = {
    "maths": Domain(ID["Σ"], _make_maths, _solve_maths, _holds_maths),
    "sorting": Domain(ID["↓"], _make_sorting, _solve_sorting, _holds_sorting),
    "brackets": Domain(ID["§"], _make_brackets, _solve_brackets, _holds_brackets),
    "repair": Domain(ID["✎"], _make_repair, _solve_repair, _holds_repair, _reply_repair),
    "search": Domain(ID["⌕"], _make_search, _solve_search, _holds_search, _reply_search),
}


def generate(chance: Random, domain: str, level: int | None = None, thinking: bool | None = None) -> Problem:
    """One problem; a level or mode that is not given is drawn. ValueError for a domain or level that does not exist."""
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} does not exist: use one of {', '.join(DOMAINS)}")
    level = chance.choice(LEVELS) if level is None else level
    if level not in LEVELS:
        raise ValueError(f"level {level} does not exist: use one of {LEVELS}")
    thinking = chance.random() < 0.5 if thinking is None else thinking
    body, world = DOMAINS[domain].make(chance, level)
    return Problem(
        domain,
        level,
        thinking,
        (DOMAINS[domain].mark, rl_symbols.THINK if thinking else rl_symbols.DIRECT, *body),
        world,
    )


def solve(problem: Problem) -> Ids:
    """The model's own tokens of a right solution, END included."""
    return DOMAINS[problem.domain].solve(problem)


def reply(problem: Problem, own: Ids) -> Ids:
    """What the tool says when the model has written its tokens ``own``: ids, mostly none."""
    return DOMAINS[problem.domain].reply(problem, own)


def thinks(problem: Problem, own: Ids) -> bool:
    """Whether the model's tokens hold a thought."""
    if problem.domain == "repair":
        return COLON in own
    return own[:1] != ((ASK,) if problem.domain == "search" else (ANSWER,))


def correct(problem: Problem, own: Ids) -> bool:
    """Whether the model's own tokens solve the problem: they must end with END, and hold no other."""
    return own[-1:] == (END,) and own.count(END) == 1 and DOMAINS[problem.domain].holds(problem, own[:-1])
