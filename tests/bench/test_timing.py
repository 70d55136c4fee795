"""All candidates take turns, the median counts, and threads are given back; never how long anything took."""

import pytest
import torch

from dsa.bench import timing


def clock(monkeypatch, name, *ticks):
    coming = iter(ticks)
    monkeypatch.setattr(timing, name, lambda: next(coming))


def test_candidates_take_turns_and_the_median_counts(monkeypatch):
    told = []
    calls = {name: lambda name=name: told.append(name) for name in ("dense", "sparse")}
    clock(monkeypatch, "process_time", 0, 9, 0, 9, 0, 1, 0, 2, 0, 3, 0, 4, 0, 50, 0, 60)  # the first of each warms up
    assert timing.cpu_seconds(calls, repeats=3) == {"dense": 3, "sparse": 4}
    assert told == ["dense", "sparse"] * 4


def test_a_short_call_runs_often_enough_in_each_sample(monkeypatch):
    told = []
    clock(monkeypatch, "process_time", 0, 0.01, 0, 0.1)
    assert timing.cpu_seconds({"": lambda: told.append(1)}, repeats=1) == {"": 0.1 / 5}
    assert len(told) == 1 + 5


def test_calls_run_on_one_thread_and_threads_are_as_they_were():
    before, seen = torch.get_num_threads(), []

    def call():
        seen.append(torch.get_num_threads())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        timing.cpu_seconds({"": call}, repeats=1)
    assert seen == [1] and torch.get_num_threads() == before


def test_what_lasts_is_timed_by_the_clock(monkeypatch):
    clock(monkeypatch, "perf_counter", 10, 13)
    assert timing.wall_seconds(lambda: None, torch.device("cpu")) == 3
