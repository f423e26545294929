"""A rank that goes on and on, without torch, until the file that is its argument says which rank hangs."""

import os
import sys
import time
from pathlib import Path

hangs, rank = Path(sys.argv[-1]), os.environ["RANK"]
print(f"rank {rank} is there", flush=True)
while not (hangs.exists() and hangs.read_text() == rank):
    Path(os.environ["MOSAICBERT_HEARTBEATS"], rank).touch()
    time.sleep(0.05)  # a step
time.sleep(3600)
