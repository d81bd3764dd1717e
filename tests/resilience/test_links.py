"""A node behind a slow network is told apart from a busy one, and from rank 0's own node."""

from megatron_ext.resilience.links import WINDOW_SECONDS, Links


def _windows(trips: list[dict[str, list[float]]]) -> list[tuple[dict, list[str]]]:
    """What each window of round trips by node, seen from n0, comes to."""
    links, found = Links("n0"), []
    links.tick(0.0)
    for k, window in enumerate(trips):
        for node, seconds in window.items():
            for trip in seconds:
                links.hear(node, trip)
        found.append(links.tick((k + 1) * WINDOW_SECONDS))
    return found


CLEAN = {"n0": [0.0001], "n1": [0.0002, 0.3], "n2": [0.0002], "n3": [0.0003]}


def test_a_slow_way_is_named_in_its_second_window_and_called_well_again() -> None:
    slow = {**CLEAN, "n2": [0.051, 0.052]}
    found = _windows([CLEAN, slow, slow, slow, CLEAN])
    assert [set(turned) for turned, _ in found] == [set(), set(), {"n2"}, set(), set()]
    assert [well for _, well in found] == [[], [], [], [], ["n2"]]


def test_answers_that_are_late_now_and_then_are_a_busy_machine() -> None:
    assert not any(turned or well for turned, well in _windows([CLEAN] * 6))


def test_where_all_are_far_it_is_the_node_of_rank_0() -> None:
    far = {"n1": [0.05], "n2": [0.05], "n3": [0.06]}
    assert set(_windows([far, far])[1][0]) == {"n0"}


def test_of_two_nodes_the_other_one_is_named() -> None:
    assert set(_windows([{"n1": [0.05]}] * 2)[1][0]) == {"n1"}
    assert _windows([{"n1": [0.009]}] * 3)[2] == ({}, [])
