"""Write shapes-bench as a file in the format of DPG-Bench's `dpg_bench.csv`.

python benchmarks/shapes_bench.py -o shapes_bench.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shapes.bench import items, to_csv

DESTINATION = Path(__file__).parent / "shapes" / "shapes_bench.csv"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=DESTINATION, help="default: the file in the repository")
    options = parser.parse_args()
    benchmark = items()
    options.output.write_text(to_csv(benchmark), encoding="utf-8")
    print(f"{len(benchmark)} prompts, {sum(len(i.propositions) for i in benchmark)} questions in {options.output}")
