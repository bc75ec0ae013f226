"""vLLM behind the protocols Generator and Teacher.

Only this package and :mod:`learner.process.publish` import vLLM. Importing the generator or the teacher is
cheap: they import vLLM when an engine starts, after they have set the environment variables that vLLM and
torch read at import. One process contains one engine.

The tests exercise everything here on a CPU, pushes through shared memory included. The GPU paths
(``device="cuda"``, and the nccl and ipc backends of ``VllmGenerator``) are written against vLLM's interface
and have not run on a GPU.
"""
