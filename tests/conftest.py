"""What every test runs under: CPU, one thread, the CPU back end entered once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
