"""The checker of every exercise accepts its solution, refuses its wrong answers, and knows an untouched stub."""

import dataclasses
import re

import pytest
import torch

from course.exercises import registry
from course.exercises.exercise import checker, judge
from dsa.kernels.reference import selection_mask
from project import NOTEBOOKS
from sample_exercise import SAMPLE, largest, smallest, unsorted

EXERCISES = [SAMPLE, *registry.all_exercises()]


def defined(exercise, source):
    """The function that a cell with `source` defines, given what the exercise's module has imported."""
    names = dict(exercise.solution.__globals__)
    exec(source, names)
    return names[exercise.name]


def place(exercise):
    return f"{exercise.solution.__module__.rpartition('.')[2]}.{exercise.name}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=place)
class TestEveryExercise:
    def test_its_solution_is_right(self, exercise):
        assert judge(exercise, exercise.solution).state == "right"
        assert judge(exercise, defined(exercise, exercise.source)).state == "right"

    def test_its_stub_is_not_tried_yet(self, exercise):
        verdict = judge(exercise, defined(exercise, exercise.stub))
        assert verdict.state == "untried", verdict.words
        assert "not tried yet" in verdict.words

    def test_its_wrong_answers_are_refused_with_a_reason(self, exercise):
        for wrong in exercise.wrong:
            verdict = judge(exercise, wrong)
            assert verdict.state == "refused", f"{wrong.__name__}: {wrong.__doc__}"
            assert len(verdict.words) > 20, verdict.words

    def test_its_stub_and_solution_fit_a_cell(self, exercise):
        for source in (exercise.stub, exercise.source):
            assert len(source.splitlines()) <= 25
            assert max(map(len, source.splitlines())) <= 76


def test_the_registry_has_every_module_and_no_function_twice_in_one():
    folder = NOTEBOOKS / "course/exercises"
    modules = [path.stem for path in folder.glob("*.py") if "\ncheck = " in path.read_text("utf-8")]
    assert sorted(modules) == sorted(registry.CHAPTERS)
    for module in modules:
        names = [exercise.name for exercise in registry.chapter_exercises(module)]
        assert len(names) == len(set(names))
        assert registry.find_exercise(f"{module}.{names[-1]}").name == names[-1]


@pytest.mark.parametrize("named", ["selection.my_choice", "elsewhere.my_select", "my_select", ""])
def test_an_unknown_exercise_is_named(named):
    with pytest.raises(ValueError, match=rf"no exercise '{named}'; these are known: (selection\.|modules latent)"):
        registry.find_exercise(named)


def test_the_stub_shows_signature_and_docstring_and_nothing_of_the_solution():
    assert SAMPLE.stub.splitlines() == [
        "def largest(numbers: list[int], k: int) -> list[int]:",
        '    """The k largest numbers, largest first."""',
        "    return ...  # your code",
    ]


def test_check_knows_an_exercise_by_the_name_of_its_function(capsys):
    check = checker(SAMPLE)
    check(largest)
    smallest.__name__ = "largest"
    check(smallest)
    check(unsorted)
    check(5)
    assert capsys.readouterr().out.splitlines() == [
        "✓ The k largest",
        "✗ the 2 largest of 3, 1, 4, 1, 5 are [5, 4]; you returned [1, 1]",
        "✗ no exercise asks for unsorted: hand over one of the functions largest",
        "✗ this is a int: hand over one of the functions largest",
    ]


def raising(numbers, k):
    return numbers[99]


def forgetful(numbers, k):
    sorted(numbers)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (raising, r"your code raised IndexError: list index out of range in line \d+: `return numbers\[99\]`"),
        (lambda numbers: numbers, "your code raised TypeError"),
        (forgetful, "returned None: is a `return` missing"),
        (lambda numbers, k: 7, "cannot be used: TypeError"),
        ([5, 4], "list; hand over the function itself: largest"),
        (None, "hand over the function itself"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(answer, says):
    verdict = judge(SAMPLE, answer)
    assert verdict.state == "refused"
    assert re.search(says, verdict.words), verdict.words


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hints": ("one", "two")}, "three hints"),
        ({"hints": ("one", "two", " ")}, "three hints"),
        ({"difficulty": 4}, "difficulty"),
        ({"minutes": 0}, "minutes"),
        ({"wrong": (smallest, unsorted)}, "three wrong answers"),
        ({"wrong": (smallest, unsorted, forgetful)}, "docstring: its reason"),
        ({"solution": forgetful}, "docstring"),
    ],
)
def test_an_exercise_that_misses_something_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SAMPLE, **change)


def verdict(place, answer):
    return judge(registry.find_exercise(place), answer)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("top_ks", [(4,), (8,), (4, 8, 64)], ids=str)
def test_a_test_of_logits_is_refused_and_told_what_it_cannot_see(tolerance, top_ks):
    def my_test(model, tokens, golden):
        for model.top_k in top_ks:
            if not torch.allclose(model(tokens), golden[model.top_k].logits, atol=tolerance, rtol=0):
                return False
        return True

    found = verdict("lightning_indexer.my_test", my_test)
    assert found.state == "refused"
    if tolerance:  # otherwise it refuses a right model, which rounds differently
        assert "mask with 0, in the last layer only" in found.words
        assert "move no logit" in found.words and found.words.endswith("look at what is selected")


@pytest.mark.parametrize("top_k", [4, 8])
def test_tests_of_the_selection_are_accepted_however_they_compare(top_k):
    def by_sets(model, tokens, golden):
        model.top_k = top_k
        _, trace = model(tokens, trace=True)
        pairs = zip(trace, golden[top_k].sets, strict=True)
        return all(set(row.tolist()) - {-1} == right[t] for a, right in pairs for t, row in enumerate(a.selected[0]))

    def by_masks_and_logits(model, tokens, golden):
        model.top_k = top_k
        logits, trace = model(tokens, trace=True)
        wanted = [[[s in keys for s in range(40)] for keys in layer] for layer in golden[top_k].sets]
        same = torch.equal(torch.cat([selection_mask(layer.selected, 40) for layer in trace]), torch.tensor(wanted))
        return same and torch.allclose(logits, golden[top_k].logits, atol=1e-4)

    for answer in (by_sets, by_masks_and_logits):
        assert verdict("lightning_indexer.my_test", answer).state == "right"


def log_q(scores):
    return scores.log_softmax(-1).masked_fill(scores == float("-inf"), 0)


def by_kl_div(p, scores):
    seen = p > 0
    logs = scores.log_softmax(-1)[seen], p[seen].log()
    return torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)


def by_kl_div_of_shares(p, scores):
    return torch.nn.functional.kl_div(log_q(scores), p, reduction="sum")


def by_xlogy(p, scores):
    return torch.special.xlogy(p, p).sum() - (p * log_q(scores)).sum()


def by_entr(p, scores):
    return -torch.special.entr(p).sum() - (p * log_q(scores)).sum()


def by_nan_to_num(p, scores):
    return (p * (p.log() - scores.log_softmax(-1))).nan_to_num().sum()


def by_logsumexp(p, scores):
    seen = p > 0
    return (p[seen] * (p[seen].log() - scores[seen])).sum() + scores.logsumexp(-1)


def in_fp32(p, scores):
    return by_kl_div(p.float(), scores.float())


RIGHT = [by_kl_div, by_kl_div_of_shares, by_xlogy, by_entr, by_nan_to_num, by_logsumexp, in_fp32]


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: answer.__name__)
def test_a_divergence_may_be_written_in_many_ways(answer):
    found = verdict("indexer_kl.my_safe_kl", answer)
    assert found.state == "right", found.words


@pytest.mark.parametrize("least", [1e-6, 1e-8, 1e-9])
@pytest.mark.parametrize("clip", [torch.add, torch.clamp], ids=["added", "clamped"])
def test_a_clipped_logarithm_is_refused_with_what_it_costs(clip, least):
    def both(p, scores):
        return (p * (clip(p, least).log() - clip(scores.softmax(-1), least).log())).sum()

    def of_p(p, scores):
        return (p * (clip(p, least).log() - log_q(scores))).sum()

    def of_q(p, scores):
        return torch.special.xlogy(p, p).sum() - (p * clip(scores.softmax(-1), least).log()).sum()

    for answer in (both, of_q):
        assert "the divergence is 101.1, yours is" in verdict("indexer_kl.my_safe_kl", answer).words
    assert "the divergence is 0, yours is" in verdict("indexer_kl.my_safe_kl", of_p).words


def test_a_checker_that_accepts_everything_would_be_found_out():
    lenient = dataclasses.replace(SAMPLE, check=lambda answer: None)
    with pytest.raises(AssertionError):
        TestEveryExercise().test_its_wrong_answers_are_refused_with_a_reason(lenient)
