"""A process that tokenises one shard after another while the trainer trains: pickled jobs come by stdin, answers go by
stdout.

It is started anew, not forked: a fork of a process that has started CUDA may hang, and a thread would take the trainer's
time. It ends when its stdin does, so it does not outlive the trainer, however that died.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from axo_flash.data.files import DataError
from axo_flash.data.prepared import Origin, make_set

if TYPE_CHECKING:
    from axo_flash.config import Config
    from axo_flash.data.formats import RowEncoder


class Tokeniser:
    """The trainer's end. `make` blocks; it is for one thread at a time, `close` for any."""

    def __init__(self, config: Config, encoders: list[RowEncoder]):
        # the cwd may lie on a mount; modules are found where this process finds them; a GPU has nothing to do there
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env=environment, start_new_session=True,
        )  # fmt: skip
        self._settings: tuple[Config, list[RowEncoder]] | None = (config, encoders)

    def make(self, origins: list[Origin], work: Path) -> None:
        """`make_set` of these files into `work`/set. Raises DataError."""
        try:
            if self._settings is not None:
                pickle.dump(self._settings, self._process.stdin)
                self._settings = None
            pickle.dump((origins, work), self._process.stdin)
            self._process.stdin.flush()
            problem = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise DataError(
                f"the process that tokenises {', '.join(origin.name for origin in origins)} ended with exit code "
                f"{self._process.wait()} (-9: killed, often for want of memory). Its own messages stand above; with less "
                "memory, set a smaller dataset_num_proc, or cut the data into smaller shards."
            ) from error
        if problem is not None:
            raise problem

    def close(self) -> None:
        """End it, with the processes that it started, whatever it is at."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was still in its buffer has nobody to read it
                pipe.close()


def serve() -> None:
    """Tokenise until stdin ends. A problem is an answer too: a DataError as it is, a mistake as its traceback."""
    import datasets

    datasets.disable_progress_bars()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    try:
        config, encoders = pickle.load(sys.stdin.buffer)
        while True:
            origins, work = pickle.load(sys.stdin.buffer)
            pickle.dump(_problem(config, encoders, origins, work), answers)
            answers.flush()
    except (EOFError, BrokenPipeError):  # the trainer has ended, or has no more to do
        return


def _problem(config: Config, encoders: list[RowEncoder], origins: list[Origin], work: Path) -> Exception | None:
    try:
        make_set(config, encoders, origins, work)
    except DataError as error:
        return DataError(str(error))
    except OSError as error:  # the local disk
        return DataError(f"{', '.join(origin.name for origin in origins)} cannot be tokenised in {work}: {error}.")
    except Exception:  # raised in the trainer
        return RuntimeError(
            f"tokenising {', '.join(origin.name for origin in origins)} failed:\n{traceback.format_exc()}"
        )
    return None
