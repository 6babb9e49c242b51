"""The attention benchmark whose figures the README shows: every case, into results/attention_<gpu>.csv and .png.

python scripts/bench/attention.py [--commit $(git rev-parse --short HEAD)] [--fa3 DIR] [--backends hopper triton fa3 ...]
python scripts/bench/attention.py --table scripts/bench/results/attention_h100.csv

--fa3: where `python scripts/bench/fa3.py DIR` has put FlashAttention-3, if its own package is not installed.
"""

import argparse
from pathlib import Path

import torch

from axo_flash.bench import bench, dense_cases, model_cases, packed_cases, plot, read_csv, short_name, table, write_csv
from fa3 import load


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="")
    parser.add_argument("--fa3", type=Path, metavar="DIR")
    parser.add_argument("--backends", nargs="+", help="default: all that are to be had")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print (and draw anew) stored results")
    args = parser.parse_args()
    if args.table:
        results = read_csv(args.table)
        plot(results, args.table.with_suffix(".png"))
    else:
        if args.fa3:
            load(args.fa3)
        results = []
        for case in (
            *packed_cases(),
            *model_cases(),
            *dense_cases((1024, 2048, 4096, 8192, 16384), (128,)),
            *dense_cases((1024, 4096, 16384), (64,)),
        ):
            results += bench([case], backends=args.backends, commit=args.commit)
            # after every case, as a rented GPU may be gone before the last one
            write_csv(results, args.out / f"attention_{short_name(torch.cuda.get_device_name())}.csv")
    print(table(results))


if __name__ == "__main__":
    main()
