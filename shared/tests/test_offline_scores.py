"""Reference scores of D4RL's tasks."""

from __future__ import annotations

import numpy as np
import pytest

from leap_shared.errors import UserError
from leap_shared.offline import labelled_score, normalised_score, reference, tasks, tasks_of_file


def test_every_task_has_a_file_and_all_but_one_a_range() -> None:
    references = [reference(task) for task in tasks()]
    assert len(references) == 183
    assert all(found.file.endswith(".hdf5") for found in references)
    assert [found.task for found in references if found.min_score is None] == ["carla-town-render-v0"]
    assert all(found.min_score < found.max_score for found in references if found.min_score and found.max_score)


def test_reference_holds_the_facts_of_its_task() -> None:
    found = reference("antmaze-umaze-v2")
    assert (found.suite, found.max_episode_steps, found.observation_width, found.action_width) == (
        "locomotion",
        700,
        29,
        8,
    )


def test_score_is_0_at_the_random_and_100_at_the_expert_return() -> None:
    found = reference("hopper-medium-v2")
    scores = normalised_score("hopper-medium-v2", np.array([[found.min_score, found.max_score]], np.float64))
    np.testing.assert_allclose(scores, [[0, 100]], atol=1e-12)
    assert normalised_score("antmaze-umaze-v2", 0.5).item() == 50.0


def test_unknown_task_names_near_ones() -> None:
    with pytest.raises(UserError, match="no task 'hopper-medum-v2': did you mean hopper-medium-v2"):
        normalised_score("hopper-medum-v2", 1.0)


def test_task_without_range_is_refused() -> None:
    with pytest.raises(UserError, match="no reference scores for carla-town-render-v0"):
        normalised_score("carla-town-render-v0", 1.0)


@pytest.mark.parametrize(
    ("environment", "task", "label"),
    [
        ("Hopper-v5", "hopper-expert-v2", "v5, D4RL reference range"),
        ("HalfCheetah-v4", "halfcheetah-random-v0", "v4, D4RL reference range"),
        ("Ant-v5", "ant-medium-v2", "v5, D4RL reference range"),
        ("hopper-medium-v2", "hopper-medium-v2", "D4RL"),
    ],
)
def test_score_of_another_environment_is_labelled_so(environment: str, task: str, label: str) -> None:
    score, given = labelled_score(environment, [1000.0])
    assert given == label
    np.testing.assert_array_equal(score, normalised_score(task, [1000.0]))


def test_environment_without_range_is_refused() -> None:
    with pytest.raises(UserError, match="no task 'Humanoid-v5'"):
        labelled_score("Humanoid-v5", 1.0)


def test_file_belongs_to_the_tasks_that_share_it() -> None:
    names = [found.task for found in tasks_of_file("pen-human-v1.hdf5")]
    assert names == ["pen-human-longhorizon-v1", "pen-human-v1"]
    assert [found.task for found in tasks_of_file("hopper-medium-v2.hdf5")] == ["hopper-medium-v2"]
    assert tasks_of_file("mine.hdf5") == []
