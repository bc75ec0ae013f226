"""How the failure of an actor reaches the driver, on every backend."""

from __future__ import annotations

from collections.abc import Iterable

from distill.errors import NO_VALUE, DistillError


class ActorFailed(DistillError, RuntimeError):
    """An actor raised an error, died, or did not answer in time."""

    code = "actor"

    @classmethod
    def raised(cls, actor: str, error: BaseException) -> DistillError:
        """The error for what an actor raised: a DistillError keeps its class and gains the actor's name."""
        cause = root_cause(error)
        if isinstance(cause, DistillError):
            return cause.within(actor)
        return cls(actor, NO_VALUE, f"finish its work; it raised {type(cause).__name__}: {cause}")


class ActorGone(ActorFailed):
    """An actor that died, or does not answer: nothing can be expected of it any more. Its heir may do better."""

    waited_s: float = 0.0
    """Seconds of a deadline that had to pass before the failure was noticed. Only the driver makes such errors."""

    @classmethod
    def died(cls, actor: str, cause: str, *, num_killed: int = 0) -> ActorGone:
        """The error for an actor whose process has ended. ``num_killed``: processes that were killed for lack of memory
        meanwhile, which the cause need not say."""
        if not num_killed:
            return cls(actor, NO_VALUE, f"live; it died ({cause})")
        processes = "a process" if num_killed == 1 else f"{num_killed} processes"
        return cls(
            actor, NO_VALUE, f"live; it died ({cause}), and {processes} of the container or machine ran out of memory",
            "give the run more memory, or lower kv_cache_gib, learner.micro_batch_tokens, replay.memory_bytes or replicas",
        )  # fmt: skip

    @classmethod
    def late(cls, actors: Iterable[str], timeout_s: float, *, logs: str = "") -> ActorGone:
        """The error for actors that have not answered in time. ``logs``: where those of the actors are."""
        return cls(
            ", ".join(sorted(actors)), NO_VALUE, f"answer within {timeout_s:.0f} s",
            "raise cluster.start_timeout_s" + (f", or read the actors' logs under {logs}" if logs else ""),
        )._after(timeout_s)  # fmt: skip

    @classmethod
    def silent(cls, actor: str, timeout_s: float, setting: str) -> ActorGone:
        """The error for an actor that does not answer a question that costs it little. ``setting``: the limit's name."""
        remedy = f"raise {setting} if it is only slow, or look at what holds it up"
        return cls(actor, NO_VALUE, f"answer within {timeout_s:g} s", remedy)._after(timeout_s)

    @classmethod
    def stalled(cls, actor: str, seconds: float, timeout_s: float) -> ActorGone:
        """The error for an actor that has work and finishes none of it."""
        return cls(
            actor, NO_VALUE,
            f"finish some of its work within cluster.stall_timeout_s={timeout_s:g} (it has been silent for {seconds:.0f} s)",
            "raise the limit if its work takes so long, or look at what its engine does",
        )._after(timeout_s)  # fmt: skip

    def _after(self, seconds: float) -> ActorGone:
        self.waited_s = seconds
        return self


class BackendEnded(ActorFailed):
    """What runs the actors has ended, so that no heir of any of them can start."""

    @classmethod
    def process(cls, name: str, pid: int) -> BackendEnded:
        """The error for a process of a local Ray. ``name``: its program."""
        return cls(
            "Ray", NO_VALUE, f"live; its process {name} ({pid}) has ended, and no actor can start without it",
            "look at what ended it (too little memory is a common cause), and resume the run",
        )  # fmt: skip

    @classmethod
    def stopped(cls, name: str, pid: int, seconds: float) -> BackendEnded:
        """The error for a process of a local Ray that the system does not run. ``name``: its program."""
        return cls(
            "Ray", NO_VALUE,
            f"live; its process {name} ({pid}) has stood still for {seconds:.0f} s, and no actor can start without it",
            "resume the run",
        )  # fmt: skip


def root_cause(error: BaseException) -> BaseException:
    """The first failure inside exception groups and Ray's wrappers, which have it as ``cause``."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(cause := getattr(error, "cause", None), BaseException):
            error = cause
        else:
            return error
