"""What each actor takes of a node, and which nodes are refused."""

from __future__ import annotations

import pytest

from deploy import PRESETS
from deploy.placement import (
    Node,
    Placement,
    Share,
    described,
    place_locally,
    place_on_node,
    require_room,
    threads_on_cores,
    with_threads,
)
from distill.config import RunConfig
from distill.config.load import load_config
from distill.errors import ConfigError

APART = "replay.max_policy_age=1"
"""Actors that work at the same time."""


def config(*overrides: str) -> RunConfig:
    student = ["recipe=ammd", "student.init.from=teacher", "student.init.num_layers=2"]
    return load_config(None, [*student, *overrides], PRESETS)


def node(num_cpus: float = 8, num_gpus: float = 0, *, free: float | None = None, num_others: int = 0) -> Node:
    return Node(
        address="10.0.0.1",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        free_cpus=num_cpus if free is None else free,
        free_gpus=num_gpus,
        num_others=num_others,
    )


def place(place: Node, *overrides: str, num_cores: int = 64, vllm_on_gpu: bool = False) -> Placement:
    return place_on_node(config(*overrides), num_cores, place, vllm_on_gpu=vllm_on_gpu)


def total(placement: Placement, unit: str) -> float:
    """What the actors that live at the same time take."""
    return sum(getattr(share, unit) for name, share in placement.items() if name not in ("sampler", "corpus"))


def refusal(place_: Node, *overrides: str, vllm_on_gpu: bool = False) -> str:
    with pytest.raises(ConfigError) as error:
        place(place_, *overrides, vllm_on_gpu=vllm_on_gpu)
    return str(error.value)


def test_on_a_local_ray_every_actor_may_use_every_core_and_states_nothing():
    placement = place_locally(config("scoring.num_threads=3"), 8)
    threads = {name: share.num_threads for name, share in placement.items()}
    assert threads == {"learner": 8, "rollout": 8, "sampler": 8, "corpus": 8, "teacher": 3, "replay": 1}
    assert total(placement, "num_cpus") == total(placement, "num_gpus") == 0


@pytest.mark.parametrize("num_cpus", [1, 2, 7, 64])
def test_in_lock_step_every_actor_has_all_threads_and_the_parts_fit_the_node(num_cpus: int):
    placement = place(node(num_cpus))
    assert placement["learner"].num_threads == placement["teacher"].num_threads == num_cpus
    assert num_cpus - 0.01 < total(placement, "num_cpus") <= num_cpus


def test_a_node_lends_no_more_threads_than_the_cores_of_its_machine():
    placement = place(node(num_cpus=64), num_cores=4)
    assert placement["learner"].num_threads == 4
    assert total(placement, "num_cpus") <= 4


def test_in_lock_step_the_largest_budget_is_what_the_run_takes():
    threads = ["learner.num_threads=2", "rollout.num_threads=4", "scoring.num_threads=1"]
    placement = place(node(), *threads)
    assert [placement[name].num_threads for name in ("learner", "rollout", "teacher")] == [2, 4, 1]
    assert total(placement, "num_cpus") == pytest.approx(4, abs=0.01)


def test_actors_that_work_at_the_same_time_state_their_threads_and_divide_the_rest():
    placement = place(node(), APART, "rollout.num_threads=3")
    assert (placement["rollout"].num_threads, placement["rollout"].num_cpus) == (3, 3)
    assert (placement["learner"].num_threads, placement["learner"].num_cpus) == (2, 2.5)
    assert placement["teacher"] == placement["learner"]


def test_two_cores_suffice_for_three_actors_at_the_same_time():
    placement = place(node(2), APART)
    assert all(share.num_threads == 1 for share in placement.values())
    assert total(placement, "num_cpus") <= 2


def test_a_proxy_is_a_scorer_of_its_own():
    assert total(place(node(), "recipe=ammd_blackbox"), "num_cpus") <= 8
    placement = place(node(8, 4), "recipe=ammd_blackbox", vllm_on_gpu=True)
    assert placement["proxy"].num_gpus == placement["teacher"].num_gpus == 1
    assert total(placement, "num_gpus") == 4


def test_gpus_go_to_the_learner_and_to_engines_that_compute_on_them():
    placement = place(node(8, 4), "scoring.tensor_parallel_size=2", vllm_on_gpu=True)
    assert [placement[name].num_gpus for name in ("learner", "rollout", "teacher", "replay")] == [1, 1, 2, 0]
    plain = ["rollout.engine=transformers", "scoring.engine=transformers"]
    assert total(place(node(8, 4), *plain, vllm_on_gpu=True), "num_gpus") == 1
    assert total(place(node(8, 4)), "num_gpus") == 1
    assert total(place(node(8, 4), "learner.device=cpu"), "num_gpus") == 0
    assert total(place(node(8, 0)), "num_gpus") == 0


def test_a_node_with_too_little_is_refused_with_the_numbers():
    line = refusal(node(4), APART, "rollout.num_threads=3", "scoring.num_threads=2")
    assert line.startswith("CPUs of the Ray node 10.0.0.1=4 must be >= 6, which the actors take")
    assert "(learner 1, rollout 3, teacher 2)" in line and "lower num_threads and replicas of learner" in line
    assert refusal(node(2), "rollout.num_threads=3").startswith(
        "CPUs of the Ray node 10.0.0.1=2 must be >= 3"
    )
    line = refusal(node(8, 1), vllm_on_gpu=True)
    assert line.startswith("GPUs of the Ray node 10.0.0.1=1 must be >= 3")
    assert "(learner 1, rollout 1, teacher 1)" in line
    assert "0 must be >= 1" in refusal(node(8), "learner.device=cuda")


def test_a_head_that_lends_no_cpus_is_refused_and_the_other_nodes_are_mentioned():
    line = refusal(node(0, num_others=3))
    assert "CPUs of the Ray node 10.0.0.1=0" in line and "the other nodes are not used yet" in line


def test_a_node_that_others_use_is_refused_with_what_is_free():
    line = refusal(node(8, free=2.5))
    assert line.startswith("free CPUs of the Ray node 10.0.0.1=2.5 must be >= ")
    assert "other jobs have 5.5 of 8; wait until they have ended" in line


def test_the_actors_read_their_threads_from_the_configuration():
    whole = config("rollout.num_threads=3", APART)
    placed = with_threads(whole, place_on_node(whole, 64, node(), vllm_on_gpu=False))
    assert (placed.learner.num_threads, placed.rollout.num_threads, placed.scoring.num_threads) == (2, 3, 2)


def test_the_description_names_what_is_taken():
    assert described(place(node(4, 1), "learner.num_threads=3")) == (
        "learner 1.3333 CPUs and 1 GPU, rollout 1.3333 CPUs, teacher 1.3333 CPUs"
    )
    assert described(place_locally(config(), 4)) == "no reserved CPUs"


def test_a_pool_does_not_grow_beyond_what_the_node_has_left():
    share = Share(num_threads=2, num_cpus=2.0)
    require_room(share, 2, node(8, free=4), "rollout")
    with pytest.raises(ConfigError, match=r"free CPUs of the Ray node 10.0.0.1: 3 more actors take 6 of 4"):
        require_room(share, 3, node(8, free=4), "rollout")
    with pytest.raises(ConfigError, match=r"free GPUs .*: 1 more actors take 1 of 0"):
        require_room(Share(num_threads=1, num_gpus=1), 1, node(8), "scoring")


@pytest.mark.parametrize(
    ("has_gpu", "vllm_on_gpu", "roles"),
    [
        (False, False, {"learner", "rollout", "teacher"}),
        (True, False, {"rollout", "teacher"}),
        (True, True, set()),
    ],
    ids=["no GPU", "learner on a GPU", "all on GPUs"],
)
def test_roles_on_the_cores(has_gpu: bool, vllm_on_gpu: bool, roles: set[str]):
    placement = place_locally(config("scoring.num_threads=3"), 8)
    threads = threads_on_cores(config(), placement, has_gpu=has_gpu, vllm_on_gpu=vllm_on_gpu)
    assert threads.keys() == roles
    assert all(threads[role] == placement[role].num_threads for role in roles)
