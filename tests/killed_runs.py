"""Start tiny runs in forked processes (torch is imported once) and kill them: `python killed_runs.py JSON`.

The JSON holds `yaml`, `mounted` (publish by verified copies, through the helper process, as on a mount) and `kills`:
seconds after which each run is killed with SIGKILL. Afterwards one run is left alone. Prints the exit code of it.
"""

import json
import os
import signal
import sys
import time

from axo_flash.checkpoints import session
from axo_flash.config import load_config
from axo_flash.train import train


def start(options: dict) -> int:
    """Fork a run; its pid."""
    pid = os.fork()
    if pid:
        return pid
    if options["mounted"]:
        session.place_of = lambda config: (os.path.abspath(config.output_dir), True)
    try:
        train(load_config(options["yaml"], options.get("overrides", [])))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def main() -> int:
    """Kill as many runs as were asked for; the exit code of the last."""
    options = json.loads(sys.argv[1])
    for seconds in options["kills"]:
        pid = start(options)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(os.waitpid(start(options), 0)[1])


if __name__ == "__main__":
    sys.exit(main())
