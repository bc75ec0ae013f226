"""Fixtures of the engine contract: two students, and engines that all of its tests share. And of Rays in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.engines import (
    GENERATORS,
    MAX_MODEL_TOKENS,
    TEACHERS,
    EngineHost,
    GeneratorHost,
    Student,
)


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Student]:
    """One student whose vocabulary head is its embedding, and one with a separate head."""
    return {
        "tied": Student(tmp_path_factory.mktemp("tied"), tied=True),
        "untied": Student(tmp_path_factory.mktemp("untied"), tied=False),
    }


@pytest.fixture(scope="session")
def student(students: dict[str, Student]) -> Student:
    return students["tied"]


@pytest.fixture(scope="session")
def generators() -> Iterator[dict[str, GeneratorHost]]:
    hosts: dict[str, GeneratorHost] = {}
    yield hosts
    for host in hosts.values():
        host.close()


@pytest.fixture(params=GENERATORS)
def generator(
    request: pytest.FixtureRequest, students: dict[str, Student], generators: dict[str, GeneratorHost]
) -> GeneratorHost:
    """One engine per kind for all tests; a new one starts after a test that has ended it."""
    kind = request.param
    if kind not in generators or not generators[kind].process.is_alive():
        generators[kind] = GeneratorHost(kind, students)
        assert generators[kind].call("policy_version") == 0
    return generators[kind]


@pytest.fixture(scope="session", params=TEACHERS)
def teacher(request: pytest.FixtureRequest, student: Student) -> Iterator[EngineHost]:
    class_path, settings = TEACHERS[request.param]
    host = EngineHost(class_path, str(student.folder), settings, max_model_tokens=MAX_MODEL_TOKENS)
    yield host
    host.close()


@pytest.fixture(scope="module")
def no_tokens() -> Iterator[None]:
    """For every module that connects its own process to a Ray: Ray reads once per process whether it uses tokens, and
    a local Ray would turn them on, so that the Rays of later modules would not hear this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield
