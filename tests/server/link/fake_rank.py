"""A process of a cluster that reads its config, then ends or stays, as the checkpoint's name says.

Run with a descriptor it is the engine, which stays.
"""

import pickle
import sys
import time

if len(sys.argv) > 1 or pickle.load(sys.stdin.buffer).model_path.name == "stays":
    time.sleep(1000)
