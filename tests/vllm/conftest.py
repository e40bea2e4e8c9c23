import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# The double of a GPU is there.
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
