"""A training step captured once in a CUDA graph and launched as a whole from then on.

A step launches thousands of kernels; below some size of model the host takes longer to launch them
than the device to run them. A graph is one launch. It repeats the same kernels on the same
addresses, so a step that is to be captured reads its inputs from memory that stays in place, takes
no decision on the host and waits for nothing (`metro_ext.train_step`).

How it is done follows torch.cuda.graph: a few calls on a side stream before the capture let
libraries make their handles and workspaces; gradients are made anew inside the capture, from
memory that the graph keeps. The calls before the capture are steps of the run like any other, and
a capture runs nothing by itself: no step is lost or taken twice, and the run is the eager one.
"""

from collections.abc import Callable, Hashable

import torch

from metro_ext.errors import UserError

WARM_UP_STEPS = 3


def wanted(mode: str, device: torch.device, distributed: bool, compiled: bool) -> bool:
    """Whether a run captures its step.

    Args:
        mode: ``run.graph``: ``auto`` captures where nothing speaks against it.
        device: where the step runs.
        distributed: whether the process is one of a group; its collectives stay eager.
        compiled: whether the model goes through torch.compile.

    Raises:
        UserError: ``on`` where a step cannot be captured.
    """
    if mode == "off":
        return False
    obstacles = {
        f"a CUDA device, found run.device={device.type}": device.type != "cuda",
        "one process without a launcher": distributed,
        "run.compile=false": compiled,
    }
    needs = next((what for what, present in obstacles.items() if present), None)
    if needs is not None and mode == "on":
        raise UserError(f"run.graph is on, which needs {needs}; use --run.graph=auto")
    return needs is None


class GraphedStep:
    """Calls a step: eagerly at first, then as one graph.

    Args:
        step: takes no argument and returns nothing; reads and writes memory that stays in place,
            and synchronises with the device nowhere.
        device: the CUDA device it runs on.
        constants: gives what the step reads on the host; the graph has it built in, and is captured
            anew where it is no longer the same.
    """

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        constants: Callable[[], Hashable] = lambda: None,
    ):
        self._step, self._device, self._constants = step, device, constants
        self._captured: Hashable = None
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm_up_left = WARM_UP_STEPS

    def __call__(self) -> None:
        """One step, in the order of the current stream.

        Raises:
            UserError: the step could not be captured.
        """
        if self._warm_up_left > 0:
            self._warm_up_left -= 1
            self._run_aside()
            return
        constants = self._constants()
        if self._graph is None or self._captured != constants:
            self._graph = None  # gives its memory back before the next one takes some
            self._graph, self._captured = self._capture(), constants
        self._graph.replay()

    def _run_aside(self) -> None:
        """An eager step on the stream of the capture, between what stands before and after it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step()
        current.wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step()
        except RuntimeError as error:
            # torch chains what the step met before to what ending the capture met after it.
            reason = str(error.__context__ or error).strip().splitlines()[0]
            raise UserError(
                f"the training step could not be captured in a CUDA graph ({reason}); use "
                "--run.graph=off, which gives the same run by single launches"
            ) from error
        return graph
