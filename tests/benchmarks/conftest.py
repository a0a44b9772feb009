import sys
from pathlib import Path

# As for a script that is run from there.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
