"""Run Axolotl on several YAML files one after another in this process: `python run_configs.py a.yml b.yml ...`.

Axolotl's imports take longer than a tiny run. Its own programs run one YAML a process; each run here gets the same seed,
and what it prints stands between two marker lines, the second of which holds the error it ended with, if any.
"""

import sys

MARK = "--- run_configs"

if __name__ == "__main__":
    from axolotl.cli.train import do_cli
    from transformers import set_seed

    paths, sys.argv[1:] = sys.argv[1:], []  # Axolotl parses the command line too
    for path in paths:
        print(f"\n{MARK} begins {path}", flush=True)
        set_seed(0)  # Axolotl's `seed` does not reach the adapter's initialisation
        try:
            do_cli(path)
            ended = "well"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"\n{MARK} ends {ended}", flush=True)
