"""The attention benchmark whose figures the README shows: every dense case, into results/attention_<gpu>.csv and .png.

python scripts/bench/attention.py [--commit $(git rev-parse --short HEAD)] [--out scripts/bench/results]
python scripts/bench/attention.py --table scripts/bench/results/attention_h100.csv
"""

import argparse
from pathlib import Path

import torch

from axo_flash.bench import bench, dense_cases, plot, read_csv, table, write_csv


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print (and draw anew) stored results")
    args = parser.parse_args()
    if args.table:
        results = read_csv(args.table)
        plot(results, args.table.with_suffix(".png"))
    else:
        results = bench(dense_cases(), commit=args.commit)
        gpu = next(word for word in torch.cuda.get_device_name().lower().split() if any(c.isdigit() for c in word))
        write_csv(results, args.out / f"attention_{gpu}.csv")
    print(table(results))


if __name__ == "__main__":
    main()
