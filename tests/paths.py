"""Where the checkout is; the package itself knows nothing of it."""

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent
