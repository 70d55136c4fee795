"""A right answer is always accepted, a changed one never; tools say what they know; transcripts keep who spoke."""

from itertools import product
from random import Random

import pytest
import torch

from dsa.datasets import rl_domains, rl_symbols, rl_transcripts
from dsa.datasets.rl_domains import DOMAINS, LEVELS, generate, solve
from dsa.datasets.rl_symbols import ANSWER, ASK, COLON, DIGITS, END, FAILED, NAMES, PAD, PASSED, RUN, read, write
from dsa.datasets.rl_transcripts import COMPLETION, LENGTH, PROMPT, Demonstrations, demonstration, run_with_tool

KINDS = list(product(DOMAINS, LEVELS, (False, True)))
each = pytest.mark.parametrize(("name", "level", "thinking"), KINDS)


def problems(name, level, thinking, count=40):
    chance = Random(f"{name} {level} {thinking}")
    return [generate(chance, name, level, thinking) for _ in range(count)]


def counts_from(problem, solution):
    """Where the part of a solution begins that a checker must hold to the letter."""
    if not problem.thinking:
        return 0
    return solution.index(ANSWER) if ANSWER in solution else len(solution)


def independent(problem, answer):
    """Whether an answer is right, worked out from the prompt's text by other means than the checker's."""
    text = read(problem.body)
    if problem.domain == "maths":
        return read(answer).replace(" ", "") == str(eval(text))
    if problem.domain == "sorting":
        return read(answer).split() == sorted(text.split())
    whole = text.replace(" ", "") + read(answer).replace(" ", "")
    while any(pair in whole for pair in ("()", "[]", "{}")):
        whole = whole.replace("()", "").replace("[]", "").replace("{}", "")
    return whole == ""


@each
def test_right_answers_are_accepted_and_fit(name, level, thinking):
    for problem in problems(name, level, thinking):
        one = demonstration(problem)
        assert one.correct and one.completion == solve(problem)
        assert len(problem.prompt) <= PROMPT and len(one.tokens) <= COMPLETION
        assert rl_domains.contains_thought(problem, one.completion) == thinking
        if name in ("maths", "sorting", "brackets"):
            assert independent(problem, one.completion[one.completion.index(ANSWER) + 1 : -1])


@each
def test_changed_answers_are_refused(name, level, thinking):
    chance = Random(1)
    for problem in problems(name, level, thinking, 12):
        right = solve(problem)
        first = counts_from(problem, right)
        for place in range(first, len(right)):
            for other in chance.sample(range(rl_symbols.VOCAB), 16):
                if other != right[place]:
                    changed = (*right[:place], other, *right[place + 1 :])
                    assert not rl_domains.correct(problem, changed), read(changed)
            assert not rl_domains.correct(problem, (*right[:place], *right[place + 1 :])), "one left out"
            if place > first or not thinking:
                inserted = chance.randrange(rl_symbols.VOCAB)
                assert not rl_domains.correct(problem, (*right[:place], inserted, *right[place:])), "one too many"
        assert not rl_domains.correct(problem, right[:-1]) and not rl_domains.correct(problem, (*right, END))
        assert not rl_domains.correct(problem, ()) and not rl_domains.correct(problem, (END, *right))


@pytest.mark.parametrize("level", LEVELS)
def test_the_agents_must_do_and_not_only_say(level):
    for problem in problems("repair", level, True):
        right = solve(problem)
        for place in [n for n, token in enumerate(right) if token in DIGITS]:
            wrong = DIGITS[(DIGITS.index(right[place]) + 1) % 10]
            changed = (*right[:place], wrong, *right[place + 1 :])
            assert not rl_domains.correct(problem, changed) and FAILED in run_with_tool(problem, changed).tokens
        assert not rl_domains.correct(problem, (PASSED, END)) and not rl_domains.correct(problem, (RUN, PASSED, END))
        assert not rl_domains.correct(problem, right[1:]), "without running the tests"
    for problem in problems("search", level, True):
        answer = solve(problem)[-2]
        assert not rl_domains.correct(problem, (ANSWER, answer, END)), "guessed without asking"


def test_a_wrong_thought_does_no_harm():
    for name, level in product(DOMAINS, LEVELS):
        for problem in problems(name, level, True, 10):
            right = solve(problem)
            act = {ASK, RUN, ANSWER, END, *(DIGITS if name == "repair" else ())}
            stop = counts_from(problem, right)
            asked = {n + 1 for n, token in enumerate(right) if token == ASK}
            for place in (n for n, token in enumerate(right[:stop]) if token not in act and n not in asked):
                other = COLON if right[place] != COLON else NAMES[0]
                assert rl_domains.correct(problem, (*right[:place], other, *right[place + 1 :]))


def test_tools_say_what_they_know_and_nothing_else():
    chain = rl_domains.Problem("search", 2, False, write("⌕ D a"), {NAMES[0]: NAMES[2], NAMES[2]: DIGITS[7]})
    assert read(run_with_tool(chain, write("? a ? c = 7 .")).tokens) == "? a c ? c 7 = 7 ."
    assert read(run_with_tool(chain, write("? b ? a = 7 .")).tokens) == "? b ✗ ."
    broken = rl_domains.Problem(
        "repair", 2, False, write("✎ D a 1 b 2 c 3"), {NAMES[1]: DIGITS[2], NAMES[0]: DIGITS[1]}
    )
    assert read(run_with_tool(broken, write("▸ 2 1 .")).tokens) == "▸ b 2 a 1 ✓ ."
    assert read(run_with_tool(broken, write("▸ 2 5 .")).tokens) == "▸ b 2 a 5 ✗ ."
    one = run_with_tool(broken, write("▸ 2 1 ."))
    assert one.completion_mask == (True, False, True, False, True, False, True) and one.completion == write("▸ 2 1 .")


def test_levels_get_harder_and_all_problems_differ():
    for name in DOMAINS:
        lengths = [len(demonstration(problems(name, level, False)[0]).tokens) for level in LEVELS]
        assert lengths == sorted(lengths)
        if name != "search":
            assert len({problem.prompt for problem in problems(name, 3, False)}) > 30


def test_a_batch_marks_the_models_own_tokens():
    generator = torch.Generator().manual_seed(0)
    drawn = rl_transcripts.sample_problems(generator, tuple(DOMAINS), 10)
    episodes = rl_transcripts.batch([demonstration(problem) for problem in drawn])
    assert episodes.tokens.shape == episodes.loss_mask.shape == (10, LENGTH)
    for row, counts, problem in zip(episodes.tokens, episodes.loss_mask, drawn, strict=True):
        assert row[counts].tolist() == list(solve(problem))
        assert not counts[:PROMPT].any() and (row[: PROMPT - len(problem.prompt)] == PAD).all()


def test_the_bases_corpus_has_as_many_mistakes_as_it_says():
    chance, wrong = Random(0), 0
    for name, level, thinking in KINDS * 10:
        problem = generate(chance, name, level, thinking)
        one = rl_transcripts.noisy_demonstration(chance, problem)
        wrong += not one.correct
        assert one.completion[-1] == END and one.completion != solve(problem)
    assert wrong > 0.7 * 10 * len(KINDS)  # some mistakes are in thoughts and harm nothing
    clean, dirty = (Demonstrations(noise=share).generate(torch.Generator().manual_seed(3), 300) for share in (0, 0.4))
    changed = (clean.tokens != dirty.tokens).any(1).float().mean()
    assert 0.3 < changed < 0.5
    again = Demonstrations(noise=0.4).generate(torch.Generator().manual_seed(3), 300)
    assert torch.equal(again.tokens, dirty.tokens)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="domain 'poetry' does not exist: use one of maths"):
        generate(Random(0), "poetry")
    with pytest.raises(ValueError, match="level 4 does not exist"):
        generate(Random(0), "maths", 4)
    with pytest.raises(ValueError, match="symbol 'z' is not among the 48"):
        write("a z")
    assert read(write("Σ D 1 + 2")) == "Σ D 1 + 2" and COLON != ASK
