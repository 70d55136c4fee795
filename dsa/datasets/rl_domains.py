"""Five tiny domains whose answers a rule can check: what specialists are trained in.

They stand for the report's five, at a size that a model of a quarter of a million weights can learn:

| here | stands for | the task |
| --- | --- | --- |
| `maths` | mathematics | add two to four digits below five |
| `sorting` | competitive programming | sort three to five digits |
| `brackets` | logical reasoning | close what is open, innermost first |
| `repair` | agentic coding | run the tests, write the line they name as the specification has it, until they pass |
| `search` | agentic search | ask for a name, then for what was found, until a number comes, and report it |

The last two take several turns: after some of the model's tokens a tool replies (:meth:`Domain.tool_reply`), and its
tokens are not the model's own. Every prompt says whether to think. A thinker writes what it needs first (running
totals, sorted halves, what is open, the name it is about); only what comes after ``=``, or what the tool was told,
counts.

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

Environment = dict[int, int]


@dataclass(frozen=True)
class Problem:
    """One prompt, as ids, and the ``environment`` that only the tool sees: a name -> what it says to that name."""

    domain: str
    level: int
    thinking: bool
    prompt: Ids
    environment: Environment

    @property
    def body(self) -> Ids:
        """The prompt without the marks of domain and mode."""
        return self.prompt[2:]


@dataclass(frozen=True)
class Domain:
    """One domain; ``completion`` below are the model's tokens so far, those of the tool left out.

    - ``make(rng, level)`` -> the prompt's body and the tool's environment;
    - ``solve(problem)`` -> the model's tokens of a right solution, thoughts included where the prompt asks for them;
    - ``verify(problem, completion)`` -> whether the model's tokens, up to but without END, do what was asked;
    - ``tool_reply(problem, completion)`` -> what the tool says after the last of them, mostly nothing.
    """

    mark: int
    make: Callable[[Random, int], tuple[Ids, Environment]]
    solve: Callable[[Problem], Ids]
    verify: Callable[[Problem, Ids], bool]
    tool_reply: Callable[[Problem, Ids], Ids] = lambda problem, completion: ()


def _extract_answer(problem: Problem, completion: Ids) -> Ids | None:
    """What stands after the one ``=``; None if there is none or more than one, or a thought that nobody asked for."""
    silent = problem.thinking or completion[:1] in ((ANSWER,), (ASK,))
    return completion[completion.index(ANSWER) + 1 :] if completion.count(ANSWER) == 1 and silent else None


def _solution(problem: Problem, thought: Sequence[Ids], answer: Ids) -> Ids:
    """Thoughts with colons between them if the prompt asks for them, then the answer."""
    joined = tuple(token for part in thought for token in (COLON, *part))[1:]
    return (*(joined if problem.thinking else ()), ANSWER, *answer, END)


# maths: a thinker writes the running totals -------------------------------------------------------------------------


def _number(value: int) -> Ids:
    return tuple(DIGITS[int(digit)] for digit in str(value))


def _terms(problem: Problem) -> list[int]:
    return [DIGITS.index(token) for token in problem.body if token in DIGITS]


def _make_maths(rng: Random, level: int) -> tuple[Ids, Environment]:
    terms = [rng.choice(DIGITS[:5]) for _ in range(level + 1)]
    return tuple(token for term in terms for token in (ID["+"], term))[1:], {}


def _solve_maths(problem: Problem) -> Ids:
    terms = _terms(problem)
    totals = [_number(sum(terms[:n])) for n in range(2, len(terms) + 1)]
    return _solution(problem, totals, totals[-1])


def _verify_maths(problem: Problem, completion: Ids) -> bool:
    return _extract_answer(problem, completion) == _number(sum(_terms(problem)))


# sorting: a thinker sorts both halves first -------------------------------------------------------------------------


def _make_sorting(rng: Random, level: int) -> tuple[Ids, Environment]:
    return tuple(rng.sample(DIGITS, level + 2)), {}


def _solve_sorting(problem: Problem) -> Ids:
    items, half = problem.body, len(problem.body) // 2
    return _solution(problem, [tuple(sorted(items[:half])), tuple(sorted(items[half:]))], tuple(sorted(items)))


def _verify_sorting(problem: Problem, completion: Ids) -> bool:
    answer = _extract_answer(problem, completion)
    return answer is not None and in_order(answer) and same_items(problem.body, answer)


def in_order(ids: Ids) -> bool:
    """Whether no id is smaller than the one before it."""
    return all(a <= b for a, b in itertools.pairwise(ids))


def same_items(a: Ids, b: Ids) -> bool:
    """Whether both hold the same ids equally often."""
    return sorted(a) == sorted(b)


# brackets: a thinker lists what is open -----------------------------------------------------------------------------


def _make_brackets(rng: Random, level: int) -> tuple[Ids, Environment]:
    """``level`` brackets stay open; between them stand pairs that are closed, one or two of them."""
    text = [rng.choice(list(CLOSES)) for _ in range(level)]
    for _ in range(rng.randint(1, 2)):
        place, opening = rng.randint(0, len(text)), rng.choice(list(CLOSES))
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
    return _solution(problem, [opened], tuple(CLOSES[token] for token in reversed(opened)))


def _verify_brackets(problem: Problem, completion: Ids) -> bool:
    answer = _extract_answer(problem, completion)
    return answer is not None and all(t in BRACKETS for t in answer) and still_open(problem.body + answer) == ()


# repair: tests name a line, the specification in the prompt says what it must be; a thinker repeats the name ---------


def _make_repair(rng: Random, level: int) -> tuple[Ids, Environment]:
    names = rng.sample(NAMES, LINES)
    lines = {name: rng.choice(DIGITS) for name in names}
    broken = rng.sample(names, level)
    return tuple(token for line in lines.items() for token in line), {name: lines[name] for name in broken}


def _solve_repair(problem: Problem) -> Ids:
    edits = (((COLON, name) if problem.thinking else ()) + (digit,) for name, digit in problem.environment.items())
    return (RUN, *(token for edit in edits for token in edit), END)


def _edits(completion: Ids) -> list[int]:
    return [token for token in completion if token in DIGITS]


def _tool_reply_repair(problem: Problem, completion: Ids) -> Ids:
    """The next failing line, ✓ when there is none; ✗ for good after a wrong edit."""
    done, wanted = _edits(completion), list(problem.environment.values())
    if RUN not in completion or completion[-1] not in (RUN, *DIGITS):
        return ()
    if done != wanted[: len(done)]:
        return (FAILED,)
    return (list(problem.environment)[len(done)],) if len(done) < len(wanted) else (PASSED,)


def _verify_repair(problem: Problem, completion: Ids) -> bool:
    notes = {COLON, *NAMES} if problem.thinking else set()
    edits = _edits(completion) == list(problem.environment.values())
    return completion[:1] == (RUN,) and edits and set(completion[1:]) <= {*DIGITS, *notes}


# search: a chain of names that ends in a number; a thinker notes the name before asking -------------------------------


def _make_search(rng: Random, level: int) -> tuple[Ids, Environment]:
    chain = [*rng.sample(NAMES, level), rng.choice(DIGITS)]
    return (chain[0],), dict(itertools.pairwise(chain))


def _solve_search(problem: Problem) -> Ids:
    asks = (((name,) if problem.thinking else ()) + (ASK, name) for name in problem.environment)
    return (*(token for ask in asks for token in ask), ANSWER, list(problem.environment.values())[-1], END)


def _tool_reply_search(problem: Problem, completion: Ids) -> Ids:
    """What stands under the name that was asked for, ✗ if nothing does."""
    asked = completion[-2:-1] == (ASK,)
    return (problem.environment.get(completion[-1], FAILED),) if asked else ()


def _verify_search(problem: Problem, completion: Ids) -> bool:
    asked = [name for ask, name in itertools.pairwise(completion) if ask == ASK]
    to_the_point = problem.thinking or len(completion) == 2 * len(asked) + 2
    answer = (list(problem.environment.values())[-1],)
    return to_the_point and asked == list(problem.environment) and _extract_answer(problem, completion) == answer


DOMAINS = {
    "maths": Domain(ID["Σ"], _make_maths, _solve_maths, _verify_maths),
    "sorting": Domain(ID["↓"], _make_sorting, _solve_sorting, _verify_sorting),
    "brackets": Domain(ID["§"], _make_brackets, _solve_brackets, _verify_brackets),
    "repair": Domain(ID["✎"], _make_repair, _solve_repair, _verify_repair, _tool_reply_repair),
    "search": Domain(ID["⌕"], _make_search, _solve_search, _verify_search, _tool_reply_search),
}


def generate(rng: Random, domain: str, level: int | None = None, thinking: bool | None = None) -> Problem:
    """One problem; a level or mode that is not given is drawn. ValueError for a domain or level that does not exist."""
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} does not exist: use one of {', '.join(DOMAINS)}")
    level = rng.choice(LEVELS) if level is None else level
    if level not in LEVELS:
        raise ValueError(f"level {level} does not exist: use one of {LEVELS}")
    thinking = rng.random() < 0.5 if thinking is None else thinking
    body, environment = DOMAINS[domain].make(rng, level)
    mode = rl_symbols.THINK if thinking else rl_symbols.DIRECT
    return Problem(domain, level, thinking, (DOMAINS[domain].mark, mode, *body), environment)


def solve(problem: Problem) -> Ids:
    """The model's own tokens of a right solution, END included."""
    return DOMAINS[problem.domain].solve(problem)


def tool_reply(problem: Problem, completion: Ids) -> Ids:
    """What the tool says when the model has written its tokens ``completion``: ids, mostly none."""
    return DOMAINS[problem.domain].tool_reply(problem, completion)


def contains_thought(problem: Problem, completion: Ids) -> bool:
    """Whether the model's tokens hold a thought."""
    if problem.domain == "repair":
        return COLON in completion
    return completion[:1] != ((ASK,) if problem.domain == "search" else (ANSWER,))


def correct(problem: Problem, completion: Ids) -> bool:
    """Whether the model's own tokens solve the problem: they must end with END, and hold no other."""
    ended = completion[-1:] == (END,) and completion.count(END) == 1
    return ended and DOMAINS[problem.domain].verify(problem, completion[:-1])
